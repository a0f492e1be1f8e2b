import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.aggregation import weighted_average


def update(silo, num_examples, **params):
    return SimpleNamespace(silo=silo, num_examples=num_examples, params=params)


def test_mean_follows_number_of_examples():
    small = update("a", 1, w=torch.tensor([8.0, 0.0]))
    large = update("b", 3, w=torch.tensor([0.0, 4.0]))
    mean = weighted_average([small, large])
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 3.0]))  # 8/4, 3*4/4


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6),
            st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_equals_a_float64_numpy_mean(silos):
    updates = [update(str(i), n, w=torch.tensor(v)) for i, (n, v) in enumerate(silos)]
    sizes = [n for n, _ in silos]
    values = np.array([u.params["w"].numpy() for u in updates], dtype=np.float64)
    expected = np.average(values, axis=0, weights=sizes)
    got = weighted_average(updates)["w"].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)


def test_one_update_and_equal_updates_come_out_exactly():
    w = torch.randn(50, generator=torch.Generator().manual_seed(1)) / 3
    assert torch.equal(weighted_average([update("a", 7, w=w)])["w"], w)
    same = [update(name, n, w=w.clone()) for name, n in (("a", 3), ("b", 11), ("c", 5))]
    assert torch.equal(weighted_average(same)["w"], w)


def test_inputs_are_not_modified_and_the_result_is_new():
    a, b = update("a", 1, w=torch.ones(3)), update("b", 1, w=torch.zeros(3))
    mean = weighted_average([a, b])
    mean["w"].add_(100)
    assert a.params["w"].tolist() == [1, 1, 1] and b.params["w"].tolist() == [0, 0, 0]


def test_integer_and_boolean_entries_take_the_maximum():
    a = update("a", 9, n=torch.tensor(5), m=torch.tensor([True, False]))
    b = update("b", 1, n=torch.tensor(8), m=torch.tensor([False, False]))
    mean = weighted_average([a, b])
    assert mean["n"].item() == 8 and mean["n"].dtype == torch.int64
    assert mean["m"].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_dtype(dtype):
    updates = [
        update(str(i), 1, w=torch.tensor([float(i)], dtype=dtype)) for i in range(3)
    ]
    mean = weighted_average(updates)["w"]
    assert mean.dtype == dtype and mean.item() == 1.0  # (0 + 1 + 2) / 3


def test_averages_a_batchnorm_model_with_its_statistics():
    torch.manual_seed(0)
    states = [batchnorm_model().state_dict() for _ in range(2)]
    states[1]["1.running_mean"] += 2.0
    states[1]["1.num_batches_tracked"] += 7
    sent = [update("a", 1, **states[0]), update("b", 1, **states[1])]
    mean = weighted_average(sent)
    assert mean["1.running_mean"].tolist() == [1.0] * 4  # (0 + 2) / 2
    assert mean["1.num_batches_tracked"].item() == 7
    batchnorm_model().load_state_dict(mean)


def test_holds_one_update_at_a_time():
    alive = []

    def generate():
        for i in range(10):
            item = update(str(i), 1, w=torch.full((4,), float(i)))
            alive.append(weakref.ref(item.params["w"]))
            yield item
            del item
            # Who asks for the next one has let go of this one.
            assert not any(ref() is not None for ref in alive)

    assert weighted_average(generate())["w"][0].item() == pytest.approx(4.5)  # 0..9


def test_large_finite_values_are_not_taken_for_infinite():
    big = torch.full((4,), 3e38)  # finite, but their float32 sum is not
    assert torch.equal(weighted_average([update("a", 1, w=big)])["w"], big)


GOOD = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    ("params", "num_examples", "message"),
    [
        (GOOD, 0, "num_examples=0"),
        (GOOD, -1, "num_examples=-1"),
        (GOOD, math.nan, "num_examples=nan"),
        (GOOD, math.inf, "num_examples=inf; it must be a finite number > 0"),
        (GOOD, True, "num_examples=True"),
        ({"w": GOOD["w"]}, 1, r"another model: 'b' is None, the others' \(\(2,\)"),
        (
            GOOD | {"extra": torch.zeros(1)},
            1,
            r"another model: 'extra' is .*, the others' None",
        ),
        (GOOD | {"b": torch.zeros(3)}, 1, r"'b' is \(\(3,\), .*others' \(\(2,\)"),
        (GOOD | {"b": torch.zeros(2).double()}, 1, "torch.float64"),
        (GOOD | {"b": torch.tensor([0.0, torch.nan])}, 1, "1 NaN or infinite"),
        (GOOD | {"b": torch.tensor([torch.inf, -torch.inf])}, 1, "2 NaN or infinite"),
    ],
)
def test_refuses_a_bad_update_and_names_the_silo(params, num_examples, message):
    good, bad = update("a", 1, **GOOD), update("St. Mary", num_examples, **params)
    with pytest.raises(ValueError, match=message) as error:
        weighted_average([good, bad])
    assert "St. Mary" in str(error.value)


def test_an_empty_model_is_another_model():
    with pytest.raises(ValueError, match="'b' sent another model: 'b' is"):
        weighted_average([update("a", 1), update("b", 1, **GOOD)])


def test_refuses_no_update_and_two_of_one_silo():
    with pytest.raises(ValueError, match="no updates"):
        weighted_average([])
    with pytest.raises(ValueError, match="'a' sent two"):
        weighted_average([update("a", 1, **GOOD), update("a", 1, **GOOD)])


def test_any_shape_and_memory_layout():
    grid = torch.arange(6.0).reshape(2, 3)
    a = update("a", 1, scalar=torch.tensor(1.0), w=grid.T, none=torch.zeros(0, 3))
    b = update("b", 3, scalar=torch.tensor(5.0), w=grid.T + 4, none=torch.zeros(0, 3))
    mean = weighted_average([a, b])
    assert mean["scalar"].item() == 4.0  # (1 + 3 * 5) / 4
    assert torch.equal(mean["w"], grid.T + 3)  # (0 + 3 * 4) / 4 more than a's
    assert mean["none"].shape == (0, 3)
    assert a.params["w"].tolist() == grid.T.tolist()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(-(2.0**126), 2.0**126, width=32)),
        min_size=1,
        max_size=6,
    )
)
def test_mean_lies_between_the_extremes(silos):
    sent = [update(str(i), n, w=torch.tensor([v])) for i, (n, v) in enumerate(silos)]
    values = [v for _, v in silos]
    assert min(values) <= weighted_average(sent)["w"].item() <= max(values)


def test_half_precision_is_summed_in_float32():
    # In float16, 2048 + 1 is 2048: a mean kept in it would not move from 2048.
    sent = [update("a", 1, w=torch.tensor([2048.0]).half())]
    sent += [update(str(i), 1, w=torch.tensor([2056.0]).half()) for i in range(15)]
    # (2048 + 15 * 2056) / 16 = 2055.5, and float16 has every second number there
    assert weighted_average(sent)["w"].item() == 2056
