import math
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
import torch
from conftest import batchnorm_model, play
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers import robust
from fl_helpers.aggregation import make_aggregate, weighted_average
from fl_helpers.robust import (
    NormClipping,
    coordinate_median,
    geometric_median,
    krum,
    trimmed_mean,
)
from fl_helpers.training import train_locally


@dataclass(frozen=True)
class Update:
    silo: str
    params: dict
    num_examples: float = 1


RULES = {  # each withstands one malicious silo of five or more
    "median": coordinate_median,
    "trimmed": partial(trimmed_mean, trim=1),
    "krum": partial(krum, malicious=1),
    "multi-krum": partial(krum, malicious=1, keep=3),
    "geometric": geometric_median,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def from_rows(rows, dtype=torch.float64):
    """One update per row of numbers; two entries, so that rules must go over both."""
    rows = torch.as_tensor(np.asarray(rows), dtype=dtype)
    return [
        Update(f"silo {k:02d}", {"a": row[:1].clone(), "b": row[1:].clone()})
        for k, row in enumerate(rows)
    ]


def numbers(params):
    return np.concatenate([params["a"].numpy(), params["b"].numpy()])


def random_rows(silos, size=7, seed=0):
    return np.random.default_rng(seed).normal(size=(silos, size))


ROW = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


# -- oracles


@pytest.mark.parametrize("silos", [1, 2, 5, 6])
def test_median_equals_numpy(silos):
    rows = random_rows(silos)
    np.testing.assert_allclose(
        numbers(coordinate_median(from_rows(rows))), np.median(rows, axis=0)
    )


@pytest.mark.parametrize(("silos", "trim"), [(1, 0), (5, 0), (5, 2), (6, 1), (9, 3)])
def test_trimmed_mean_equals_scipy(silos, trim):
    rows = random_rows(silos)
    found = numbers(trimmed_mean(from_rows(rows), trim=trim))
    share = (trim + 0.5) / silos  # scipy rounds share * silos down
    np.testing.assert_allclose(found, scipy.stats.trim_mean(rows, share, axis=0))


@pytest.mark.parametrize(("silos", "malicious"), [(3, 0), (5, 1), (8, 2), (12, 3)])
def test_krum_equals_its_definition(silos, malicious):
    rows = random_rows(silos, seed=silos)
    far = scipy.spatial.distance.squareform(
        scipy.spatial.distance.pdist(rows, "sqeuclidean")
    )
    nearest = silos - malicious - 2
    scores = [np.sort(np.delete(far[k], k))[:nearest].sum() for k in range(silos)]
    order = np.argsort(scores)
    for keep in range(1, silos - malicious + 1):
        found = numbers(krum(from_rows(rows), malicious=malicious, keep=keep))
        np.testing.assert_allclose(found, rows[order[:keep]].mean(axis=0))


@pytest.mark.parametrize("silos", [3, 4, 7, 8])
def test_geometric_median_has_the_smallest_sum_of_distances(silos):
    rows = random_rows(silos, size=3, seed=silos)

    def total(x):
        return np.linalg.norm(rows - x, axis=1).sum()

    best = scipy.optimize.minimize(total, rows.mean(axis=0), method="Nelder-Mead")
    found = numbers(geometric_median(from_rows(rows)))
    assert total(found) <= best.fun * (1 + 1e-5)
    np.testing.assert_allclose(found, best.x, atol=0.02)  # its neighbours are as good


@pytest.mark.parametrize("silos", [3, 5, 7, 9])
@pytest.mark.parametrize("seed", range(5))
def test_geometric_median_goes_on_from_a_silos_own_model(silos, seed):
    rows = random_rows(silos, size=3, seed=seed)
    rows[0] = np.median(rows[1:], axis=0)  # now it is the coordinate median
    np.testing.assert_allclose(numbers(coordinate_median(from_rows(rows))), rows[0])

    def total(x, smooth=0.0):
        return np.hypot(np.linalg.norm(rows - x, axis=1), smooth).sum()

    best = rows[np.argmin([total(row) for row in rows])]  # or it lies between them:
    between = rows.mean(axis=0)
    for smooth in (1e-1, 1e-3, 1e-6):
        between = scipy.optimize.minimize(total, between, args=(smooth,)).x
    least = min(total(best), total(between))
    assert total(numbers(geometric_median(from_rows(rows)))) <= least * (1 + 1e-4)


def test_geometric_median_of_a_line_and_of_a_majority():
    line = numbers(geometric_median(from_rows([[0, 0], [1, 0], [9, 0]])))
    np.testing.assert_allclose(line, [1, 0], atol=1e-5)  # the median of the line
    # Three of five are the same: the sum of distances grows in every direction.
    majority = [[2, 3]] * 3 + [[50, 0], [0, 70]]
    np.testing.assert_allclose(numbers(geometric_median(from_rows(majority))), [2, 3])


@pytest.fixture(scope="module")
def flower():
    pytest.importorskip("flwr", reason="flwr needs Python >= 3.11")
    from flwr.server.strategy import aggregate

    return aggregate


@pytest.mark.parametrize("seed", range(5))
def test_rules_equal_flower(flower, seed):
    rows = random_rows(7, seed=seed)
    updates = from_rows(rows)
    arrays = [([u.params["a"].numpy(), u.params["b"].numpy()], 1) for u in updates]

    def same(params, expected):
        np.testing.assert_allclose(numbers(params), np.concatenate(expected))

    same(coordinate_median(updates), flower.aggregate_median(arrays))
    same(trimmed_mean(updates, trim=2), flower.aggregate_trimmed_avg(arrays, 2.5 / 7))
    same(krum(updates, malicious=2), flower.aggregate_krum(arrays, 2, 0))
    same(krum(updates, malicious=2, keep=3), flower.aggregate_krum(arrays, 2, 3))


# -- properties


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(ROW, min_size=5, max_size=9), data=st.data())
def test_rules_stay_between_the_silos_and_know_no_order(rows, data):
    updates = from_rows(rows)
    low, high = np.min(rows, axis=0), np.max(rows, axis=0)
    slack = 1e-9 * (1 + np.abs(rows).max())
    mixed = data.draw(st.permutations(updates))
    for rule in RULES.values():
        found = numbers(rule(updates))
        assert (found >= low - slack).all() and (found <= high + slack).all()
        np.testing.assert_array_equal(numbers(rule(mixed)), found)


