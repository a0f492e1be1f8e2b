"""Faults to try a federation with: a hospital drops out, crashes, is late, lies.

`with_faults` wraps what a silo does; which fault hits whom, and when, is a plain table.
So the round loop itself has no switch for them. Needs only torch: copy this file on its
own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

Fault = Callable[[Callable[[], Any]], Any]  # gets the real work, may call it


def with_faults(
    client_update: Callable[..., Any],
    schedule: Mapping[tuple[str, int], Fault | Sequence[Fault]],
) -> Callable[..., Any]:
    """A client_update for `run_rounds` that goes wrong as the schedule says.

    schedule: {(silo name, round): fault}, rounds from 0. A fault hits every attempt of
    that round; of a list of faults, the first one hits the first attempt, and so on,
    and later attempts succeed. Attempts are counted for the life of the function."""
    attempts: Counter[tuple[str, int]] = Counter()

    def client(
        params: Any, silo: Any, *, round_index: int, rng: torch.Generator
    ) -> Any:
        def train() -> Any:
            return client_update(params, silo, round_index=round_index, rng=rng)

        key = (silo.name, round_index)
        faults = schedule.get(key, ())
        if callable(faults):
            return faults(train)
        attempts[key] += 1
        if attempts[key] <= len(faults):
            return faults[attempts[key] - 1](train)
        return train()

    return client


def unreachable(train: Callable[[], Any]) -> Any:
    """The silo does not answer."""
    raise ConnectionError("the silo does not answer")


def crash(train: Callable[[], Any]) -> Any:
    """The silo trains, and its process ends before it has sent anything."""
    train()
    raise RuntimeError("the silo's process ended in the middle of the round")


def slow(seconds: float) -> Fault:
    """The silo begins so much later; with a longer one than the deadline it is late."""

    def fault(train: Callable[[], Any]) -> Any:
        time.sleep(seconds)
        return train()

    return fault


def garbage(train: Callable[[], Any]) -> Any:
    """Every number that the silo sends is NaN, as after a division by zero."""
    update = train()
    nan = {
        name: torch.full_like(value, torch.nan) if value.is_floating_point() else value
        for name, value in update.params.items()
    }
    return replace(update, params=nan)


def other_model(train: Callable[[], Any]) -> Any:
    """The silo runs an old version of the code: one entry has another name."""
    update = train()
    first, *others = update.params
    params = {f"old.{first}": update.params[first]}
    return replace(update, params=params | {k: update.params[k] for k in others})
