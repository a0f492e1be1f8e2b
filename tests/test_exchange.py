import hashlib
import json
import math
import os
import pickle
import resource
import signal
import socket
import struct
import tempfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import batchnorm_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers import exchange
from fl_helpers.aggregation import FedAvgM, FedNova, weighted_average
from fl_helpers.exchange import (
    Ledger,
    Limits,
    ReceivedUpdate,
    Refused,
    check_update,
    ledger_items,
    read_ledger,
    read_model,
    read_update,
    write_model,
    write_update,
)
from fl_helpers.scaffold import zero_variates
from fl_helpers.training import Update


def state():
    """Global model with every kind of entry that occurs; SCAFFOLD's among them."""
    return {
        "w": torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -0.0]]),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([0.25, 3.0], dtype=torch.bfloat16),
        "bn.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "variate.w": torch.zeros(2, 3),
    }


def update(**changes):
    parts = dict(silo="clinic", params=state(), num_examples=5)
    return Update(
        **(parts | dict(metrics={"train_loss": 0.25, "steps": 3.0}) | changes)
    )


def sent(folder, **changes):
    return write_update(folder, update(**changes), round_index=2)


def received(folder, **changes):
    known = dict(expected=state(), silo="clinic", round_index=2)
    return read_update(folder, **(known | changes))


def raw(params):
    """Everything that there is of a state, comparable: -0.0 is not 0.0."""
    return {
        name: (v.dtype, v.shape, v.detach().flatten().view(torch.uint8).tolist())
        for name, v in params.items()
    }


def file_of(header, payload=b""):
    """A safetensors file by hand: length of the header, header, payload."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + payload


def parts_of(data):
    """Header and payload of a safetensors file, to be spoiled."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def seal(folder, data=None, **changes):
    """Write weights and a manifest that fits them by hand, as a silo would that cheats
    knowingly; changes: other values, further keys, None removes one."""
    data = safetensors.torch.save(state()) if data is None else data
    manifest = {"version": 1, "silo": "clinic", "round": 2, "num_examples": 5}
    manifest |= {"metrics": {"train_loss": 0.25, "steps": 3.0}, "bytes": len(data)}
    manifest |= {"sha256": hashlib.sha256(data).hexdigest()} | changes
    text = json.dumps({k: v for k, v in manifest.items() if v is not None})
    (folder / exchange.UPDATE).write_bytes(data)
    (folder / exchange.MANIFEST).write_text(text)
    return folder


