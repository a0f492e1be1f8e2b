import math
import secrets
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model, play
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.secure_aggregation import (
    SHARE_BYTES,
    Participant,
    add_mask,
    decode,
    encode,
    join,
    secure_average,
    secure_sum,
    split,
    unmask,
)

NAMES = ("A", "B", "C", "D", "E")


def vectors(names=NAMES, values=1000, seed=0):
    draw = np.random.default_rng(seed)
    return {n: draw.integers(0, 2**32, values, dtype=np.uint32) for n in names}


def plain_sum(parts):
    whole = sum(part.astype(object) for part in parts)  # Python's numbers do not wrap
    return np.array(whole % 2**32, dtype=np.uint32)


class Round:
    """The protocol step by step, so that a test can meddle with one of them."""

    def __init__(self, parts, threshold=3):
        self.parts, self.threshold = parts, threshold
        self.silos = {name: Participant(name, threshold) for name in parts}
        self.hellos = {name: silo.hello() for name, silo in self.silos.items()}
        self.sent = {n: silo.share(self.hellos) for n, silo in self.silos.items()}

    def inbox(self, name):
        return {sender: boxes[name] for sender, boxes in self.sent.items()}

    def finish(self, dropped=(), silent=(), change=lambda revealed: None):
        """silent: silos that send their update and then answer no more."""
        alive = [name for name in self.parts if name not in dropped]
        masked = {n: self.silos[n].mask(self.parts[n], self.inbox(n)) for n in alive}
        revealed = {
            n: self.silos[n].reveal(alive, dropped) for n in alive if n not in silent
        }
        change(revealed)
        return unmask(masked, self.hellos, revealed, self.threshold)


