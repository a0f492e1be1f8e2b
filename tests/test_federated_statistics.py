import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.federated_statistics import (
    Column,
    TooFew,
    combine_statistics,
    combine_tables,
    copy_warnings,
    first_table,
    local_statistics,
    local_table,
    silo_sketch,
    silo_table,
    standardised_difference,
    tables_of,
    unit_warnings,
)

EDGES = [-10, -1, 0, 1, 10]


@settings(deadline=None)
@given(st.lists(st.integers(10, 60), min_size=1, max_size=6), st.integers(0, 2**31))
def test_combined_equals_pooled(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(scale=3), size=(n, 2)) for n in sizes]
    sent = [local_statistics(str(i), x, bin_edges=EDGES) for i, x in enumerate(parts)]
    got, pooled = combine_statistics(sent), np.concatenate(parts)
    assert got.count == len(pooled) and got.silo == "all"
    np.testing.assert_allclose(got.mean, pooled.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.variance, pooled.var(axis=0), rtol=1e-12)
    inside = np.clip(pooled, -10, 10)
    expected = [np.histogram(column, bins=EDGES)[0] for column in inside.T]
    assert np.array_equal(got.histogram, expected)


def test_by_hand_and_values_beyond_the_edges():
    x = np.array([[1.0], [3.0], [99.0], [-99.0]])
    got = local_statistics("a", x, bin_edges=[0, 2, 4], min_rows=4)
    assert got.mean.tolist() == [1.0]  # (1 + 3 + 99 - 99) / 4
    assert got.squares.tolist() == [0 + 4 + 98**2 + 100**2]
    assert got.histogram.tolist() == [[2, 2]]  # -99 and 1 | 3 and 99


@pytest.mark.parametrize(
    ("x", "edges", "message"),
    [
        (np.zeros((9, 1)), EDGES, "'St. Mary' must have at least 10 rows"),
        (np.zeros(20), EDGES, "'St. Mary' must have"),
        (np.full((10, 1), np.nan), EDGES, "'St. Mary' has 10 NaN"),
        (np.zeros((10, 1)), [1, 0], "increasing"),
        (np.zeros((10, 1)), [16], "increasing"),
    ],
)
def test_a_silo_refuses_what_it_should_not_send(x, edges, message):
    with pytest.raises(ValueError, match=message):
        local_statistics("St. Mary", x, bin_edges=edges)


def test_parts_must_fit_together():
    a = local_statistics("a", np.zeros((10, 1)), bin_edges=EDGES)
    b = local_statistics("b", np.zeros((10, 2)), bin_edges=EDGES)
    with pytest.raises(ValueError, match="silo 'b' sent"):
        combine_statistics([a, b])
    with pytest.raises(ValueError, match="no statistics"):
        combine_statistics([])


PATIENTS = {
    "A": {
        "age": np.arange(40.0) + 30,
        "sex": np.arange(40) % 2,
        "stage": np.arange(40) % 3,
    },
    "B": {
        "age": np.arange(25.0) * 2,
        "sex": np.arange(25) % 2,
        "stage": np.zeros(25, int),
    },
}
LABELS = {"sex": ("female", "male"), "stage": ("I", "II", "III")}


def tables(patients=PATIENTS):
    return {s: local_table(s, c, categories=LABELS) for s, c in patients.items()}


def test_the_table_of_all_is_that_of_the_pooled_rows():
    whole = combine_tables(tables())
    ages = np.concatenate([PATIENTS[silo]["age"] for silo in "AB"])
    age = whole["age"]
    assert (age.count, age.missing) == (65, 0)
    assert age.mean == pytest.approx(ages.mean())
    assert age.spread == pytest.approx(ages.std(ddof=1))
    male = np.concatenate([PATIENTS[silo]["sex"] for silo in "AB"]) == 1
    assert whole["sex: male"].mean == pytest.approx(male.mean())
    assert whole["sex: male"].squares == pytest.approx(65 * male.var())


