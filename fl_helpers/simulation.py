"""The round loop of a federation, simulated in one process.

Each round: send the global model to the silos that take part, let each train, reduce
their updates to the next global model (McMahan et al. 2017, Algorithm 1). What a silo
does and how updates are reduced are functions that you pass in. Needs torch and tqdm:
copy this file on its own.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

Params = dict[str, Tensor]
Metrics = dict[str, float]
A = TypeVar("A")
B = TypeVar("B")


# client(params, silo, round_index=, rng=): local training; does not modify params, and
# returns an update with .silo, .params, .num_examples, .metrics: `training.Update`.
ClientUpdate = Callable[..., Any]
# check(update, expected, silo=, round_index=, norms=) raises what is wrong, such as
# `exchange.check_update`; may return the norm of the delta, for later rounds' limits.
Check = Callable[..., float | None]


class SiloLike(Protocol):
    """What the round loop needs of a silo: a name that no other silo has."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class Client(Protocol):
    """What a silo does, such as `training.ClientFunctions`.

    evaluate(params, silo): metrics of the silo's model on its own test set; or None.
    draws_only_from_rng: update and evaluate draw no number but from the rng that they
    are given. Only then can silos train in threads: torch has one global generator.
    """

    update: ClientUpdate
    evaluate: Callable[[Params, Any], Metrics] | None
    draws_only_from_rng: bool


@runtime_checkable
class StatefulRule(Protocol):
    """An aggregate that remembers something between rounds, such as `FedAdam`; params
    is the global model that it stands at. It must be new, or resumed with the run."""

    params: Params

    def __call__(self, updates: Iterable[Any]) -> Params: ...
    def state_dict(self) -> Params: ...
    def load_state_dict(self, state: Params) -> None: ...


class CheckpointLike(Protocol):
    """Where a run is kept and gone on from, such as `checkpoint.Checkpoint`.

    every: rounds between two files. run: what must be the same, plain values.
    """

    every: int

    def load(self, run: dict[str, Any], rounds: int) -> dict[str, Any] | None: ...
    def save(self, run: dict[str, Any], content: dict[str, Any]) -> None: ...


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


class NoQuorum(RuntimeError):
    """Too few updates for a round; the rounds before it are in the checkpoint."""


@dataclass(frozen=True)
class Stop:
    """End a run early: when none of the last scores is better than all before.

    metric: a name that the test of a silo's model returns. patience: how many tests
    may be no better.
    """

    metric: str
    patience: int
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if type(self.patience) is not int or self.patience < 1:
            raise ValueError(f"patience must be an integer >= 1, got {self.patience!r}")

    def reached(self, scores: Sequence[float]) -> bool:
        """scores: the mean over silos, one per tested round; NaN is never better."""
        sign = 1 if self.higher_is_better else -1
        ranks = [-math.inf if math.isnan(s) else sign * s for s in scores]
        before = ranks[: -self.patience]
        return bool(before) and max(ranks) == max(before)


@dataclass(frozen=True)
class Terms:
    """What silos and orchestrator agree on for each round.

    silos_per_round: how many silos are drawn for each round; None is all.
    keep_local: names of entries that never leave a silo: each goes on with its own, and
        they are neither averaged nor counted in bytes. Normalisation layers make this
        FedBN (Li et al. 2021), the head FedPer (Arivazhagan et al. 2019), and what is
        not trained (`training.frozen_entries`) a network of which only a part travels.
    quorum: how many updates a round needs. A silo that fails is asked once more, with
        the same draws, and then left out of the round; the average is over those that
        came. With fewer, NoQuorum: run again, with the same checkpoint, to go on.
        None: the first failure ends the run, as it is.
    deadline: seconds for the silos of one round, which then train all at the same time,
        each in a thread of its own. What comes later is never used: it started from an
        old model, and the result would depend on the clock. A late thread cannot be
        stopped. Needs a client that draws_only_from_rng.
    check: called before an update is used, with the entries that were sent out and
        `History.norms`; what it refuses is missing, and not asked again.
        None: aggregate decides, and what it refuses ends the run.
    stop: when to end before the last round. Needs a client that evaluates.
    """

    silos_per_round: int | None = None
    keep_local: Collection[str] = ()
    quorum: int | None = None
    deadline: float | None = None
    check: Check | None = None
    stop: Stop | None = None


