"""The round loop: what it promises for every strategy, order, crash and thread."""

import copy
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model, linear_model, play
from torch import nn

from fl_helpers import checkpoint
from fl_helpers.aggregation import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedNova,
    FedYogi,
    QFedAvg,
    weighted_average,
)
from fl_helpers.scaffold import ControlVariates, zero_variates
from fl_helpers.simulation import (
    Execution,
    default_workers,
    run_alone,
    silo_rng,
    state_bytes,
)
from fl_helpers.training import (
    PlainSGD,
    ProximalTerm,
    Step,
    evaluate,
    frozen_entries,
    norm_entries,
    sgd_client,
    train_locally,
)


def client(make_model, **options):
    options = dict(epochs=1, lr=0.1, batch_size=8) | options
    template = make_model()

    def client_update(params, silo, *, round_index, rng):
        model = copy.deepcopy(template)
        model.load_state_dict(params)
        return train_locally(model, silo, rng=rng, **options)

    return client_update


def start(make_model):
    torch.manual_seed(0)
    return make_model().state_dict()


def run(silos, make_model=batchnorm_model, **options):
    options = dict(rounds=3, seed=0, threads=True) | options
    return play(
        start(make_model), silos, client(make_model), weighted_average, **options
    )


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_one_silo_is_centralized_training_bit_for_bit(silos):
    silo = silos[0]
    plain = dict(step=Step(PlainSGD(0, 0)))
    history = play(
        start(batchnorm_model),
        [silo],
        client(batchnorm_model, **plain),
        weighted_average,
        rounds=4,
        seed=7,
    )
    model = batchnorm_model()
    model.load_state_dict(start(batchnorm_model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = silo.train
    for round_index in range(4):
        rng = silo_rng(7, silo.name, round_index)
        for batch in torch.randperm(len(x), generator=rng).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert_equal(history.params, model.state_dict())


def test_equal_silos_with_one_full_batch_step_are_a_pooled_step(silos):
    x, y = silos[0].train
    parts = [copy.copy(silos[0]) for _ in range(4)]
    for k, part in enumerate(parts):  # four silos of ten rows each
        part.name, part.train = (
            f"s{k}",
            (x[k * 10 : k * 10 + 10], y[k * 10 : k * 10 + 10]),
        )
    step = client(linear_model, batch_size=40, step=Step(PlainSGD(0, 0)))
    history = play(
        start(linear_model),
        parts,
        step,
        weighted_average,
        rounds=1,
        seed=0,
    )
    model = linear_model()
    model.load_state_dict(start(linear_model))
    nn.functional.cross_entropy(model(x), y).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(history.params[name], weight - 0.1 * weight.grad)


def test_the_number_of_workers_does_not_change_a_bit(silos):
    expected = run(silos, workers=1).params
    assert_equal(run(silos, workers=2).params, expected)
    assert not torch.equal(run(silos, seed=1).params["3.weight"], expected["3.weight"])


def test_channels_last_depends_neither_on_workers_nor_on_who_had_the_model(silos):
    """A worker's model is new in one engine, and used before in another."""
    step, models = Step(channels_last=True), threading.local()
    template = batchnorm_model()

    def reused(params, silo, *, round_index, rng):
        if not hasattr(models, "own"):
            models.own = copy.deepcopy(template)
        models.own.load_state_dict(params)
        how = dict(epochs=1, lr=0.1, batch_size=8, rng=rng, step=step)
        return train_locally(models.own, silo, **how)

    how = dict(rounds=3, seed=0, threads=True)
    work = start(batchnorm_model), silos
    new = client(batchnorm_model, step=step)
    expected = play(*work, new, weighted_average, workers=1, **how).params
    for update in (new, reused):
        for workers in (1, 2):
            history = play(*work, update, weighted_average, workers=workers, **how)
            assert_equal(history.params, expected)


def test_alone_is_a_federation_of_one(silos):
    args = dict(rounds=3, seed=0, execution=Execution(progress=False))
    alone = run_alone(start(batchnorm_model), silos, client(batchnorm_model), **args)
    for silo in silos:
        assert_equal(alone[silo.name], run([silo]).params)


def test_alone_goes_on_from_what_each_silo_had(silos):
    """Two calls of a round are one of two rounds, if each round draws the same."""
    own = client(batchnorm_model)

    def same_draws(params, silo, *, round_index, rng):
        return own(params, silo, round_index=0, rng=silo_rng(0, silo.name, 0))

    args = dict(seed=0, execution=Execution(progress=False))
    first = run_alone(start(batchnorm_model), silos, same_draws, rounds=1, **args)
    twice = run_alone(first, silos, same_draws, rounds=1, **args)
    once = run_alone(start(batchnorm_model), silos, same_draws, rounds=2, **args)
    for name in ("a", "b"):
        assert_equal(twice[name], once[name])
        assert any(not first[name][k].equal(once[name][k]) for k in once[name])
    with pytest.raises(ValueError, match=r"those of \['a'\]; they lack \['b'\]"):
        run_alone({"a": first["a"]}, silos, same_draws, rounds=1, **args)


def many(silos, count):
    out = []
    for k in range(count):
        silo = copy.copy(silos[k % 2])
        silo.name = f"silo {k:02d}"
        out.append(silo)
    return out


def test_sampling_draws_the_stated_number_and_reaches_everybody(silos):
    history = run(many(silos, 6), linear_model, rounds=20, silos_per_round=2)
    drawn = [tuple(record["silos"]) for record in history.rounds]
    assert all(len(set(names)) == 2 and list(names) == sorted(names) for names in drawn)
    assert {name for names in drawn for name in names} == {
        f"silo {k:02d}" for k in range(6)
    }
    again = run(many(silos, 6), linear_model, rounds=20, silos_per_round=2)
    assert drawn == [tuple(record["silos"]) for record in again.rounds]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("crash_after", [0, 2, 4])
def test_resume_gives_the_same_bits(silos, tmp_path, every, crash_after):
    options = dict(rounds=6, silos_per_round=3, evaluate=lambda p, s: {"m": 1.0})
    expected = run(many(silos, 5), **options)

    def crash(record, params):
        if record["round"] == crash_after:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    kept = dict(checkpoint=file, checkpoint_every=every)
    with pytest.raises(KeyboardInterrupt):
        run(many(silos, 5), on_round=crash, **kept, **options)
    resumed = run(many(silos, 5), **kept, **options)
    assert_equal(resumed.params, expected.params)
    without_time = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in h.rounds]
        for h in (resumed, expected)
    ]
    assert without_time[0] == without_time[1]