@settings(deadline=None, max_examples=60)
@given(
    honest=st.lists(ROW, min_size=6, max_size=6),
    lie=st.floats(-1e30, 1e30, allow_subnormal=False),
    place=st.integers(0, 6),
)
def test_one_liar_moves_no_rule_away_from_the_honest(honest, lie, place):
    rows = honest[:place] + [[lie, -lie, lie, lie]] + honest[place:]
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    updates = from_rows(rows)
    for name in ("median", "trimmed"):
        found = numbers(RULES[name](updates))
        assert (found >= low - 1e-9).all() and (found <= high + 1e-9).all()
    # Geometric median: at most 2 * 6 / (6 - 1) times the honest ones' radius away from
    # any centre of theirs (Pillutla et al. 2022, from Lopuhaa and Rousseeuw 1991).
    centre = np.mean(honest, axis=0)
    radius = np.linalg.norm(np.array(honest) - centre, axis=1).max()
    away = np.linalg.norm(numbers(geometric_median(updates)) - centre)
    assert away <= 2.4 * radius * (1 + 1e-6) + 1e-9
    if abs(lie) > 1e4:  # far beyond the honest ones, which lie within 200
        for name in ("krum", "multi-krum"):
            found = numbers(RULES[name](updates))
            assert (found >= low - 1e-9).all() and (found <= high + 1e-9).all()