@dataclass(frozen=True)
class Execution:
    """How a run is carried out here; nothing in it changes the final model.

    workers: silos that train at the same time, each in a thread with one intra-op
        thread; None leaves it to `default_workers`. One if the client does not promise
        draws_only_from_rng.
    checkpoint: where to go on from, and to write to.
    evaluate_every: rounds between two tests; the last round is always tested.
    on_round: called as on_round(record, params) after each round.
    progress: show a bar with the time left, and balanced accuracy or training loss.
    """

    workers: int | None = None
    checkpoint: CheckpointLike | None = None
    evaluate_every: int = 1
    on_round: Callable[[RoundRecord, Params], None] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        _check_positive(evaluate_every=self.evaluate_every)
        _check_positive(workers=1 if self.workers is None else self.workers)


class RoundRecord(TypedDict):
    """What happened in one round; dictionaries are by name of silo."""

    round: int  # from 0
    silos: list[str]  # whose updates were used
    missing: dict[str, str]  # why not
    train: dict[str, Metrics]
    test: dict[str, Metrics]  # empty in a round without a test
    norms: dict[str, float]  # what check returned
    bytes_down: int  # all silos together
    bytes_up: int  # of the updates used
    seconds: float
    stopped: bool  # whether `Terms.stop` ended the run here


@dataclass
class History:
    """What happened: the final params and one record per round.

    local: {silo: entries of the state that it never sent}, empty without `keep_local`.
    """

    params: Params
    rounds: list[RoundRecord] = field(default_factory=list)
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
        return [norm for r in self.rounds for norm in r["norms"].values()]

    @property
    def bytes_sent(self) -> int:
        """Bytes in both directions, all rounds and silos."""
        return sum(r["bytes_down"] + r["bytes_up"] for r in self.rounds)


def run_rounds(
    params: Params,
    silos: Sequence[SiloLike],
    client: Client | ClientUpdate,
    aggregate: StatefulRule | Callable[[Iterable[Any]], Params],
    *,
    rounds: int,
    seed: int,
    terms: Terms = Terms(),
    execution: Execution = Execution(),
) -> History:
    """Train one global model for a number of rounds.

    params: initial global model {entry: tensor}, not modified.
    silos: reduced in the order of their names, whatever order they are given in.
    client: a function client(params, silo, round_index=, rng=), run inside a silo, or a
        `Client`, which can also test. What torch draws there, from rng or without a
        generator, depends on (seed, silo name, round) only: see `draws_from`.
    aggregate: gets an iterator; at most 2 * workers updates exist at a time.
    rounds: how many in all, with those in a checkpoint.
    seed: of every draw.
    terms, execution: see `Terms` and `Execution`.

    Raises ValueError for what cannot be meant, NoQuorum, and what client and aggregate
    raise.
    """
    silos = sorted(silos, key=lambda silo: silo.name)
    run = _Run(_as_client(client), aggregate, seed, terms)
    _check_run(silos, rounds)
    _check_terms(terms, len(silos), run.client)
    history = _first_history(params, silos, terms.keep_local)
    if terms.keep_local and not history.params:
        raise ValueError("keep_local names every entry; that is `run_alone`")
    return _play(run, history, silos, rounds, execution)