# -- the sum


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 6), st.integers(1, 50), st.integers(0, 2**32), st.data())
def test_the_sum_is_exact_whoever_drops_out(num_silos, values, seed, data):
    threshold = data.draw(st.integers(max(3, num_silos // 2 + 1), num_silos))
    dropped = data.draw(
        st.lists(st.sampled_from(range(num_silos)), unique=True,
                 max_size=num_silos - threshold)
    )  # fmt: skip
    parts = vectors([f"silo {k}" for k in range(num_silos)], values, seed)
    gone = [f"silo {k}" for k in dropped]
    got = secure_sum(parts, threshold=threshold, dropped=gone).total
    left = [v for name, v in parts.items() if name not in gone]
    assert np.array_equal(got, plain_sum(left))


def test_below_the_threshold_nothing_is_revealed():
    parts = vectors()
    assert len(secure_sum(parts, threshold=3, dropped=["A", "B"]).masked) == 3
    with pytest.raises(ValueError, match="2 silos are left, 3 are needed.*reveals no"):
        secure_sum(parts, threshold=3, dropped=["A", "B", "C"])


def test_silos_that_send_and_then_fall_silent_are_in_the_sum():
    parts = vectors()
    got = Round(parts).finish(dropped=["E"], silent=["A"])
    assert np.array_equal(got, plain_sum(parts[n] for n in "ABCD"))
    with pytest.raises(ValueError, match="2 silos revealed, 3 are needed"):
        Round(parts).finish(silent=["A", "B", "C"])


def test_a_silo_that_never_shared_is_left_out():
    parts = vectors()
    round_ = Round(parts)
    del round_.sent["E"], round_.silos["E"], round_.hellos["E"], parts["E"]
    assert np.array_equal(round_.finish(), plain_sum(parts.values()))


# -- what the orchestrator sees


def test_a_masked_vector_looks_uniform_and_the_vector_itself_does_not():
    update = encode(small_cnn(3).body[0].state_dict(), 0.25, silo="A")
    update = np.resize(update, 50_000)
    parts = {name: update for name in NAMES}  # the worst case: all the same
    seen = secure_sum(parts, threshold=3).masked

    def uniform(vector):
        counts = np.bincount(vector.view(np.uint8), minlength=256)
        return stats.chisquare(counts).pvalue

    assert all(uniform(seen[name]) > 1e-4 for name in NAMES)
    assert uniform(update) < 1e-12
    for a, b in (("A", "B"), ("B", "E")):  # neither equal nor opposite
        assert uniform(seen[a] - seen[b]) > 1e-4
        assert uniform(seen[a] + seen[b]) > 1e-4
    bits = np.unpackbits((seen["A"] ^ update).view(np.uint8)).mean()
    assert abs(bits - 0.5) < 4 * 0.5 / np.sqrt(32 * len(update))


def test_any_set_of_silos_but_all_stays_masked():
    parts = vectors(values=5000)
    seen = secure_sum(parts, threshold=3).masked
    for k in range(1, 5):
        some = sum(seen[name] for name in NAMES[:k])
        true = plain_sum(parts[name] for name in NAMES[:k])
        assert (some == true).mean() < 0.01


def test_masks_are_new_in_every_round():
    parts = vectors()
    first, second = (secure_sum(parts, threshold=3) for _ in range(2))
    assert np.array_equal(first.total, second.total)
    assert (first.masked["A"] == second.masked["A"]).mean() < 0.01


def test_masks_of_a_pair_cancel_exactly():
    seed, zero = secrets.token_bytes(32), np.zeros(100, np.uint32)
    there = add_mask(zero, seed)
    assert not np.array_equal(there, zero)
    assert np.array_equal(add_mask(there, seed, plus=False), zero)


# -- secrets and shares


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 7), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret, threshold, data):
    shares = split(secret, 7, threshold)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    points = data.draw(
        st.lists(st.integers(1, 7), min_size=threshold, max_size=7, unique=True)
    )
    assert join({x: shares[x - 1] for x in points}) == secret


def test_fewer_shares_fit_every_secret():
    # Two of three points: for each secret there is a polynomial through them, so they
    # say nothing. Joined as if they were enough, they give something else each time.
    secret, found = bytes(32), set()
    for _ in range(20):
        shares = split(secret, 5, 3)
        found.add(join({1: shares[0], 2: shares[1]}))
    assert secret not in found and len(found) == 20


def test_a_share_changed_on_its_way_is_noticed_by_the_receiver():
    round_ = Round(vectors())
    box = bytearray(round_.sent["B"]["D"])
    box[40] ^= 1
    round_.sent["B"]["D"] = bytes(box)
    with pytest.raises(ValueError, match="share from 'B' to 'D' was changed"):
        round_.finish()


def test_a_box_for_another_silo_cannot_be_read():
    round_ = Round(vectors())
    round_.sent["B"]["D"] = round_.sent["B"]["C"]
    with pytest.raises(ValueError, match="from 'B' to 'D'"):
        round_.finish()


@pytest.mark.parametrize("about", ["A", "E"])  # one that survived, one that dropped
def test_a_changed_share_is_noticed_by_the_orchestrator(about):
    def change(revealed):
        share = bytearray(revealed["C"][about])
        share[-1] ^= 1
        revealed["C"][about] = bytes(share)

    with pytest.raises(ValueError, match=f"shares for silo '{about}' do not give"):
        Round(vectors()).finish(dropped=["E"], change=change)


def test_a_silo_reveals_one_secret_of_each_and_once():
    round_ = Round(vectors())
    silo = round_.silos["A"]
    silo.mask(round_.parts["A"], round_.inbox("A"))
    with pytest.raises(ValueError, match="'A' reveals one secret of each"):
        silo.reveal(["A", "B", "C", "D"], ["D", "E"])
    silo.reveal(["A", "B", "C", "D"], ["E"])
    with pytest.raises(ValueError, match="'A' is asked to reveal, .* once"):
        silo.reveal(["A", "B", "C", "E"], ["D"])


def test_a_silo_shares_and_masks_once_and_in_order():
    # Twice the same masks: the difference of what is sent is that of two updates. Twice
    # the same key and nonce: the XOR of two boxes is that of the shares in them.
    round_ = Round(vectors())
    silo, inbox = round_.silos["A"], round_.inbox("A")
    with pytest.raises(ValueError, match="'A' is asked to share, .*new participants"):
        silo.share(round_.hellos)
    silo.mask(round_.parts["A"], inbox)
    with pytest.raises(ValueError, match="'A' is asked to mask, .*once"):
        silo.mask(round_.parts["B"], inbox)
    with pytest.raises(ValueError, match="to mask, .*in order"):
        Participant("A", 3).mask(round_.parts["A"], inbox)


@pytest.mark.parametrize(("silos", "threshold"), [(3, 2), (6, 3), (4, 5)])
def test_a_threshold_that_protects_nobody_is_refused(silos, threshold):
    parts = vectors(NAMES[:silos] if silos < 6 else [*NAMES, "F"])
    with pytest.raises(ValueError, match=f"half of the {silos} silos, got {threshold}"):
        secure_sum(parts, threshold=threshold)


# -- models


def update(silo, params, num_examples):
    return SimpleNamespace(silo=silo, params=params, num_examples=num_examples)


def four_updates():
    sent = []
    for k, n in enumerate((120, 90, 60, 30)):
        torch.manual_seed(k)
        sent.append(update(NAMES[k], small_cnn(3, norm="group").state_dict(), n))
    return sent


def test_the_secure_average_is_the_weighted_average():
    sent = four_updates()
    plain, secure = weighted_average(sent), secure_average(sent, threshold=3)
    for name, value in plain.items():
        # each of 4 silos rounds by at most half a step of 2^-20
        torch.testing.assert_close(secure[name], value, atol=2.1 / 2**20, rtol=1e-6)
    left = weighted_average([sent[0], sent[1], sent[3]])
    secure = secure_average(sent, threshold=3, dropped=["C"])
    for name, value in left.items():  # divided by their 0.8 of the weight
        torch.testing.assert_close(secure[name], value, atol=2.1 / 2**20, rtol=1e-6)


ONES = {"w": torch.ones(2, 3)}
REFUSED = {
    "twice": (update("B", ONES, 1), "silo 'B' sent two updates"),
    "no examples": (update("D", ONES, 0), "silo 'D' reports num_examples=0"),
    "less": (update("D", ONES, -2), "silo 'D' reports num_examples=-2"),
    "all there are": (update("D", ONES, math.inf), "silo 'D' reports num_examples=inf"),
    "yes": (update("D", ONES, True), "silo 'D' reports num_examples=True"),
    "name": (update("D", {"v": ONES["w"]}, 1), "silo 'D' sent another model"),
    "shape": (update("D", {"w": torch.ones(3, 2)}, 1), "silo 'D' sent .*'w'"),
    "dtype": (update("D", {"w": ONES["w"].double()}, 1), "silo 'D' sent .*'w'"),
    "NaN": (update("D", {"w": ONES["w"] / 0 * 0}, 1), "silo 'D'"),
}


@pytest.mark.parametrize(("bad", "message"), REFUSED.values(), ids=REFUSED)
def test_the_secure_average_refuses_what_the_plain_one_refuses(bad, message):
    sent = [update(name, ONES, 1) for name in "ABC"] + [bad]
    for average in (weighted_average, lambda u: secure_average(u, threshold=3)):
        with pytest.raises(ValueError, match=message):
            average(iter(sent))
    with pytest.raises(ValueError, match="no updates to average"):
        secure_average([], threshold=3)


def test_few_examples_among_many_are_off_by_as_much_as_is_said():
    values = (0.3, -0.7, 0.1, 0.9)
    sizes = (1, 1, 1, 200_000)
    sent = [
        update(name, {"w": torch.tensor([v], dtype=torch.float64)}, n)
        for name, v, n in zip("ABCD", values, sizes, strict=True)
    ]
    found = secure_average(sent, threshold=3, dropped=["D"])["w"].item()
    error = abs(found - sum(values[:3]) / 3)
    assert 0.01 < error <= 3 / 2**21 / (3 / 200_003)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1023, 1023, width=32), min_size=1, max_size=20),
    st.floats(0.01, 1),
)
def test_encoding_loses_at_most_half_a_step(values, share):
    params = {"b": torch.tensor(values), "a": torch.zeros(2, 1)}
    back = decode(encode(params, share, silo="A"), params, share)
    assert list(back) == ["b", "a"] and back["a"].shape == (2, 1)
    error = (back["b"].double() - params["b"].double()).abs().max().item()
    assert error <= 0.5 / 2**20 / share + 1e-4  # the latter: float32 near 1,000


