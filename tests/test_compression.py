import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import batchnorm_model, linear_model, play
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.aggregation import weighted_average
from fl_helpers.compression import (
    FromDeltas,
    compress_update,
    quantise,
    restore,
    top_k,
    zero_residual,
)
from fl_helpers.simulation import state_bytes
from fl_helpers.training import Update, train_locally


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_delta():
    return {
        "w": torch.randn(20, 30, generator=rng()),
        "b": 1e-4 * torch.randn(30, generator=rng(1)),
        "scalar": torch.tensor(0.5),
        "none": torch.zeros(0, 3),
        "still": torch.zeros(4),
    }


def test_eight_bits_by_hand():
    packed = quantise({"w": torch.tensor([12.7, -12.7, 0.04, 0.06, 1.0])})
    # the largest is 12.7, so a step is 0.1
    assert packed["codes.w"].tolist() == [127, -127, 0, 1, 10]
    assert packed["codes.w"].dtype == torch.int8
    assert packed["scale.w"].item() == pytest.approx(0.1)
    like = {"w": torch.zeros(5)}
    expected = torch.tensor([12.7, -12.7, 0.0, 0.1, 1.0])
    torch.testing.assert_close(restore(packed, like)["w"], expected)


@settings(deadline=None)
@given(
    st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32).filter(
            lambda v: v == 0 or abs(v) > 2.0**-60
        ),
        min_size=1,
        max_size=30,
    )
)
def test_no_value_is_off_by_more_than_half_a_step(values):
    delta = {"w": torch.tensor(values)}
    back = restore(quantise(delta), delta)["w"]
    step = delta["w"].abs().max().item() / 127
    assert (back - delta["w"]).abs().max().item() <= 0.5001 * step


def test_top_k_by_hand():
    delta = {"a": torch.tensor([[0.1, -5.0], [3.0, 0.0]]), "b": torch.tensor([4.0])}
    packed = top_k(delta, share=0.4)  # 2 of 5 values: -5 and 4
    assert packed["index.a"].tolist() == [1] and packed["values.a"].tolist() == [-5]
    assert packed["index.b"].tolist() == [0] and packed["values.b"].tolist() == [4]
    back = restore(packed, delta)
    assert back["a"].tolist() == [[0, -5], [0, 0]] and back["b"].tolist() == [4]


def test_top_k_keeps_the_share_and_the_largest():
    delta = some_delta()
    back = restore(top_k(delta, share=0.1), delta)
    flat = torch.cat([v.flatten() for v in delta.values()])
    kept = torch.cat([v.flatten() for v in back.values()])
    assert (kept != 0).sum() == 64  # 0.1 * 635, rounded
    assert flat[kept != 0].abs().min() >= flat[kept == 0].abs().max()
    assert torch.equal(kept[kept != 0], flat[kept != 0])


@pytest.mark.parametrize("compress", [quantise, top_k])
def test_shapes_and_dtypes_come_back_and_inputs_stay(compress):
    delta = some_delta() | {"half": torch.ones(3).half()}
    before = copy.deepcopy(delta)
    back = restore(compress(delta), delta)
    for name, value in before.items():
        assert torch.equal(delta[name], value)
        assert back[name].shape == value.shape and back[name].dtype == value.dtype


def test_bytes_are_a_quarter_and_a_fifth():
    delta = {"w": torch.randn(100_000, generator=rng())}
    assert state_bytes(quantise(delta)) == 100_000 + 4  # a byte each, and the scale
    assert state_bytes(top_k(delta, 0.1)) == 10_000 * 8  # a place and a value each


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"share must be > 0 .* got {share}"):
        top_k(some_delta(), share)