@contextmanager
def within(seconds):
    """Fail instead of hanging."""

    def late(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def memory_folder(tmp_path):
    """A folder that needs no disk, where there is one: tens of thousands of files."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else tmp_path) as name:
        yield seal(Path(name))


# -- what passes


def test_an_update_arrives_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = batchnorm_model()
    tiny = {"tiny": torch.tensor([-0.0, 1e-45, 3e38, float.fromhex("0x1.fffffep-1")])}
    shared = {k: v for k, v in zero_variates(model).items() if k[:3] == "var"}
    params = model.state_dict() | shared | state() | tiny | {"none": torch.zeros(0, 4)}
    params["transposed"] = torch.arange(6.0).reshape(2, 3).T
    outgoing = update(params=params)
    assert sent(tmp_path / "u", params=params) == tmp_path / "u"
    got = received(tmp_path / "u", expected=params)
    assert raw(got.params) == raw(params)
    assert (got.silo, got.round_index, got.num_examples) == ("clinic", 2, 5)
    assert got.metrics == outgoing.metrics
    data = (tmp_path / "u" / "update.safetensors").read_bytes()
    assert got.num_bytes == len(data)
    assert got.sha256 == hashlib.sha256(data).hexdigest()
    assert sorted(p.name for p in (tmp_path / "u").iterdir()) == [
        "manifest.json",
        "update.safetensors",
    ]


def test_entries_lie_where_their_type_wants_them(tmp_path):
    # By name, the boolean would come first and the integers at byte 1.
    params = {"a": torch.tensor([True]), "b": torch.tensor([1, 2]), "c": torch.ones(1)}
    path = write_model(tmp_path, params, round_index=0) / "model.safetensors"
    header, _ = parts_of(path.read_bytes())
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    assert offsets == {"b": [0, 16], "c": [16, 20], "a": [20, 21]}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    order, replace_file = [], os.replace

    def recorded(source, target):
        order.append(Path(target).name)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", recorded)
    sent(tmp_path)
    assert order == ["update.safetensors", "manifest.json"]


def test_the_same_update_makes_the_same_file(tmp_path):
    a, b = sent(tmp_path / "a"), sent(tmp_path / "b")
    for name in ("update.safetensors", "manifest.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_a_model_arrives_and_can_be_used_without_this_project(tmp_path):
    model = batchnorm_model()
    params = model.state_dict()
    folder = write_model(tmp_path / "model", params, round_index=4)
    assert raw(read_model(folder, params, round_index=4)) == raw(params)
    assert raw(safetensors.torch.load_file(folder / "model.safetensors")) == raw(params)
    with pytest.raises(Refused, match="round 4, expected 5"):
        read_model(folder, params, round_index=5)
    with pytest.raises(Refused, match="'orchestrator', expected 'other'"):
        read_model(folder, params, silo="other")
    with pytest.raises(Refused, match="must hold update.safetensors and manifest"):
        received(folder)
    bad = {**params, "0.bias": torch.full((4,), math.nan)}
    with pytest.raises(Refused, match="'0.bias' has 4 NaN or infinite"):
        write_model(tmp_path / "bad", bad, round_index=0)
    assert not (tmp_path / "bad").exists()
    other = {"silo": "orchestrator", "num_examples": None, "metrics": None}
    seal(folder, safetensors.torch.save(bad), **other)
    (folder / "update.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(Refused, match="'orchestrator' sends: '0.bias' has 4 NaN"):
        read_model(folder, params)


def test_entries_may_share_memory_and_need_gradients(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    params = {"in": weight, "out": weight, "row": weight[0]}
    folder = write_model(tmp_path, params, round_index=0)
    assert read_model(folder, params)["out"].tolist() == [[1, 1], [1, 1]]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
ENTRIES = st.tuples(
    st.sampled_from(sorted(exchange._DTYPES, key=str)),
    st.lists(st.integers(0, 3), max_size=4),
)


@given(
    layout=st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), ENTRIES),
    silo=NAMES,
    num_examples=st.integers(1, 10**9),
    steps=st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_can_be_sent_is_accepted(layout, silo, num_examples, steps, memory_folder):
    params = {
        name: torch.arange(math.prod(shape)).reshape(shape).to(dtype)
        for name, (dtype, shape) in layout.items()
    }
    outgoing = Update(silo, params, num_examples, {"steps": steps})
    write_update(memory_folder, outgoing, round_index=0)
    got = read_update(memory_folder, params, silo=silo, round_index=0)
    assert raw(got.params) == raw(params)
    assert (got.num_examples, got.metrics) == (num_examples, {"steps": steps})
    loaded = safetensors.torch.load_file(memory_folder / "update.safetensors")
    assert raw(loaded) == raw(params)


def test_what_is_accepted_goes_straight_into_aggregation(tmp_path):
    trained = {
        **state(),
        "w": state()["w"] + 4,
        "bn.num_batches_tracked": torch.tensor(9),
    }
    sent(tmp_path / "a")
    sent(tmp_path / "b", silo="dept", params=trained, num_examples=15)
    both = [received(tmp_path / "a"), received(tmp_path / "b", silo="dept")]
    mean = weighted_average(both)
    torch.testing.assert_close(mean["w"], state()["w"] + 3)  # (5*0 + 15*4) / 20
    assert mean["bn.num_batches_tracked"] == 9
    for rule in (FedAvgM(state(), ["w"], momentum=0), FedNova(state(), ["w"])):
        torch.testing.assert_close(rule(both)["w"], mean["w"])  # equal steps: FedAvg


def test_checking_modifies_nothing():
    outgoing, expected = update(), state()
    check_update(outgoing, expected, silo="clinic", limits=Limits(max_norm=1))
    assert raw(outgoing.params) == raw(state()) == raw(expected)


# -- what a silo must not send: in memory, and so also to a file


def with_entry(**entries):
    return {"params": state() | entries}


BAD_UPDATES = {
    "another silo": ({"silo": "dept"}, "comes from 'dept', expected 'clinic'"),
    "no examples": ({"num_examples": 0}, "from 1 to 1000000000, got 0; leave a silo"),
    "too many": ({"num_examples": 10**10}, "to 1000000000, got 10000000000;"),
    "half an example": ({"num_examples": 2.0}, "must be an integer .* got 2.0"),
    "true examples": ({"num_examples": True}, "must be an integer .* got a bool"),
    "a digit bomb": ({"num_examples": 10**400}, "must be an integer .* got a int"),
    "other metric": (
        {"metrics": {"patient_7": 1.0}},
        "1 metrics are not on the list .*'loss_before', 'steps', 'train_loss'.*patient",
    ),
    "pixels": ({"metrics": {"steps": [0.1, 0.2]}}, "'steps' must be one .* got a list"),
    "a text": ({"metrics": {"steps": "1"}}, "'steps' must be one .* got a str"),
    "a NaN": ({"metrics": {"train_loss": math.nan}}, "'train_loss' must .* got nan"),
    "a tensor": ({"metrics": {"steps": torch.zeros(9)}}, "got a Tensor; send float"),
    "a subclass": ({"metrics": {"steps": np.float64(1)}}, "got a float64; send float"),
    "long number": ({"metrics": {"steps": 10**300}}, "'steps' must .* got a int"),
    "no metrics": ({"metrics": None}, "params and metrics must be dicts"),
    "a list": ({"params": [torch.zeros(2)]}, "params and metrics must be dicts"),
    "NaN": (with_entry(w=torch.full((2, 3), math.nan)), "'w' has 6 NaN or infinite"),
    "infinite": (
        with_entry(half=torch.tensor([1, math.inf]).half()),
        "'half' has 1 NaN or infinite values, none is allowed; the training diverged",
    ),
    "both infinities": (
        with_entry(brain=torch.tensor([math.inf, -math.inf]).bfloat16()),
        "'brain' has 2 NaN or infinite",
    ),
    "a bool of 2": (
        with_entry(mask=torch.tensor([2, 0], dtype=torch.uint8).view(torch.bool)),
        "'mask' has booleans that are neither 0 nor 1",
    ),
    "sparse": (with_entry(w=torch.eye(2, 3).to_sparse()), "'w' is .*torch.sparse_coo"),
    "elsewhere": (with_entry(w=torch.zeros(2, 3, device="meta")), "'w' is .* on meta"),
    "an array": (with_entry(w=np.zeros((2, 3))), "'w' is a ndarray; send tensors"),
    "not numbers": (with_entry(w="w"), "'w' is a str; send tensors only"),
}
BAD_FOR_THE_MODEL = {
    "an entry more": (with_entry(scan=torch.zeros(9)), "0 missing .., 1 unknown"),
    "entries less": (
        {"params": {"w": state()["w"]}},
        r"5 missing \('half', 'brain', 'bn.num_batches_tracked'\), 0 unknown",
    ),
    "other shape": (with_entry(w=torch.zeros(3, 2)), "3, 2. .* expected .*2, 3.;"),
    "0-dim as 1-dim": (
        with_entry(**{"bn.num_batches_tracked": torch.tensor([7])}),
        r"'bn.num_batches_tracked' is torch.int64 \[1\] .*, expected torch.int64 \[\]",
    ),
    "other dtype": (
        with_entry(half=torch.zeros(2)),
        r"'half' is torch.float32 \[2\] .*, expected torch.float16 \[2\]",
    ),
    "far away": (
        with_entry(w=state()["w"] + 100),
        "norm 244.949, the limit is 100.0; train",  # sqrt(6 * 100^2)
    ),
}  # fmt: skip


IN_MEMORY = BAD_UPDATES | BAD_FOR_THE_MODEL
WRITTEN = {k: v for k, v in IN_MEMORY.items() if k != "another silo"}  # it says who
ALONE = BAD_UPDATES.keys() & WRITTEN.keys()


@pytest.mark.parametrize("changes, reason", IN_MEMORY.values(), ids=IN_MEMORY)
def test_a_bad_update_in_memory_is_refused_and_recorded(changes, reason, tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    known = dict(silo="clinic", round_index=2, limits=Limits(max_norm=100.0))
    with pytest.raises(Refused, match=reason) as refusal:
        check_update(update(**changes), state(), **known, ledger=ledger)
    assert refusal.value.silo == "clinic" and "'clinic'" in str(refusal.value)
    (line,), torn = read_ledger(ledger.path)
    assert line["verdict"] == "refused" and line["reason"] == refusal.value.reason
    assert line["what"] == "update" and not torn


@pytest.mark.parametrize("changes, reason", WRITTEN.values(), ids=WRITTEN)
def test_a_bad_update_is_refused_before_it_is_written(changes, reason, tmp_path):
    known = dict(round_index=2, expected=state(), limits=Limits(max_norm=100.0))
    with pytest.raises(Refused, match=reason):
        write_update(tmp_path / "u", update(**changes), **known)
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize("case", sorted(ALONE))
def test_that_needs_no_global_model(case, tmp_path):
    with pytest.raises(Refused, match=BAD_UPDATES[case][1]):
        sent(tmp_path / "u", **BAD_UPDATES[case][0])
    assert not (tmp_path / "u").exists()


def test_the_norm_is_that_of_the_whole_delta():
    # 3 in one entry, 4 in another: 5. Counters and masks do not count.
    start = {"a": torch.zeros(2), "b": torch.zeros(1).half(), "n": torch.tensor(0)}
    end = {"a": torch.tensor([0.0, 3.0]), "b": torch.full((1,), 4.0).half()}
    moved = update(params=end | {"n": torch.tensor(10**6)})
    check_update(moved, start, silo="clinic", limits=Limits(max_norm=5.0))
    with pytest.raises(Refused, match="norm 5, the limit is 4.999"):
        check_update(moved, start, silo="clinic", limits=Limits(max_norm=4.999))


def test_the_norm_may_be_larger_than_half_precision_can_say():
    start = {"a": torch.tensor([-6e4]).half()}
    moved = update(params={"a": -start["a"]})  # 120,000 apart; half ends at 65,504
    check_update(moved, start, silo="clinic", limits=Limits(max_norm=120_000.0))
    with pytest.raises(Refused, match="norm 120000, the limit is 119999;"):
        check_update(moved, start, silo="clinic", limits=Limits(max_norm=119_999))


def moved_by(length):
    start = {"w": torch.zeros(4)}
    return update(params={"w": torch.full((4,), length / 2)}), start


def accepts(length, norms, **limits):
    moved, start = moved_by(length)
    known = dict(silo="clinic", norms=norms, limits=Limits(**limits))
    try:
        norm = check_update(moved, start, **known)
        return norm == pytest.approx(length) if limits else norm is None
    except Refused as refusal:
        assert f"norm {length:g}, the limit is" in refusal.reason
        return False


def test_a_limit_follows_the_median_of_earlier_norms():
    norms = [1.0, 1.2, 100.0, 0.8, 1.0]  # one of them was an attack: the median is 1
    assert accepts(2.9, norms, norm_factor=3.0)
    assert not accepts(3.1, norms, norm_factor=3.0)
    assert accepts(50.0, norms[:4], norm_factor=3.0)  # too few to say what is usual
    assert accepts(3.1, norms)  # not asked for
    # The last 50 count: training has become calm.
    assert not accepts(3.1, [100.0] * 200 + norms[:2] * 25, norm_factor=2.0)
    assert accepts(3.1, [0.1] * 200 + [2.0] * 50, norm_factor=2.0)


@pytest.mark.parametrize("few", [True, False])
def test_the_smaller_one_of_two_norm_limits_holds(few):
    norms = [1.0] * (4 if few else 5)
    assert accepts(2.9, norms, norm_factor=3.0, max_norm=5.0)
    assert accepts(3.1, norms, norm_factor=3.0, max_norm=5.0) == few
    assert not accepts(2.9, norms, norm_factor=3.0, max_norm=2.0)
    assert not accepts(2.9, norms, norm_factor=3.0, max_norm=math.nan)
    assert accepts(2.9, norms, norm_factor=math.nan) == few


def test_a_received_update_says_its_norm(tmp_path):
    moved, start = moved_by(6.0)
    write_update(tmp_path, moved, round_index=2)
    read = partial(read_update, tmp_path, start, silo="clinic", round_index=2)
    assert read().norm is None  # nothing limits it
    assert read(limits=Limits(max_norm=7.0)).norm == 6
    assert read(limits=Limits(norm_factor=2.0)).norm == 6
    with pytest.raises(Refused, match=r"norm 6, the limit is 5\.0; .*norm_factor"):
        read(limits=Limits(norm_factor=2.0), norms=[2.5] * 5)


@pytest.mark.parametrize("limit", [1e3, math.nan, -1.0])
@pytest.mark.parametrize("dtype, huge", [(torch.float64, 1e300), (torch.float32, 3e38),
                                         (torch.float16, 6e4)])  # fmt: skip
def test_a_norm_that_overflows_is_refused(dtype, huge, limit):
    start = {"a": torch.full((2,), -huge, dtype=dtype)}
    with pytest.raises(Refused, match="has norm"):
        check_update(
            update(params={"a": -start["a"]}), start, silo="clinic",
            limits=Limits(max_norm=limit),
        )  # fmt: skip


def test_the_round_is_compared_where_the_update_has_one(tmp_path):
    sent(tmp_path)
    got = received(tmp_path)
    check_update(got, state(), silo="clinic", round_index=2)
    with pytest.raises(
        Refused, match="belongs to round 2, expected 3; late or sent twi"
    ):
        check_update(got, state(), silo="clinic", round_index=3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2, torch.uint16])
def test_dtypes_that_cannot_be_averaged_do_not_cross(dtype, tmp_path):
    odd = {"w": torch.zeros(2).to(dtype)}
    with pytest.raises(Refused, match=f"'w' is {dtype} .*; the dtypes that may cross"):
        check_update(update(params=odd), odd, silo="clinic")
    with pytest.raises(Refused, match=f"'w' is {dtype}"):
        write_model(tmp_path / "m", odd, round_index=0)
    seal(tmp_path, safetensors.torch.save(odd))
    with pytest.raises(Refused, match="'w' is .*, expected .None"):
        received(tmp_path, expected=odd)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_without_a_shape_is_refused():
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(Refused, match="."):
        check_update(update(**with_entry(w=ragged)), state(), silo="clinic")


def test_limits_can_be_agreed_otherwise(tmp_path):
    limits = Limits(metrics=frozenset({"auroc"}), max_examples=10, max_bytes=100_000)
    other = update(metrics={"auroc": 0.5}, num_examples=10)
    write_update(tmp_path, other, round_index=2, limits=limits)
    assert received(tmp_path, limits=limits).metrics == {"auroc": 0.5}
    with pytest.raises(Refused, match="1 metrics are not on the list"):
        received(tmp_path)
    with pytest.raises(Refused, match="from 1 to 9, got 10"):
        received(tmp_path, limits=replace(limits, max_examples=9))
    size = (tmp_path / "update.safetensors").stat().st_size
    received(tmp_path, limits=replace(limits, max_bytes=size))
    too_small = replace(limits, max_bytes=size - 1)
    with pytest.raises(
        Refused, match=f"has {size} bytes, the limit is {size - 1}; send"
    ):
        received(tmp_path, limits=too_small)
    with pytest.raises(
        Refused, match=f"has {size} bytes, the limit is {size - 1}; send"
    ):
        write_update(tmp_path / "u", other, round_index=2, limits=too_small)


# -- manifests


@pytest.mark.parametrize("changes, reason", [
    ({"silo": "dept"}, "comes from 'dept', expected 'clinic'; do two silos share"),
    ({"round": 1}, "belongs to round 1, expected 2; late or sent twice"),
    ({"version": 2}, "must be of version 1"),
    ({"file": "../../other/update.safetensors"}, r"1 are missing, .* \('file'\)"),
    ({"sha256": None}, r"1 are missing, unknown or of a wrong type \('sha256'\)"),
    ({"round": True}, r"wrong type \('round'\)"),
    ({"round": 2.0}, r"wrong type \('round'\)"),
    ({"bytes": "100"}, r"wrong type \('bytes'\)"),
    ({"silo": ["clinic"], "round": "2", "version": {}, "metrics": []}, "4 are miss"),
    ({"metrics": {"steps": {"pixels": [1, 2]}}}, "'steps' must be one .* got a dict"),
    ({"metrics": {"steps": 10**16}}, "'steps' must be one finite number"),
    ({"metrics": {"steps": True}}, "'steps' must be one finite number, got a bool"),
    ({"num_examples": -1}, "from 1 to 1000000000, got -1"),
    ({"bytes": 1}, "has [0-9]+ bytes, its manifest says 1; cut short or replaced"),
    ({"bytes": -(10**30)}, "bytes, its manifest says a int"),
    ({"sha256": "0" * 64}, "does not have the SHA-256 of its manifest; it was damaged"),
    ({"sha256": ""}, "does not have the SHA-256 of its manifest"),
])  # fmt: skip
def test_a_bad_manifest_is_refused(changes, reason, tmp_path):
    seal(sent(tmp_path), **changes)
    with pytest.raises(Refused, match=reason):
        received(tmp_path)


@pytest.mark.parametrize("content, reason", [
    (b"", "not plain JSON: Expecting value"),
    (b"[1, 2]", "must be a JSON object, got a list"),
    (b"7", "must be a JSON object, got 7"),
    (b"{" * 9, "not plain JSON"),
    (b"[" * 60_000, "not plain JSON"),
    (b'{"a":' * 10_000, "not plain JSON"),
    (b'{"round": 2, "round": 2}', "not plain JSON: a key appears twice"),
    (b'{"metrics": {"steps": 1, "steps": 1}}', "not plain JSON: a key appears twice"),
    (b'{"metrics": {"steps": NaN}}', "not plain JSON: NaN is not a number"),
    (b'{"metrics": {"steps": -Infinity}}', "not plain JSON: -Infinity is not a number"),
    (b'\xff\xfe{\x00}\x00', "not plain JSON: not UTF-8"),
    (b'\xef\xbb\xbf{}', "not plain JSON: Unexpected UTF-8 BOM"),
    (b'{"round": ' + b"9" * 5000 + b"}", "not plain JSON|are missing"),
    (b'{"\\ud800": 1, "\\n\\u001b[2J": 2}', r"'.n.x1b.2J', 'bytes', 'metrics'"),
    (b'{"a": "' + b"x" * 65_536 + b'"}', "has 65545 bytes, the limit is 65536"),
    (pickle.dumps({"silo": "clinic"}), "not plain JSON: not UTF-8"),
])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(content, reason, tmp_path):
    sent(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(Refused, match=reason) as refusal:
        received(tmp_path)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 800


def test_an_infinite_number_in_the_manifest_is_refused(tmp_path):
    sent(tmp_path)
    text = (tmp_path / "manifest.json").read_text().replace("0.25", "1e999")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(
        Refused, match="'train_loss' must be one finite number, got inf"
    ):
        received(tmp_path)


# -- weights


def spoiled(folder, change):
    """The file that was written, with a header that `change` made another one of."""
    header, payload = parts_of((folder / exchange.UPDATE).read_bytes())
    return file_of(change(header) or header, payload)


HEADERS = {
    "metadata": (lambda h: h.update(__metadata__={"a": "b"}), "1 unknown"),
    "an entry more": (lambda h: h.update(x=h["w"]), r"1 unknown \('x'\)"),
    "an entry less": (lambda h: h.pop("w") and None, r"1 missing \('w'\)"),
    "renamed": (lambda h: h.update({"../w": h.pop("w")}), "1 missing .'w'., 1 unk"),
    "another shape": (lambda h: h["w"].update(shape=[3, 2]), r"\[3, 2\].*\[2, 3\]"),
    "another dtype": (lambda h: h["w"].update(dtype="I32"), "'I32'.* expected .'F32'"),
    "no dtype": (lambda h: h["w"].update(dtype="F33"), "'w' is .'F33'"),
    "dtype list": (lambda h: h["w"].update(dtype=[["F32"]]), "'w' is "),
    "shape of floats": (lambda h: h["w"].update(shape=[2.0, 3.0]), r"'w' is .*2.0"),
    "shape of bools": (lambda h: h["mask"].update(shape=[2, True]), "'mask' is"),
    "a long shape": (lambda h: h["w"].update(shape=[1] * 500), "'w' is "),
    "a key more": (lambda h: h["w"].update(note="x" * 50), "'w' must have .'data_offs"),
    "a key less": (lambda h: h["w"].pop("data_offsets") and None, "'w' must have"),
    "no object": (lambda h: h.update(w=[1]), "the entry 'w' must have"),
    "overlap": (
        lambda h: h["variate.w"].update(data_offsets=h["w"]["data_offsets"]),
        "not valid safetensors",
    ),
    "beyond": (lambda h: h["w"].update(data_offsets=[0, 2**62]), "not valid"),
    "negative": (lambda h: h["w"].update(data_offsets=[-24, 0]), "not valid"),
    "backwards": (lambda h: h["w"].update(data_offsets=[24, 0]), "not valid"),
    "a text": (lambda h: h["w"].update(data_offsets="4711"), "its data_offsets do not"),
    "three": (lambda h: h["w"].update(data_offsets=[0, 8, 24]), "not valid"),
    "a list": (lambda h: [h], "header must be a JSON object, got a list"),
    "padded": (lambda h: json.dumps(h).encode() + b" " * 9999, "bytes, the limit is"),
    "twice": (
        lambda h: json.dumps(h).encode()[:-1] + b', "w": {}}',
        "header is not plain JSON: a key appears twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", HEADERS.values(), ids=HEADERS)
def test_a_bad_header_is_refused_though_its_hash_is_right(change, reason, tmp_path):
    sent(tmp_path)
    seal(tmp_path, spoiled(tmp_path, change))
    with pytest.raises(Refused, match=reason):
        received(tmp_path)


def test_a_header_has_its_own_limit(tmp_path):
    header, payload = parts_of(safetensors.torch.save(state()))
    seal(tmp_path, file_of(json.dumps(header).encode() + b" " * 9999, payload))
    with pytest.raises(Refused, match="a header of 10[0-9]+ bytes in .*, the limit is"):
        received(tmp_path, limits=Limits(max_bytes=10**6))


FILES = {
    "empty": (b"", "a header of 0 bytes in 0, the limit is"),
    "short": (b"\x02\0\0", "not safetensors, or damaged: a header of 2 bytes in 3"),
    "header bomb": (struct.pack("<Q", 2**60) + b"{}", f"header of {2**60} bytes in 10"),
    "all ones": (b"\xff" * 100, f"header of {2**64 - 1} bytes in 100"),
    "only a header": (file_of({}), "6 missing"),
    "nested": (file_of(b"[" * 900), "header is not plain JSON"),
    "pickle": (pickle.dumps(state()["w"].numpy()), "not safetensors.*no pickle or zip"),
    "old pickle": (pickle.dumps([1, 2], protocol=0), "not safetensors"),
    "binary header": (file_of(b"\x80\x04K\x01."), "not plain JSON: not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("data, reason", FILES.values(), ids=FILES)
def test_a_file_that_is_no_safetensors_is_refused(data, reason, tmp_path):
    sent(tmp_path)
    seal(tmp_path, data)
    with pytest.raises(Refused, match=reason):
        received(tmp_path)


def test_zip_and_torch_files_are_refused(tmp_path):
    sent(tmp_path / "u")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("update.safetensors", b"123")
    torch.save(state(), tmp_path / "torch")
    for name in ("zip", "torch"):
        seal(tmp_path / "u", (tmp_path / name).read_bytes())
        with pytest.raises(Refused, match="is not safetensors|the limit is"):
            received(tmp_path / "u")


@pytest.mark.parametrize("spaces", range(8))
@pytest.mark.parametrize("backwards", [False, True])
def test_any_valid_file_is_read_as_the_library_reads_it(tmp_path, spaces, backwards):
    """Entries in any order, at any address: tensors are made on the file's bytes."""
    params = state() | {"none": torch.zeros(0, 3), "last": torch.tensor(-1.5)}
    header, payload, end = {}, b"", 0
    for name in sorted(params, reverse=backwards):
        value = params[name]
        start, end = end, end + value.nbytes
        header[name] = dict(
            dtype=exchange._DTYPES[value.dtype], data_offsets=[start, end]
        )
        header[name]["shape"] = list(value.shape)
        payload += bytes(value.reshape(-1).view(torch.uint8).tolist())
    header = dict(sorted(header.items()))  # not the order of the bytes, if backwards
    data = file_of(json.dumps(header).encode() + b" " * spaces, payload)
    found = received(seal(tmp_path, data), expected=params).params
    assert raw(found) == raw(safetensors.torch.load(data)) == raw(params)
    assert not any(v.data_ptr() % v.element_size() for v in found.values())
    found["w"] += 1  # memory of its own, that may be written


def test_values_are_checked_in_what_was_read(tmp_path):
    sent(tmp_path)
    spoilt = {**state(), "w": torch.full((2, 3), math.nan)}
    seal(tmp_path, safetensors.torch.save(spoilt))
    with pytest.raises(Refused, match="'w' has 6 NaN"):
        received(tmp_path)
    header, payload = parts_of(safetensors.torch.save(state()))
    start = header["mask"]["data_offsets"][0]
    seal(tmp_path, file_of(header, payload[:start] + b"\x07" + payload[start + 1 :]))
    with pytest.raises(Refused, match="'mask' has booleans that are neither 0 nor 1"):
        received(tmp_path)
    sent(tmp_path, params={**state(), "w": state()["w"] + 100})
    with pytest.raises(Refused, match="norm 244.949, the limit is 1; train"):
        received(tmp_path, limits=Limits(max_norm=1))


@pytest.mark.parametrize("cut", [1, 8, 60, 400])
def test_a_file_cut_short_or_prolonged_is_refused(cut, tmp_path):
    path = sent(tmp_path) / "update.safetensors"
    data = path.read_bytes()
    for wrong in (data[:-cut], data + b"\0" * cut):
        path.write_bytes(wrong)
        with pytest.raises(Refused, match=f"has {len(wrong)} bytes, its manifest says"):
            received(tmp_path)
        seal(tmp_path, wrong)  # the same with a manifest that fits
        with pytest.raises(Refused, match="safetensors"):
            received(tmp_path)


def test_an_oversize_file_is_refused_unread(tmp_path):
    path = sent(tmp_path) / "update.safetensors"
    os.truncate(path, 2**40)  # a hole: takes no disk, but would fill the memory
    with within(5), pytest.raises(Refused, match=f"has {2**40} bytes, the limit is"):
        received(tmp_path)
    os.truncate(tmp_path / "manifest.json", 2**40)
    with within(5), pytest.raises(Refused, match="manifest.json has 10995.*65536"):
        received(tmp_path)


# -- folders


def test_links_are_not_followed(tmp_path):
    sent(tmp_path / "other")
    for name in ("update.safetensors", "manifest.json"):
        path = sent(tmp_path / "u") / name
        path.unlink()
        path.symlink_to(tmp_path / "other" / name)
        with pytest.raises(Refused, match="symbolic links"):
            received(tmp_path / "u")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(Refused, match="'link' is a link; send a folder"):
        received(tmp_path / "link")
    with pytest.raises(Refused, match="is a link"):
        received(f"{tmp_path}/link/")


@pytest.mark.parametrize("name", ["update.safetensors", "manifest.json"])
def test_special_files_are_refused_without_waiting(name, tmp_path):
    path = sent(tmp_path) / name
    path.unlink()
    os.mkfifo(path)
    with within(5), pytest.raises(Refused, match=f"{name} is not a plain file"):
        received(tmp_path)
    path.unlink()
    path.mkdir()
    with within(5), pytest.raises(Refused, match="directory"):
        received(tmp_path)
    path.rmdir()
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # a socket's path may have 107 bytes only
        server.bind(name)
        with within(5), pytest.raises(Refused, match="No such device"):
            received(tmp_path)


def test_devices_are_refused_without_reading():
    with within(5), pytest.raises(ValueError, match="zero is not a plain file"):
        exchange._read_file(Path("/dev/zero"), 100)


def test_other_files_and_missing_ones_are_refused(tmp_path):
    with pytest.raises(Refused, match="No such file or directory"):
        received(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        Refused, match="only, it has nothing; give each update a folder"
    ):
        received(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="Not a directory"):
        received(tmp_path / "file")
    sent(tmp_path / "u")
    (tmp_path / "u" / ".hidden\n").touch()
    with pytest.raises(Refused, match=r"it has '.hidden\\n', 'man.*', 'update"):
        received(tmp_path / "u")
    (tmp_path / "u" / ".hidden\n").rename(tmp_path / "u" / "manifest.json")
    with pytest.raises(Refused, match="not plain JSON"):
        received(tmp_path / "u")


# -- crashes


class Crash(BaseException):
    """The process is gone: nothing of it runs any more."""


@pytest.mark.parametrize("calls", range(7))
@pytest.mark.parametrize("old", [True, False])
def test_a_crash_leaves_a_whole_update_or_none(calls, old, tmp_path, monkeypatch):
    if old:
        sent(tmp_path)
    new = update(params={**state(), "w": torch.ones(2, 3)})
    left = [calls]

    def until_crash(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", until_crash(os.fsync))
        patch.setattr(os, "replace", until_crash(os.replace))
        patch.setattr(Path, "unlink", until_crash(Path.unlink))
        with pytest.raises(Crash):
            write_update(tmp_path, new, round_index=2)
    try:
        got = received(tmp_path)
    except Refused:
        pass
    else:  # 2 fsync, 1 unlink, 2 replace: whole, then
        assert raw(got.params) == raw(new.params) and calls >= 5
    write_update(tmp_path, new, round_index=2)  # and it can be tried again
    assert raw(received(tmp_path).params) == raw(new.params)


def test_an_error_while_writing_leaves_the_old_update(tmp_path, monkeypatch):
    sent(tmp_path)

    def full(_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            sent(tmp_path, params={**state(), "w": torch.ones(2, 3)})
    assert raw(received(tmp_path).params) == raw(state())


# -- the ledger


def test_the_ledger_has_a_line_for_each_item_both_ways(tmp_path):
    ledger = Ledger(tmp_path / "logs" / "ledger.jsonl")
    write_update(tmp_path / "u", update(), round_index=2, ledger=ledger)
    received(tmp_path / "u", ledger=ledger)
    lines, torn = read_ledger(ledger.path)
    names = [*state(), "num_examples", "train_loss", "steps"]
    assert [line["what"] for line in lines if line["direction"] == "out"] == names
    back = [line["what"] for line in lines if line["direction"] == "in"]
    assert sorted(back) == sorted(names) and not torn
    line = dict(lines[0])
    assert line.pop("time").endswith("+00:00")
    digest = hashlib.sha256(state()["w"].numpy().tobytes()).hexdigest()
    assert line == {
        "direction": "out", "silo": "clinic", "round": 2, "what": "w", "shape": [2, 3],
        "dtype": "float32", "bytes": 24, "sha256": digest, "verdict": "accepted",
        "reason": "",
    }  # fmt: skip
    sums = {
        d: sum(x["bytes"] for x in lines if x["direction"] == d) for d in ("out", "in")
    }
    assert sums == {"out": 66 + 24, "in": 66 + 24}  # 24+4+4+8+2+24, and 3 numbers of 8


def test_the_ledger_records_models(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    write_model(tmp_path / "m", state(), round_index=2, ledger=ledger)
    read_model(tmp_path / "m", state(), ledger=ledger)
    with pytest.raises(Refused):
        read_model(tmp_path / "m", {"w": torch.zeros(2)}, ledger=ledger)
    lines, _ = read_ledger(ledger.path)
    assert len(lines) == 6 + 6 + 1
    assert {line["silo"] for line in lines} == {"orchestrator"}
    assert lines[-1]["what"] == "model.safetensors" and lines[-1]["bytes"] is None


def test_the_ledger_keeps_no_value_of_what_was_refused(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    secret = {"patient_name": 4711.25, "train_loss": math.nan, "steps": [4711.25]}
    params = {**state(), "w": torch.full((2, 3), 4711.25), "half": state()["half"] / 0}
    bad = [{"metrics": {k: v}} for k, v in secret.items()] + [{"params": params}]
    for changes in bad:
        with pytest.raises(Refused):
            check_update(update(**changes), state(), silo="clinic", ledger=ledger)
    text = ledger.path.read_text()
    assert text.count("\n") == 4 and "4711" not in text


def test_nothing_is_released_that_the_ledger_could_not_record(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.path.mkdir()  # cannot be appended to
    with pytest.raises(OSError, match="directory"):
        write_update(tmp_path / "u", update(), round_index=2, ledger=ledger)
    assert not (tmp_path / "u").exists()
    sent(tmp_path / "u")
    with pytest.raises(OSError, match="directory"):
        received(tmp_path / "u", ledger=ledger)


def test_the_ledger_is_on_the_disk_before_anything_else(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file was synced")
    monkeypatch.setattr(os, "fsync", recorded)
    write_update(
        tmp_path / "u", update(), round_index=2, ledger=Ledger(tmp_path / "log")
    )
    assert synced == ["log", "update.safetensors.tmp", "manifest.json.tmp"]


def test_a_torn_line_is_reported_and_spoils_no_other(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    head = dict(direction="out", silo="clinic", round_index=0, verdict="accepted")
    for what in "ab":
        ledger.add([{"what": what}], **head)
    whole = ledger.path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second + 1, len(whole) - 1):  # wherever the crash came
        ledger.path.write_bytes(whole[:cut])
        lines, torn = read_ledger(ledger.path)
        assert [line["what"] for line in lines] == ["a"] and torn == [2]
        ledger.add([{"what": "c"}], **head)
        lines, torn = read_ledger(ledger.path)
        assert [line["what"] for line in lines] == ["a", "c"] and torn == [2]
    ledger.path.write_bytes(whole[:-1])  # only the line's end is missing: nothing lost
    ledger.add([{"what": "c"}], **head)
    lines, torn = read_ledger(ledger.path)
    assert [line["what"] for line in lines] == ["a", "b", "c"] and not torn


def test_a_disk_that_takes_half_a_line_is_an_error(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    head = dict(direction="out", silo="clinic", round_index=0, verdict="accepted")
    ledger.add([{"what": "a"}], **head)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 9, limits[1])
    )
    try:
        with pytest.raises(OSError, match="took 9 of"):
            ledger.add([{"what": "b"}], **head)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    ledger.add([{"what": "c"}], **head)
    lines, torn = read_ledger(ledger.path)
    assert [line["what"] for line in lines] == ["a", "c"] and torn == [2]


def test_threads_may_share_a_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger")

    def write(silo):
        for i in range(20):
            ledger.add(ledger_items(state(), ["steps"]), direction="out", silo=silo,
                       round_index=i, verdict="accepted")  # fmt: skip

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    lines, torn = read_ledger(ledger.path)
    assert len(lines) == 4 * 20 * 7 and not torn


def test_a_refusal_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(Refused("clinic", "too late")))
    assert (error.silo, error.reason) == ("clinic", "too late")
    assert str(error) == "refused what 'clinic' sends: too late"


# -- whatever comes, it is accepted and can be averaged, or it is Refused


def judged(folder):
    """What was accepted, or None and the reason; an exception but Refused escapes."""
    try:
        got = received(folder)
    except Refused as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 800
        return None, refusal.reason
    assert isinstance(got, ReceivedUpdate)
    mean = weighted_average([got, update(silo="other")])
    assert mean.keys() == state().keys()
    return got, ""


def mutated(data, rng):
    """A damaged copy: bits flipped, bytes replaced, cut, inserted, doubled."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(0, len(data) + 1))
        stop = min(len(data), start + int(rng.integers(1, 9)))
        match rng.integers(0, 7):
            case 0 if start < len(data):
                data[start] ^= 1 << int(rng.integers(0, 8))
            case 1:
                data[start:stop] = rng.bytes(stop - start)
            case 2:
                del data[start:]
            case 3:
                del data[start:stop]
            case 4:
                data[start:start] = rng.bytes(int(rng.integers(1, 9)))
            case 5:
                data[start:start] = data[start:stop] * int(rng.integers(1, 5))
            case _:  # what breaks parsers: digits, brackets, quotes, extremes
                bits = (b"9" * 30, b"-", b"[", b"{", b'"', b"\0", b"\xff" * 8, b"e9")
                data[start:stop] = bits[rng.integers(0, len(bits))]
    return bytes(data)


def used():
    """Pages of memory and open files of this process; zeros where /proc is not."""
    if not Path("/proc/self/statm").exists():
        return 0, 0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages, len(os.listdir("/proc/self/fd"))


def test_damaged_files_are_refused_and_nothing_else_happens(memory_folder):
    rng = np.random.default_rng(0)
    weights = memory_folder / "update.safetensors"
    manifest = memory_folder / "manifest.json"
    good = weights.read_bytes(), manifest.read_bytes()
    accepted, reasons = 0, set()
    with within(300):
        for case in range(20_000):
            if case == 2_000:  # caches are warm
                memory, files = used()
            manifest.write_bytes(good[1])
            if case % 4 == 0:
                weights.write_bytes(good[0])
                manifest.write_bytes(mutated(good[1], rng))
            elif case % 4 == 1:
                weights.write_bytes(mutated(good[0], rng))
            else:  # the sender is not unlucky but malicious: size and hash fit
                seal(memory_folder, mutated(good[0], rng))
            got, reason = judged(memory_folder)
            accepted += got is not None
            reasons.add(reason[:18])
    assert 100 < accepted < 10_000  # other values, or another number of examples
    assert len(reasons) > 15, reasons
    assert used()[1] == files
    growth = used()[0] - memory
    assert growth < 4096, f"{growth} pages more: {growth * 4096 / 18_000} bytes a case"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*exchange._DTYPES.values(), "F8_E4M3", "C64", 1]),
        "shape": st.lists(st.integers(-1, 4) | st.just(2**63), max_size=3)
        | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 80), max_size=3) | JSON_VALUES,
    }
)
same_folder = settings(max_examples=400)


@same_folder
@given(data=st.data())
def test_made_up_headers_are_judged(data, memory_folder):
    header, payload = parts_of(safetensors.torch.save(state()))
    names = st.sampled_from([*header, "x", "__metadata__", ""])
    changes = data.draw(st.dictionaries(names, ENTRY | JSON_VALUES, max_size=4))
    payload = data.draw(st.just(payload) | st.binary(max_size=90))
    seal(memory_folder, file_of(header | changes, payload))
    judged(memory_folder)


@same_folder
@given(values=st.binary(min_size=66, max_size=66))
def test_any_values_are_judged_and_taken_only_if_finite(values, memory_folder):
    header, _ = parts_of(safetensors.torch.save(state()))
    seal(memory_folder, file_of(header, values))
    got, _ = judged(memory_folder)
    arrived = safetensors.torch.load(file_of(header, values))
    finite = all(v.double().isfinite().all() for v in arrived.values())
    boolean = arrived["mask"].view(torch.uint8).max() <= 1
    assert (got is not None) == bool(finite and boolean)


@same_folder
@given(data=st.data())
def test_made_up_manifests_are_judged(data, memory_folder):
    keys = st.sampled_from([*exchange._UPDATE_KEYS, "x", ""])
    metrics = st.dictionaries(
        st.sampled_from(["steps", "train_loss", "x"]), st.floats() | JSON_VALUES
    )
    changes = data.draw(st.dictionaries(keys, JSON_VALUES | metrics, max_size=3))
    seal(memory_folder, **changes)
    judged(memory_folder)