def test_what_cannot_be_summed_is_refused_with_the_silo():
    with pytest.raises(ValueError, match="'A'.*num_batches_tracked.*BatchNorm"):
        encode(batchnorm_model().state_dict(), 1, silo="A")
    for bad in (1024.0, -2000.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="'A'.*below 1024"):
            encode({"w": torch.tensor([bad])}, 1, silo="A")


def test_bytes_are_four_per_value_and_a_setup_that_does_not_grow_with_the_model():
    small, large = (secure_sum(vectors(values=n), threshold=3) for n in (10, 10_010))
    assert large.bytes_up["A"] - small.bytes_up["A"] == 4 * 10_000
    # 96 for two keys and a hash, 5 boxes of 2 * 66 + 16, 5 shares of 66
    assert small.bytes_up["A"] == 40 + 96 + 5 * 148 + 5 * 66
    lost = secure_sum(vectors(values=10), threshold=3, dropped=["A"])
    assert lost.bytes_up["A"] == 96 + 5 * 148


def test_a_run_with_secure_aggregation_ends_at_the_same_model(silos):
    third = SimpleNamespace(name="c", train=silos[0].train)

    def client(params, silo, *, round_index, rng):
        moved = {
            name: v + 0.1 * torch.randn(v.shape, generator=rng)
            for name, v in params.items()
        }
        sent = update(silo.name, moved, len(silo.train[1]))
        sent.metrics = {}
        return sent

    def run(aggregate):
        start = small_cnn(2, norm="group").state_dict()
        start = {name: torch.zeros_like(v) for name, v in start.items()}
        how = dict(rounds=2, seed=0)
        return play(start, [*silos, third], client, aggregate, **how).params

    plain = run(weighted_average)
    secure = run(lambda updates: secure_average(updates, threshold=3))
    for name, value in plain.items():
        torch.testing.assert_close(secure[name], value, atol=1e-5, rtol=0)
