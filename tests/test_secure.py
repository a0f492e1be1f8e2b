"""Secure sums without an engine: what a silo answers, and what it never does."""

import datetime
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_helpers.aggregation import FedAdam, weighted_average
from fl_helpers.cross_silo import secure
from fl_helpers.cross_silo.cohorts import Cohort, subtracts
from fl_helpers.cross_silo.fixed_point import (
    FRACTION_BITS,
    Plain,
    SecureAverage,
    decode,
    decode_arrays,
    encode,
    encode_arrays,
)
from fl_helpers.cross_silo.secure import Denied, Identity, Member, Question, Sum
from fl_helpers.training import Update

NAMES = ["Hospital A", "Hospital B", "Hospital C", "Hospital D"]
RUN = "0" * 32
TODAY = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


# -- certificates


def name(text):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def certificate(subject, key, issuer, signer, *, start=-DAY, end=DAY):
    made = (
        x509.CertificateBuilder()
        .subject_name(name(subject)).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(TODAY + start).not_valid_after(TODAY + end)
    )  # fmt: skip
    return made.sign(signer, hashes.SHA256())


def pem(made):
    return made.public_bytes(serialization.Encoding.PEM)


class Authority:
    def __init__(self):
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.root = certificate("root", self.key, name("root"), self.key)
        self.keys = {n: ec.generate_private_key(ec.SECP256R1()) for n in NAMES}
        self.issued = {n: self.issue(n, key) for n, key in self.keys.items()}

    def issue(self, silo, key, **options):
        subject = silo.replace(" ", "-")
        return pem(certificate(subject, key, self.root.subject, self.key, **options))

    def identity(self, silo, **options):
        known = {n: secure.fingerprint(made) for n, made in self.issued.items()}
        options = {"confirmed": known} | options
        return Identity(self.issued[silo], self.keys[silo], self.root, **options)


@pytest.fixture(scope="module")
def authority():
    return Authority()


def new_members(authority, folder, run=RUN, names=NAMES):
    return {
        n: Member(folder / n / run, n, run, names, authority.identity(n)) for n in names
    }


@pytest.fixture
def members(authority, tmp_path):
    made = new_members(authority, tmp_path)
    introduce(made)
    return made


def introduce(members):
    hellos = {n: member.hello() for n, member in members.items()}
    for member in members.values():
        member.meet(hellos)


def ask(**more):
    basis = dict(run=RUN, kind="train", round=0, attempt=0, silos=tuple(NAMES))
    return Question(**basis | {"model": "m", "total": 100} | more)


def plain(silo, value=0):
    number = NAMES.index(silo) + 1
    weights = np.arange(1000, dtype=np.uint32) * number + value
    return Plain(weights, np.array([number, 7], np.uint64), f"{silo} {value}")


def summed(members, asked):
    added = Sum(asked)
    for silo in asked.silos:
        added.add(silo, members[silo].answer(asked, plain(silo)))
    for silo in asked.silos:
        added.opened[silo] = members[silo].open(asked)
    return added.read()


# -- the sum


@pytest.mark.parametrize("names", [NAMES, NAMES[:3], NAMES[1:]])
def test_the_masks_cancel_in_the_sum_and_in_nothing_else(members, names):
    found = summed(members, ask(silos=tuple(names)))
    numbers = [NAMES.index(n) + 1 for n in names]
    expected = np.arange(1000, dtype=np.uint32) * sum(numbers)  # 1 + 2 + 3 + 4, say
    assert (found.weights == expected).all()
    assert found.numbers.tolist() == [sum(numbers), 7 * len(names)]


def is_uniform(values):
    """Chi-square of the bytes; 1e-6: one in a million good ones would fail."""
    counts = np.bincount(values.view(np.uint8), minlength=256)
    return stats.chisquare(counts).pvalue > 1e-6


