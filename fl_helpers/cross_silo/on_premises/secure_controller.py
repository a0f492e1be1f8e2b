"""Runs the rounds of a secure run: the server adds up integers that it cannot read.

Before the first round, all silos say hello and give the sum of their examples. In a
round, each answers under the masks of a set; when all of the set have, they open it. If
one is missing, the others are asked for the same update under a smaller set, which
costs one more upload and no training.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nvflare.apis.shareable import Shareable

from fl_helpers import exchange
from fl_helpers.cross_silo.fixed_point import ALL, FRACTION_BITS, Plain, decode
from fl_helpers.cross_silo.on_premises.attendance import Answers
from fl_helpers.cross_silo.on_premises.controller import RoundController
from fl_helpers.cross_silo.on_premises.gate import SEALED, pack
from fl_helpers.cross_silo.on_premises.record import replace_file
from fl_helpers.cross_silo.secure import MAX_HELLO, Question, Sum
from fl_helpers.simulation import NoQuorum, Params


class SumController(RoundController):
    """What all secure sums need: to meet, to be asked, to open, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.sum: Sum | None = None

    def _hellos(self) -> Answers:
        """Of all silos of the run, each with the key of its masks."""
        hellos = self._send("keys", 0, sorted(self.job.silos), Shareable())
        silos = tuple(sorted(self.job.silos.values()))
        self._all_or_none("say hello", hellos, silos)
        return hellos

    def _gather(self, asked: Question, message: Shareable) -> Answers:
        self.sum = Sum(asked)
        message["question"] = asked.text()
        return self._send(asked.kind, asked.round, self._sites(asked), message)

    def _open(self) -> Answers:
        asked = self.sum.asked
        message = Shareable({"question": asked.text()})
        return self._send("open", asked.round, self._sites(asked), message)

    def _sites(self, asked: Question) -> list[str]:
        silos = self.job.silos
        return [site for site in sorted(silos) if silos[site] in asked.silos]

    def _take(self, task: str, message: Shareable, silo: str, index: int) -> Any:
        if task == "keys":
            return _bytes(message, "hello", MAX_HELLO)
        added = self.sum
        if task == "open":
            mask = _bytes(message, "mask", 32)
            with self.lock:
                added.opened[silo] = mask
            return mask
        expected = self._layout(task)
        update = self._read(message, silo, index, expected, SEALED)
        if update.metrics != {"attempt": added.asked.attempt}:
            raise ValueError(f"the answer is to attempt {update.metrics}")
        parts = {name: part.numpy() for name, part in update.params.items()}
        weights = parts.get("masked_weights", np.empty(0, np.int32))
        numbers = parts["masked_numbers"]
        masked = Plain(weights.view(np.uint32), numbers.view(np.uint64))
        with self.lock:
            added.add(silo, masked)
        return replace(update, params={}, metrics={})

    def _layout(self, task: str) -> Params:
        """Of a masked answer, as tensors without content."""
        raise NotImplementedError

    def _all_or_none(self, what: str, answers: Answers, silos: tuple[str, ...]) -> None:
        if missing := sorted({*silos} - answers.updates.keys()):
            raise NoQuorum(
                f"{missing} did not {what}, and without them nothing of this sum can "
                f"be read: all of {list(silos)} must be there; refused: "
                f"{answers.refused}"
            )