def _play(
    run: _Run,
    history: History,
    silos: Sequence[SiloLike],
    rounds: int,
    execution: Execution,
) -> History:
    """The loop itself: goes on from history, or from the checkpoint if there is one."""
    checkpoint, stop = execution.checkpoint, run.terms.stop
    run_id = _run_id(run, silos, history)
    found = checkpoint.load(run_id, rounds) if checkpoint else None
    if found:
        history = History(found["params"], found["rounds"], found["local"])
        if isinstance(run.aggregate, StatefulRule):
            run.aggregate.load_state_dict(found["memory"])
    _check_aggregate(run.aggregate, history.params)
    done, several = len(history.rounds), run.terms.silos_per_round or len(silos)
    workers = _workers(run.client, execution, history.params_of(silos[0].name), several)
    with _Pool(workers) as pool, _bar(rounds, done, execution.progress) as bar:
        for round_index in range(done, rounds):
            if _stopped(history, stop):  # also a run that is resumed
                break
            started = time.perf_counter()
            chosen = _sample(silos, run.terms.silos_per_round, run.seed, round_index)
            record = _play_round(run, history, chosen, pool)
            last = round_index == rounds - 1
            if last or (round_index + 1) % execution.evaluate_every == 0:
                record["test"] = _test(run, history, silos, pool)
            record["seconds"] = time.perf_counter() - started
            history.rounds.append(record)
            record["stopped"] = _stopped(history, stop)
            due = last or record["stopped"]
            if checkpoint and (due or (round_index + 1) % checkpoint.every == 0):
                checkpoint.save(run_id, _content(history, run.aggregate))
            if execution.on_round:
                execution.on_round(record, history.params)
            _advance(bar, record)
    return history


def run_alone(
    params: Params | dict[str, Params],
    silos: Sequence[SiloLike],
    client: Client | ClientUpdate,
    *,
    rounds: int,
    seed: int,
    execution: Execution = Execution(),
) -> dict[str, Params]:
    """Train one model per silo without any exchange: the reference for a federation.

    Each silo starts from params and does what it would do in `run_rounds`, with the
    same random draws, but goes on from its own result instead of the average: a run in
    which every entry stays local.

    params: as in `run_rounds`, or what another call returned, to go on from there.
    silos, client: as in `run_rounds`.
    rounds, seed: as in `run_rounds`.
    execution: only workers and progress count.

    Returns {silo name: its final params}. Raises ValueError as `run_rounds` does, and
    for a silo that params lack.
    """
    silos = sorted(silos, key=lambda silo: silo.name)
    _check_run(silos, rounds)
    own = _as_client(client)
    only_train = _Function(own.update, draws_only_from_rng=own.draws_only_from_rng)
    starts = _starts(params, silos)
    kept = tuple(starts[silos[0].name])
    run = _Run(only_train, _average_nothing, seed, Terms(keep_local=kept))
    here = Execution(execution.workers, progress=execution.progress)
    history = History({}, local=starts)
    return _play(run, history, silos, rounds, here).local


def _starts(
    params: Params | dict[str, Params], silos: Sequence[SiloLike]
) -> dict[str, Params]:
    """Where each silo starts: from params, or from its own."""
    if all(isinstance(value, Tensor) for value in params.values()):
        return {silo.name: params for silo in silos}
    lacking = [silo.name for silo in silos if silo.name not in params]
    if lacking:
        raise ValueError(
            f"params are those of {sorted(params)}; they lack {lacking}, which must "
            "have been in the earlier run, too"
        )
    return {silo.name: params[silo.name] for silo in silos}


def _average_nothing(updates: Iterable[Any]) -> Params:
    for _ in updates:
        pass
    return {}


def silo_rng(seed: int, silo: str, round_index: int) -> torch.Generator:
    """The generator of one silo in one round: the same on every engine.

    It depends on its arguments only (through a hash), never on what ran before.
    """
    return torch.Generator().manual_seed(_derived_seed(seed, silo, round_index))