def test_a_small_category_takes_another_with_it():
    stage = np.repeat([0, 1, 2, -1], [20, 12, 5, 3])
    found = local_table("A", {"stage": stage}, categories=LABELS)
    assert list(found) == ["stage: I"]  # II would give III away
    assert found["stage: I"] == Column(37, 0, 20 / 37, 20 * 17 / 37)  # 3 missing: 0
    both = combine_tables({"A": found, "B": tables()["B"]})
    assert list(both) == ["stage: I"]


def test_missing_values_count_and_few_values_do_not_leave():
    age = np.append(np.arange(20.0), [np.nan] * 12)
    found = local_table("A", {"age": age, "rare": np.where(age < 5, age, np.nan)})
    assert found == {"age": Column(20, 12, 9.5, 20 * (20**2 - 1) / 12)}


def test_a_column_that_few_differ_in_is_left_out():
    """The mean of a yes-or-no column times the rows is a count: here of three."""
    for few, kept in ((3, []), (10, ["hiv"]), (37, []), (0, ["hiv"])):
        found = local_table("A", {"hiv": (np.arange(40) < few) * 1.0})
        assert [*found] == kept, few


def test_the_standardised_difference_by_hand():
    # Means 0 and 1, both variances 4: half a standard deviation.
    a, b = Column(50, 0, 0.0, 200.0), Column(100, 0, 1.0, 400.0)
    assert standardised_difference(a, b) == 0.5 == standardised_difference(b, a)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"age": np.array(["12", "unknown"] * 10)}, "column 'age' holds text"),
        ({"age": np.append(np.zeros(19), np.inf)}, "column 'age' has infinite values"),
        ({"sex": np.full(20, 2)}, "column 'sex' must hold positions 0 to 1"),
        ({"age": np.zeros(20), "sex": np.zeros(19, int)}, "columns of one length"),
        ({"age": np.zeros(9)}, "at least 10 rows"),
    ],
)
def test_a_bad_column_is_named_with_its_silo(columns, message):
    with pytest.raises(ValueError, match=f"silo 'A'.*{message}"):
        local_table("A", columns, categories=LABELS)


def test_the_first_table_shows_what_was_sent_and_what_was_not():
    # Means 50 and 60, both variances 100: one standard deviation apart.
    a = {"age": Column(20, 0, 50.0, 2000.0), "sex: male": Column(20, 0, 0.25, 3.75)}
    b = {"age": Column(20, 0, 60.0, 2000.0)}
    age, sex = first_table({"A": a, "B": b})
    assert age == {"row": "age", "A": "50.0 ± 10.3", "B": "60.0 ± 10.3", "apart": 1.0}
    assert sex == {"row": "sex: male", "A": "25%", "B": "held back", "apart": 0.0}


def test_the_first_table_shows_what_is_missing_and_hides_that_few_are():
    columns = {"age": np.append(np.arange(40.0), [np.nan] * 12)}
    few = {"age": np.append(np.arange(43.0), [np.nan] * 9)}  # fewer than ten
    (row,) = first_table({"A": local_table("A", columns), "B": local_table("B", few)})
    # 0 to 39: mean 19.5, variance 40 * 41 / 12; 0 to 42: mean 21, variance 43 * 44 / 12
    assert row["A"] == "19.5 ± 11.7, 12 missing" and row["B"] == "21.0 ± 12.6"


def test_what_one_silo_alone_has_sent_is_apart_from_nothing():
    (row,) = first_table({"A": {"age": Column(20, 0, 50.0, 2000.0)}, "B": {}})
    assert row["B"] == "held back" and row["apart"] == 0


def test_arrays_carry_the_table_as_it_is():
    data = {"age": np.arange(20.0), "smokes": np.arange(20) % 2}
    labels = {"smokes": ["no", "yes"]}
    sent = {"a": silo_table(data, categories=labels)}
    assert tables_of(sent) == {"a": local_table("a", data, categories=labels)}
    with pytest.raises(TooFew, match="at least 10 rows"):
        silo_table({"age": np.arange(9.0)})


def heights(unit=1.0, seed=0):
    return {"height": unit * np.random.default_rng(seed).normal(1.7, 0.1, 50)}