def test_a_packed_update_that_does_not_fit_is_refused():
    delta = some_delta()
    packed = quantise(delta)
    for bad in (
        {k: v for k, v in packed.items() if k != "codes.w"},
        packed | {"codes.w": torch.zeros(7).to(torch.int8)},
        top_k(delta) | {"index.w": torch.tensor([600], dtype=torch.int32)},
        top_k(delta) | {"index.w": torch.arange(3, dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match="'w' cannot be restored"):
            restore(bad, delta)


@pytest.mark.parametrize("compress", [quantise, partial(top_k, share=0.05)])
def test_what_is_lost_is_sent_later(compress):
    # After any number of rounds: what arrived and what is owed is what was trained.
    start = {"w": torch.zeros(200)}
    trained = [torch.randn(200, generator=rng(k)) for k in range(6)]
    owed, arrived = zero_residual(start), torch.zeros(200)
    for delta in trained:
        sent = compress_update({"w": delta}, start | owed, compress)
        owed = {k: sent.pop(k) for k in owed}
        arrived += restore(sent, start)["w"]
    total = arrived + owed["own_residual.w"]
    torch.testing.assert_close(total, sum(trained), atol=1e-4, rtol=1e-4)
    assert owed["own_residual.w"].abs().max() > 1e-3  # it was not without loss


def test_counters_of_batchnorm_go_as_they_are(silos):
    start = batchnorm_model().state_dict()
    model = batchnorm_model()
    update = train_locally(model, silos[0], epochs=1, lr=0.1, batch_size=8, rng=rng())
    packed = compress_update(update.params, start | zero_residual(start), quantise)
    sent = {k: v for k, v in packed.items() if not k.startswith("own_")}
    assert sent["whole.1.num_batches_tracked"].item() == 5  # 40 images, 8 at a time
    mean = FromDeltas(start, weighted_average)([Update("a", sent, 40)])
    for name, value in update.params.items():
        step = (value - start[name]).abs().max().item() / 127
        assert (mean[name] - value).abs().max().item() <= 0.51 * step + 1e-6, name


def federate(silos, compress, *, rounds=3, **options):
    torch.manual_seed(0)
    start = linear_model().state_dict()

    def client(params, silo, *, round_index, rng):
        model = linear_model()
        model.load_state_dict({k: params[k] for k in model.state_dict()})
        how = dict(epochs=1, lr=0.01, batch_size=8, rng=rng)
        update = train_locally(model, silo, **how)
        if compress is None:
            return update
        params = compress_update(update.params, params, compress)
        return Update(silo.name, params, update.num_examples)

    how = dict(rounds=rounds, seed=0)
    if compress is None:
        return play(start, silos, client, weighted_average, **how)
    owed = zero_residual(start)
    rule = FromDeltas(start, weighted_average)
    how |= dict(keep_local=list(owed)) | options
    return play(start | owed, silos, client, rule, **how)


def test_a_run_with_few_bytes_ends_near_the_one_with_many(silos):
    plain, packed = federate(silos, None), federate(silos, quantise)
    moved = (plain.params["1.weight"] - federate(silos, None, rounds=1).params[
        "1.weight"]).abs().max()  # fmt: skip
    gap = (packed.params["1.weight"] - plain.params["1.weight"]).abs().max()
    assert 0 < gap < 0.05 * moved
    # 514 bytes and two scales instead of 514 * 4, for 2 silos
    assert packed.rounds[0]["bytes_up"] == 2 * (514 + 8)
    assert plain.rounds[0]["bytes_up"] == 2 * 514 * 4


def test_a_resumed_run_has_the_same_bits(silos, tmp_path):
    whole = federate(silos, top_k, rounds=4)
    file = dict(checkpoint=tmp_path / "run.pt")
    federate(silos, top_k, rounds=2, **file)
    resumed = federate(silos, top_k, rounds=4, **file)
    for history in (whole, resumed):
        assert set(history.params) == {"1.weight", "1.bias"}
    assert all(torch.equal(v, whole.params[k]) for k, v in resumed.params.items())


def test_an_update_of_other_shapes_names_the_silo():
    rule = FromDeltas({"w": torch.zeros(3)}, weighted_average)
    sent = quantise({"w": torch.zeros(4)})
    with pytest.raises(ValueError, match="silo 'a': 'w' cannot be restored"):
        rule([SimpleNamespace(silo="a", params=sent, num_examples=1)])