def test_a_foreign_or_broken_checkpoint_is_refused_and_kept(silos, tmp_path):
    file = tmp_path / "run.pt"
    run(silos, checkpoint=file)
    with pytest.raises(ValueError, match="belongs to another run"):
        run(silos, checkpoint=file, seed=5)
    broken = file.read_bytes()[:100]
    file.write_bytes(broken)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(silos, checkpoint=file)
    assert file.read_bytes() == broken


def test_history_counts_bytes_and_collects_metrics(silos):
    history = run(
        silos,
        linear_model,
        rounds=4,
        evaluate_every=3,
        evaluate=lambda params, silo: {"rows": float(len(silo.train[1]))},
    )
    one = (256 * 2 + 2) * 4  # weights and biases, float32
    assert state_bytes(history.params) == one
    assert [r["bytes_up"] for r in history.rounds] == [2 * one] * 4
    assert history.bytes_sent == 4 * 2 * 2 * one
    assert history.per_silo("rows") == {"a": [40.0, 40.0], "b": [24.0, 24.0]}
    assert history.mean("rows") == [32.0, 32.0]  # rounds 3 and 4
    assert set(history.rounds[0]["train"]) == {"a", "b"}
    assert history.rounds[0]["seconds"] > 0


def test_thread_count_and_initial_params_are_left_as_found(silos):
    torch.set_num_threads(2)
    params = start(batchnorm_model)
    before = copy.deepcopy(params)
    seen = []

    def failing(given, silo, *, round_index, rng):
        seen.append(torch.get_num_threads())
        raise RuntimeError("disk full at the hospital")

    for workers in (1, 2):
        with pytest.raises(RuntimeError, match="disk full"):
            play(
                params,
                silos,
                failing,
                weighted_average,
                rounds=1,
                seed=0,
                workers=workers,
            )
        assert torch.get_num_threads() == 2
    assert set(seen) == {1}
    assert_equal(params, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_few_updates_exist_at_a_time(silos, workers):
    alive, most = [], 0
    inner = client(linear_model)

    def counted(params, silo, *, round_index, rng):
        if silo.name == "silo 01":  # the others finish while it is waited for
            time.sleep(0.3)
        update = inner(params, silo, round_index=round_index, rng=rng)
        alive.append(weakref.ref(update.params["1.weight"]))
        return update

    def aggregate(updates):
        def watched():
            nonlocal most
            for update in updates:
                most = max(most, sum(ref() is not None for ref in alive))
                yield update

        return weighted_average(watched())

    play(
        start(linear_model),
        many(silos, 50),
        counted,
        aggregate,
        rounds=1,
        seed=0,
        workers=workers,
        threads=True,
    )
    # `workers` running + finished ones ahead, and the one being averaged.
    assert len(alive) == 50 and most <= 2 * workers + 1


def test_silo_rng_depends_on_its_arguments_only():
    def draw(*key):
        return torch.rand(1, generator=silo_rng(*key)).item()

    keys = [(s, f"silo {k}", r) for s in range(3) for k in range(20) for r in range(20)]
    assert len({silo_rng(*key).initial_seed() for key in keys}) == len(keys)
    keys = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (0, "a/0", 0)]
    first = [draw(*key) for key in keys]
    assert len(set(first)) == len(keys)
    assert [draw(*key) for key in reversed(keys)] == first[::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rounds=0), "rounds must be >= 1, got 0"),
        (dict(silos_per_round=3), "silos_per_round must be 1 to 2"),
        (dict(silos_per_round=0), "silos_per_round must be 1 to 2"),
        (dict(evaluate_every=0), "evaluate_every must be >= 1"),
    ],
)
def test_bad_requests_say_what_is_wrong(silos, change, message):
    with pytest.raises(ValueError, match=message):
        run(silos, **change)


