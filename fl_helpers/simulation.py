"""The round loop of a federation, simulated in one process.

Each round: send the global model to the silos that take part, let each train, reduce
their updates to the next global model (McMahan et al. 2017, Algorithm 1). What a silo
does and how updates are reduced are functions that you pass in. Needs torch and tqdm:
copy this file on its own.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

Params = dict[str, Tensor]
Metrics = dict[str, float]
A = TypeVar("A")
B = TypeVar("B")


class SiloLike(Protocol):
    """What the round loop needs of a silo: a name that no other silo has."""

    @property
    def name(self) -> str: ...


class ClientUpdate(Protocol):
    """Local training: gets the global params (not to be modified), returns an update
    with .silo, .params, .num_examples and .metrics."""

    def __call__(
        self, params: Params, silo: Any, *, round_index: int, rng: torch.Generator
    ) -> Any: ...


class Check(Protocol):
    """Raises what is wrong with an update, such as `exchange.check_update`; may return
    the norm of its delta, for the limits of later rounds."""

    def __call__(
        self,
        update: Any,
        expected: Params,
        *,
        silo: str,
        round_index: int,
        norms: Sequence[float],
    ) -> float | None: ...


class NoQuorum(RuntimeError):
    """Too few updates for a round; the rounds before it are in the checkpoint."""


@dataclass
class History:
    """What happened: the final params and one record per round.

    A record holds round (from 0), silos (names whose updates were used), missing
    ({silo: why not}), train and test ({silo: {metric: value}}), norms ({silo: what
    check returned}), bytes_down and bytes_up (all silos together; of the updates used),
    seconds.
    local: {silo: entries of the state that it never sent}, empty without `keep_local`.
    """

    params: Params
    rounds: list[dict[str, Any]] = field(default_factory=list)
    local: dict[str, Params] = field(default_factory=dict)

    def params_of(self, silo: str) -> Params:
        """The model as one silo has it: the global entries and its own."""
        return self.params | self.local.get(silo, {})

    def per_silo(self, metric: str) -> dict[str, list[float]]:
        """One value per evaluated round and silo: {silo: [value, ...]}."""
        tested = [record["test"] for record in self.rounds if record["test"]]
        names = tested[-1] if tested else {}
        return {name: [test[name][metric] for test in tested] for name in names}

    def mean(self, metric: str) -> list[float]:
        """Mean over silos, each counted once, per evaluated round."""
        curves = self.per_silo(metric).values()
        return [sum(values) / len(values) for values in zip(*curves, strict=True)]

    @property
    def norms(self) -> list[float]:
        """Norms of the deltas used so far, as check returned them."""
        return [norm for r in self.rounds for norm in r.get("norms", {}).values()]

    @property
    def bytes_sent(self) -> int:
        """Bytes in both directions, all rounds and silos."""
        return sum(r["bytes_down"] + r["bytes_up"] for r in self.rounds)


def run_rounds(
    params: Params,
    silos: Sequence[SiloLike],
    client_update: ClientUpdate,
    aggregate: Callable[[Iterable[Any]], Params],
    *,
    rounds: int,
    seed: int,
    evaluate: Callable[[Params, Any], Metrics] | None = None,
    evaluate_every: int = 1,
    silos_per_round: int | None = None,
    keep_local: Collection[str] = (),
    quorum: int | None = None,
    deadline: float | None = None,
    check: Check | None = None,
    workers: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1,
    on_round: Callable[[dict[str, Any], Params], None] | None = None,
    progress: bool = True,
) -> History:
    """Train one global model for a number of rounds.

    params: initial global model, not modified. silos: reduced in the order of their
    names, whatever order they are given in. client_update(params, silo, round_index=,
    rng=) runs inside a silo; rng depends on (seed, silo name, round) only. If it has an
    attribute `together`, together([params, ...], silos, round_index=, rngs=) makes all
    updates of a round at once, for example with `training.train_together`; after a
    FloatingPointError, or with a deadline, silos are called one by one.
    aggregate(updates) gets an iterator; at most 2 * workers updates exist at a time. If
    it remembers something between rounds, it has `params`, the global model it stands
    at, and `state_dict` / `load_state_dict`; it must be new, or resumed with the run.
    evaluate(params, silo): metrics of the silo's model on its own test set, every
    `evaluate_every` rounds and after the last. silos_per_round: how many silos are
    drawn for each round; None is all.
    keep_local: names of entries that never leave a silo: each goes on with its own, and
    they are neither averaged nor counted in bytes. Normalisation layers make this
    FedBN (Li et al. 2021), the head FedPer (Arivazhagan et al. 2019).

    quorum: how many updates a round needs. A silo that fails is asked once more, with
    the same draws, and then left out of the round; the average is over those that
    came. With fewer, NoQuorum: run again, with the same checkpoint, to go on. None: the
    first failure ends the run, as it is.
    deadline: seconds for the silos of one round, which then train all at the same time,
    each in a thread of its own. What comes later is never used: it started from an old
    model, and the result would depend on the clock. A late thread cannot be stopped.
    check(update, expected, silo=, round_index=, norms=), such as
    `exchange.check_update`, sees each update before it is used, with the entries that
    were sent out and `History.norms`; what it refuses is missing, and not asked again.
    Without it, aggregate decides, and what it refuses ends the run.

    workers: silos that train at the same time, each in a thread with one intra-op
    thread; None leaves it to `default_workers`. The result is the same for any number.
    checkpoint: a file, written every `checkpoint_every` rounds; if it exists, the run
    goes on from it and ends with the same bits as one that was never interrupted: it
    also holds what silos keep and what aggregate remembers. It knows the seed, silos,
    sampling and model, not your functions and their settings: give each algorithm a
    file of its own.
    on_round(record, params) is called after each round. progress: show a bar with the
    round, time left, and the mean balanced accuracy or training loss.
    """
    silos = sorted(silos, key=lambda silo: silo.name)
    _check_run(silos, rounds, silos_per_round, workers)
    _check_positive(evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
    terms = _Terms(quorum, deadline, check)
    _check_terms(terms, silos_per_round or len(silos))
    history = _first_history(params, silos, keep_local)
    run_id = {"seed": seed, "silos": [silo.name for silo in silos]}
    run_id |= {"silos_per_round": silos_per_round, "model": _fingerprint(params)}
    run_id |= {"keep_local": sorted(keep_local), "memory": _memory_kind(aggregate)}
    if checkpoint is not None and Path(checkpoint).exists():
        history = _load_checkpoint(Path(checkpoint), run_id, rounds, aggregate)
    done = len(history.rounds)
    _check_aggregate(aggregate, history.params)
    workers = workers or default_workers(params, silos_per_round or len(silos))
    with _worker_pool(workers) as pool, _bar(rounds, done, progress) as bar:
        for round_index in range(done, rounds):
            started = time.perf_counter()
            chosen = _sample(silos, silos_per_round, seed, round_index)
            record = _play_round(
                history, chosen, client_update, aggregate, seed, terms, pool
            )
            last = round_index == rounds - 1
            if evaluate and (last or (round_index + 1) % evaluate_every == 0):
                record["test"] = _test(history, silos, evaluate, pool)
            record["seconds"] = time.perf_counter() - started
            history.rounds.append(record)
            if checkpoint and (last or (round_index + 1) % checkpoint_every == 0):
                _save_checkpoint(Path(checkpoint), run_id, history, aggregate)
            if on_round:
                on_round(record, history.params)
            _advance(bar, history)
    return history


def run_alone(
    params: Params,
    silos: Sequence[SiloLike],
    client_update: ClientUpdate,
    *,
    rounds: int,
    seed: int,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Params]:
    """Train one model per silo without any exchange: the reference for a federation.

    Each silo starts from params and does what it would do in `run_rounds`, with the
    same random draws, but goes on from its own result instead of the average. Returns
    {silo name: its final params}. Arguments as in `run_rounds`.
    """
    silos = sorted(silos, key=lambda silo: silo.name)
    _check_run(silos, rounds, None, workers)

    def train(silo: SiloLike) -> Params:
        own = params
        for round_index in range(rounds):
            rng = silo_rng(seed, silo.name, round_index)
            own = client_update(own, silo, round_index=round_index, rng=rng).params
        return own

    with _worker_pool(workers or default_workers(params, len(silos))) as pool:
        with _bar(len(silos), 0, progress, unit="silo") as bar:
            result = {}
            for silo, own in zip(silos, pool.map(train, silos), strict=True):
                result[silo.name] = own
                bar.update()
    return result


def leave_one_out(
    silos: Sequence[SiloLike], value: Callable[[list[Any]], float]
) -> dict[str, float]:
    """What each silo's taking part is worth: value(all) - value(all but this one).

    value(silos): trains with these silos and returns one number, more is better, such
    as the mean balanced accuracy on the test sets of *all* silos. It is called once
    for all and once without each. Below 0: the others would be better off without.
    Two silos with the same data are worth nothing each; Shapley values share that out,
    at the price of 2^K trainings (Wang et al. 2020, "A principled approach to data
    valuation for federated learning"). Differences between few silos are noisy: take
    several seeds.
    """
    everyone = value(list(silos))
    return {
        one.name: everyone - value([silo for silo in silos if silo is not one])
        for one in silos
    }


def silo_rng(seed: int, silo: str, round_index: int) -> torch.Generator:
    """The generator of one silo in one round: the same on every engine.

    It depends on its arguments only (through a hash), never on what ran before.
    """
    return torch.Generator().manual_seed(_derived_seed(seed, silo, round_index))


def state_bytes(params: Params) -> int:
    """Bytes of a model's state, as it crosses the wire uncompressed."""
    return sum(value.nbytes for value in params.values())


def default_workers(params: Params, num_silos: int) -> int:
    """How many silos to train at the same time on this machine.

    Convolutions and large matrices leave the interpreter lock, so threads pay; steps
    of a small network without them are mostly Python, and threads only slow them down.
    Tensors that are not on the CPU are left to one worker.
    """
    if any(value.device.type != "cpu" for value in params.values()):
        return 1
    heavy = any(v.dim() >= 4 or v.numel() >= 200_000 for v in params.values())
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: respects containers
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(num_silos, cores) if heavy else 1


@dataclass(frozen=True)
class _Terms:
    """When an update, and a round, counts; see `run_rounds`."""

    quorum: int | None
    deadline: float | None
    check: Check | None


def _play_round(
    history: History,
    chosen: Sequence[SiloLike],
    client_update: ClientUpdate,
    aggregate: Callable[[Iterable[Any]], Params],
    seed: int,
    terms: _Terms,
    pool: _Pool,
) -> dict[str, Any]:
    """Scatter, train, gather: sets history.params and returns the round's record."""
    before, kept, round_index = history.params, {}, len(history.rounds)
    record: dict[str, Any] = {"round": round_index, "silos": [], "missing": {}}
    record |= {"train": {}, "test": {}, "norms": {}}
    record |= {"bytes_down": state_bytes(before) * len(chosen), "bytes_up": 0}

    answers = _train(history, chosen, client_update, seed, terms, pool)

    def received() -> Iterator[Any]:
        failure = None
        for silo, answer in zip(chosen, answers, strict=True):
            try:
                if isinstance(answer, Exception):
                    raise answer
                update, own = _divide(answer, history.local.get(silo.name, {}))
                norm = _checked(update, before, silo.name, history, terms.check)
                _note(record, silo.name, update, norm)
            except Exception as error:
                if terms.quorum is None:
                    raise
                record["missing"][silo.name] = f"{type(error).__name__}: {error}"
                failure = error
            else:
                kept[silo.name] = own
                yield update
        if len(record["train"]) < (terms.quorum or 0):
            raise _no_quorum(record, terms.quorum) from failure

    history.params = aggregate(received())
    history.local |= {name: own for name, own in kept.items() if own}
    return record


def _train(
    history: History,
    chosen: Sequence[SiloLike],
    client_update: ClientUpdate,
    seed: int,
    terms: _Terms,
    pool: _Pool,
) -> Iterator[Any]:
    """What each silo answers, in order: its update, or with a quorum its exception."""
    before, round_index = history.params, len(history.rounds)

    def start(silo: SiloLike) -> tuple[Params, torch.Generator]:
        own = before | history.local.get(silo.name, {})
        return own, silo_rng(seed, silo.name, round_index)

    def train(silo: SiloLike) -> Any:
        for _ in range(1 if terms.quorum is None else 2):
            own, rng = start(silo)
            try:
                return client_update(own, silo, round_index=round_index, rng=rng)
            except Exception as error:
                failure = error
        return failure

    together = getattr(client_update, "together", None)
    if together and terms.deadline is None:
        own, rngs = zip(*map(start, chosen), strict=True)
        with suppress(FloatingPointError):  # then one by one: who is it?
            yield from list(together(own, chosen, round_index=round_index, rngs=rngs))
            return
    yield from pool.map(train, chosen, terms.deadline)


def _checked(
    update: Any, sent: Params, silo: str, history: History, check: Check | None
) -> float | None:
    """What check returns; raises what it raises."""
    if check is None:
        return None
    about = {"silo": silo, "round_index": len(history.rounds)}
    return check(update, sent, **about, norms=history.norms)


def _note(record: dict[str, Any], silo: str, update: Any, norm: float | None) -> None:
    metrics, size = _plain(update.metrics), state_bytes(update.params)
    record["silos"].append(silo)
    record["train"][silo] = metrics
    record["bytes_up"] += size
    if norm is not None:
        record["norms"][silo] = float(norm)


def _no_quorum(record: dict[str, Any], quorum: int) -> NoQuorum:
    return NoQuorum(
        f"round {record['round']}: {len(record['silos'])} updates, the quorum is "
        f"{quorum}; missing: {record['missing']}; run again when more silos are there: "
        "with a checkpoint, it goes on from the last round in it"
    )


def _test(
    history: History,
    silos: Sequence[SiloLike],
    evaluate: Callable[[Params, Any], Metrics],
    pool: _Pool,
) -> dict[str, Metrics]:
    """Metrics of each silo's model on its own test set."""

    def test(silo: SiloLike) -> Metrics:
        return _plain(evaluate(history.params_of(silo.name), silo))

    names = [silo.name for silo in silos]
    return dict(zip(names, pool.map(test, silos), strict=True))


def _first_history(
    params: Params, silos: Sequence[SiloLike], keep_local: Collection[str]
) -> History:
    """Before the first round: every silo's own entries are those of params."""
    unknown = sorted(set(keep_local) - params.keys())
    if unknown:
        raise ValueError(f"keep_local names entries that params lacks: {unknown[:3]}")
    own = {name: value for name, value in params.items() if name in keep_local}
    if len(own) == len(params):
        raise ValueError("keep_local names every entry; that is `run_alone`")
    shared = {name: value for name, value in params.items() if name not in own}
    return History(shared, local={s.name: own for s in silos} if own else {})


def _divide(update: Any, own: Params) -> tuple[Any, Params]:
    """An update without the silo's own entries, and these."""
    if not own:
        return update, own
    missing = sorted(own.keys() - update.params.keys())
    if missing:
        raise ValueError(
            f"silo {update.silo!r} must return the entries it keeps, too; it lacks "
            f"{missing[:3]}"
        )
    sent = {name: value for name, value in update.params.items() if name not in own}
    return replace(update, params=sent), {name: update.params[name] for name in own}


def _plain(metrics: Metrics) -> Metrics:
    """Numbers as Python's own: a checkpoint takes no numpy scalars."""
    return {name: float(value) for name, value in metrics.items()}


def _derived_seed(*parts: int | str) -> int:
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _sample(
    silos: list[SiloLike], how_many: int | None, seed: int, round_index: int
) -> list[SiloLike]:
    """The silos of one round, in order of names, drawn without replacement."""
    if how_many is None or how_many == len(silos):
        return silos
    rng = torch.Generator().manual_seed(_derived_seed(seed, "sampling", round_index))
    drawn = torch.randperm(len(silos), generator=rng)[:how_many]
    return [silos[i] for i in sorted(drawn.tolist())]


class _Pool:
    """Maps a function over silos in threads; results come in order, a few at a time.

    With a deadline, in seconds, all run at once, and who is late gives a TimeoutError.
    """

    def __init__(self, executor: Executor | None, workers: int) -> None:
        self._executor, self._ahead = executor, 2 * workers - 1

    def map(
        self,
        function: Callable[[A], B],
        items: Iterable[A],
        deadline: float | None = None,
    ) -> Iterator[Any]:
        if deadline is not None:
            yield from _until(time.monotonic() + deadline, function, items)
            return
        if self._executor is None:
            yield from map(function, items)
            return
        running: deque[Any] = deque()
        for item in items:
            running.append(self._executor.submit(function, item))
            if len(running) == self._ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _until(
    end: float, function: Callable[[A], B], items: Iterable[A]
) -> Iterator[B | TimeoutError]:
    """Results in order, from threads that are left behind if they are late.

    Daemons, not an executor: the interpreter would wait for its threads to exit.
    """
    started = time.monotonic()
    running = deque(_in_thread(function, item) for item in items)
    while running:
        future = running.popleft()
        if wait([future], timeout=max(0, end - time.monotonic())).done:
            yield future.result()
        else:
            yield TimeoutError(f"no answer within {end - started:.3g} s")


def _in_thread(function: Callable[[A], B], item: A) -> Future[B]:
    future: Future[B] = Future()

    def run() -> None:
        torch.set_num_threads(1)
        try:
            future.set_result(function(item))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def _worker_pool(workers: int) -> Iterator[_Pool]:
    """Threads for the silos, with torch held to one thread in each, restored after.

    One intra-op thread per silo: more would wait for each other on a busy machine, and
    the number of threads changes the order of additions, so the last bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    executor = None
    if workers > 1:
        executor = ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(1,)
        )
    try:
        yield _Pool(executor, workers)
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _memory_kind(aggregate: Any) -> str | None:
    """Name of the rule if it remembers something, None for a plain function."""
    return type(aggregate).__name__ if hasattr(aggregate, "state_dict") else None


def _check_aggregate(aggregate: Any, params: Params) -> None:
    """Refuse a rule that stands at another model: made for one, or used before."""
    if _memory_kind(aggregate) is None:
        return
    own = aggregate.params
    differ = [k for k, v in params.items() if k not in own or not own[k].equal(v)]
    if differ:
        raise ValueError(
            f"this {type(aggregate).__name__} does not stand at the params of this run "
            f"({differ[:3]} differ): it was made for others or has been used; make a "
            "new one for each run"
        )


def _save_checkpoint(
    path: Path, run_id: dict[str, Any], history: History, aggregate: Any
) -> None:
    """Write to a temporary file and rename it: a crash leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    content = {"run": run_id, "params": history.params, "rounds": history.rounds}
    content["local"] = history.local
    content["memory"] = aggregate.state_dict() if run_id["memory"] else {}
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _fingerprint(params: Params) -> str:
    """Fingerprint of the names, shapes and dtypes of a model's state."""
    text = [f"{k} {tuple(v.shape)} {v.dtype}" for k, v in sorted(params.items())]
    return hashlib.blake2b("\n".join(text).encode(), digest_size=4).hexdigest()


def _load_checkpoint(
    path: Path, run_id: dict[str, Any], rounds: int, aggregate: Any
) -> History:
    try:  # our own file; weights_only: tensors and plain values, no code is run
        content = torch.load(path, weights_only=True)
        found, memory = content["run"], content["memory"]
        history = History(content["params"], content["rounds"], content["local"])
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint of run_rounds ({error}); name another file, "
            "or delete it to start from the first round"
        ) from error
    if found != run_id:
        raise ValueError(
            f"{path} belongs to another run: {found}, this one is {run_id}; name "
            "another file, or delete it to start from the first round"
        )
    if len(history.rounds) > rounds:
        raise ValueError(
            f"{path} belongs to another run: {len(history.rounds)} rounds are done, "
            f"this one has {rounds}; ask for more rounds or name another file"
        )
    if run_id["memory"]:
        aggregate.load_state_dict(memory)
    return history


