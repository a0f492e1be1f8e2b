"""The code of a run's jobs, as it is uploaded, and the environments that it runs in."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from fl_helpers.cross_silo.azure_ml import start
from fl_helpers.cross_silo.federation import Federation
from fl_helpers.cross_silo.run import Run, to_plain

HERE = Path(__file__).resolve().parent
JOBS, PACKAGE = HERE / "jobs", HERE.parents[1]
# What Azure ML took for `latest` on 25 September 2026, by the record of a build in
# github.com/nathernandez1189/reservaiq-azure-ml, azure/environment-lock.json.
IMAGE = (
    "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04@sha256:"
    "7481fbfbbc1c7d7ab0e9e4633180c809413bd77e108b605d6e4d3a60aa35bf67"
)
MLFLOW = ["azureml-mlflow==1.62.0.post6", "mlflow-skinny==3.15.0"]  # not in a silo
CHANNELS = ("conda-forge", "nodefaults")
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


def write_snapshots(
    run: Run, federation: Federation, folder: str | Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Write what is uploaded: `code/silo` and `code/orchestrator` in folder.

    Each holds `start.py`, the scripts of its jobs, the files of `fl_helpers`,
    `run.json` and the list of all these. The silos' also has the files of the client
    and of what prepares the data, the orchestrator's the initial model. Returns the
    folders and their digests.
    """
    code, own = Path(folder).resolve() / "code", set[Path]()
    content = {"run": to_plain(run)}
    content["silos"] = {s.azure_ml.key: s.name for s in federation.silos}
    for key in ("client", "prepare"):
        content[key] = entry = getattr(federation.azure_ml, key)
        path, _, name = entry.rpartition(":")
        if path.endswith(".py"):
            own.add(Path(path).resolve())
            content[key] = f"{Path(path).name}:{name}"
    for part, scripts in start.SCRIPTS.items():
        _copy(code / part, scripts, own if part == "silo" else ())
        text = json.dumps(content, indent=1) + "\n"
        (code / part / "run.json").write_text(text, encoding="utf-8")
    whole = {name: value.contiguous() for name, value in run.params.items()}
    save_file(whole, code / "orchestrator" / "initial.safetensors")
    folders = {part: code / part for part in start.SCRIPTS}
    return folders, {part: start.write_files(path) for part, path in folders.items()}


def _copy(target: Path, scripts: tuple[str, ...], own: Any) -> None:
    shutil.rmtree(target, ignore_errors=True)
    files = {name: JOBS / name for name in ("common.py", *(f"{s}.py" for s in scripts))}
    files |= {"start.py": HERE / "start.py"}
    for path in own:
        if path.name in {*files, "fl_helpers", "run.json"}:
            raise ValueError(f"{path.name} is the name of another file; rename it")
        files[path.name] = path
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("cross_silo/*.py")]:
        files[f"fl_helpers/{path.relative_to(PACKAGE)}"] = path
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def environments(federation: Federation) -> dict[str, Any]:
    """What jobs run in, by the snapshot that they run: a registered environment's name
    and version, or {"image", "conda"}. Only the orchestrator's has MLflow."""
    named = federation.azure_ml.environment
    if named:
        one = {"image": named} if "@sha256:" in named else named
        return dict.fromkeys(start.SCRIPTS, one)
    conda = yaml.safe_load((JOBS / "conda.yaml").read_text(encoding="utf-8"))
    check_packages(conda)
    image = federation.azure_ml.base_image or IMAGE
    *first, last = conda["dependencies"]
    tracked = conda | {"dependencies": [*first, {"pip": [*last["pip"], *MLFLOW]}]}
    return {
        "silo": {"image": image, "conda": conda},
        "orchestrator": {"image": image, "conda": tracked},
    }


def check_packages(conda: Mapping[str, Any]) -> None:
    """ValueError unless a conda file has exact versions from known channels only."""
    if not {"channels", "dependencies"} <= conda.keys() <= {
        *("name", "channels", "dependencies")
    } or not set(conda["channels"]) <= set(CHANNELS):
        raise ValueError(f"name, dependencies and channels of {CHANNELS}, got {conda}")
    for item in conda["dependencies"]:
        lines, sign = ([item], "=") if type(item) is str else (item["pip"], "==")
        for line in lines:
            exact = re.fullmatch(rf"[A-Za-z0-9][\w.-]*{sign}\d+(\.\w+)*(\+\w+)?", line)
            if not exact and not (sign == "==" and line == INDEX):
                raise ValueError(f"{line!r} must be a package{sign}version, no other")