def test_an_answer_and_every_part_of_a_sum_is_noise(members):
    asked = ask()
    zeros = Plain(np.zeros(20_000, np.uint32), np.zeros(3, np.uint64))
    masked = {n: member.answer(asked, zeros) for n, member in members.items()}
    masks = {n: member.open(asked) for n, member in members.items()}
    assert not is_uniform(zeros.weights)
    for size in (1, 2, 3, 4):
        for some in itertools.combinations(NAMES, size):
            total = sum(masked[n].weights for n in some)
            assert is_uniform(total)  # also that of all, while own masks are on
            opened = Plain(total.copy(), np.zeros(3, np.uint64))
            for n in some:
                opened.add(masks[n], plus=False)
            assert is_uniform(opened.weights) == (size < 4)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"total": 101},
        {"attempt": 1},
        {"round": 1},
        {"kind": "evaluate"},
    ],
)
def test_silos_that_were_told_different_things_give_noise(members, change):
    """As a coordinator would that sends one of them another model."""
    asked, added = ask(), Sum(ask())
    for silo in NAMES:
        told = replace(asked, **change) if silo == "Hospital C" else asked
        added.add(silo, members[silo].answer(told, plain(silo)))
        added.opened[silo] = members[silo].open(told)
    assert is_uniform(added.read().weights)


def test_different_sets_for_different_silos_give_noise(members):
    """A, B, C, D are told of four, or of three: no subset of the answers cancels."""
    four, three = ask(), ask(silos=tuple(NAMES[:3]))
    masked, masks = {}, {}
    for silo in NAMES:
        told = three if silo in ("Hospital A", "Hospital B") else four
        masked[silo] = members[silo].answer(told, plain(silo))
        masks[silo] = members[silo].open(told)
    for size in (1, 2, 3, 4):
        for some in itertools.combinations(NAMES, size):
            total = masked[some[0]]
            total = Plain(total.weights.copy(), total.numbers.copy())
            for n in some[1:]:
                total.plus(masked[n])
            for n in some:
                total.add(masks[n], plus=False)
            assert is_uniform(total.weights)


def test_a_sum_is_read_when_all_have_answered_and_opened(members):
    added = Sum(ask())
    for silo in NAMES:
        added.add(silo, members[silo].answer(ask(), plain(silo)))
    with pytest.raises(ValueError, match="no answer of 'Hospital A' is expected"):
        added.add("Hospital A", plain("Hospital A"))
    for silo in NAMES[:3]:
        added.opened[silo] = members[silo].open(ask())
    with pytest.raises(ValueError, match="Hospital D.* did not answer and open"):
        added.read()


# -- what a silo answers, and what it does not


def test_one_that_drops_out_costs_one_more_answer_and_its_late_one_is_noise(members):
    """The trap: the same update under S, and under S without x, differ by that of x."""
    four, three = ask(), ask(attempt=1, silos=tuple(NAMES[:3]))
    late = {n: members[n].answer(four, plain(n)) for n in NAMES}  # D's comes too late
    found = summed(members, three)
    assert (found.weights == np.arange(1000, dtype=np.uint32) * 6).all()
    # Whatever a coordinator asks now, A, B and C do not open the set of four any more,
    # and without that all that was answered under it is noise.
    for silo in NAMES[:3]:
        with pytest.raises(Denied, match="attempt 0 of round 0 is over"):
            members[silo].open(four)
        with pytest.raises(Denied, match="was opened for .* could be subtracted"):
            members[silo].answer(replace(four, attempt=2), plain(silo))
    total = late["Hospital A"]
    for silo in NAMES[1:]:
        total.plus(late[silo])
    total.add(members["Hospital D"].open(four), plus=False)
    assert is_uniform(total.weights - found.weights)


def test_the_same_question_has_the_same_answer_and_no_mask_serves_twice(members):
    """Resumed, or asked twice: the same bytes, so that nothing is learned."""
    first = members["Hospital A"].answer(ask(), plain("Hospital A"))
    again = members["Hospital A"].answer(ask(), plain("Hospital A"))
    assert (first.weights == again.weights).all()
    with pytest.raises(Denied, match="answered with another update"):
        members["Hospital A"].answer(ask(), plain("Hospital A", value=1))
    for change in ({"attempt": 1}, {"attempt": 2, "silos": tuple(NAMES[:3])}):
        other = members["Hospital A"].answer(ask(**change), plain("Hospital A"))
        assert is_uniform(other.weights - first.weights)