def test_where_the_rules_break_down():
    honest, liars = [[0.0, 0.0]] * 3, [[1e6, 1e6]] * 2
    assert numbers(coordinate_median(from_rows(honest + liars))).max() == 0
    assert numbers(geometric_median(from_rows(honest + liars))).max() == 0
    assert numbers(trimmed_mean(from_rows(honest + liars), trim=2)).max() == 0
    # Liars that are the majority win; so do two where one was planned for.
    assert numbers(coordinate_median(from_rows(honest[:1] + liars))).max() == 1e6
    assert numbers(geometric_median(from_rows(honest[:1] + liars))).max() == 1e6
    assert numbers(trimmed_mean(from_rows(honest + liars), trim=1)).max() > 1e5
    assert numbers(krum(from_rows(honest[:2] + liars * 2), malicious=1)).max() == 1e6
    # The plain mean breaks down with one.
    assert numbers(trimmed_mean(from_rows(honest + liars[:1]), trim=0)).max() == 25e4


@pytest.mark.parametrize("dtype, huge", [(torch.float32, 3e38), (torch.float64, 1e308)])
@pytest.mark.parametrize("liar", [0, 3, 5])
def test_huge_finite_values_overflow_nothing(liar, dtype, huge):
    rows = random_rows(6)
    rows[liar], rows[liar, ::2] = huge, -huge
    start = {"a": torch.zeros(1, dtype=dtype), "b": torch.zeros(6, dtype=dtype)}
    for rule in (*RULES.values(), NormClipping(start)):
        found = numbers(rule(from_rows(rows, dtype)))
        assert np.isfinite(found).all() and np.abs(found).max() < 10, rule


@every_rule
def test_rules_do_not_know_the_unit(rule):
    rows = torch.tensor(random_rows(6), dtype=torch.float32)
    usual = numbers(rule(from_rows(rows, torch.float32)))
    large = numbers(rule(from_rows(rows * 2.0**80, torch.float32)))  # squares: 2^160
    np.testing.assert_allclose(large, usual * 2.0**80, rtol=1e-5)


@every_rule
def test_equal_updates_come_out_as_they_are(rule):
    rows = np.repeat(random_rows(1), 5, axis=0)
    np.testing.assert_allclose(numbers(rule(from_rows(rows))), rows[0], rtol=1e-15)


# -- clipping


def test_clipping_shortens_the_loud_only():
    start = {"w": torch.zeros(2)}
    updates = [
        Update("a", {"w": torch.tensor([3.0, 4.0])}, 1),  # norm 5, scaled by 1/5
        Update("b", {"w": torch.tensor([0.0, 0.5])}, 3),  # stays
    ]
    found = NormClipping(start, max_norm=1.0)(updates)["w"]
    # (1 * (0.6, 0.8) + 3 * (0, 0.5)) / 4
    torch.testing.assert_close(found, torch.tensor([0.15, 0.575]))


def test_clipping_to_the_median_norm():
    start = {"w": torch.zeros(1)}

    def moved_by(*steps):
        return [Update(f"s{x}", {"w": torch.tensor([x])}) for x in steps]

    found = NormClipping(start)(moved_by(1.0, -2.0, 90.0))["w"]
    torch.testing.assert_close(found, torch.tensor([1 / 3]))  # (1 - 2 + 2) / 3
    still = moved_by(0.0, -0.0, 9.0)  # two of three did not move
    assert NormClipping(start)(still)["w"].item() == 0


def test_clipping_with_a_wide_limit_is_the_weighted_average():
    rows = random_rows(5)
    updates = [Update(u.silo, u.params, k + 1) for k, u in enumerate(from_rows(rows))]
    start = from_rows(random_rows(1, seed=9))[0].params
    found = NormClipping(start, max_norm=1e9)(updates)
    np.testing.assert_allclose(numbers(found), numbers(weighted_average(updates)))