@contextmanager
def draws_from(rng: torch.Generator) -> Iterator[None]:
    """For one silo's turn: what torch draws without a generator depends on rng only.

    That is dropout, initial weights, augmentation, the order of a DataLoader and the
    draws of its worker processes: torch's global generators, of the CPU and of GPUs,
    are seeded here and restored afterwards. rng is not advanced. Outside of it are the
    generators of numpy and Python, and threads of a client's own. For one turn at a
    time in a process: the global generators belong to all its threads.
    """
    seed = _derived_seed("draws", rng.initial_seed())
    cpu, gpus = torch.get_rng_state(), []
    if _has_gpu():
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        torch.cuda.manual_seed_all(seed)
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


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
class _Function:
    """A client that is a plain function."""

    update: ClientUpdate
    evaluate: None = None
    draws_only_from_rng: bool = False


@dataclass(frozen=True)
class _Run:
    """What stays the same in all rounds."""

    client: Client
    aggregate: Callable[[Iterable[Any]], Params]
    seed: int
    terms: Terms


@dataclass(frozen=True)
class _Note:
    """What is kept of an update that was used."""

    silo: str
    train: Metrics
    size: int
    norm: float | None


def _as_client(client: Client | ClientUpdate) -> Client:
    return client if isinstance(client, Client) else _Function(client)


def _workers(
    client: Client, execution: Execution, params: Params, num_silos: int
) -> int:
    if not client.draws_only_from_rng:
        return 1
    return execution.workers or default_workers(params, num_silos)


def _play_round(
    run: _Run, history: History, chosen: Sequence[SiloLike], pool: _Pool
) -> RoundRecord:
    """Scatter, train, gather: sets history.params and returns the round's record.

    aggregate pulls the updates one by one through `_accept` and `_train`, so that few
    exist at a time; the record is made of the notes when all have gone by.
    """
    bytes_down = state_bytes(history.params) * len(chosen)
    notes: list[_Note] = []
    missing: dict[str, str] = {}
    kept: dict[str, Params] = {}
    answers = zip(chosen, _train(run, history, chosen, pool), strict=True)
    history.params = run.aggregate(_accept(run, history, answers, notes, missing, kept))
    history.local |= kept
    return RoundRecord(
        round=len(history.rounds),
        silos=[note.silo for note in notes],
        missing=missing,
        train={note.silo: note.train for note in notes},
        test={},
        norms={n.silo: float(n.norm) for n in notes if n.norm is not None},
        bytes_down=bytes_down,
        bytes_up=sum(note.size for note in notes),
        seconds=0.0,
        stopped=False,
    )


def _train(
    run: _Run, history: History, chosen: Sequence[SiloLike], pool: _Pool
) -> Iterator[Any]:
    """What each silo answers, in order: its update, or its exception."""
    round_index, deadline = len(history.rounds), run.terms.deadline
    threads = pool.threads or deadline is not None

    def train(silo: SiloLike) -> Any:
        for _ in range(1 if run.terms.quorum is None else 2):
            try:
                own = history.params_of(silo.name)
                return _update(run, own, silo, round_index, threads)
            except Exception as error:
                failure = error
        return failure

    with _promised(run.client):
        yield from pool.map(train, chosen, deadline)


def _update(
    run: _Run, params: Params, silo: SiloLike, round_index: int, threads: bool
) -> Any:
    """One silo's turn."""
    rng = silo_rng(run.seed, silo.name, round_index)
    with nullcontext() if threads else draws_from(rng):
        return run.client.update(params, silo, round_index=round_index, rng=rng)


