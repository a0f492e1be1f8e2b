"""Smaller updates for slow uplinks: deltas in 8 bits, or only their largest values.

What is lost in a round is added to the next one's delta (error feedback): it arrives
late, not never. Packed updates are plain tensors. Needs torch: copy this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
RESIDUAL = "own_residual."  # entries of the state that stay in the silo


def quantise(delta: Mapping[str, Tensor]) -> Params:
    """Each entry in whole numbers from -127 to 127 times a scale, its largest / 127: no
    value is off by more than half of it. Returns {"codes.<name>": int8, "scale.<name>":
    float32 scalar}."""
    packed: Params = {}
    for name, value in delta.items():
        scale = (value.abs().amax() if value.numel() else value.new_zeros(())) / 127
        codes = (value / scale).round() if scale > 0 else torch.zeros_like(value)
        packed[f"codes.{name}"] = codes.to(torch.int8)
        packed[f"scale.{name}"] = scale.float()
    return packed


def top_k(delta: Mapping[str, Tensor], share: float = 0.1) -> Params:
    """Only this share of all values, the largest of the whole delta; the rest is 0 (Aji
    and Heafield 2017). Returns {"index.<name>": int32 places, "values.<name>"}: 8 bytes
    a value, so a share of 0.1 is 1/5 of the bytes."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be > 0 and <= 1, got {share}; 0.1 is usual")
    size = torch.cat([value.abs().flatten() for value in delta.values()])
    keep = torch.zeros(len(size), dtype=torch.bool)
    keep[size.topk(max(1, round(share * len(size)))).indices] = True
    packed: Params = {}
    parts = keep.split([value.numel() for value in delta.values()])
    for (name, value), kept in zip(delta.items(), parts, strict=True):
        packed[f"index.{name}"] = kept.nonzero()[:, 0].int()
        packed[f"values.{name}"] = value.flatten()[kept]
    return packed


def restore(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Params:
    """The delta that was packed. like: names, shapes, dtypes. Raises ValueError for
    entries that are missing or do not fit."""
    delta: Params = {}
    for name, value in like.items():
        try:
            if f"codes.{name}" in packed:
                flat = packed[f"codes.{name}"] * packed[f"scale.{name}"]
            else:
                flat = torch.zeros(value.numel(), dtype=value.dtype)
                flat[packed[f"index.{name}"].long()] = packed[f"values.{name}"]
            delta[name] = flat.reshape(value.shape).to(value.dtype)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"{name!r} cannot be restored: {error}") from error
    return delta


def zero_residual(params: Mapping[str, Tensor]) -> Params:
    """What a silo still owes before the first round: nothing. Add it to the params, and
    name it in `Terms(keep_local=...)`."""
    floats = {k: v for k, v in params.items() if v.is_floating_point()}
    return {RESIDUAL + k: torch.zeros_like(v) for k, v in floats.items()}


def compress_update(
    after: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    compress: Callable[[Params], Params],
) -> Params:
    """What a silo returns: its packed delta, and what it still owes (Seide et al.
    2014). after: params that it trained; before: those it got, with `zero_residual`'s.
    Whole numbers (BatchNorm's counters) go as they are, as "whole.<name>"."""
    names = [name for name in after if RESIDUAL + name in before]
    delta = {k: after[k] - before[k] + before[RESIDUAL + k] for k in names}
    packed = compress(delta)
    arrived = restore(packed, delta)
    whole = {f"whole.{k}": v for k, v in after.items() if k not in delta}
    return packed | whole | {RESIDUAL + k: delta[k] - arrived[k] for k in names}


class FromDeltas:
    """`aggregate` for compressed updates: restores one after the other for a plain
    function such as `weighted_average`. params: what the first round starts from."""

    def __init__(
        self, params: Params, aggregate: Callable[[Iterable[Any]], Params]
    ) -> None:
        self.params = {name: value.clone() for name, value in params.items()}
        self.aggregate = aggregate

    def __call__(self, updates: Iterable[Any]) -> Params:
        self.params = self.aggregate(self._restored(update) for update in updates)
        return {name: value.clone() for name, value in self.params.items()}

    def _restored(self, update: Any) -> Any:
        floats = {k: v for k, v in self.params.items() if v.is_floating_point()}
        try:
            delta = restore(update.params, floats)
        except ValueError as error:
            raise ValueError(f"silo {update.silo!r}: {error}") from error
        params = {
            k: v + delta[k] if k in delta else update.params[f"whole.{k}"]
            for k, v in self.params.items()
        }
        return replace(update, params=params)

    def state_dict(self) -> Params:
        return {name: value.clone() for name, value in self.params.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.params = {name: state[name].clone() for name in self.params}
