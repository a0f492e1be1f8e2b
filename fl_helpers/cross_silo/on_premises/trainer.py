"""The process that runs the hospital's function, away from key, policy and ledger.

The worker, which holds the connection, the gate and the ledger, starts this file as a
program, in a sandbox: it reads the data, the code and what comes through a pipe, and
writes a folder for itself, its home, and the privacy account. Models and updates go
through the pipe as safetensors, all else as JSON.
"""

from __future__ import annotations

import fl_helpers.cross_silo.short_lived  # noqa: F401, before PyTorch

# isort: split
import contextlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fl_helpers import exchange
from fl_helpers.cross_silo import sandbox, turn
from fl_helpers.cross_silo.on_premises.refusals import (
    CODES,
    FAILED,
    Refusal,
    blamed,
    code_of,
)
from fl_helpers.cross_silo.on_premises.site import ACCOUNT, read_site
from fl_helpers.cross_silo.run import from_plain, to_plain
from fl_helpers.simulation import Params
from fl_helpers.training import Update, num_examples

if TYPE_CHECKING:
    from fl_helpers.cross_silo.on_premises.job import Job  # with the engine: slow

Head = dict[str, Any]
GIB = 2**30
KEPT = ("LANG", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TZ")
KEPT += ("MALLOC_ARENA_MAX", "FL_FLEET")  # of the environment
PREFIXES = ("LC_", "CUDA_", "NVIDIA_")  # of names that are kept, too


def plan_of(kit: Path, job: Job) -> Head:
    """What the process is told: the hospital's own settings, and the run's."""
    with blamed("KIT_DAMAGED", TypeError):
        site = read_site(kit)
    plan = {key: getattr(site, key) for key in ("client", "data", "silo")}
    plan |= {"epsilon": site.epsilon, "delta": site.delta, "job": job.id}
    return plan | {"run": to_plain(job.run), "account": str((kit / ACCOUNT).parent)}


class Trainee:
    """The hospital's function, loaded, in this process; see `Trainer`."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.run = from_plain(plan["run"])
        label = f"{self.run.name} {plan['job']}"
        budget = plan["epsilon"], plan["delta"]
        self.place = turn.Place(Path(plan["account"]), label, *budget)
        with blamed("DATA_UNREADABLE", OSError, EOFError, SafetensorError):
            self.client = turn.load_client(
                plan["client"],
                plan["data"],
                self.run.settings,
                silo=plan["silo"],
                place=self.place,
            )

    @property
    def silo(self) -> Any:
        return self.client.silo

    def ready(self) -> None:
        """The data are loaded."""

    def turn(
        self, task: str, params: Params, round_index: int
    ) -> tuple[Update, Params]:
        """The update of a task, and the entries that stay here."""
        with blamed("DATA_UNREADABLE", OSError, EOFError):
            given = self.run, self.client, params
            if task == "evaluate":
                return turn.test(*given, round_index=round_index), {}
            done = turn.train(*given, round_index=round_index)
        self.place.check_booked(self.silo.name, round_index)
        return done


class Trainer:
    """A `Trainee` in a process of its own, started again once if it dies in a turn.

    All raise Refusal with the code of what went wrong there; its text is for the log.
    """

    def __init__(self, kit: Path, job: Job) -> None:
        self.kit, self.plan, self.names = kit, plan_of(kit, job), [*job.run.params]
        self.network = read_site(kit).network
        size = sum(value.nbytes for value in job.run.params.values())
        self.most = 4 * size + GIB // 16  # bytes of an answer
        self.examples: int | None = None  # until its data are loaded
        self.process = self._start()

    @property
    def silo(self) -> Any:
        """Its name and how many examples it trains on, as `train` of that length."""
        self.ready()
        count = range(self.examples)
        return SimpleNamespace(name=self.plan["silo"], train=(count, count))

    def ready(self) -> None:
        """Wait until the data are loaded."""
        self._twice(self._greet)

    def turn(
        self, task: str, params: Params, round_index: int
    ) -> tuple[Update, Params]:
        """As `Trainee.turn`."""

        def ask() -> tuple[Update, Params]:
            self._greet()
            head = {"task": task, "round": round_index}
            _write(self.process.stdin, head, params)
            found, (sent, own) = self._read()
            names = [name for name in self.names if name in sent]
            sent = {name: sent[name] for name in [*names, *(sent.keys() - {*names})]}
            metrics = dict(found["metrics"])
            return Update(found["silo"], sent, found["num_examples"], metrics), own

        return self._twice(ask)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _twice(self, step: Callable[[], Any]) -> Any:
        for last in (False, True):
            try:
                return step()
            except (EOFError, BrokenPipeError, ValueError) as error:
                self.close()
                if last:
                    said = "the process that trains has ended; see the lines above"
                    raise Refusal(FAILED, said) from error
                self.examples, self.process = None, self._start()
        raise AssertionError("unreachable")

    def _greet(self) -> None:
        if self.examples is None:
            self.examples = int(self._read()[0]["examples"])

    def _read(self) -> tuple[Head, list[Params]]:
        found, parts = _read(self.process.stdout, self.most)
        if "code" in found:
            code = found["code"] if found["code"] in CODES else FAILED
            raise Refusal(code, str(found.get("text", ""))[-20_000:])
        return found, parts

    def _start(self) -> subprocess.Popen[bytes]:
        """The process, confined; it begins to load the data at once. Its home has what
        an earlier one of this run left, such as a checkpoint within a turn."""
        work, account = self.kit / "work" / self.plan["job"], self.plan["account"]
        scratch = work / "tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in (scratch, Path(account)):
            folder.mkdir(parents=True, exist_ok=True)
        own = {k: v for k, v in os.environ.items() if _is_kept(k)}
        own |= {"HOME": str(work), "TMPDIR": str(scratch)}
        places = filter(None, own.get("PYTHONPATH", "").split(os.pathsep))
        read = [path for path in places if not self.kit.is_relative_to(path)]
        process = subprocess.Popen(
            sandbox.sandboxed(
                [sys.executable, "-m", __name__],
                read=[*read, self.plan["data"], *code_of_client(self.plan["client"])],
                write=[work, account, "/dev/shm", *Path("/dev").glob("nvidia*")],
                network=self.network,
                limits=_limits(self.most),
            ),
            cwd=work,
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _write(process.stdin, self.plan)
        return process


def _limits(most: int) -> dict[str, int]:
    """Of one file, of processes and, without a GPU, of memory: far above what training
    takes, so that a loop without an end does not take the machine along.
    """
    uid, threads = os.getuid(), 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            threads += process.num_threads() if process.uids().real == uid else 0
    limits = {"RLIMIT_FSIZE": GIB + 16 * most, "RLIMIT_NPROC": threads + 1024}
    if not Path("/dev/nvidia0").exists():  # CUDA reserves more than there is
        limits["RLIMIT_DATA"] = psutil.virtual_memory().total
    return limits


def _is_kept(name: str) -> bool:
    return name in KEPT or name.startswith(PREFIXES)


def code_of_client(client: str) -> Iterator[Path]:
    """What a function's file may import: what lies beside it, if that is no kit."""
    place = client.rpartition(":")[0]
    if not place.endswith(".py"):
        top = place.partition(".")[0]
        for folder in filter(None, sys.path):
            yield from (Path(folder) / name for name in (top, f"{top}.py"))
        return
    file = Path(place).resolve()
    inside = any((path / "startup").exists() for path in file.parents)
    yield file if inside or any(file.parent.glob("*/startup")) else file.parent


# ---- the pipe: a line of JSON with the sizes of what follows, as safetensors


def _write(pipe: IO[bytes], head: Mapping[str, Any], *parts: Params) -> None:
    """Without a copy of the parts: a model may be large."""
    bodies = [exchange.to_parts(_plain(part)) for part in parts]
    line = json.dumps({**head, "sizes": [sum(map(len, body)) for body in bodies]})
    pipe.write(line.encode() + b"\n")
    for body in bodies:
        pipe.writelines(body)
    pipe.flush()


def _read(pipe: IO[bytes], most: int) -> tuple[Head, list[Params]]:
    """Raises EOFError at the end, ValueError for more bytes than `most`."""
    line = pipe.readline(GIB // 64)
    if not line.endswith(b"\n"):
        raise EOFError("the other end of the pipe has gone")
    head = json.loads(line)
    sizes = [int(size) for size in head.pop("sizes")]
    if not all(size >= 0 for size in sizes) or sum(sizes) > most:
        raise ValueError(f"the answer has {sum(sizes)} bytes, the limit is {most}")
    return head, [_load(pipe, size) for size in sizes]


def _load(pipe: IO[bytes], size: int) -> Params:
    body = pipe.read(size)
    if len(body) != size:
        raise EOFError("the other end of the pipe has gone")
    return load(body)


def _plain(params: Mapping[str, Any]) -> Params:
    """Tensors in this computer's memory; what lies there is not copied."""
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} is a {type(value).__name__}; send tensors only")
    return {name: value.detach().to("cpu") for name, value in params.items()}


# ---- the process


def main() -> None:
    """Load the data, then answer one task after another until the pipe ends."""
    pipe = open(os.dup(1), "wb")  # what the hospital's function prints is no answer
    os.dup2(2, 1)
    torch.set_num_threads(1)  # the number of threads changes the last bits
    plan, _ = _read(sys.stdin.buffer, 0)
    try:
        trainee = Trainee(plan)
        _write(pipe, {"examples": num_examples(trainee.silo)})
    except Exception as error:
        _write(pipe, _failure(error))
        return
    while _answer(trainee, pipe):
        pass


def _answer(trainee: Trainee, pipe: IO[bytes]) -> bool:
    """One task; False at the end. Nothing of it is held while the next comes in."""
    try:
        head, (params,) = _read(sys.stdin.buffer, sys.maxsize)
    except EOFError:
        return False
    params = {name: params[name] for name in trainee.run.params}  # in the run's order
    try:
        update, own = trainee.turn(head["task"], params, head["round"])
        answer = {"silo": update.silo, "num_examples": _number(update.num_examples)}
        answer |= {"metrics": {k: _number(v) for k, v in update.metrics.items()}}
        _write(pipe, answer, update.params, own)
    except Exception as error:
        _write(pipe, _failure(error))
    return True


def _failure(error: Exception) -> Head:
    return {"code": code_of(error), "text": "".join(traceback.format_exception(error))}


def _number(value: Any) -> Any:
    """A plain number, or what it is instead: the gate refuses that."""
    return value if type(value) in (int, float) else f"a {type(value).__name__}"


if __name__ == "__main__":
    main()
