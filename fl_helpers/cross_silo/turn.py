"""A silo's turn in a round: what it is sent, checked, trained on, and divided.

The same on every engine, and equal to `simulation.run_rounds`: an engine moves files,
and what a silo does with them is here. The silo names one function, which finds its
data and returns a `Client`; a run sends plain settings, never code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Ledger, read_model
from fl_helpers.simulation import Params, draws_from, silo_rng
from fl_helpers.training import Update, num_examples

if TYPE_CHECKING:
    from fl_helpers.cross_silo.account import SiloAccount

ACCOUNT = "account.jsonl"  # in a silo's own folder
MOVED = {"fl_helpers.hospital": "fl_helpers.cross_silo.hospital"}  # kits name these


class WrongData(ValueError):
    """The data are another silo's."""

    code = "DATA_UNREADABLE"  # all that leaves the silo of it


class NotBooked(ValueError):
    """A silo has a privacy budget, and its client trained without the account."""

    code = "TURN_NOT_BOOKED"  # all that leaves the silo of it


@dataclass(frozen=True)
class Place:
    """What is a silo's own in a run, beside its data.

    folder: for what outlives runs, such as a privacy account. run: the run's name and
    id. epsilon, delta: the silo's privacy budget, by its own settings; None is none.
    only: what this process does with the account, see `SiloAccount`.
    """

    folder: Path
    run: str
    epsilon: float | None = None
    delta: float | None = None
    only: str = ""

    def account(self, silo: str) -> SiloAccount:
        """The silo's privacy account. Raises ValueError if it has no budget."""
        from fl_helpers.cross_silo.account import SiloAccount
        from fl_helpers.privacy import Budget

        if self.epsilon is None or self.delta is None:
            raise ValueError(
                f"silo {silo!r} has no privacy budget; set epsilon and delta in the "
                "silo's own settings"
            )
        budget, path = Budget(self.epsilon, self.delta), self.folder / ACCOUNT
        return SiloAccount(path, budget, silo=silo, only=self.only)

    def check_booked(self, silo: str, round_index: int) -> None:
        """Raises NotBooked if the silo has a budget that this turn cost nothing."""
        if self.epsilon is None:
            return
        about = {"run": self.run, "round": round_index}
        if not any(about.items() <= line.items() for line in self.account(silo).lines):
            raise NotBooked(
                f"{silo!r} has a privacy budget, but its client booked nothing; train "
                "with place.account, as hospital.private_client does"
            )


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
    entry: str,
    data: str | Path,
    settings: Mapping[str, float | str],
    *,
    silo: str,
    place: Place | None = None,
) -> Client:
    """Call a silo's function with its data's folder and the run's settings.

    entry: "module:function" or "/path/to/file.py:function"; it is called as
    function(data, settings), data a Path, settings a dict of plain numbers and texts,
    and returns a `Client`; one with three parameters gets the place, too. silo: the
    name that the data must have.
    Raises ValueError for an entry of another form and for data of another silo,
    whatever importing the function raises, and TypeError if it returns something else.
    """
    try:
        function = load_function(entry)
    except Exception as error:
        error.code = "CLIENT_UNKNOWN"  # all that leaves a silo of it
        raise
    given: list[Any] = [Path(data), dict(settings)]
    if len(inspect.signature(function).parameters) > 2:
        if place is None:
            raise ValueError(
                f"{entry} needs a place of its own; there is none here (on Azure ML, "
                "name the silos' account in silos.yaml)"
            )
        given.append(place)
    client = function(*given)
    if not isinstance(client, Client):
        raise TypeError(f"{entry} must return a Client, got {type(client).__name__}")
    if client.silo.name != silo:
        raise WrongData(f"the data are of {client.silo.name!r}, this is {silo!r}")
    return client


def load_function(entry: str) -> Callable[..., Any]:
    """The function that an entry names, see `load_client`.

    Raises ValueError for an entry of another form, ImportError with the new place for
    one that has moved, and whatever importing it raises.
    """
    place, _, name = entry.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(
            f"the client must be module:function or file.py:function, got {entry!r}"
        )
    if place in MOVED:
        raise ImportError(
            f"{entry!r} is of an older version; write {MOVED[place]}:{name} in the "
            "silo's settings (client: in silos.yaml, or in the kit's local/site.json)"
        )
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def receive(
    run: Run,
    folder: str | Path,
    own: Params,
    *,
    round_index: int,
    expected: Params | None = None,
    ledger: Ledger | None = None,
) -> Params:
    """The model that a turn starts from: what was sent, checked, and the silo's own.

    folder: what `exchange.write_model` wrote, after `round_index` rounds. own: entries
    that never leave the silo, as they are now. expected: what the silo takes, by its
    own agreement; None is what the run says. Returns the entries in the model's order.
    Raises `exchange.Refused` for what is not that model.
    """
    expected = run.shared if expected is None else expected
    sent = read_model(folder, expected, round_index=round_index, ledger=ledger)
    return {name: (sent | own)[name] for name in run.params}


def train(
    run: Run, client: Client, params: Params, *, round_index: int
) -> tuple[Update, Params]:
    """Test the model, train it, and divide the result.

    params: from `receive`, not modified. Returns the update that may be released, with
    the test's metrics, and the entries that stay in the silo; if they are not finite,
    those that it had.
    """
    metrics = _tested(run, client, params, round_index) if run.evaluate else {}
    rng = silo_rng(run.seed, client.silo.name, round_index)
    with draws_from(rng):
        update = client.update(params, client.silo, round_index=round_index, rng=rng)
    own = {name: update.params[name] for name in sorted(run.keep_local)}
    if not all(bool(value.isfinite().all()) for value in own.values()):
        own = {name: params[name] for name in own}
    sent = {k: v for k, v in update.params.items() if k not in own}
    return replace(update, params=sent, metrics={**update.metrics, **metrics}), own


def test(run: Run, client: Client, params: Params, *, round_index: int) -> Update:
    """Test the model only: its metrics, as an update without parameters."""
    metrics = _tested(run, client, params, round_index)
    return Update(client.silo.name, {}, num_examples(client.silo), metrics)


def _tested(
    run: Run, client: Client, params: Params, round_index: int
) -> dict[str, float]:
    """Metrics on the silo's test set, those that are numbers, as "test_..."."""
    if client.evaluate is None:
        return {}
    # `run_rounds` tests the same model at the end of the round before.
    rng = silo_rng(run.seed, f"{client.silo.name}/test", round_index - 1)
    with draws_from(rng):
        found = client.evaluate(params, client.silo)
    metrics = {f"test_{name}": float(value) for name, value in found.items()}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Tables:
    """A silo's rows for an analysis, see `hospital_tables.load_tables`.

    patients: how many. tables: what functions take, by the name of their module or any
    other. rows: bool [patients], for a table that holds only some of them. columns:
    [patients] numbers each, by which a question may choose a cohort.
    """

    patients: int
    tables: Mapping[str, Any]
    rows: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