@pytest.mark.parametrize(
    "first, then, message",
    [
        ({}, {"silos": tuple(NAMES[:3])}, "attempt 0 was answered for the set"),
        ({"attempt": 1}, {}, "attempt 0 of round 0 is over"),
        ({}, {"model": "other"}, "was answered for another model"),
        ({}, {"total": 99}, "was answered for another model"),
        ({"round": 3}, {"round": 2}, "round 2 is over"),
        ({}, {"run": "1" * 32}, "not for here"),
        ({}, {"silos": tuple(NAMES[1:])}, "not for here"),
        (
            {},
            {"silos": ("Hospital A", "Hospital B", "X"), "attempt": 1},
            "not for here",
        ),
        ({}, {"silos": tuple(NAMES[:2]), "attempt": 1}, "sum of 2 silos is refused"),
        ({}, {"silos": ("Hospital A", "Hospital A", "Hospital B")}, "is refused"),
        ({}, {"silos": ("Hospital B", "Hospital A", "Hospital C")}, "is refused"),
    ],
)
def test_what_is_replayed_reordered_or_too_small_is_denied(
    members, first, then, message
):
    member = members["Hospital A"]
    member.answer(ask(**first), plain("Hospital A"))
    for step in (
        member.check,
        lambda q: member.answer(q, plain("Hospital A")),
        member.open,
    ):
        with pytest.raises(Denied, match=message):
            step(ask(**then))


def test_nothing_is_opened_that_was_not_answered(members):
    member = members["Hospital A"]
    with pytest.raises(Denied, match="is to be opened, but was not answered so"):
        member.open(ask())
    member.answer(ask(), plain("Hospital A"))
    with pytest.raises(Denied, match="is to be opened, but was not answered so"):
        member.open(ask(attempt=1))


def test_what_was_promised_survives_a_kill(members, authority, tmp_path):
    """New processes on the same folder, after each step."""
    four = ask()
    first = members["Hospital A"].answer(four, plain("Hospital A"))
    members = new_members(authority, tmp_path)
    kept = members["Hospital A"].kept(four)
    assert (kept.weights == plain("Hospital A").weights).all()
    again = members["Hospital A"].answer(four, kept)
    assert (again.weights == first.weights).all()
    mask = members["Hospital A"].open(four)
    log = tmp_path / "Hospital A" / RUN / secure.ANSWERED
    with log.open("a") as file:
        file.write('{"kind": "train", "round": 0, "att')  # torn by a kill
    member = new_members(authority, tmp_path)["Hospital A"]
    assert member.open(four) == mask
    with pytest.raises(Denied, match="could be subtracted"):
        member.check(ask(attempt=1, silos=tuple(NAMES[:3])))
    member.answer(ask(round=1), plain("Hospital A"))  # and the log goes on
    with pytest.raises(Denied, match="round 0 is over"):
        new_members(authority, tmp_path)["Hospital A"].open(four)


def test_an_answer_is_on_the_disk_before_it_is_made(members, monkeypatch):
    def full(path, line):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(secure, "_append", full)
        with pytest.raises(OSError):
            members["Hospital A"].answer(ask(), plain("Hospital A"))
    members["Hospital A"].answer(ask(), plain("Hospital A"))
    with monkeypatch.context() as patch:
        patch.setattr(secure, "_append", full)
        with pytest.raises(OSError):
            members["Hospital A"].open(ask())
    members["Hospital A"].check(ask(attempt=1, silos=tuple(NAMES[:3])))  # not opened


