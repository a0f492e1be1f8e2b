"""Starts the script of a job, after a look at the code that lies beside it.

    python -B start.py SHA256 train.py --round 0 ...

No other file is run, and no data are touched, unless this folder is the one that was
signed. A silo's script finds no tokens, keys or addresses of Azure ML in its
environment. Copied into each code snapshot; standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

FILES = "files.json"  # what is in a snapshot: {name: SHA-256}; its own is the digest
SCRIPTS = {
    "silo": ("prepare", "book", "train", "evaluate"),
    "orchestrator": ("initial", "aggregate", "collect"),
}
AGAIN = "PYTHON_STARTED_AGAIN"
OF_THE_SERVICE = ("logs", "outputs", "user_logs", "system_logs", "azureml-logs")
KEPT = re.compile(  # what training needs; all else may say where a run is tracked
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|PYTHON\w+|CONDA_\w+|OMP_\w+|"
    r"MKL_\w+|OPENBLAS_\w+|CUDA_\w+|NVIDIA_\w+|NCCL_\w+|(LOCAL_|GROUP_|NODE_)?RANK|"
    r"(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)


def write_files(folder: Path) -> str:
    """List what is in a snapshot; returns its digest."""
    found = {
        name: _sha256(folder / name) for name in sorted(_names(folder)) if name != FILES
    }
    (folder / FILES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return _sha256(folder / FILES)


def verify(folder: Path, digest: str, *, exactly: bool = False) -> None:
    """Raise ValueError unless a folder is the snapshot with this digest.

    Beside its files there may be nothing that Python could import, and no link. The
    service puts folders of its own there; exactly: there may be nothing at all.
    """
    listed = folder / FILES
    if listed.is_symlink() or not listed.is_file() or _sha256(listed) != digest:
        raise ValueError(f"{folder} is not the code with the digest {digest}")
    files = json.loads(listed.read_text(encoding="utf-8"))
    found = set(_names(folder)) - {FILES}
    wrong = [n for n in files if n not in found or _sha256(folder / n) != files[n]]
    others = sorted(found - files.keys())
    if not exactly:
        others = [name for name in others if not _is_harmless(folder / name, folder)]
    if wrong or others:
        raise ValueError(
            f"{folder} is not the code that was signed: {wrong[:3]} differ, "
            f"{others[:3]} were added; build and sign the plan anew"
        )


def _names(folder: Path) -> Iterator[str]:
    """All but folders, by their paths; links are not followed."""
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        for name in (*files, *links):
            yield Path(path, name).relative_to(folder).as_posix()


def _is_harmless(path: Path, folder: Path) -> bool:
    of_the_service = path.relative_to(folder).parts[0] in OF_THE_SERVICE
    plain = path.suffix in (".txt", ".log", ".json", ".yaml", ".yml")
    return of_the_service or (plain and path.is_file() and not path.is_symlink())


def _sha256(path: Path) -> str:
    return "" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Verify, and become the script."""
    here, (digest, script, *rest) = Path(__file__).resolve().parent, sys.argv[1:]
    if Path(script).stem in SCRIPTS["silo"]:
        clean = {k: v for k, v in os.environ.items() if KEPT.fullmatch(k)}
        if len(clean) < len(
            os.environ
        ):  # a new process: /proc shows what one began with
            os.execve(sys.executable, sys.orig_argv, clean)
    verify(here, digest)
    sys.argv = [script, *rest]
    runpy.run_path(str(here / script), run_name="__main__")


if __name__ == "__main__":
    main()
