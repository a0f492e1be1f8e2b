"""Sums over silos, small cells, and cohorts that differ by a few patients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fl_helpers.analysis import (
    CohortLedger,
    TooFew,
    add_answers,
    ask_silos,
    check_count,
    suppress_small,
)


def moments(data, *, power):
    return {"n": len(data), "sum": (data**power).sum(axis=0)}


def test_the_sum_is_that_of_the_pooled_rows():
    rows = np.arange(12.0).reshape(6, 2)
    ask = ask_silos({"b": rows[4:], "a": rows[:4]})
    found = ask(moments, power=2)
    assert found["n"] == 6 and found["n"].dtype == np.int64
    np.testing.assert_array_equal(found["sum"], (rows**2).sum(axis=0))


def test_the_order_of_silos_does_not_change_a_bit():
    parts = {"a": np.array([[1e16]]), "b": np.array([[1.0]]), "c": np.array([[-1e16]])}
    backwards = dict(reversed(parts.items()))
    one, other = (
        ask_silos(parts)(moments, power=1),
        ask_silos(backwards)(moments, power=1),
    )
    assert one["sum"].tobytes() == other["sum"].tobytes()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"n": 1}, r"silo 'b' and 'a' differ in \['sum'\]"),
        ({"n": 1, "sum": [1.0, 2.0]}, r"silo 'b' sent 'sum' as \[2\], 'a' as \[1\]"),
        ({"n": 1, "sum": [np.nan]}, "silo 'b' sent NaN or infinite values in 'sum'"),
        ({"n": "x", "sum": [1.0]}, "silo 'b' sent 'n' as <U1, not as numbers"),
    ],
)
def test_an_answer_of_another_form_names_the_silo(answer, message):
    with pytest.raises(ValueError, match=message):
        add_answers([("a", {"n": 2, "sum": [3.0]}), ("b", answer)])


def test_nobody_to_ask_is_an_error():
    with pytest.raises(ValueError, match="no silos"):
        ask_silos({})
    with pytest.raises(ValueError, match="no answers"):
        add_answers([])


def test_a_refusal_keeps_its_kind_and_names_the_silo():
    def few(data):
        check_count(len(data), minimum=10)
        return {"n": len(data)}

    ask = ask_silos({"a": np.zeros(12), "b": np.zeros(9)})
    with pytest.raises(TooFew, match="silo 'b': fewer than 10 rows"):
        ask(few)


def test_a_count_of_zero_passes_the_rule_and_the_limit_itself():
    check_count(0, minimum=10)
    check_count(10, minimum=10)
    with pytest.raises(TooFew):
        check_count(9, minimum=10)


def test_a_small_cell_takes_the_next_smallest_with_it():
    # Row sums are known: 4 alone would be 61 - 57. In the column sums as well, so the
    # second row hides two, too.
    found = suppress_small([[4, 20, 37], [50, 30, 60]], minimum=10)
    hidden = np.isnan(found)
    assert hidden.tolist() == [[True, True, False], [True, True, False]]


@given(arrays(np.int64, (3, 4), elements=st.integers(0, 40)))
def test_no_line_gives_a_small_cell_away(counts):
    found = suppress_small(counts, minimum=10)
    hidden = np.isnan(found)
    assert hidden[(counts > 0) & (counts < 10)].all()
    np.testing.assert_array_equal(found[~hidden], counts[~hidden])
    for values, masks in ((counts, hidden), (counts.T, hidden.T)):
        for line, mask in zip(values, masks, strict=True):
            if mask.any() and not mask.all():
                assert mask.sum() >= 2 and line[mask].sum() >= 10


def test_a_cell_that_several_margins_give_away_is_not_alone():
    """Two blocks of four hidden cells, and a 9 between them: no line tells it, but the
    first two rows minus the first two columns do."""
    counts = np.full((4, 4), 50)
    counts[:2, :2] = counts[2:, 2:] = 6
    counts[0, 2] = 9
    hidden = np.isnan(suppress_small(counts, minimum=10))
    assert hidden[0, 2] and hidden.sum() > 9
    assert not determined(hidden).any()


def determined(hidden):
    """Hidden cells that follow from row sums, column sums and the others: those that no
    change moves that keeps all sums."""
    places = np.argwhere(hidden)
    lines = [places[:, axis] == k for axis in (0, 1) for k in range(len(hidden))]
    lines = np.array(lines, dtype=float)
    rank = np.linalg.matrix_rank
    return np.array([
        rank(np.vstack([lines, np.eye(len(places))[k]])) == rank(lines)
        for k in range(len(places))
    ])  # fmt: skip


@given(arrays(np.int64, (5, 5), elements=st.sampled_from([0, 3, 9, 20, 40, 60])))
def test_no_margins_together_give_a_cell_away(counts):
    hidden = np.isnan(suppress_small(counts, minimum=10))
    if hidden.any() and not hidden.all():
        assert not determined(hidden).any()


def test_counts_that_are_no_counts_are_refused():
    for bad in ([-1, 2], [0.5, 1.0], [[[1]]]):
        with pytest.raises(ValueError, match="whole numbers"):
            suppress_small(bad)


def cohort(*rows, n=40):
    mask = np.zeros(n, dtype=bool)
    mask[list(rows)] = True
    return mask


def test_a_cohort_without_one_patient_is_refused(tmp_path):
    ledger = CohortLedger(tmp_path / "asked.jsonl")
    ledger.admit(cohort(*range(20)), about="all women")
    with pytest.raises(TooFew, match="'all women' by fewer than 10"):
        ledger.admit(cohort(*range(19)), about="all women but one")
    ledger.admit(cohort(*range(20)), about="the same again gives nothing new")
    ledger.admit(cohort(*range(30)), about="ten more")


def test_what_was_asked_survives_a_restart(tmp_path):
    path = tmp_path / "asked.jsonl"
    CohortLedger(path).admit(cohort(*range(20)), about="first")
    with pytest.raises(TooFew):
        CohortLedger(path).admit(cohort(*range(21)), about="second")
    CohortLedger(path).admit(cohort(*range(21)), about="other data", data="v2")


def test_a_small_cohort_is_refused_and_not_noted(tmp_path):
    path = tmp_path / "asked.jsonl"
    with pytest.raises(TooFew):
        CohortLedger(path).admit(cohort(1, 2), about="two patients")
    assert not path.exists()


def test_the_ledger_is_written_before_it_says_yes(tmp_path, monkeypatch):
    ledger = CohortLedger(tmp_path / "asked.jsonl")

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        ledger.admit(cohort(*range(20)), about="first")


@pytest.mark.parametrize("damage", ["{", '{"mask": "00", "rows": 8}', "[]", '"x"'])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "asked.jsonl"
    CohortLedger(path).admit(cohort(*range(20)), about="first")
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        CohortLedger(path)


def test_a_changed_mask_is_damage(tmp_path):
    path = tmp_path / "asked.jsonl"
    CohortLedger(path).admit(cohort(*range(20)), about="first")
    path.write_text(path.read_text().replace("fffff", "fffef"))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        CohortLedger(path)


def test_the_same_cohort_is_written_once(tmp_path):
    """A fit asks about the same patients again and again."""
    ledger = CohortLedger(tmp_path / "asked.jsonl")
    for _ in range(3):
        ledger.admit(cohort(*range(20)), about="a step of Newton's")
    assert len((tmp_path / "asked.jsonl").read_text().splitlines()) == 1


def test_all_refusals_carry_the_code_of_a_real_run():
    from fl_helpers import regression, survival, trees, validation

    kinds = [TooFew, validation.TooFew, trees.TooFew]
    kinds += [survival.TooFewEvents, regression.TooFewRows]
    assert {kind.code for kind in kinds} == {"TOO_FEW"}