def test_the_very_same_update_is_in_no_other_set_in_another_run(authority, tmp_path):
    """A coordinator that leaves D out, and starts again with the same seed."""
    first, second = "1" * 32, "2" * 32
    members = new_members(authority, tmp_path, first)
    introduce(members)
    summed(members, ask(run=first))
    three = new_members(authority, tmp_path, second, NAMES[:3])
    introduce(three)
    with pytest.raises(
        Denied, match="this very update was .* give this run another seed"
    ):
        summed(three, ask(run=second, silos=tuple(NAMES[:3])))
    other = new_members(authority, tmp_path, "3" * 32)
    introduce(other)
    summed(other, ask(run="3" * 32))  # the same set says the same again


@given(
    script=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(0, 2), st.integers(0, 4), st.booleans(),
            st.booleans(),
        ),
        max_size=12,
    )
)  # fmt: skip
@settings(max_examples=60)
def test_whatever_is_asked_a_silo_opens_one_set_per_round(authority, tmp_path, script):
    """A coordinator that tries all there is, with kills in between."""
    folder = tmp_path / str(abs(hash(str(script))))
    member = Member(folder / RUN, NAMES[0], RUN, NAMES, authority.identity(NAMES[0]))
    member.meet(
        {n: hello_of(authority, folder, n) for n in NAMES[1:]}
        | {NAMES[0]: member.hello()}
    )
    sets = [tuple(NAMES), *(tuple(s) for s in itertools.combinations(NAMES, 3))]
    opened, answered = {}, {}
    for index, attempt, which, opens, killed in script:
        asked = ask(round=index, attempt=attempt, silos=sets[which])
        if killed:
            known = authority.identity(NAMES[0])
            member = Member(folder / RUN, NAMES[0], RUN, NAMES, known)
        try:
            masked = member.answer(asked, plain(NAMES[0], value=index))
        except Denied:
            continue
        before = answered.setdefault((index, attempt), (asked, masked.weights))
        assert before[0] == asked and (before[1] == masked.weights).all()
        if opens:
            member.open(asked)
            assert opened.setdefault(index, asked) == asked


def hello_of(authority, folder, silo):
    return Member(folder / silo, silo, RUN, NAMES, authority.identity(silo)).hello()


# -- hellos


def changed(hello, **said):
    content = json.loads(hello)
    content["said"] |= said
    return json.dumps(content).encode()


def test_a_forged_hello_is_denied(members, authority, tmp_path):
    a, hellos = members["Hospital A"], {n: m.hello() for n, m in members.items()}
    other = Authority()  # its root has the same name
    foreign = Member(
        tmp_path / "x", "Hospital B", RUN, NAMES, other.identity("Hospital B")
    )
    b = json.loads(hellos["Hospital B"])
    cases = {
        "is not signed with its certificate": changed(
            hellos["Hospital B"], key="00" * 32
        ),
        "not from the authority pinned here": foreign.hello(),
        "shows the certificate of 'Hospital-C'": hellos["Hospital C"],
        "is no hello": b"\x80\x04junk",
        "is no hello: 2": hellos["Hospital B"] + b" " * 20_000,
        "B' says is no hello": json.dumps(b | {"signature": "zz"}).encode(),
        "'Hospital B' says is no": json.dumps({"said": b["said"]}).encode(),
    }
    for message, forged in cases.items():
        with pytest.raises(Denied, match=message):
            a.meet(hellos | {"Hospital B": forged})
    for size in range(0, len(hellos["Hospital B"]), 97):  # cut short
        with pytest.raises(Denied):
            a.meet(hellos | {"Hospital B": hellos["Hospital B"][:size]})
    with pytest.raises(Denied, match="the run has"):
        a.meet({n: hello for n, hello in hellos.items() if n != "Hospital D"})


