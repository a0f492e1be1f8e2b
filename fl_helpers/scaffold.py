"""SCAFFOLD: what a silo adds to local training so that all pull in one direction.

Knows nothing of the training loop but that it calls a function before each step. Needs
only torch: copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ControlVariates:
    """SCAFFOLD inside one silo, for one round (Karimireddy et al. 2020, Algorithm 1).

    The silo corrects each of its gradients g by c - c_k: c is the mean of all silos'
    variates, c_k its own, both gradients at last sight. Afterwards
    c_k+ = mean of the g on the way. For SGD without momentum or weight decay that is
    the paper's option II, c_k - c + (x - y_k) / (steps * lr); unlike it, it also holds
    with momentum.

    They travel and are kept as further entries of the model's state, "variate.<name>"
    for c and "own_variate.<name>" for c_k (see `zero_variates`): the former are sent,
    averaged and counted in bytes like weights, the latter stay in the silo
    (`Terms(keep_local=...)`). Use:

        variates = ControlVariates(params)
        update = train_locally(..., adjust_gradients=variates.correct)
        params = update.params | variates.entries()
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._shared = _with_prefix(params, "variate.")
        self._own = _with_prefix(params, "own_variate.")
        if not self._own or self._own.keys() != self._shared.keys():
            raise ValueError(
                "params hold no control variates; start from "
                "`model.state_dict() | zero_variates(model)`"
            )
        self._sum = {name: torch.zeros_like(c) for name, c in self._own.items()}
        self._correction = {k: c - self._own[k] for k, c in self._shared.items()}
        self._steps = 0

    def correct(self, model: nn.Module) -> None:
        """Add c - c_k to the gradients of the model's parameters, in place."""
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                for kept in (self._sum, self._correction):
                    kept[name] = kept[name].to(weight.device)  # copies at most once
                self._sum[name] += weight.grad
                weight.grad.add_(self._correction[name])
        self._steps += 1

    def entries(self, *, participation: float = 1.0) -> dict[str, Tensor]:
        """New variates: c_k+, and c + participation * (c_k+ - c_k) to be averaged.

        participation: share of the silos that take part in a round. The average over
        silos is the paper's c+ with the silos' weights: with full participation, the
        weighted mean of all c_k+.
        """
        if self._steps == 0:
            raise ValueError("no gradient was seen; pass `correct` to train_locally")
        new: dict[str, Tensor] = {}
        for name, own in self._own.items():
            mean = self._sum[name].cpu() / self._steps
            change = participation * (mean - own)
            new[f"variate.{name}"] = self._shared[name] + change
            new[f"own_variate.{name}"] = mean
        return new


def zero_variates(model: nn.Module) -> dict[str, Tensor]:
    """SCAFFOLD's variates before the first round, to be added to the initial params."""
    names = [(n, w) for n, w in model.named_parameters() if w.requires_grad]
    return {
        f"{kind}.{name}": torch.zeros_like(weight, requires_grad=False)
        for kind in ("variate", "own_variate")
        for name, weight in names
    }


def _with_prefix(params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)
    }
