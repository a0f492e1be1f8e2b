"""Answers of analyses as integers: the exact sum, whatever the silos' order."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.analysis import add_answers
from fl_helpers.cross_silo.fixed_point import (
    LOWEST,
    MOST_SILOS,
    decode_arrays,
    encode_arrays,
    words_of,
)

LARGEST = math.nextafter(2.0**LOWEST, 0)
NUMBERS = st.floats(-LARGEST, LARGEST) | st.floats(-1e-40, 1e-40) | st.floats(-9, 9)


def layout_of(arrays):
    return {
        name: torch.empty(
            value.shape, dtype=getattr(torch, str(value.dtype)), device="meta"
        )
        for name, value in arrays.items()
    }


def summed(answers):
    """As silos and server do, without masks: words modulo 2^64."""
    words = [encode_arrays(f"silo {k}", each) for k, each in enumerate(answers)]
    assert {len(each) for each in words} == {words_of(layout_of(answers[0]))}
    total = np.zeros_like(words[0])
    for each in words:
        total = total + each
    return decode_arrays(total, layout_of(answers[0]), several=len(answers))


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=7))
@settings(max_examples=300)
def test_a_float_is_the_exact_sum_rounded_once(rows):
    """The oracle is arithmetic with fractions."""
    found = summed([{"x": np.array(row)} for row in rows])["x"]
    plain = add_answers((f"{k}", {"x": np.array(row)}) for k, row in enumerate(rows))
    for value, other, column in zip(
        found, plain["x"], zip(*rows, strict=True), strict=True
    ):
        exact = sum(map(Fraction, column))
        below = sum(abs(number) < 2.0**-160 for number in column)
        near = [
            value,
            math.nextafter(value, math.inf),
            math.nextafter(value, -math.inf),
        ]
        error = abs(Fraction(float(value)) - exact)
        best = min(abs(Fraction(float(number)) - exact) for number in near)
        assert error <= best + below * Fraction(2) ** -213
        if not below:  # a third way to the same number
            assert value == math.fsum(column)
        size = sum(abs(Fraction(number)) for number in column)
        bound = len(column) * (size * Fraction(2) ** -53 + Fraction(2) ** -212)
        assert abs(Fraction(float(value)) - Fraction(float(other))) <= bound


@given(
    st.lists(
        st.lists(st.integers(-(2**60), 2**60), min_size=4, max_size=4),
        min_size=1,
        max_size=7,
    )
)
def test_whole_numbers_are_exact(rows):
    found = summed([{"n": np.array(row)} for row in rows])["n"]
    assert found.dtype == np.int64
    assert found.tolist() == [sum(column) for column in zip(*rows, strict=True)]


@given(st.permutations(range(5)), st.integers(0, 10**6))
def test_the_order_of_the_silos_does_not_show(order, seed):
    """Not so of plain sums: 1e16 + 1 + 1 is another float than 1 + 1 + 1e16."""
    values = (
        np.random.default_rng(seed).normal(size=(5, 6))
        * 10.0 ** np.arange(-9, 21, 6)[:, None]
    )
    answers = [{"b": row, "a": np.arange(2)} for row in values]
    one, other = summed(answers), summed([answers[k] for k in order])
    assert [*one] == [*other] == ["b", "a"]
    assert one["b"].tobytes() == other["b"].tobytes()
    assert summed([{"x": np.array(v)} for v in (1e16, 1.0, 1.0)])["x"] == 1e16 + 2


def test_shapes_come_back_also_of_single_numbers_and_of_none():
    answer = {
        "z": np.array(2.5),
        "m": np.ones((2, 3)),
        "e": np.empty((0, 4)),
        "n": np.array(7),
    }
    found = summed([answer, answer, answer])
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in answer.items()
    }
    assert found["z"] == 7.5 and (found["m"] == 3).all() and found["n"] == 21


@pytest.mark.parametrize("sign", [1, -1])
def test_as_many_silos_as_are_allowed_do_not_overflow(sign):
    """All bits of all words are set; 1,023 times 2^53 is just below 2^63."""
    largest = sign * LARGEST
    words = encode_arrays("A", {"x": np.array([largest, sign * 2.0**-159])})
    total = words * np.uint64(MOST_SILOS)
    layout = layout_of({"x": np.empty(2)})
    found = decode_arrays(total, layout, several=MOST_SILOS)["x"]
    assert found.tolist() == [largest * MOST_SILOS, sign * 2.0**-159 * MOST_SILOS]
    with pytest.raises(ValueError, match="of 1024 silos, at most 1023"):
        decode_arrays(total, layout, several=MOST_SILOS + 1)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([1.0, 2.0**LOWEST], "silo 'A' has 'x' up to 6.58e[+]63"),
        ([-(2.0**LOWEST)], "scale the columns"),
        ([math.nan], "silo 'A' has 'x' up to nan"),
        ([0.0, math.inf], "silo 'A' has 'x' up to inf"),
        (np.float32([1]), "silo 'A' has 'x' as float32"),
        (["Smith"], "silo 'A' has 'x' as <U5"),
    ],
)
def test_what_cannot_be_added_is_refused(value, why):
    with pytest.raises(ValueError, match=why):
        encode_arrays("A", {"w": np.ones(2), "x": np.asarray(value)})


def test_a_sum_that_cannot_be_one_is_refused():
    layout = layout_of({"x": np.empty(2), "n": np.empty(1, np.int64)})
    words = encode_arrays("A", {"x": np.ones(2), "n": np.array([2**62])})
    three = words * np.uint64(3)
    with pytest.raises(ValueError, match="'n' is beyond the range of int64"):
        decode_arrays(three, layout, several=3)
    for several in (1, 2, 4):
        with pytest.raises(ValueError, match="did not cancel"):
            decode_arrays(three, layout, several=several)
    with pytest.raises(ValueError, match="18 words of 3 silos"):
        decode_arrays(three[:-1], layout, several=3)
    noise = np.random.default_rng(0).integers(0, 2**64, len(words), np.uint64)
    with pytest.raises(ValueError, match="did not cancel"):
        decode_arrays(noise, layout, several=3)