def test_a_hello_for_another_run_or_of_other_code_is_denied(
    members, authority, tmp_path, monkeypatch
):
    hellos = {n: m.hello() for n, m in members.items()}
    a, known = members["Hospital A"], authority.identity("Hospital B")
    old = Member(tmp_path / "old", "Hospital B", "9" * 32, NAMES, known)
    with pytest.raises(Denied, match="'Hospital B' signed another run"):
        a.meet(hellos | {"Hospital B": old.hello()})
    fewer = Member(tmp_path / "fewer", "Hospital B", RUN, NAMES[:3], known)
    with pytest.raises(Denied, match="'Hospital B' signed another silos"):
        a.meet(hellos | {"Hospital B": fewer.hello()})
    monkeypatch.setattr(secure, "code_hash", lambda: "f" * 64)
    code = Member(tmp_path / "code", "Hospital B", RUN, NAMES, known)
    with pytest.raises(Denied, match="'Hospital B' signed another code: 'fff"):
        a.meet(hellos | {"Hospital B": code.hello()})


def test_a_key_counts_once_for_a_run(members, authority, tmp_path):
    """The coordinator may not bring another one later, not even a genuine one."""
    hellos = {n: m.hello() for n, m in members.items()}
    known = authority.identity("Hospital B")
    later = Member(tmp_path / "again", "Hospital B", RUN, NAMES, known).hello()
    with pytest.raises(Denied, match=r"\['Hospital B'\] come with another key"):
        members["Hospital A"].meet(hellos | {"Hospital B": later})
    own = Member(
        tmp_path / "own", "Hospital A", RUN, NAMES, authority.identity("Hospital A")
    )
    with pytest.raises(Denied, match="somebody poses as 'Hospital A'"):
        members["Hospital A"].meet(hellos | {"Hospital A": own.hello()})
    members["Hospital A"].meet(hellos)  # the same again: a run that is resumed


def test_who_is_not_confirmed_is_denied_unless_the_authority_is_independent(
    members, authority, tmp_path
):
    hellos = {n: m.hello() for n, m in members.items()}

    def meet(**options):
        known = authority.identity("Hospital A", **options)
        member = Member(tmp_path / "Hospital A" / RUN, "Hospital A", RUN, NAMES, known)
        member.meet(hellos)

    with pytest.raises(
        Denied, match="'Hospital A' is not confirmed here.*by telephone"
    ):
        meet(confirmed={})
    meet(confirmed={}, independent=True)
    # The authority issued a second certificate for B, and somebody else has its key.
    two = ec.generate_private_key(ec.SECP256R1())
    false = Identity(authority.issue("Hospital B", two), two, authority.root)
    posing = Member(tmp_path / "posing", "Hospital B", RUN, NAMES, false)
    with pytest.raises(Denied, match="of 'Hospital B' is .*, confirmed was"):
        members["Hospital A"].meet(hellos | {"Hospital B": posing.hello()})


