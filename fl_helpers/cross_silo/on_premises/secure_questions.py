"""Questions of an analysis in secure sums: how they are asked and answered.

1. All silos of the run say hello, once, as in a secure run of training.
2. Each silo works a question out and says the form of its answer: names, types and
   shapes of arrays. Those that answer in one form are the set.
3. Each adds its masks to the answer, as `fixed_point.encode_arrays` has it; the masks
   depend on question, form and set.
4. All of the set open, and the sum can be read.

If one of the set is missing in step 3 or 4, nothing can be read and the question has to
be asked again. Who has opened an answer lets its patients be in sums of that set only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.shareable import Shareable

from fl_helpers.cross_silo.fixed_point import (
    ALL,
    Plain,
    decode_arrays,
    encode_arrays,
    words_of,
)
from fl_helpers.cross_silo.on_premises.analyses import QuestionController, codes_of
from fl_helpers.cross_silo.on_premises.gate import Spoken, Sums
from fl_helpers.cross_silo.on_premises.job import Job
from fl_helpers.cross_silo.on_premises.questions import MAX_ANSWER, expected_of
from fl_helpers.cross_silo.on_premises.refusals import Refusal
from fl_helpers.cross_silo.on_premises.secure_controller import SumController
from fl_helpers.cross_silo.on_premises.secure_site import member_of, sealed
from fl_helpers.cross_silo.run import SMALLEST_SET
from fl_helpers.cross_silo.secure import Denied, Question
from fl_helpers.simulation import Params
from fl_helpers.training import Update

KIND = "answer"  # of a `secure.Question`


def about(question: str, layout: str) -> str:
    """What goes into the masks: SHA-256 of a question and of the form of its answer."""
    return hashlib.sha256(json.dumps([question, layout]).encode()).hexdigest()


# -- at the server


class SecureQuestionController(SumController, QuestionController):
    """As `QuestionController`; what comes of a question is one answer, of `ALL`."""

    def __init__(self) -> None:
        super().__init__()
        self.hellos: dict[str, bytes] = {}
        self.expected: Params = {}  # the form of the answer that is asked for now

    def _begin(self) -> None:
        self.hellos = self._hellos().updates

    def _put(self, number: int, silos: list[str], question: str, needed: int) -> None:
        """Send one question; the sum lies in the box before the event says so."""
        self.function = json.loads(question)["function"]
        sites = [site for site, silo in sorted(self.job.silos.items()) if silo in silos]
        message = {"asked": question, "hellos": self.hellos}
        layouts = self._send("layout", number, sites, Shareable(message))
        codes = codes_of(layouts, silos) | others(layouts.updates)
        left = tuple(sorted({*silos} - codes.keys()))
        if len(left) < max(needed, SMALLEST_SET):
            return self._say(number, [], codes)
        layout = layouts.updates[left[0]]
        self.expected = expected_of(layout, self.function)
        asked = Question(self.job.id, KIND, number, 0, left, about(question, layout))
        answers = self._gather(asked, Shareable(message))
        missing = codes_of(answers, left) or codes_of(self._open(), left)
        if missing:
            return self._say(number, [], codes | missing)
        try:
            how = {"several": len(left)}
            found = decode_arrays(self.sum.read().numbers, self.expected, **how)
        except ValueError as error:
            return self._say(number, [], codes, reason=str(error))
        self._lay_down(number, ALL, found)
        return self._say(number, left, codes)

    def _take(self, task: str, message: Shareable, silo: str, index: int) -> Any:
        if task != "layout":
            return super()._take(task, message, silo, index)
        words_in(expected_of(message.get("layout"), self.function))
        return message["layout"]

    def _layout(self, task: str) -> Params:
        size = words_of(self.expected)
        return {"masked_numbers": torch.empty(size, dtype=torch.int64, device="meta")}


def words_in(layout: Params) -> int:
    """Words of an answer; ValueError if it is too long."""
    words = words_of(layout)
    if 8 * words > MAX_ANSWER:
        raise ValueError(f"{8 * words} bytes in a secure sum, at most {MAX_ANSWER}")
    return words


def others(layouts: Mapping[str, str]) -> dict[str, str]:
    """Silos whose answers have another form than those of most others, and where."""
    if len({*layouts.values()}) < 2:
        return {}
    usual = Counter(layouts[silo] for silo in sorted(layouts)).most_common(1)[0][0]
    parts = json.loads(usual)
    found = {}
    for silo, text in sorted(layouts.items()):
        own = json.loads(text)
        differ = sorted(k for k in own | parts if own.get(k) != parts.get(k))
        if text != usual:
            found[silo] = f"another form of answer than others in {differ[:3]}"
    return found


# -- at a hospital


class SecureQuestions:
    """A hospital's answers in a run of secure sums; what it must not forget is in
    `secure/` of its kit."""

    def __init__(self, job: Job, kit: Path) -> None:
        self.member, self.folder = member_of(job, kit), kit / "secure"
        self.last: tuple[Any, Any, Sums | None] = (None, None, None)

    def answer(
        self, task: str, message: Shareable, work: Callable[[Any, Any], Sums]
    ) -> Sums | Spoken:
        """work: the plain answer to a question's text and number."""
        if task == "keys":
            return Spoken("hello", self.member.hello())
        if task == "open":
            return Spoken("mask", self.member.open(self._asked(message)))
        if task not in ("layout", KIND):
            raise Refusal("JOB_REFUSED", f"an analysis has no task {task!r}")
        asked = self._asked(message) if task == KIND else None
        self.member.meet(message["hellos"])
        if asked:
            self.member.check(asked)
        found = self._found(message.get("asked"), message.get("round"), work)
        found.seal = partial(self._seal, asked, message.get("asked"), found.cohort)
        return found

    def _asked(self, message: Shareable) -> Question:
        asked = Question.read(message["question"])
        if (asked.kind, asked.round) != (KIND, message.get("round")):
            raise Denied(f"the task is an answer to question {message.get('round')}")
        return asked

    def _found(self, text: Any, number: Any, work: Callable[[Any, Any], Sums]) -> Sums:
        """What was worked out for the same question in step 2, or anew after a kill."""
        *known, found = self.last
        if found is None or known != [text, number]:
            found = work(text, number)
        self.last = text, number, found
        return found

    def _seal(
        self,
        asked: Question | None,
        text: str,
        cohort: Any,
        arrays: Mapping[str, np.ndarray],
        layout: str,
    ) -> Update | None:
        """What leaves for an answer that the gate has looked at: at first nothing."""
        if asked is None:
            return None
        if about(text, layout) != asked.model:
            raise Denied("the sum is of another question, or another form of answers")
        numbers = encode_arrays(self.member.silo, arrays)
        if numbers.nbytes > MAX_ANSWER:
            raise Denied(f"an answer of {numbers.nbytes} bytes in a secure sum")
        kept = cohort.keep(self.folder)
        plain = Plain(np.empty(0, np.uint32), numbers, kept)
        return sealed(self.member.silo, self.member.answer(asked, plain), asked)