def _accept(
    run: _Run,
    history: History,
    answers: Iterable[tuple[SiloLike, Any]],
    notes: list[_Note],
    missing: dict[str, str],
    kept: dict[str, Params],
) -> Iterator[Any]:
    """Yield the updates that count, without what silos keep, and write down what came:
    a note of each, or why a silo is missing, and what it keeps, which is its own also
    if check refuses the rest. Raises NoQuorum after the last one."""
    round_index, norms, failure = len(history.rounds), history.norms, None
    for silo, answer in answers:
        try:
            if isinstance(answer, Exception):
                raise answer
            update, own = _divide(answer, history.local.get(silo.name, {}))
            if own and all(bool(value.isfinite().all()) for value in own.values()):
                kept[silo.name] = own  # else it goes on with what it had
            about = {"silo": silo.name, "round_index": round_index, "norms": norms}
            check = run.terms.check
            norm = check(update, history.params, **about) if check else None
            train, size = _plain(update.metrics), state_bytes(update.params)
        except Exception as error:
            if run.terms.quorum is None:
                raise
            missing[silo.name] = f"{type(error).__name__}: {error}"
            failure = error
        else:
            notes.append(_Note(silo.name, train, size, norm))
            yield update
    if len(notes) < (run.terms.quorum or 0):
        raise NoQuorum(
            f"round {round_index}: {len(notes)} updates, the quorum is "
            f"{run.terms.quorum}; missing: {missing}; run again when more silos are "
            "there: with a checkpoint, it goes on from the last round in it"
        ) from failure


def _test(
    run: _Run, history: History, silos: Sequence[SiloLike], pool: _Pool
) -> dict[str, Metrics]:
    """Metrics of each silo's model on its own test set."""
    evaluate = run.client.evaluate
    if evaluate is None:
        return {}

    def test(silo: SiloLike) -> Metrics:
        rng = silo_rng(run.seed, f"{silo.name}/test", len(history.rounds))
        with nullcontext() if pool.threads else draws_from(rng):
            return _plain(evaluate(history.params_of(silo.name), silo))

    names = [silo.name for silo in silos]
    with _promised(run.client):
        return dict(zip(names, pool.map(test, silos), strict=True))


def _stopped(history: History, stop: Stop | None) -> bool:
    """Whether the tests so far end the run; a silo counts where its score is finite."""
    if stop is None:
        return False
    scores = []
    for tests in (record["test"] for record in history.rounds if record["test"]):
        values = [test[stop.metric] for test in tests.values() if stop.metric in test]
        if not values:
            names = sorted({name for test in tests.values() for name in test})
            raise ValueError(f"stop needs the metric {stop.metric!r}; there is {names}")
        values = [value for value in values if math.isfinite(value)]
        scores.append(sum(values) / len(values) if values else math.nan)
    return stop.reached(scores)


@contextmanager
def _promised(client: Client) -> Iterator[None]:
    """Hold a client to its word, `draws_only_from_rng`."""
    before = torch.get_rng_state()
    yield
    if client.draws_only_from_rng and not torch.get_rng_state().equal(before):
        raise RuntimeError(
            "something drew from torch's global generator while silos trained in "
            "threads, so the result depends on their timing; if it was the client, say "
            "draws_only_from_rng=False, else give it a generator of its own"
        )


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


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


def _first_history(
    params: Params, silos: Sequence[SiloLike], keep_local: Collection[str]
) -> History:
    """Before the first round: every silo's own entries are those of params."""
    unknown = sorted(set(keep_local) - params.keys())
    if unknown:
        raise ValueError(f"keep_local names entries that params lacks: {unknown[:3]}")
    own = {name: value for name, value in params.items() if name in keep_local}
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
    kept = {  # what did not change is in memory, and in a checkpoint, only once
        name: old if old.equal(update.params[name]) else update.params[name]
        for name, old in own.items()
    }
    return replace(update, params=sent), kept


def _plain(metrics: Metrics) -> Metrics:
    """Numbers as Python's own: a checkpoint takes no numpy scalars."""
    return {name: float(value) for name, value in metrics.items()}


class _Pool:
    """Maps a function over silos in threads; results come in order, a few at a time.

    One intra-op thread of torch for each silo, as found afterwards: more would wait for
    each other on a busy machine, and change the order of additions, so the last bits.
    With a deadline, in seconds, all run at once, and who is late gives a TimeoutError.
    """

    def __init__(self, workers: int) -> None:
        self.threads, self._ahead = workers > 1, 2 * workers - 1
        alike = {"initializer": torch.set_num_threads, "initargs": (1,)}
        self._executor = ThreadPoolExecutor(workers, **alike) if workers > 1 else None
        self._before = torch.get_num_threads()

    def __enter__(self) -> _Pool:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

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


