"""The `Ask` of a real run: a question goes to the hospitals, and their sums come back.

`asking` starts a run without a model and yields an `Ask`. Its process puts a question
into the server's kit, `QuestionController` sends it, `QuestionExecutor` answers at each
hospital, and what passed all checks is added up as `analysis.ask_silos` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from safetensors.numpy import load_file, save_file

from fl_helpers.analysis import Arrays, add_answers
from fl_helpers.cross_silo import turn
from fl_helpers.cross_silo.on_premises import job, runs
from fl_helpers.cross_silo.on_premises.controller import RoundController
from fl_helpers.cross_silo.on_premises.executor import TaskExecutor
from fl_helpers.cross_silo.on_premises.gate import Sums
from fl_helpers.cross_silo.on_premises.line import Line, Patience
from fl_helpers.cross_silo.on_premises.questions import (
    ANSWER,
    Denied,
    Question,
    answer,
    expected_of,
    read_rules,
)
from fl_helpers.cross_silo.on_premises.record import Record
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.on_premises.site import (
    ANALYSES,
    ANSWERS,
    read_site,
    site_name,
)

PLACE, TASK, END = "analyses", "ask", "end"
CODE = "the site answered "  # how the controller says which code came


@dataclass(frozen=True)
class Analysis:
    """A run that asks questions.

    name: of its folder, `analyses/<name>` in the server's kit. quorum: silos that an
    answer needs; None is all. deadline: seconds for an answer. idle: seconds without a
    question after which the run ends by itself. Raises ValueError for other values.
    """

    name: str
    quorum: int | None = None
    deadline: int = 60
    idle: int = 1800
    wait_for_quorum = 0  # as `run.Run` has it: an analysis does not wait

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", self.name):
            raise ValueError(
                f"name must be letters, digits, _ and -, got {self.name!r}"
            )
        numbers = self.quorum or 1, self.deadline, self.idle
        if any(type(n) is not int or n < 1 for n in numbers) or self.quorum == 0:
            raise ValueError(f"quorum, deadline, idle: integers >= 1, got {numbers}")


class QuestionRefused(RunError):
    """Too few silos answered a question; `codes` says what the others sent, by silo."""

    def __init__(self, function: str, codes: Mapping[str, str], quorum: int) -> None:
        super().__init__(
            f"{function} was not answered by {dict(codes)}, {quorum} silos are needed; "
            "ask about(silos=...) those that do answer, or look into the others' logs"
        )
        self.codes = dict(codes)


class EngineAsk:
    """An `analysis.Ask` of silos that are processes.

    With a quorum below all silos, its first question decides who takes part; whoever
    did has to answer the next ones, too, so that no fit mixes sums of other patients.
    `left_out` says who does not, and the code that came. `about` makes a new one.
    """

    def __init__(
        self,
        box: Path,
        events: Iterator[dict[str, Any]],
        silos: Collection[str],
        quorum: int,
    ) -> None:
        self.box, self.events = box, events
        self.silos, self.quorum = tuple(sorted(silos)), quorum
        self.left_out: dict[str, str] = {}
        self.asked, self.table = False, ""
        self.where: dict[str, Any] = {}

    def about(
        self,
        *,
        table: str = "",
        where: Mapping[str, tuple[float | None, float | None]] | None = None,
        silos: Collection[str] | None = None,
    ) -> EngineAsk:
        """An `Ask` about another table, a cohort, or of fewer silos.

        table: a name that the hospitals' `Tables` have; "" is that of the function's
        module. where: {column: (lowest, highest)}, None for no limit.
        silos: some of those here; the quorum is then no more than their number.
        Raises ValueError for others, and for none.
        """
        chosen = self.silos if silos is None else silos
        if {*chosen} - {*self.silos} or not chosen:
            raise ValueError(f"silos must be of {list(self.silos)}, got {[*chosen]}")
        quorum = self.quorum if silos is None else min(self.quorum, len({*chosen}))
        made = EngineAsk(self.box, self.events, {*chosen}, quorum)
        made.table, made.where = table, dict(where or {})
        return made

    def __call__(self, function: Callable[..., Any], **settings: Any) -> Arrays:
        """The sums over silos; raises QuestionRefused, and RunError if the run ends."""
        answers = self.each(function, **settings)
        return add_answers((silo, answers[silo]) for silo in sorted(answers))

    def each(self, function: Callable[..., Any], **settings: Any) -> dict[str, Arrays]:
        """{silo: its own answer}, in the order of names."""
        name = f"{function.__module__}:{function.__name__}"
        question = Question(name, plain(settings), self.table, plain(self.where))
        event = self._send(question)
        answers = self._read(event, name)
        codes = {k: v for k, v in event["codes"].items() if k in self.silos}
        left = [silo for silo in self.silos if silo not in codes]
        if codes and (self.asked or len(left) < self.quorum):
            raise QuestionRefused(
                name, codes, len(self.silos) if self.asked else self.quorum
            )
        self.asked, self.silos = True, tuple(left)
        self.left_out |= codes
        return answers

    def _send(self, question: Question) -> dict[str, Any]:
        """Put a question into the server's box; what the server says of it."""
        number = 1 + sum(1 for _ in self.box.glob("*.json"))
        path = self.box / f"{number:06d}.json"
        content = {"silos": self.silos, "question": question.text()}
        path.with_suffix(".tmp").write_text(json.dumps(content))
        os.replace(path.with_suffix(".tmp"), path)
        for event in self.events:
            if event["event"] == "answered" and event["question"] == number:
                return event
        raise RunError("the analysis is over: no question came for a long time")

    def _read(self, event: Mapping[str, Any], name: str) -> dict[str, Arrays]:
        folder = self.box / f"{event['question']:06d}"
        found = {}
        for silo in event["silos"]:
            arrays = load_file(folder / f"{site_name(silo)}.safetensors")
            found[silo] = {key[len(name) + 1 :]: arrays[key] for key in arrays}
        shutil.rmtree(folder, ignore_errors=True)
        return found


