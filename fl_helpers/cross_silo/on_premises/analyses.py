"""The `Ask` of a real run: a question goes to the hospitals, and their sums come back.

`asking` starts a run without a model and yields an `Ask`. Its process puts a question
into the server's kit, `QuestionController` sends it, `QuestionExecutor` answers at each
hospital, and what passed all checks is added up as `analysis.ask_silos` does. In secure
sums, `secure_questions` does both, and single answers are known to nobody.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from safetensors.numpy import load_file, save_file

from fl_helpers.analysis import Arrays, add_answers
from fl_helpers.cross_silo import turn
from fl_helpers.cross_silo.fixed_point import ALL, MOST_SILOS
from fl_helpers.cross_silo.on_premises import job, runs
from fl_helpers.cross_silo.on_premises.attendance import Answers
from fl_helpers.cross_silo.on_premises.controller import RoundController
from fl_helpers.cross_silo.on_premises.executor import TaskExecutor
from fl_helpers.cross_silo.on_premises.line import Line, Patience
from fl_helpers.cross_silo.on_premises.questions import (
    ANSWER,
    ONE_BY_ONE,
    Denied,
    Question,
    answer,
    expected_of,
    read_rules,
)
from fl_helpers.cross_silo.on_premises.record import Record
from fl_helpers.cross_silo.on_premises.refusals import blamed
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.on_premises.site import (
    ANALYSES,
    ANSWERS,
    read_site,
    site_name,
)
from fl_helpers.cross_silo.run import SMALLEST_SET

ASK_FEWER = "ask about(silos=...) those that do answer"
NOT_SECURE = "ask without secure, of silos that answer plain questions"
PLACE, TASK, END = "analyses", "ask", "end"
SECURE_TASKS = ("keys", "layout", "answer", "open")
CODE = "the site answered "  # how the controller says which code came
FEWER = f"a secure sum needs {SMALLEST_SET} silos or more, or one would read another"


@dataclass(frozen=True)
class Analysis:
    """A run that asks questions.

    name: of its folder, `analyses/<name>` in the server's kit. quorum: silos that an
    answer needs; None is all. deadline: seconds for an answer. idle: seconds without a
    question after which the run ends by itself. secure: the orchestrator gets sums of
    three or more silos only; all silos of the run must be there when it begins. Raises
    ValueError for other values.
    """

    name: str
    quorum: int | None = None
    deadline: int = 60
    idle: int = 1800
    secure: bool = False
    wait_for_quorum = 0  # as `run.Run` has it: an analysis does not wait

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", self.name):
            raise ValueError(
                f"name must be letters, digits, _ and -, got {self.name!r}"
            )
        numbers = self.quorum or 1, self.deadline, self.idle
        if any(type(n) is not int or n < 1 for n in numbers) or self.quorum == 0:
            raise ValueError(f"quorum, deadline, idle: integers >= 1, got {numbers}")
        if type(self.secure) is not bool:
            raise ValueError(f"secure must be True or False, got {self.secure!r}")
        if self.secure and self.quorum is not None and self.quorum < SMALLEST_SET:
            raise ValueError(f"quorum {self.quorum}: {FEWER}")


class QuestionRefused(RunError):
    """Too few silos answered a question; `codes` says what the others sent, by silo.

    In secure sums, `codes` is empty if all answered and the sum cannot be read."""

    def __init__(
        self,
        function: str,
        codes: Mapping[str, str],
        quorum: int,
        *,
        reason: str = "",
        secure: bool = False,
    ) -> None:
        why = (
            f"gave no sum: {reason}" if reason else f"was not answered by {dict(codes)}"
        )
        how = "ask the same again, of the same silos" if secure else ASK_FEWER
        super().__init__(
            f"{function} {why}, {quorum} silos are needed; {how}, or look into the "
            "logs of those that did not answer"
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
        secure: bool = False,
    ) -> None:
        self.secure = secure
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
        Raises ValueError for others, for none, and in secure sums for fewer than three;
        there a silo lets its patients be in sums of one set of silos only.
        """
        chosen = self.silos if silos is None else silos
        if {*chosen} - {*self.silos} or not chosen:
            raise ValueError(f"silos must be of {list(self.silos)}, got {[*chosen]}")
        if self.secure and len({*chosen}) < SMALLEST_SET:
            raise ValueError(f"silos {sorted(chosen)}: {FEWER}")
        quorum = self.quorum if silos is None else min(self.quorum, len({*chosen}))
        made = EngineAsk(self.box, self.events, {*chosen}, quorum, self.secure)
        made.table, made.where = table, dict(where or {})
        return made

    def __call__(self, function: Callable[..., Any], **settings: Any) -> Arrays:
        """The sums over silos; raises QuestionRefused, and RunError if the run ends."""
        name = f"{function.__module__}:{function.__name__}"
        if self.secure and name in ONE_BY_ONE:
            raise ValueError(f"answers of {name} are for each silo alone: {NOT_SECURE}")
        answers = self._answers(name, settings)
        return add_answers((silo, answers[silo]) for silo in sorted(answers))

    def each(self, function: Callable[..., Any], **settings: Any) -> dict[str, Arrays]:
        """{silo: its own answer}, in the order of names; ValueError in secure sums."""
        if self.secure:
            raise ValueError(f"there are no answers of single silos: {NOT_SECURE}")
        name = f"{function.__module__}:{function.__name__}"
        return self._answers(name, settings)

    def _answers(self, name: str, settings: Mapping[str, Any]) -> dict[str, Arrays]:
        """By silo, or in secure sums of `ALL`."""
        question = Question(name, plain(settings), self.table, plain(self.where))
        event = self._send(question)
        codes = {k: v for k, v in event["codes"].items() if k in self.silos}
        left = [silo for silo in self.silos if silo in event["silos"]]
        answers = self._read(event, name)
        needed = len(self.silos) if self.asked else self.quorum
        if len(left) < needed:
            about = {"reason": event.get("reason", ""), "secure": self.secure}
            raise QuestionRefused(name, codes, needed, **about)
        self.asked, self.silos = True, tuple(left)
        self.left_out |= codes
        return answers

    def _send(self, question: Question) -> dict[str, Any]:
        """Put a question into the server's box; what the server says of it."""
        number = 1 + sum(1 for _ in self.box.glob("*.json"))
        path = self.box / f"{number:06d}.json"
        content = {"silos": self.silos, "question": question.text()}
        content["needed"] = len(self.silos) if self.asked else self.quorum
        path.with_suffix(".tmp").write_text(json.dumps(content))
        os.replace(path.with_suffix(".tmp"), path)
        for event in self.events:
            if event["event"] == "answered" and event["question"] == number:
                return event
        raise RunError("the analysis is over: no question came for a long time")

    def _read(self, event: Mapping[str, Any], name: str) -> dict[str, Arrays]:
        folder = self.box / f"{event['question']:06d}"
        found = {}
        for silo in [ALL] * bool(event["silos"]) if self.secure else event["silos"]:
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
        quorum = analysis.quorum or len(silos)
        yield EngineAsk(box, events, silos, quorum, analysis.secure)
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
    if analysis.secure and not SMALLEST_SET <= len(silos) <= MOST_SILOS:
        raise ValueError(f"{len(silos)} silos: {FEWER}, and at most {MOST_SILOS}")
    app = jobs / analysis.name / "app" / job.CONFIG
    app.mkdir(parents=True, exist_ok=True)
    sites = {site_name(silo): silo for silo in silos}
    content = {"id": uuid.uuid4().hex, "silos": sites, "analysis": asdict(analysis)}
    (app / job.RUN).write_text(json.dumps(content), encoding="utf-8")
    tasks = SECURE_TASKS if analysis.secure else [TASK]
    return job.write_parts(app, quorum, ANALYSES[analysis.secure], ANSWERS, tasks)