def _run_id(run: _Run, silos: Sequence[SiloLike], first: History) -> dict[str, Any]:
    """What must be the same for a run to go on from a file.

    A run may be given more rounds, another quorum or other workers and be the same. The
    model counts by its layout and the rule by its name, since their values are in the
    file. Plain values only: the file is read without running code.
    """
    params = first.params_of(silos[0].name)
    layout = [f"{k} {tuple(v.shape)} {v.dtype}" for k, v in sorted(params.items())]
    stateful = isinstance(run.aggregate, StatefulRule)
    return {
        "seed": run.seed,
        "silos": [silo.name for silo in silos],
        "silos_per_round": run.terms.silos_per_round,
        "model": hashlib.blake2b("\n".join(layout).encode(), digest_size=4).hexdigest(),
        "keep_local": sorted(run.terms.keep_local),
        "memory": type(run.aggregate).__name__ if stateful else None,
    }


def _content(history: History, aggregate: Any) -> dict[str, Any]:
    """Everything that the next round depends on, and what has been."""
    stateful = isinstance(aggregate, StatefulRule)
    memory = aggregate.state_dict() if stateful else {}
    kept = {"params": history.params, "local": history.local, "memory": memory}
    return kept | {"rounds": history.rounds}


def _bar(total: int, done: int, show: bool) -> tqdm:
    how = {"disable": not show, "leave": False, "dynamic_ncols": True}
    return tqdm(total=total, initial=done, unit="round", file=sys.stdout, **how)


def _advance(bar: tqdm, record: RoundRecord) -> None:
    for kind, name in (("test", "balanced_accuracy"), ("train", "train_loss")):
        values = [m[name] for m in record[kind].values() if name in m]
        if values:
            bar.set_postfix({name: sum(values) / len(values)})
            break
    bar.update()


def _check_aggregate(aggregate: Any, params: Params) -> None:
    """Refuse a rule that stands at another model: made for one, or used before."""
    if not isinstance(aggregate, StatefulRule):
        return
    own = aggregate.params
    differ = [k for k, v in params.items() if k not in own or not own[k].equal(v)]
    if differ:
        raise ValueError(
            f"this {type(aggregate).__name__} does not stand at the params of this run "
            f"({differ[:3]} differ): it was made for others or has been used; make a "
            "new one for each run"
        )


def _check_run(silos: Sequence[SiloLike], rounds: int) -> None:
    names = [silo.name for silo in silos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names:
        raise ValueError("no silos to train on")
    if twice:
        raise ValueError(f"silo names used twice: {twice}; give each silo its own name")
    _check_positive(rounds=rounds)


def _check_terms(terms: Terms, num_silos: int, client: Client) -> None:
    some, quorum, deadline = terms.silos_per_round, terms.quorum, terms.deadline
    if some is not None and not 1 <= some <= num_silos:
        raise ValueError(f"silos_per_round must be 1 to {num_silos} (all), got {some}")
    asked = some or num_silos
    if quorum is not None and not 1 <= quorum <= asked:
        raise ValueError(
            f"quorum must be 1 to {asked} (all that are asked), got {quorum}"
        )
    if deadline is not None and not deadline > 0:
        raise ValueError(f"deadline must be > 0 seconds, got {deadline}")
    if deadline is not None and not client.draws_only_from_rng:
        raise ValueError(
            "with a deadline, silos train in threads, which share torch's global "
            "generator; if update draws only from its rng, as train_locally does, say "
            "ClientFunctions(update, draws_only_from_rng=True)"
        )
    if terms.stop and client.evaluate is None:
        raise ValueError(
            f"stop needs {terms.stop.metric!r} of each round, and this client has no "
            "evaluate; give it one: ClientFunctions(update, evaluate)"
        )