def plain(value: Any) -> Any:
    """Settings as JSON takes them: arrays and tuples as lists, numbers as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def asking(
    analysis: Analysis,
    session: Any,
    *,
    silos: Collection[str],
    server_kit: Path,
    jobs: Path,
    check: Callable[[], None] = lambda: None,
    timeout: float = 86_400,
) -> Iterator[EngineAsk]:
    """Start a run of questions and yield its `Ask`; the run ends with the block.

    session: of NVFlare's `new_secure_session`.
    silos: names of those that are asked.
    server_kit: the server's; questions and answers pass through it.
    jobs: a folder for what the engine is told.
    check: called again and again; raises if the run should end.
    timeout: seconds for the whole run.

    Raises ValueError for a quorum that the silos cannot reach, RunError as `runs.play`.
    """
    folder = write_analysis(analysis, jobs.resolve(), silos)
    content = json.loads((folder / "app" / job.CONFIG / job.RUN).read_text())
    record = server_kit / PLACE / analysis.name
    line = Line(session, Patience())
    watch = runs.Watch(analysis, line, [*silos], record, check)
    watch.end = time.monotonic() + timeout
    events = _events(watch, folder)
    box = record / content["id"]
    box.mkdir(parents=True)
    try:
        while next(events)["event"] != "start":  # then the engine has begun
            pass
        yield EngineAsk(box, events, silos, analysis.quorum or len(silos))
        (box / END).touch()
        for _ in events:
            pass
    except runs.GivenUp as error:
        raise RunError(f"analysis {analysis.name!r} ended as {error}") from None
    finally:
        events.close()  # aborts the run if it is not over


def _events(watch: Any, folder: Path) -> Iterator[dict[str, Any]]:
    yield from watch.submit(folder)
    yield from watch.follow()


def write_analysis(analysis: Analysis, jobs: Path, silos: Collection[str]) -> Path:
    """Write a folder for the engine, below jobs; returns it."""
    quorum = analysis.quorum or len(silos)
    if quorum > len(silos):
        raise ValueError(f"quorum {quorum}, but there are {len(silos)} silos")
    app = jobs / analysis.name / "app" / job.CONFIG
    app.mkdir(parents=True, exist_ok=True)
    sites = {site_name(silo): silo for silo in silos}
    content = {"id": uuid.uuid4().hex, "silos": sites, "analysis": asdict(analysis)}
    (app / job.RUN).write_text(json.dumps(content), encoding="utf-8")
    return job.write_parts(app, quorum, ANALYSES, ANSWERS, [TASK])


# -- at the server


class QuestionController(RoundController):
    """Sends the questions that lie in its box, one after the other; an answer that is
    not one costs its silo's only. Writes into `analyses/<name>/` of the server's kit.
    """

    def start_controller(self, fl_ctx: FLContext) -> None:
        self.communicator._task_check_period = 0.02  # seconds
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        folder = Path(workspace.get_app_dir(fl_ctx.get_job_id())) / job.CONFIG
        found = json.loads((folder / job.RUN).read_text(encoding="utf-8"))
        analysis = Analysis(**found["analysis"])
        self.job = job.Job(found["id"], found["silos"], analysis, folder)
        self.record = Record(Path(workspace.get_root_dir(), PLACE, analysis.name))
        self.function = ""  # of the question that is asked now

    def _play(self) -> None:
        self.record.event("start")
        box, number, since = self.record.folder / self.job.id, 1, time.monotonic()
        while time.monotonic() - since < self.job.run.idle:
            path = box / f"{number:06d}.json"
            if path.exists():
                self._put(number, **json.loads(path.read_text(encoding="utf-8")))
                number, since = number + 1, time.monotonic()
            elif (box / END).exists():
                break
            if self.abort.triggered:
                raise RuntimeError("the run was aborted")
            time.sleep(0.01)
        self.record.event("done", questions=number - 1)

    def _put(self, number: int, silos: list[str], question: str) -> None:
        """Send one question; its answers lie in the box before the event says so."""
        self.function = json.loads(question)["function"]
        sites = [site for site, silo in sorted(self.job.silos.items()) if silo in silos]
        answers = self._send(TASK, number, sites, Shareable({"question": question}))
        folder = self.record.folder / self.job.id / f"{number:06d}"
        folder.mkdir()
        for silo, update in answers.updates.items():
            arrays = {name: value.numpy() for name, value in update.params.items()}
            save_file(arrays, folder / f"{site_name(silo)}.safetensors")
        came = sorted(answers.updates)
        said = {silo: answers.refused.get(silo, "MISSING") for silo in silos}
        codes = {k: v.removeprefix(CODE) for k, v in said.items() if k not in came}
        self.record.event("answered", question=number, silos=came, codes=codes)

    def _take(self, task: str, message: Shareable, silo: str, index: int) -> Any:
        expected = expected_of(message.get("layout"), self.function)
        return self._read(message, silo, index, expected, ANSWER)


# -- at a hospital


class QuestionExecutor(TaskExecutor):
    """Answers the task "ask" with `Sums`, by the hospital's rules, see `questions`."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: turn.Tables | None = None

    def result(
        self, task: str, message: Shareable, kit: Path, context: FLContext
    ) -> Sums:
        site, _ = read_site(kit), read_rules(kit)
        if not site.tables:
            raise Denied("local/site.json names no function `tables`")
        if self.tables is None:
            self.tables = turn.load_function(site.tables)(Path(site.data))
        text, number = message.get("question"), message.get("round")
        return answer(kit, site.silo, self.tables, text, number)