def test_silos_need_different_names(silos):
    with pytest.raises(ValueError, match="no silos"):
        run([])
    with pytest.raises(ValueError, match=r"used twice: \['a'\]"):
        run([silos[0], silos[0]])


def test_two_workers_train_two_silos_at_the_same_time(silos):
    both = threading.Barrier(2, timeout=10)  # broken if the silos take turns
    inner = client(linear_model)

    def meet(params, silo, *, round_index, rng):
        both.wait()
        assert torch.get_num_threads() == 1
        return inner(params, silo, round_index=round_index, rng=rng)

    torch.set_num_threads(2)
    options = dict(rounds=2, seed=0, workers=2, threads=True)
    play(start(linear_model), silos, meet, weighted_average, **options)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_after_a_failure_inside_a_silo(silos, tmp_path, workers):
    options = dict(rounds=4, seed=0, workers=workers, threads=True)
    inner, file, broken = client(batchnorm_model), tmp_path / "new" / "run.pt", True

    def fails_once(params, silo, *, round_index, rng):
        if broken and round_index == 2 and silo.name == "b":
            raise RuntimeError("power cut")
        return inner(params, silo, round_index=round_index, rng=rng)

    def go(**more):
        initial = start(batchnorm_model)
        return play(initial, silos, fails_once, weighted_average, **options, **more)

    with pytest.raises(RuntimeError, match="power cut"):
        go(checkpoint=file)
    broken = False
    resumed = go(checkpoint=file)
    assert [record["round"] for record in resumed.rounds] == [0, 1, 2, 3]
    assert_equal(resumed.params, go().params)


def test_numpy_metrics_survive_a_checkpoint(silos, tmp_path):
    def scores(params, silo):
        return {"auroc": np.mean([0.25, 0.75])}  # np.float64, as many metrics are

    file = tmp_path / "run.pt"
    run(silos, rounds=1, checkpoint=file, evaluate=scores)
    resumed = run(silos, rounds=2, checkpoint=file, evaluate=scores)
    assert resumed.mean("auroc") == [0.5, 0.5]


@pytest.mark.parametrize(
    ("make_model", "change"),
    [
        (linear_model, {}),  # another architecture
        (batchnorm_model, dict(silos_per_round=1)),
        (batchnorm_model, dict(rounds=2)),  # three are in the file
    ],
    ids=["architecture", "sampling", "rounds"],
)
def test_a_checkpoint_of_other_settings_is_refused(silos, tmp_path, make_model, change):
    file = tmp_path / "run.pt"
    run(silos, rounds=3, checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="another run"):
        run(silos, make_model, checkpoint=file, **change)
    assert file.read_bytes() == before


def test_more_rounds_go_on_from_a_finished_run(silos, tmp_path):
    file = tmp_path / "run.pt"
    run(silos, rounds=2, checkpoint=file)
    assert_equal(
        run(silos, rounds=5, checkpoint=file).params, run(silos, rounds=5).params
    )


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(silos, workers):
    with pytest.raises(ValueError, match=f"workers.*{workers}"):
        run(silos, workers=workers)