def test_clipping_goes_on_from_its_own_result():
    rule = NormClipping({"w": torch.zeros(1)}, max_norm=1.0)
    step = [Update("a", {"w": torch.tensor([5.0])})]
    for expected in (1, 2, 3):
        found = rule(step)
        assert found["w"].item() == expected
        found["w"].add_(100)  # is nothing to the rule
    again = NormClipping({"w": torch.zeros(1)}, max_norm=1.0)
    again.load_state_dict(rule.state_dict())
    assert again(step)["w"].item() == 4
    with pytest.raises(ValueError, match="'b' sent 1 NaN"):
        rule([*step, Update("b", {"w": torch.tensor([math.nan])})])
    assert rule(step)["w"].item() == 4  # the refused round left no trace


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_clipping_needs_a_positive_limit(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be > 0 .*{max_norm}"):
        NormClipping({"w": torch.zeros(1)}, max_norm=max_norm)


def test_distances_go_over_the_named_entries():
    # "b" is the noise of everyone's scanner, "a" is where silo 3 lies.
    rows = [[0, 90], [0.1, -80], [0.2, 70], [50, 1], [0.3, -60], [0.1, 0]]
    updates, named = from_rows(rows), dict(entries=["a", "not in the model"])
    # By "b" it is -60: 20^2 + 60^2 + 61^2 + 49.7^2; by "a" 0.1: 0 + 0.1^2 + 0.1^2.
    assert krum(updates, malicious=1)["a"].item() == 0.3
    assert krum(updates, malicious=1, **named)["a"].item() == 0.1
    without = updates[:5]  # by "b", silo 3 is in the middle of them
    assert geometric_median(without)["a"].item() > 10
    assert geometric_median(without, **named)["a"].item() < 0.3
    start = {"a": torch.zeros(1).double(), "b": torch.zeros(1).double()}
    assert NormClipping(start)(updates)["a"].item() > 8  # 50 is usual, beside 90
    assert NormClipping(start, **named)(updates)["a"].item() < 0.2


# -- models as they are


def batchnorm_updates(silos=5):
    updates = []
    for k in range(silos):
        torch.manual_seed(k)
        model = batchnorm_model()
        for _ in range(k + 1):
            model(torch.randn(8, 1, 16, 16))  # moves the running statistics
        updates.append(Update(f"s{k}", model.state_dict(), k + 1))
    return updates


def clipping(updates):
    return NormClipping(batchnorm_model().state_dict())(updates)


ALL_RULES = RULES | {"clipping": clipping}


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES)
def test_a_batchnorm_model_comes_out_whole(rule):
    updates = batchnorm_updates()
    before = [{k: v.clone() for k, v in u.params.items()} for u in updates]
    found = rule(iter(updates))
    model = batchnorm_model()
    model.load_state_dict(found)  # names and shapes
    for name, value in found.items():
        assert value.dtype == updates[0].params[name].dtype
    if rule not in (RULES["krum"], RULES["multi-krum"]):  # of those that it kept
        assert found["1.num_batches_tracked"].item() == 5
    assert (found["1.running_var"] > 0).all()
    for value in found.values():
        value.add_(1)  # new tensors: nothing of this arrives in the updates
    for update, old in zip(updates, before, strict=True):
        assert all(update.params[k].equal(old[k]) for k in old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_rule
def test_other_precisions_keep_their_dtype(rule, dtype):
    updates = from_rows(random_rows(5).round(1), dtype)
    found = rule(updates)
    wide = rule(from_rows([numbers_of(u) for u in updates]))
    assert found["b"].dtype == dtype
    torch.testing.assert_close(found["b"].double(), wide["b"], atol=0.01, rtol=0.01)


def numbers_of(update):
    return torch.cat([update.params["a"], update.params["b"]]).double().numpy()


def test_parts_of_an_entry_and_odd_memory_layouts_make_no_difference(monkeypatch):
    def updates():
        rng = torch.Generator().manual_seed(0)
        for k in range(5):
            w = torch.randn(3, 8, 5, 5, generator=rng)
            w = w.to(memory_format=torch.channels_last) if k % 2 else w
            yield Update(f"s{k}", {"w": w, "scalar": torch.tensor(float(k))})

    whole = {name: rule(updates()) for name, rule in RULES.items()}
    monkeypatch.setattr(robust, "_VALUES", 35)  # seven numbers at a time
    for name, rule in RULES.items():
        found = rule(updates())
        assert found["w"].shape == (3, 8, 5, 5) and found["scalar"].shape == ()
        for entry in found:
            torch.testing.assert_close(found[entry], whole[name][entry], msg=name)


@pytest.mark.parametrize("rule", [coordinate_median, partial(trimmed_mean, trim=1)])
def test_rules_take_part_in_a_run_that_is_resumed(silos, tmp_path, rule):
    def client(params, silo, *, round_index, rng):
        model = batchnorm_model()
        model.load_state_dict(params)
        return train_locally(model, silo, epochs=1, lr=0.1, batch_size=8, rng=rng)

    def go(aggregate, **more):
        some = [type(s)(**vars(s) | {"name": n}) for n in "ab" for s in silos[:1]]
        some += [type(s)(**vars(s) | {"name": n}) for n in "cd" for s in silos[1:]]
        return play(start, some, client, aggregate, seed=0, **more).params

    torch.manual_seed(0)
    start = batchnorm_model().state_dict()
    for make in (lambda: rule, lambda: NormClipping(start)):
        file = tmp_path / f"{make()}.pt"[-40:].replace("/", "_")
        expected = go(make(), rounds=3)
        go(make(), rounds=2, checkpoint=file)
        resumed = go(make(), rounds=3, checkpoint=file)
        assert all(resumed[k].equal(expected[k]) for k in expected)


# -- what is refused


def bad(**changes):
    good = [Update(n, {"w": torch.ones(3), "n": torch.tensor(1)}) for n in "abcde"]
    values = vars(good[2]) | changes
    return [*good[:2], Update(**values), *good[3:]]


ONES, COUNT = torch.ones(3), torch.tensor(1)
NOT_FINITE = torch.tensor([1, math.nan, math.inf])
REFUSED = {
    "NaN": (bad(params={"w": NOT_FINITE, "n": COUNT}), "'c' sent 2 NaN .* in 'w'"),
    "missing": (bad(params={"w": ONES}), r"'a' and 'c'.*\['n'\]"),
    "unknown": (bad(params={"w": ONES, "n": COUNT, "x": ONES}), r"'c'.*\['x'\]"),
    "shape": (bad(params={"w": ONES[None], "n": COUNT}), r"'c'.*\['w'\]"),
    "dtype": (bad(params={"w": ONES.double(), "n": COUNT}), r"'c'.*\['w'\]"),
    "twice": (bad(silo="b"), "silo 'b' sent two updates"),
    "no examples": (bad(num_examples=0), "silo 'c' reports num_examples=0"),
    "less": (bad(num_examples=-3), "silo 'c' reports num_examples=-3.*finite"),
    "all there are": (bad(num_examples=math.inf), "silo 'c' reports num_examples=inf"),
    "uncounted": (bad(num_examples=math.nan), "silo 'c' reports num_examples=nan"),
    "yes": (bad(num_examples=True), "silo 'c' reports num_examples=True"),
    "empty": ([Update("a", {}), *bad()[1:]], "'a' and 'b' sent different models"),
    "nobody": ([], "at least . updates, got 0"),
}


@pytest.mark.parametrize("updates, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_refused(updates, message):
    clipping = NormClipping({"w": torch.zeros(3), "n": torch.tensor(0)})
    for rule in (*RULES.values(), clipping):
        with pytest.raises(ValueError, match=message):
            rule(iter(updates))
    with pytest.raises(ValueError):  # whatever these refuse, the average refuses
        weighted_average(iter(updates))


def test_finite_values_with_an_infinite_sum_are_accepted():
    updates = from_rows([[3e38] * 5] * 5, torch.float32)
    for rule in RULES.values():
        assert np.isfinite(numbers(rule(updates))).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (partial(trimmed_mean, trim=3), "trim=3 needs at least 7 updates, got 5; ask"),
        (partial(trimmed_mean, trim=-1), "trim must be >= 0"),
        (partial(krum, malicious=2), "malicious=2 needs at least 7 updates, got 5"),
        (partial(krum, malicious=-1), "malicious must be >= 0 silos, got -1"),
        (partial(krum, malicious=1, keep=5), "keep must be 1 to 4 .*, got 5"),
        (partial(krum, malicious=1, keep=0), "keep must be 1 to 4"),
        (partial(krum, malicious=1, entries=["w"]), r"names none .*: \['w'\]"),
        (partial(geometric_median, entries=[]), r"names none of the model's: \[\]"),
    ],
)
def test_settings_that_promise_nothing_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        rule(from_rows(random_rows(5)))