@pytest.mark.parametrize("start, end", [(-2 * DAY, -DAY), (DAY, 2 * DAY)])
def test_a_certificate_that_is_not_valid_now_is_denied(authority, tmp_path, start, end):
    key = authority.keys["Hospital B"]
    made = authority.issue("Hospital B", key, start=start, end=end)
    known = Identity(made, key, authority.root, independent=True)
    hello = Member(tmp_path, "Hospital B", RUN, NAMES, known).hello()
    with pytest.raises(Denied, match="is not valid now; renew it"):
        secure.read_hello(hello, "Hospital B", {}, known)


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_bytes_that_are_no_hello_are_denied(authority, content):
    with pytest.raises(Denied):
        secure.read_hello(content, "Hospital B", {}, authority.identity("Hospital A"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=100)  # fmt: skip
def test_what_is_no_question_is_denied(content):
    good = json.loads(ask().text())
    for broken in [content, *({**good, key: content} for key in good)]:
        try:
            found = Question.read(json.dumps(broken))
        except Denied:
            continue
        assert json.loads(found.text()) == broken  # it was one, after all


# -- fixed point


def update(silo, params, n=10, **metrics):
    return Update(silo, params, n, metrics)


def averaged(updates, start, total=None, metrics=()):
    total = total or sum(u.num_examples for u in updates)
    parts = [encode(u, start, total=total, metrics=metrics) for u in updates]
    for part in parts[1:]:
        parts[0].plus(part)
    return decode(parts[0], start, total=total, several=len(parts), metrics=metrics)


@given(seed=st.integers(0, 10**6), several=st.integers(1, 20), lost=st.integers(1, 100))
@settings(max_examples=50)
def test_the_average_is_within_the_stated_bound(seed, several, lost):
    rng = torch.Generator().manual_seed(seed)
    start = {"w": torch.randn(50, generator=rng, dtype=torch.float64)}
    sizes = torch.randint(1, 5000, (several,), generator=rng).tolist()
    updates = [
        update(str(k), {"w": start["w"] + torch.randn(50, generator=rng).double()}, n)
        for k, n in enumerate(sizes)
    ]
    total = lost * sum(sizes)  # of all participants; those that are left are few
    found = averaged(updates, start, total=total)
    exact = sum(u.params["w"] * u.num_examples for u in updates) / sum(sizes)
    bound = several * 2.0 ** -(FRACTION_BITS + 1) * lost
    assert (found.params["w"] - exact).abs().max() <= bound * 1.0001
    assert found.num_examples == sum(sizes)


def test_what_is_too_large_is_refused_and_what_is_not_does_not_wrap():
    start = {"w": torch.zeros(3), "n": torch.tensor(5)}
    far = {"w": torch.tensor([255.9, -255.9, 0.0]), "n": torch.tensor(4_000_005)}
    found = averaged([update(k, far) for k in "abc"], start)
    assert (
        torch.allclose(found.params["w"], far["w"]) and found.params["n"] == 4_000_005
    )
    for name, value in {"w": 256.0, "n": 2**22 + 5}.items():
        over = far | {name: torch.full_like(start[name], value)}
        with pytest.raises(ValueError, match=f"silo 'a' changed '{name}' by"):
            encode(update("a", over), start, total=10, metrics=())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"params": {"w": torch.zeros(1), "n": torch.tensor(5)}}, r"another.*\['w'\]"),
        ({"params": {"w": torch.zeros(3).double(), "n": torch.tensor(5)}}, r"\['w'\]"),
        ({"params": {"w": torch.zeros(3)}}, r"'b' sent another model.*\['n'\]"),
        ({"params": {"x": torch.zeros(3)}}, r"\['n', 'w', 'x'\]"),
        (
            {"params": {"w": torch.full((3,), torch.nan), "n": torch.tensor(5)}},
            "by nan",
        ),
        (
            {"params": {"w": torch.full((3,), torch.inf), "n": torch.tensor(5)}},
            "by inf",
        ),
        ({"num_examples": 11}, "silo 'b' has 11 of 20 examples|'b' has 11 of"),
        ({"num_examples": 0}, "silo 'b' has 0 of"),
        ({"num_examples": -5}, "silo 'b' has -5 of"),
        ({"num_examples": 2.5}, "silo 'b' has 2.5 of"),
        ({"num_examples": True}, "silo 'b' has True of"),
        ({"silo": "a"}, r"silos \['a'\] sent two updates"),
    ],
)
def test_the_secure_average_refuses_what_the_plain_one_refuses(bad, message):
    start = {"w": torch.zeros(3), "n": torch.tensor(5)}
    found = [update("a", start), replace(update("b", start), **bad)]
    with pytest.raises(ValueError, match=message):
        SecureAverage(weighted_average, start, total=10)(found)
    with pytest.raises(ValueError, match="no updates to average"):
        SecureAverage(weighted_average, start)([])


def test_metrics_are_means_and_one_that_a_silo_lacks_is_known_of_nobody():
    start = {"w": torch.zeros(1)}
    found = averaged(
        [update("a", start, loss=0.5, auroc=0.9), update("b", start, loss=-1.5),
         update("c", start, loss=2.5, auroc=0.7)],
        start, metrics=["loss", "auroc"],
    )  # fmt: skip
    assert found.metrics == {"loss": 0.5}
    one = update("a", start, auroc=0.9)
    parts = [
        encode(u, start, total=10, metrics=["auroc"]) for u in (one, update("b", start))
    ]
    parts[0].plus(parts[1])
    assert parts[0].numbers[1] != round(0.9 * 2**32)


