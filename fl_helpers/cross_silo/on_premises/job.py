"""A run as the engine is told of it: names and numbers in `run.json`, and the model.

Written at the coordinator, read by the controller and by each silo's executor. The
classes are named, not imported: a job brings no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from safetensors import safe_open
from safetensors.torch import save_file

from fl_helpers.cross_silo.federation import SHAPES
from fl_helpers.cross_silo.on_premises.refusals import Refusal
from fl_helpers.cross_silo.on_premises.site import (
    CLASSES,
    CONFIG,
    CONTROLLERS,
    INITIAL,
    RUN,
    site_name,
)
from fl_helpers.cross_silo.run import SMALLEST_SET, Run, from_plain, to_plain
from fl_helpers.simulation import Params

SILO = SHAPES["silos[].name"]
TASKS = ["train", "evaluate", "keys", "examples", "open"]  # the last of secure runs
# Seconds without progress before a transfer begins anew, see `site.LINE`. So long does
# a silo wait, too, for a reply that was lost on its way.
CUT = 120
SHORT_CUT = 20  # for a model below SMALL, which is sooner sent again than waited for
SMALL = 10**6  # bytes
SOON = 0.1  # seconds after which a silo without work asks again, at first
DAY = 86_400  # seconds; a silo that is away is for deadline and quorum to judge
MAY_CHANGE = (  # of a run that is resumed
    *("rounds", "quorum", "deadline", "stop"),
    "wait_for_quorum",
)


@dataclass(frozen=True)
class Job:
    """What a process of the engine knows of its run.

    id: the same for a run that is started again. silos: names, by NVFlare's names of
    their sites. run: its params without content, these are in `initial`; in an
    analysis, `analyses.Analysis`.
    """

    id: str
    silos: Mapping[str, str]
    run: Any
    folder: Path

    def initial(self, names: Iterable[str]) -> Params:
        """Entries of the initial model, no others are read."""
        with safe_open(self.folder / INITIAL, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}


def read_job(
    fl_ctx: FLContext, key: str = "run", read: Callable[[Any], Any] = from_plain
) -> Job:
    """The job of this process. Raises Refusal for one that is not of the agreed form:
    its names become those of folders, and its numbers are used.

    key, read: where in its file the run is, and what makes it of plain values."""
    workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
    folder = Path(workspace.get_app_dir(fl_ctx.get_job_id())) / CONFIG
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if not re.fullmatch("[0-9a-f]{32}", found["id"]):
            raise ValueError("the id of a run has 32 hexadecimal digits")
        for site, silo in found["silos"].items():
            if not re.fullmatch(SILO, silo, re.ASCII) or site != site_name(silo):
                raise ValueError(f"the name of a silo must match {SILO}, got {silo!r}")
        return Job(found["id"], found["silos"], read(found[key]), folder)
    except Exception as error:
        raise Refusal("JOB_REFUSED", f"{folder / RUN}: {error!r}") from error


def round_of(message: Mapping[str, Any]) -> int:
    """The round that a task says it is of; it names files, too."""
    index = message.get("round")
    if type(index) is not int or not 0 <= index < 10**6:
        raise Refusal("JOB_REFUSED", f"a task of round {index!r}")
    return index


def write_job(run: Run, jobs: Path, silos: Collection[str]) -> Path:
    """Write a folder for the engine, below jobs; returns it.

    Raises ValueError for a quorum that the silos cannot reach, and for a name that
    another run had.
    """
    quorum = max(run.quorum or len(silos), SMALLEST_SET if run.secure else 1)
    if quorum > len(silos):
        raise ValueError(f"quorum {quorum}, but there are {len(silos)} silos")
    app = jobs / run.name / "app" / CONFIG
    app.mkdir(parents=True, exist_ok=True)
    save_file(dict(run.params), app / INITIAL)
    digest = hashlib.sha256((app / INITIAL).read_bytes()).hexdigest()
    sites = {site_name(silo): silo for silo in silos}
    content = {"run": to_plain(run), "silos": sites, "initial": digest}
    _write(app / RUN, {"id": run_id(app / RUN, content), **content})
    size = sum(run.params[name].nbytes for name in run.shared)
    parts = CONTROLLERS[run.secure], CLASSES[0], TASKS, size
    folder = write_parts(app, quorum, *parts)
    return _without_model(folder, run, sites)


def _without_model(folder: Path, run: Run, sites: Iterable[str]) -> Path:
    """Let the silos get the job without the model, which comes with each round: the
    engine gives a silo ten seconds to take a job, and a slow line needs more."""
    own = folder / "site"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(folder / "app", own, ignore=shutil.ignore_patterns(INITIAL))
    kept = {name: run.params[name] for name in run.params if name in run.keep_local}
    save_file(kept, own / CONFIG / INITIAL)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    places = {"app": ["server"], own.name: sorted(sites)}
    _write(folder / "meta.json", meta | {"deploy_map": places})
    return folder


def write_parts(
    app: Path,
    quorum: int,
    controller: str,
    executor: str,
    tasks: Collection[str],
    size: int = 0,
) -> Path:
    """What the engine is told of a job: the classes and tasks; returns its folder.

    size: bytes of the model that travels.
    """
    folder = app.parents[1]
    about = {"name": folder.name, "resource_spec": {}, "min_clients": quorum}
    _write(folder / "meta.json", about | {"deploy_map": {"app": ["@ALL"]}})
    empty = ("components", "task_data_filters", "task_result_filters")
    base = {"format_version": 2, **{key: [] for key in empty}}
    rounds = {"id": "rounds", "path": controller, "args": {}}
    poll = {"task_request_interval": SOON}  # by default 2 s
    server = base | {"workflows": [rounds], "server": poll}
    server["dead_client_grace_period"] = DAY  # by default the job ends after a minute
    _write(app / "config_fed_server.json", server)
    work = [{"tasks": [*tasks], "executor": {"path": executor, "args": {}}}]
    client = base | {"executors": work}
    cut = SHORT_CUT if size < SMALL else CUT
    client |= {"get_task_timeout": cut, "submit_task_result_timeout": cut}
    _write(app / "config_fed_client.json", client)
    return folder


def run_id(path: Path, content: Mapping[str, Any]) -> str:
    """The id of a run that was started before with the same content, or a new one."""
    if not path.exists():
        return uuid.uuid4().hex
    kept = json.loads(path.read_text(encoding="utf-8"))
    before, now = ({**c["run"], **c} for c in (kept, json.loads(json.dumps(content))))
    compared = now.keys() - {"run", *MAY_CHANGE}
    if differ := sorted(k for k in compared if before.get(k) != now[k]):
        raise ValueError(
            f"run {now['name']!r} was started before with another {differ}; give this "
            "one another name"
        )
    return kept["id"]


def _write(path: Path, content: Any) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