class SecureController(SumController):
    """As `RoundController`; what came of a round is one update, of `ALL`.

    `secure.json` in the run's folder says what was asked last, and is written before it
    is asked: a run that is resumed asks the same again.
    """

    asks_all_again = True  # who has answered keeps that, and does not train again

    def __init__(self) -> None:
        super().__init__()
        self.total = 0  # examples of all participants

    def _begin(self) -> None:
        known = self._known()
        self.total = known.get("total", 0) or self._meet()

    def _meet(self) -> int:
        """All say hello and learn the others' keys; the sum of their examples."""
        silos = tuple(sorted(self.job.silos.values()))
        hellos = self._hellos()
        asked = self._question("examples", 0, silos, "", 1)
        self._save(asked)
        message = Shareable({"hellos": hellos.updates})
        answers = self._gather(asked, message)
        self._all_or_none("answer", answers, silos)
        self._all_or_none("open", self._open(), silos)
        added = self.sum.read()
        total = int(added.numbers[0])
        decode(added, {}, total=total, several=len(silos), metrics=())  # or raises
        return total

    def _ask(self, task: str, index: int, sites: list[str]) -> Answers:
        """The mean of the largest set that answered, as the update of `ALL`."""
        silos = tuple(sorted(self.job.silos[site] for site in sites))
        files = pack(self.record.model(index))
        self.bytes_down, sent = len(files[exchange.MODEL]), 0
        model = hashlib.sha256(files[exchange.MODEL]).hexdigest()
        asked, refused = self._question(task, index, silos, model, self.total), {}
        while len(asked.silos) >= self.quorum:
            self._save(asked)
            answers = self._gather(asked, Shareable(files))
            refused |= answers.refused
            sent += sum(update.num_bytes for update in answers.updates.values())
            if self.sum.silos == {*asked.silos}:
                self._all_or_none("open", self._open(), asked.silos)
                mean = replace(self._mean(task), num_bytes=sent)
                return Answers({ALL: mean}, refused, asked.silos)
            left = tuple(sorted(self.sum.silos))
            self.record.event("asked_again", round=index, silos=left)
            asked = replace(asked, attempt=asked.attempt + 1, silos=left)
        return Answers({}, refused, asked.silos)

    def _ask_again(self, before: Answers, index: int, sites: list[str]) -> Answers:
        """All of the last set; a sum has no parts that could count alone."""
        return self._ask("train", index, sites)

    def _question(
        self, kind: str, index: int, silos: tuple[str, ...], model: str, total: int
    ) -> Question:
        """What was asked last, if it was for this round, or a first attempt."""
        if before := self._known().get("asked"):
            last = Question.read(before)
            if (last.kind, last.round, last.model) == (kind, index, model):
                return last
        return Question(self.job.id, kind, index, 0, silos, model, total)

    def _layout(self, task: str) -> Params:
        """Of a masked update, as tensors without content."""
        metrics = self.job.run.limits.metrics if task != "examples" else ()
        sizes = {"masked_numbers": (1 + 2 * len(metrics), torch.int64)}
        if task == "train":
            weights = sum(value.numel() for value in self.params.values())
            sizes = {"masked_weights": (weights, torch.int32)} | sizes
        return {
            name: torch.empty(size, dtype=dtype, device="meta")
            for name, (size, dtype) in sizes.items()
        }

    def _mean(self, task: str) -> exchange.ReceivedUpdate:
        """The average, if it can be one of silos that kept to the limits."""
        run, asked = self.job.run, self.sum.asked
        start = self.params if task == "train" else {}
        how = {"total": asked.total, "metrics": run.limits.metrics}
        mean = decode(self.sum.read(), start, several=len(asked.silos), **how)
        limits = replace(run.limits, max_examples=10**12)
        if limits.max_norm is not None:  # and what rounding may add
            values = sum(value.numel() for value in start.values())
            rounding = len(asked.silos) * math.sqrt(values) * 2.0**-FRACTION_BITS
            limits = replace(limits, max_norm=limits.max_norm + rounding)
        try:
            exchange.check_update(mean, start, silo=ALL, limits=limits)
        except exchange.Refused as error:
            raise exchange.Refused(
                ALL,
                f"{error.reason}; so at least one of {list(asked.silos)} did not keep "
                "to what its own gate should hold, and a secure sum hides which one",
            ) from None
        about = mean.num_examples, mean.metrics, "", 0, None
        return exchange.ReceivedUpdate(ALL, asked.round, mean.params, *about)

    def _known(self) -> dict[str, Any]:
        path = self.record.folder / "secure.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): without it nobody knows what was asked "
                "last; bring it back from a backup, or start a run of another name"
            ) from None

    def _save(self, asked: Question) -> None:
        path = self.record.folder / "secure.json"
        replace_file(path, json.dumps({"total": self.total, "asked": asked.text()}))


def _bytes(message: Shareable, name: str, limit: int) -> bytes:
    content = message.get(name)
    if not isinstance(content, bytes) or len(content) > limit:
        raise ValueError(f"a {name} must be at most {limit} bytes")
    return content