# -- memory

MEASURE = """
import torch
from types import SimpleNamespace
from functools import partial
from fl_helpers import robust

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
shapes = {"conv": (512, 512, 3, 3), "head": (1000, 8640)}  # 11 M parameters
states = [
    {k: torch.randn(s, generator=rng) for k, s in shapes.items()} for _ in range(4)
]
updates = [  # 32 silos; some share memory, which the rules do not know
    SimpleNamespace(silo=f"s{k:02d}", num_examples=1, params=states[k % 4])
    for k in range(32)
]
model = sum(v.nbytes for v in states[0].values())
def memory(line):
    return next(
        int(text.split()[1]) * 1024
        for text in open("/proc/self/status") if text.startswith(line)
    )
assert 40e6 < model < 50e6
tiny = [
    SimpleNamespace(silo=u.silo, num_examples=1, params={"w": torch.ones(9)})
    for u in updates
]
rules = robust.coordinate_median, partial(robust.trimmed_mean, trim=4)
for rule in rules:  # whatever is loaded at the first call
    rule(tiny)
before = memory("VmRSS")
for rule in rules:
    rule(updates)
print((memory("VmHWM") - before) / model)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_32_updates_of_11_million_numbers_need_no_more_than_two_models():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 2, done.stdout  # the result is one


def test_rules_by_name_are_the_rules():
    rng = torch.Generator().manual_seed(0)
    start = {"w": torch.zeros(3, 2), "running": torch.zeros(2)}
    updates = [
        Update(
            name, {k: torch.randn(v.shape, generator=rng) for k, v in start.items()}, 9
        )
        for name in "abcdef"
    ]
    direct = {
        "coordinate_median": (robust.coordinate_median, {}),
        "trimmed_mean": (partial(robust.trimmed_mean, trim=1), {"trim": 1}),
        "krum": (partial(robust.krum, malicious=1, entries=["w"]), {"malicious": 1}),
        "geometric_median": (partial(robust.geometric_median, entries=["w"]), {}),
        "NormClipping": (
            robust.NormClipping(start, max_norm=0.1, entries=["w"]),
            {"max_norm": 0.1},
        ),
    }
    assert direct.keys() == robust.ROBUST_RULES.keys()
    for name, (rule, options) in direct.items():
        more = {"more": robust.ROBUST_RULES}
        made = make_aggregate(name, start, ["w"], options, **more)
        found, expected = made(iter(updates)), rule(iter(updates))
        assert all(found[key].equal(expected[key]) for key in start), name
        with pytest.raises(ValueError, match=f"{name} does not take .*'speed'"):
            make_aggregate(name, start, ["w"], options | {"speed": 1}, **more)
    with pytest.raises(ValueError, match="got 'krum'"):
        make_aggregate("krum", start, ["w"], {"malicious": 1})