def test_a_sum_that_cannot_be_one_is_refused():
    start = {"w": torch.zeros(1)}
    for examples in (0, 2, 2**63):
        with pytest.raises(ValueError, match="the masks did not cancel"):
            added = Plain(np.zeros(1, np.uint32), np.array([examples], np.uint64))
            decode(added, start, total=10, several=3, metrics=())


@pytest.mark.parametrize(
    "make", [lambda p: weighted_average, lambda p: FedAdam(p, ["w"], lr=0.1)]
)
def test_the_simulated_secure_run_resumes_to_the_same_bits(make):
    start = {"w": torch.ones(4)}

    def rounds(rule, begin, end):
        for r in range(begin, end):
            moved = rule.params["w"] + 0.1 * (r + 1)
            rule([update("a", {"w": moved}), update("b", {"w": moved + 1}, n=3)])
        return rule

    straight = rounds(SecureAverage(make(start), start), 0, 4)
    half = rounds(SecureAverage(make(start), start), 0, 2)
    resumed = SecureAverage(make(start), start)
    resumed.load_state_dict(half.state_dict())
    assert rounds(resumed, 2, 4).params["w"].equal(straight.params["w"])
    plain = make(start)
    state = start
    for r in range(4):
        moved = state["w"] + 0.1 * (r + 1)
        state = plain(
            iter([update("a", {"w": moved}), update("b", {"w": moved + 1}, n=3)])
        )
    # One round is off by 2 * 2^-23; FedAdam divides by at least sqrt(v) + tau.
    assert torch.allclose(straight.params["w"], state["w"], atol=1e-4, rtol=0)
    assert not math.isnan(straight.params["w"].sum())
    with pytest.raises(ValueError, match="sent two updates"):
        straight([update("a", start), update("a", start)])


# -- answers of analyses: whose patients were in which sums


def cohort(rows, of=40, data="d"):
    chosen = np.zeros(of, dtype=bool)
    chosen[list(rows)] = True
    return Cohort(chosen, data)


def question(**more):
    return ask(**{"kind": "answer", "model": "q", "total": 1} | more)


def answered(members, asked, rows, *, opens=True, **about):
    """The sum of answers about these rows, or the first refusal."""
    added = Sum(asked)
    for silo in asked.silos:
        kept = cohort(rows, **about).keep(members[silo].folder.parent)
        words = encode_arrays(silo, {"n": np.array([10 ** NAMES.index(silo)])})
        made = Plain(np.empty(0, np.uint32), words, kept)
        added.add(silo, members[silo].answer(asked, made))
    if not opens:
        return None
    for silo in asked.silos:
        added.opened[silo] = members[silo].open(asked)
    layout = {"n": torch.empty(1, dtype=torch.int64, device="meta")}
    numbers = added.read().numbers
    return int(decode_arrays(numbers, layout, several=len(asked.silos))["n"][0])


THREE = tuple(NAMES[:3])


def test_women_men_and_all_do_not_give_away_who_was_left_out(members):
    """111 of the women and 111 of the men of A, B and C, and 1111 of all at all four:
    without the rule, 1111 * 2 - 222 would be twice what D alone has answered."""
    assert answered(members, question(silos=THREE), range(0, 20)) == 111
    assert answered(members, question(round=1, silos=THREE), range(20, 40)) == 111
    with pytest.raises(Denied, match="patients of this cohort .* the same silos as"):
        answered(members, question(round=2), range(40))
    # Others of its patients, or the same set: that can be asked.
    assert answered(members, question(round=3, silos=THREE), range(40)) == 111


def test_patients_that_were_in_no_sum_may_be_in_that_of_another_set(members):
    assert answered(members, question(), range(0, 20)) == 1111
    assert answered(members, question(round=1, silos=THREE), range(20, 40)) == 111