def read_analysis(fl_ctx: FLContext) -> job.Job:
    """The job of this process, see `job.read_job`."""
    return job.read_job(fl_ctx, "analysis", lambda found: Analysis(**found))


# -- at the server


class QuestionController(RoundController):
    """Sends the questions that lie in its box, one after the other; an answer that is
    not one costs its silo's only. Writes into `analyses/<name>/` of the server's kit.
    """

    def start_controller(self, fl_ctx: FLContext) -> None:
        self.communicator._task_check_period = 0.02  # seconds
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self.job = read_analysis(fl_ctx)
        self.record = Record(Path(workspace.get_root_dir(), PLACE, self.job.run.name))
        self.function = ""  # of the question that is asked now

    def _play(self) -> None:
        self._begin()
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

    def _put(self, number: int, silos: list[str], question: str, needed: int) -> None:
        """Send one question; its answers lie in the box before the event says so.

        needed: how many must answer, for a sum that cannot be read without."""
        self.function = json.loads(question)["function"]
        sites = [site for site, silo in sorted(self.job.silos.items()) if silo in silos]
        answers = self._send(TASK, number, sites, Shareable({"question": question}))
        for silo, update in answers.updates.items():
            arrays = {name: value.numpy() for name, value in update.params.items()}
            self._lay_down(number, silo, arrays)
        self._say(number, sorted(answers.updates), codes_of(answers, silos))

    def _lay_down(self, number: int, whose: str, arrays: Arrays) -> None:
        folder = self.record.folder / self.job.id / f"{number:06d}"
        folder.mkdir(exist_ok=True)
        save_file(arrays, folder / f"{site_name(whose)}.safetensors")

    def _say(
        self, number: int, silos: Collection[str], codes: Any, **more: Any
    ) -> None:
        about = {"question": number, "silos": list(silos), "codes": codes}
        self.record.event("answered", **about, **more)

    def _take(self, task: str, message: Shareable, silo: str, index: int) -> Any:
        expected = expected_of(message.get("layout"), self.function)
        return self._read(message, silo, index, expected, ANSWER)


def codes_of(answers: Answers, silos: Collection[str]) -> dict[str, str]:
    """What came from those of the silos that did not answer."""
    lack = sorted({*silos} - answers.updates.keys())
    return {k: answers.refused.get(k, "MISSING").removeprefix(CODE) for k in lack}


# -- at a hospital


class QuestionExecutor(TaskExecutor):
    """Answers the task "ask" with `Sums`, by the hospital's rules, see `questions`; and
    `SECURE_TASKS`, see `secure_questions`."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: turn.Tables | None = None
        self.sums: Any = None  # of a run in secure sums

    def result(
        self, task: str, message: Shareable, kit: Path, context: FLContext
    ) -> Any:
        site, _ = read_site(kit), read_rules(kit)
        if not site.tables:
            raise Denied("local/site.json names no function `tables`")
        if self.tables is None:
            self.tables = turn.load_function(site.tables)(Path(site.data))
        work = partial(answer, kit, site.silo, self.tables)
        if task == TASK:
            return work(message.get("question"), message.get("round"))
        from fl_helpers.cross_silo.on_premises import secure_questions  # needs this

        with blamed("KIT_DAMAGED", json.JSONDecodeError, OSError):
            make, read = secure_questions.SecureQuestions, read_analysis
            self.sums = self.sums or make(read(context), kit)
        return self.sums.answer(task, message, partial(work, sealed=True))