def test_evaluated_rounds_are_every_nth_and_the_last(silos):
    options = dict(rounds=5, evaluate_every=2, evaluate=lambda p, s: {"m": 0.0})
    tested = [r["round"] for r in run(silos, **options).rounds if r["test"]]
    assert tested == [1, 3, 4]


def test_batchnorm_counters_count_as_bytes(silos):
    # conv 4*9 + 4, norm 4 * 4, head 196*2 + 2 float32 and one int64 counter
    one = (40 + 16 + 394) * 4 + 8
    history = run(many(silos, 5), rounds=2, silos_per_round=3)
    assert [record["bytes_down"] for record in history.rounds] == [3 * one] * 2
    assert history.bytes_sent == 2 * 2 * 3 * one


def test_workers_pay_for_convolutions_only():
    assert default_workers(linear_model().state_dict(), 8) == 1
    assert 1 <= default_workers(batchnorm_model().state_dict(), 8) <= 8
    assert default_workers(batchnorm_model().state_dict(), 1) == 1


def test_progress_shows_a_mean_over_silos(silos, capsys):
    run(silos, progress=True, evaluate=lambda p, s: {"balanced_accuracy": 0.625})
    assert "balanced_accuracy=0.625" in capsys.readouterr().out
    run(silos, progress=True)
    assert "train_loss=" in capsys.readouterr().out


@pytest.mark.parametrize("silos_per_round", [None, 4])
def test_any_order_of_many_silos_gives_the_same_bits(silos, silos_per_round):
    some = many(silos, 7)
    mixed = [some[k] for k in (3, 0, 6, 2, 5, 1, 4)]
    options = dict(rounds=2, silos_per_round=silos_per_round)
    assert_equal(run(mixed, **options).params, run(some, **options).params)


def half_written(content, target):
    target.write(b"half a fi")
    raise OSError("no space left on device")


def not_renamed(source, target):
    raise PermissionError(target)


@pytest.mark.parametrize(
    ("module", "name", "fail"),
    [("torch", "save", half_written), ("os", "replace", not_renamed)],
    ids=["while it is written", "before it is renamed"],
)
def test_a_crash_keeps_the_old_checkpoint(
    silos, tmp_path, monkeypatch, module, name, fail
):
    file = tmp_path / "run.pt"
    run(silos, rounds=1, checkpoint=file)
    before = file.read_bytes()
    monkeypatch.setattr(getattr(checkpoint, module), name, fail)
    with pytest.raises(OSError):
        run(silos, rounds=2, checkpoint=file)
    assert file.read_bytes() == before
    monkeypatch.undo()
    resumed = run(silos, rounds=2, checkpoint=file)
    assert_equal(resumed.params, run(silos, rounds=2).params)


RULES = {
    "FedAvgM": lambda *a: FedAvgM(*a, lr=0.7, momentum=0.5),
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedNova": FedNova,
    "QFedAvg": lambda *a: QFedAvg(*a, q=0.5, lipschitz=20.0),
}


# ---- every strategy in the round loop


def as_it_is(update, params, silo):
    return update


def trainer(make_model, prepare=as_it_is, mu=None, **options):
    options = dict(epochs=1, lr=0.05, batch_size=8) | options
    template = make_model()

    def client_update(params, silo, *, round_index, rng):
        model = copy.deepcopy(template)
        model.load_state_dict({key: params[key] for key in model.state_dict()})
        near = {} if mu is None else {"adjust_gradients": ProximalTerm(model, mu)}
        update = train_locally(model, silo, rng=rng, **options | near)
        return prepare(update, params, silo)

    return client_update


def loss_first(make_model):
    template = make_model()

    def prepare(update, params, silo):
        model = copy.deepcopy(template)
        model.load_state_dict(params)
        loss = evaluate(model, silo.train)["loss"]
        return replace(update, metrics=update.metrics | {"loss_before": loss})

    return trainer(make_model, prepare)


def scaffold(make_model):
    template = make_model()

    def client_update(params, silo, *, round_index, rng):
        variates, model = ControlVariates(params), copy.deepcopy(template)
        model.load_state_dict({key: params[key] for key in model.state_dict()})
        how = dict(epochs=1, lr=0.05, batch_size=8, rng=rng)
        update = train_locally(model, silo, adjust_gradients=variates.correct, **how)
        return replace(update, params=update.params | variates.entries())

    return client_update


