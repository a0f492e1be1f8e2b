"""What a silo brings to a real run: its data, and the functions that a round calls.

The same `Client` serves every engine: the silo names one function, which finds the data
and returns the functions that `simulation.run_rounds` would be given. A run sends plain
settings, never code. Standard library and torch only: copy this file on its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Client:
    """A silo and what is done with it.

    silo: with `name` and `train`, such as `silos.Silo`. update(params, silo,
    round_index=, rng=) returns an update, such as `training.Update`; evaluate(params,
    silo) returns metrics of the model on the silo's test set. Neither modifies params.
    """

    silo: Any
    update: Callable[..., Any]
    evaluate: Callable[[Params, Any], Mapping[str, float]] | None = None


def load_client(
    entry: str, data: str | Path, settings: Mapping[str, float | str]
) -> Client:
    """Call a silo's function with the place of its data and the run's settings.

    entry: "module:function" or "/path/to/file.py:function"; it is called as
    function(data, settings), data a Path, settings a dict of plain numbers and texts,
    and returns a `Client`. Raises ValueError for an entry of another form, whatever
    importing it raises, and TypeError if it returns something else.
    """
    place, _, name = entry.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(
            f"the client must be module:function or file.py:function, got {entry!r}"
        )
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    client = getattr(module, name)(Path(data), dict(settings))
    if not isinstance(client, Client):
        raise TypeError(f"{entry} must return a Client, got {type(client).__name__}")
    return client