def test_another_unit_is_named_and_a_usual_difference_is_not():
    """Metres in three hospitals and millimetres in one: a factor of 1,000."""
    columns = {silo: heights(seed=k) for k, silo in enumerate("abc")}
    columns |= {"d": heights(1000, seed=3)}
    tables = {silo: local_table(silo, c) for silo, c in columns.items()}
    (said,) = unit_warnings(tables)
    assert said.startswith("silo 'd', column 'height': values of about 1.7")
    del tables["d"]
    assert unit_warnings(tables) == []
    # Twice as tall is no unit, and centred columns have a mean of about 0.
    tables["e"] = local_table("e", heights(2.0))
    assert unit_warnings(tables) == []
    rng = np.random.default_rng(0)
    centred = {s: local_table(s, {"z": rng.normal(size=400)}) for s in "abc"}
    assert unit_warnings(centred) == []


def test_of_three_hospitals_only_the_one_with_another_unit_is_named():
    tables = {s: local_table(s, heights(seed=k)) for k, s in enumerate("ab")}
    tables["c"] = local_table("c", heights(1000, seed=2))
    assert [said[:8] for said in unit_warnings(tables)] == ["silo 'c'"]
    del tables["b"]  # of two, nobody knows which
    assert [said[:8] for said in unit_warnings(tables)] == ["silo 'a'", "silo 'c'"]
    assert unit_warnings({"a": tables["a"]}) == []


def test_zeros_for_missing_values_are_named():
    """As cholesterol at Switzerland, in the file of the heart disease data."""
    tables = {s: local_table(s, heights(seed=k)) for k, s in enumerate("abc")}
    tables["d"] = local_table("d", {"height": np.zeros(30)})
    assert [said[:8] for said in unit_warnings(tables)] == ["silo 'd'"]


def sketch_of(seed, n=300, rows=None):
    rng = np.random.default_rng(seed)
    data = {"age": rng.normal(60, 9, n), "bmi": rng.normal(25, 3, n)}
    return data if rows is None else {k: v[rows] for k, v in data.items()}


def test_a_copy_is_named_whatever_the_order_of_its_rows():
    order = np.random.default_rng(1).permutation(300)
    data = {"a": sketch_of(0), "b": sketch_of(2), "c": sketch_of(0, rows=order)}
    (said,) = copy_warnings({silo: silo_sketch(d) for silo, d in data.items()})
    # 300 equal pairs, give or take 300 / 8: four errors are 150.
    assert said.startswith("silos 'a' and 'c': about ")


def test_few_copies_are_found_by_chance_only():
    """Twenty seeds, hospitals with nothing in common: none is named."""
    for seed in range(20):
        pair = {"a": silo_sketch(sketch_of(2 * seed)), "b": silo_sketch(sketch_of(99))}
        assert copy_warnings(pair) == []


def test_the_sketch_says_little_about_a_row_and_nothing_about_few():
    """A row's 64 signs agree with the sums by 64, and by chance by (64 n) ** 0.5."""
    rng, hits = np.random.default_rng(0), []
    for seed in range(200):
        inside = sketch_of(seed)
        row = {name: values[:1].repeat(64) for name, values in inside.items()}
        signs = silo_sketch(row)["sketch"] / 64
        hits.append(float(signs @ silo_sketch(inside)["sketch"]))
    z = np.mean(hits) / (64 * 300) ** 0.5
    assert abs(z - (64 / 300) ** 0.5) < 0.25  # .46; the mean of 200 is off by .07
    with pytest.raises(TooFew, match="fewer than 64"):
        silo_sketch({"x": rng.normal(size=63)}, min_rows=1)


def test_rows_that_repeat_are_counted_if_there_are_ten():
    data = sketch_of(0, n=100)
    twice = {k: np.concatenate([v, v[:10]]) for k, v in data.items()}
    (said,) = copy_warnings({"a": silo_sketch(twice)})
    assert said == "silo 'a': 10 of 110 rows repeat another"
    less = {k: np.concatenate([v, v[:9]]) for k, v in data.items()}
    assert silo_sketch(less)["repeated"] == 0


def test_text_in_a_column_of_a_sketch_is_refused():
    with pytest.raises(ValueError, match="column 'x' holds text") as error:
        silo_sketch({"x": np.array(["Smith"] * 70)})
    assert "Smith" not in str(error.value)