def fresh(make_model):
    torch.manual_seed(3)
    return make_model()


def federate(model, silos, client_update, aggregate=weighted_average, **options):
    """Three rounds with everything that the strategy needs in its params."""
    params = options.pop("params", model.state_dict())
    options = dict(rounds=3, seed=0, threads=True) | options
    return play(params, silos, client_update, aggregate, **options)


def scaffold_setting(model):
    variates = zero_variates(model)
    own = [name for name in variates if name.startswith("own_variate.")]
    return dict(params=model.state_dict() | variates, keep_local=own)


def strategy_run(name, silos, **options):
    """One run of a strategy by name, on a model with BatchNorm."""
    model = fresh(batchnorm_model)
    trainable = [key for key, _ in model.named_parameters()]
    plain = trainer(batchnorm_model)
    if name == "SCAFFOLD":
        setting = scaffold_setting(model)
        return federate(model, silos, scaffold(batchnorm_model), **setting, **options)
    if name == "FedBN":
        options["keep_local"] = norm_entries(model)
    elif name == "FedPer":
        options["keep_local"] = ["3.weight", "3.bias"]
    elif name == "FedProx":
        plain = trainer(batchnorm_model, mu=0.5)
    elif name == "FedBN and FedAdam":
        options["keep_local"] = norm_entries(model)
        options["aggregate"] = FedAdam(model.state_dict(), trainable)
    else:
        options["aggregate"] = RULES[name](model.state_dict(), trainable)
    if name == "QFedAvg":
        plain = loss_first(batchnorm_model)
    return federate(model, silos, plain, **options)


EVERY = [*RULES, "SCAFFOLD", "FedBN", "FedPer", "FedProx", "FedBN and FedAdam"]


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_bit_identical_for_every_strategy(silos, name, tmp_path):
    silos = many(silos, 3)
    options = dict(rounds=5, silos_per_round=2)
    expected = strategy_run(name, silos, **options)

    def crash(record, params):
        if record["round"] == 2:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        strategy_run(name, silos, checkpoint=file, on_round=crash, **options)
    resumed = strategy_run(name, silos, checkpoint=file, **options)
    assert len(resumed.rounds) == 5
    for silo in silos:
        got, wanted = resumed.params_of(silo.name), expected.params_of(silo.name)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", EVERY)
def test_workers_and_a_deadline_change_no_bit_of_a_strategy(silos, name):
    one = strategy_run(name, many(silos, 3), workers=1)
    for how in (dict(workers=3), dict(deadline=300.0, quorum=3)):
        other = strategy_run(name, many(silos, 3), **how)
        assert_equal(other.params, one.params)
        for silo in one.local:
            assert_equal(other.local[silo], one.local[silo])


def test_a_used_rule_or_one_for_another_model_is_refused(silos):
    model = fresh(linear_model)
    names = [key for key, _ in model.named_parameters()]
    rule = FedAdam(model.state_dict(), names)
    federate(model, silos, trainer(linear_model), rule)
    with pytest.raises(ValueError, match="has been used; make a new one for each run"):
        federate(model, silos, trainer(linear_model), rule)
    other = FedAdam(linear_model().state_dict(), names)
    with pytest.raises(ValueError, match="does not stand at the params of this run"):
        federate(model, silos, trainer(linear_model), other)


def test_a_checkpoint_of_another_rule_is_refused(silos, tmp_path):
    model, file = fresh(linear_model), tmp_path / "run.pt"
    names = [key for key, _ in model.named_parameters()]
    federate(model, silos, trainer(linear_model), checkpoint=file)
    rule = FedAdam(model.state_dict(), names)
    with pytest.raises(ValueError, match="belongs to another run"):
        federate(model, silos, trainer(linear_model), rule, checkpoint=file)


def test_fedprox_without_proximal_weight_is_fedavg_exactly(silos):
    model = fresh(batchnorm_model)
    plain = federate(model, silos, trainer(batchnorm_model)).params
    zero = federate(model, silos, trainer(batchnorm_model, mu=0.0)).params
    some = federate(model, silos, trainer(batchnorm_model, mu=0.1)).params
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert not torch.equal(plain["0.weight"], some["0.weight"])