def _bar(total: int, done: int, show: bool, unit: str = "round") -> tqdm:
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        disable=not show,
        leave=False,
        file=sys.stdout,
        dynamic_ncols=True,
    )


def _advance(bar: tqdm, history: History) -> None:
    record = history.rounds[-1]
    tested = [
        m["balanced_accuracy"]
        for m in record["test"].values()
        if "balanced_accuracy" in m
    ]
    losses = [m["train_loss"] for m in record["train"].values() if "train_loss" in m]
    if tested:
        bar.set_postfix_str(
            f"balanced accuracy {100 * sum(tested) / len(tested):.1f} %"
        )
    elif losses:
        bar.set_postfix_str(f"training loss {sum(losses) / len(losses):.3f}")
    bar.update()


def _check_run(
    silos: Sequence[SiloLike],
    rounds: int,
    silos_per_round: int | None,
    workers: int | None,
) -> None:
    names = [silo.name for silo in silos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names:
        raise ValueError("no silos to train on")
    if twice:
        raise ValueError(f"silo names used twice: {twice}; give each silo its own name")
    if silos_per_round is not None and not 1 <= silos_per_round <= len(names):
        raise ValueError(
            f"silos_per_round must be 1 to {len(names)} (all), got {silos_per_round}"
        )
    _check_positive(rounds=rounds, workers=1 if workers is None else workers)


def _check_terms(terms: _Terms, num_silos: int) -> None:
    if terms.quorum is not None and not 1 <= terms.quorum <= num_silos:
        raise ValueError(
            f"quorum must be 1 to {num_silos} (all that are asked), got {terms.quorum}"
        )
    if terms.deadline is not None and not terms.deadline > 0:
        raise ValueError(f"deadline must be > 0 seconds, got {terms.deadline}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