@pytest.mark.parametrize("more", [{"data": "of next year"}, {"of": 41}])
def test_in_other_data_nobody_knows_who_is_who(members, more):
    assert answered(members, question(), range(0, 20)) == 1111
    with pytest.raises(Denied, match="could be subtracted"):
        answered(members, question(round=1, silos=THREE), range(20, 40), **more)
    assert answered(members, question(round=2), range(20, 40), **more) == 1111


def test_another_question_in_another_run_about_the_same_patients_is_denied(
    authority, tmp_path
):
    members = new_members(authority, tmp_path, "1" * 32)
    introduce(members)
    answered(members, question(run="1" * 32), range(20))
    later = new_members(authority, tmp_path, "2" * 32)
    introduce(later)
    other = question(run="2" * 32, model="other settings", silos=THREE)
    for rows in (range(20), range(19, 40)):  # one patient in common is enough
        with pytest.raises(Denied, match=f"Hospital D'.* in run {'1' * 32}"):
            answered(later, other, rows)
    assert answered(later, replace(other, silos=tuple(NAMES)), range(20)) == 1111


def test_an_answer_that_nobody_opened_binds_nobody(members, authority, tmp_path):
    answered(members, question(), range(20), opens=False)
    assert answered(members, question(round=1, silos=THREE), range(20)) == 111
    with pytest.raises(Denied, match="round 0 is over"):
        members["Hospital A"].open(question())
    # And after it was opened, a kill changes nothing; even of one that opened alone.
    members = new_members(authority, tmp_path)
    members["Hospital D"].open(question())
    with pytest.raises(Denied, match="could be subtracted"):
        answered(members, question(round=2), range(20))


def test_of_two_runs_that_are_answered_at_once_one_can_be_opened(authority, tmp_path):
    """Nothing was opened when the second answer was made; the opening decides."""
    runs = {}
    for run, silos in (("1" * 32, tuple(NAMES)), ("2" * 32, THREE)):
        runs[run] = (
            new_members(authority, tmp_path, run),
            question(run=run, silos=silos),
        )
        introduce(runs[run][0])
        answered(*runs[run], range(20), opens=False)
    (four, asked), (three, other) = runs.values()
    four["Hospital A"].open(asked)
    with pytest.raises(Denied, match="could be subtracted"):
        three["Hospital A"].open(other)
    three["Hospital B"].open(other)  # each of them minds its own patients
    with pytest.raises(Denied, match="could be subtracted"):
        four["Hospital B"].open(asked)


@pytest.mark.parametrize("harm", ["lost", "damaged", "another"])
def test_a_cohort_that_cannot_be_read_meets_all_others(members, tmp_path, harm):
    answered(members, question(), range(20))
    folder = members["Hospital A"].folder.parent
    (path,) = (folder / "cohorts").iterdir()
    if harm == "lost":
        path.unlink()
    else:
        other = cohort(range(30, 40)).text()
        path.write_text(other if harm == "another" else path.read_text()[:-9])
    with pytest.raises(Denied, match="patients of this cohort were in the sum of"):
        answered(members, question(round=1, silos=THREE), range(20, 40))


@given(a=st.sets(st.integers(0, 15)), b=st.sets(st.integers(0, 15)))
@settings(max_examples=60)
def test_cohorts_have_patients_in_common_or_not(tmp_path, a, b):
    names = [cohort(rows, of=16).keep(tmp_path) for rows in (a, b)]
    assert bool(subtracts(tmp_path, *names)) == bool(a & b)
    assert (names[0] == names[1]) == (a == b)


def test_updates_are_compared_as_such(tmp_path):
    name = cohort(range(3)).keep(tmp_path)
    assert subtracts(tmp_path, "ab", "ab")[1] == "give this run another seed"
    assert not subtracts(tmp_path, "ab", "cd") and not subtracts(tmp_path, "ab", name)