def test_what_stays_local_is_neither_sent_nor_mixed(silos):
    model = fresh(batchnorm_model)
    keep = norm_entries(model)
    assert keep == [f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var",
                                       "num_batches_tracked")]  # fmt: skip
    seen = {}

    def spy(updates):
        updates = list(updates)
        seen.update({u.silo: u.params for u in updates})
        return weighted_average(updates)

    history = federate(model, silos, trainer(batchnorm_model), spy, keep_local=keep)
    assert all(seen[silo].keys().isdisjoint(keep) for silo in seen)
    assert history.params.keys().isdisjoint(keep)
    own = [history.local[silo.name]["1.running_mean"] for silo in silos]
    assert not torch.equal(*own)
    full = state_bytes(model.state_dict())
    kept = sum(model.state_dict()[name].nbytes for name in keep)
    assert history.rounds[0]["bytes_up"] == 2 * (full - kept)
    assert history.rounds[0]["bytes_down"] == 2 * (full - kept)


def test_everything_local_but_one_frozen_entry_is_training_alone(silos):
    """If only the counter is shared, each silo goes its own way: run_alone."""
    model = fresh(batchnorm_model)
    keep = [name for name in model.state_dict() if "num_batches" not in name]
    plain = trainer(batchnorm_model)
    history = federate(model, silos, plain, keep_local=keep)
    options = dict(rounds=3, seed=0, execution=Execution(progress=False))
    alone = run_alone(model.state_dict(), silos, plain, **options)
    for silo in silos:
        own = history.params_of(silo.name)
        assert all(torch.equal(own[key], alone[silo.name][key]) for key in keep)


def test_a_silo_that_did_not_take_part_keeps_what_it_had(silos):
    model, silos = fresh(batchnorm_model), many(silos, 3)
    history = federate(
        model,
        silos,
        trainer(batchnorm_model),
        rounds=1,
        silos_per_round=1,
        keep_local=norm_entries(model),
    )
    (took_part,) = history.rounds[0]["silos"]
    for silo in silos:
        same = torch.equal(
            history.local[silo.name]["1.running_mean"],
            model.state_dict()["1.running_mean"],
        )
        assert same == (silo.name != took_part)


@pytest.mark.parametrize(
    ("keep", "message"),
    [(["nope"], r"lacks: \['nope'\]"), (["1.weight", "1.bias"], "run_alone")],
)
def test_bad_local_entries_are_refused(silos, keep, message):
    with pytest.raises(ValueError, match=message):
        federate(fresh(linear_model), silos, trainer(linear_model), keep_local=keep)


def test_a_client_that_drops_its_own_entries_is_told(silos):
    def forgets(update, params, silo):
        return replace(update, params={"1.weight": update.params["1.weight"]})

    with pytest.raises(ValueError, match="silo 'a' must return the entries it keeps"):
        federate(
            fresh(linear_model),
            silos,
            trainer(linear_model, forgets),
            keep_local=["1.bias"],
        )


def test_only_what_is_trained_travels(silos):
    """A head on a frozen body: the bytes of the head, and the bits of sending all."""
    frozen = start(batchnorm_model)

    def half_frozen():
        model = batchnorm_model()
        model.load_state_dict(frozen)
        model[:2].requires_grad_(False)
        return model

    client = sgd_client(half_frozen, epochs=1, lr=0.1, batch_size=8)
    keep = frozen_entries(half_frozen())
    run = dict(rounds=3, seed=0)
    whole = play(frozen, silos, client, weighted_average, **run)
    light = play(frozen, silos, client, weighted_average, keep_local=keep, **run)
    assert_equal(light.params_of("a"), whole.params)
    assert light.params.keys() == {"3.weight", "3.bias"}
    assert light.bytes_sent == 3 * 2 * 2 * 4 * (196 * 2 + 2)  # float32, both ways
    assert light.local["a"]["0.weight"] is light.local["b"]["0.weight"]  # one in memory


def test_a_dataset_that_fails_costs_its_own_silo_only(silos):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, row):
            raise OSError("/archive/b/17.dcm is cut short")

    silos[1].train = Broken()
    client = sgd_client(linear_model, epochs=1, lr=0.1, batch_size=8)
    how = dict(rounds=2, seed=0, quorum=1)
    history = play(start(linear_model), silos, client, weighted_average, **how)
    for record in history.rounds:
        assert record["silos"] == ["a"]
        assert "silo 'b', examples" in record["missing"]["b"]
        assert "17.dcm is cut short" in record["missing"]["b"]
