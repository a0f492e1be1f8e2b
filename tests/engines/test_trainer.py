"""The process that trains: same bits as without it, and nothing of the kit in reach."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from fl_helpers.cross_silo import hospital, sandbox
from fl_helpers.cross_silo.on_premises import job, site, trainer
from fl_helpers.cross_silo.on_premises.refusals import Refusal
from fl_helpers.cross_silo.run import Run
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo

from .conftest import wait_until

SETTINGS = {"num_classes": 2, "rounds": 3, "epochs": 1, "lr": 0.05, "batch_size": 8}
HONEST = "from fl_helpers.cross_silo.hospital import client\n"
pytestmark = pytest.mark.skipif(
    sandbox.available_sandbox() == "none", reason="no sandbox here: NOT tested"
)


@pytest.fixture
def run():
    torch.manual_seed(0)
    params = small_cnn(2).state_dict()
    kept = ["head.weight", "head.bias"]
    return Run("x", params, rounds=3, seed=1, settings=SETTINGS, keep_local=kept)


@pytest.fixture
def place(kit, tmp_path, run):
    """A kit with a function beside it, data, and the job of a run."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 1, 16, 16, generator=rng), torch.arange(24) % 2
    silo = Silo("Hospital A", Examples(x[:16], y[:16]), Examples(x[16:], y[16:]))
    hospital.save_silo(silo, tmp_path / "data")
    (kit / "startup" / "client.key").write_text("secret")
    (kit / "ledger.jsonl").write_text("")
    code = tmp_path / "code"
    code.mkdir()
    own = replace(
        site.read_site(kit),
        data=str(tmp_path / "data"),
        client=f"{code / 'mine.py'}:client",
    )
    site.write_site(kit, own)
    (code / "mine.py").write_text(HONEST)
    return kit, job.Job("0" * 32, {"Hospital-A": "Hospital A"}, run, tmp_path)


@pytest.fixture
def started(place):
    """started(text): a trainer of a hospital's function, ended with the test."""
    made = []

    def start(text=HONEST):
        kit, its_job = place
        (kit / "code" / "mine.py").write_text(text)
        made.append(trainer.Trainer(kit, its_job))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_bits_names_and_numbers_are_those_of_a_turn_without_a_process(
    started, place, run
):
    far, near = started(), trainer.Trainee(trainer.plan_of(*place))
    assert len(far.silo.train[0]) == 16 and far.silo.name == "Hospital A"
    for index in (0, 1):
        (sent, own), (sent_here, own_here) = (
            each.turn("train", run.params, index) for each in (far, near)
        )
        assert list(sent.params) == list(sent_here.params)
        assert own.keys() == own_here.keys() == {*run.keep_local}
        for mine, theirs in ((sent.params, sent_here.params), (own, own_here)):
            assert all(mine[name].equal(theirs[name]) for name in theirs)
        assert sent.metrics == sent_here.metrics and sent.num_examples == 16
    tested, _ = far.turn("evaluate", run.params, 2)
    assert tested == near.turn("evaluate", run.params, 2)[0]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def client(:", "CLIENT_UNKNOWN"),
        ("def client(data, settings):\n    open('/a/b')", "DATA_UNREADABLE"),
        ("def client(data, settings):\n    raise MemoryError", "OUT_OF_MEMORY"),
        ("def client(data, settings):\n    1 / 0", "EXECUTION_EXCEPTION"),
    ],
)
def test_a_function_that_fails_says_why_and_is_tried_again(started, place, text, code):
    its = started(text)
    for _ in range(2):
        with pytest.raises(Refusal) as error:
            its.ready()
        assert error.value.code == code and "Traceback" in str(error.value)
    (place[0] / "code" / "mine.py").write_text(HONEST)
    its.ready()  # the file was mended


ESCAPE = """
import ctypes, json, os, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path
from fl_helpers.cross_silo import hospital

def client(data, settings):
    print("this is no answer")
    own = hospital.client(data, settings)
    kit = data.parent
    def tcp():
        socket.create_connection(("127.0.0.1", PORT), timeout=5)
    def udp():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", ("127.0.0.1", PORT))
    def core():
        import resource
        assert resource.getrlimit(resource.RLIMIT_CORE)[1] != 0
    def environment():
        os.environ["A_TOKEN"]
    def command_line():
        assert b"stranger" in Path("/proc/STRANGER/cmdline").read_bytes()
    attempts = {
        "own data": lambda: next(data.iterdir()).read_bytes(),
        "key": lambda: (kit / "startup/client.key").read_text(),
        "policy": lambda: (kit / "local/egress.json").read_text(),
        "change the policy": lambda: (kit / "local/egress.json").write_text("{}"),
        "change the settings": lambda: (kit / "local/site.json").write_text("{}"),
        "ledger": lambda: (kit / "ledger.jsonl").read_text(),
        "change the ledger": lambda: (kit / "ledger.jsonl").write_text("x"),
        "change the data": lambda: (data / "new").write_text("x"),
        "change the code": lambda: Path(__file__).write_text("x"),
        "a new file in the kit": lambda: (kit / "new").write_text("x"),
        "tcp": tcp, "udp": udp, "core": core, "environment": environment,
        "command line of another process": command_line,
    }
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except (OSError, KeyError, AssertionError):
            pass
    (Path(os.environ["TMPDIR"]) / "done").write_text(json.dumps(done))
    return own
"""


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_nothing_of_the_kit_is_in_reach(started, place, kind, monkeypatch):
    import socket

    if not sandbox.works(kind):
        pytest.skip(f"{kind} does not work on this machine: NOT tested")
    monkeypatch.setattr(sandbox, "available_sandbox", lambda: kind)
    monkeypatch.setenv("A_TOKEN", "secret")
    stranger = subprocess.Popen(["sleep", "60"], executable="/bin/sleep")
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard,
        ):
            heard.bind(listener.getsockname())
            heard.setblocking(False)
            text = ESCAPE.replace("PORT", str(listener.getsockname()[1]))
            text = text.replace("STRANGER", str(stranger.pid)).replace(
                'b"stranger"', 'b"sleep"'
            )
            its = started(text)
            before = {p: p.read_bytes() for p in place[0].rglob("*") if p.is_file()}
            its.ready()
            with pytest.raises(BlockingIOError):
                heard.recv(9)  # nothing came
    finally:
        stranger.kill()
        stranger.wait()
    kit = place[0]
    done = json.loads((kit / "work" / ("0" * 32) / "tmp" / "done").read_text())
    # In bubblewrap it has folders and a network of its own, which nobody else sees.
    mine = ["change the ledger", "a new file in the kit", "udp"]
    seen = {"bubblewrap": mine, "landlock": ["command line of another process"]}
    assert done == ["own data", *seen[kind]]
    after = {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()}
    made = {path.name for path in after.keys() - before.keys()}
    assert made == {"done"}
    assert {path: after[path] for path in before} == before


def test_it_is_started_again_when_it_is_killed(started, run):
    its = started()
    before, _ = its.turn("train", run.params, 0)
    for child in psutil.Process(its.process.pid).children(recursive=True):
        child.kill()
    its.process.kill()
    after, _ = its.turn("train", run.params, 0)
    assert all(after.params[name].equal(before.params[name]) for name in after.params)


def test_one_that_always_dies_is_refused_and_not_tried_for_ever(started, run):
    its = started("import os\nos._exit(3)")
    with pytest.raises(Refusal, match="has ended") as error:
        its.turn("train", run.params, 0)
    assert error.value.code == "EXECUTION_EXCEPTION"


def test_it_ends_with_the_process_that_started_it(place, tmp_path):
    kit, its_job = place
    code = f"""
import pickle, sys, time
from pathlib import Path
from fl_helpers.cross_silo.on_premises import job, trainer
import torch
from fl_helpers.models import small_cnn
from fl_helpers.cross_silo.run import Run
run = Run("x", small_cnn(2).state_dict(), rounds=3, seed=1, settings={SETTINGS!r})
its = trainer.Trainer(Path({str(kit)!r}), job.Job("{its_job.id}", {{}}, run, Path(".")))
its.ready()
print(its.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        number = int(parent.stdout.readline())
        family = [psutil.Process(number)]
        family += family[0].children(recursive=True)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate()

    def gone():
        return not any(
            each.is_running() and each.status() != psutil.STATUS_ZOMBIE
            for each in family
        )

    wait_until(gone, 10, "the process that trains ends")


def test_the_gate_sees_what_is_no_number_or_tensor(started, run):
    text = """
from dataclasses import replace
import torch
from fl_helpers.cross_silo import hospital
def client(data, settings):
    own = hospital.client(data, settings)
    def update(params, silo, *, round_index, rng):
        done = own.update(params, silo, round_index=round_index, rng=rng)
        if round_index:
            other = [1] if round_index == 1 else torch.ones(2, dtype=torch.complex64)
            return replace(done, params=done.params | {"x": other})
        metrics = {"a": torch.tensor(1.0), "b": float("nan"), "c": True}
        more = {"images": silo.train.x[:2]}
        return replace(done, params=done.params | more, metrics=metrics)
    return replace(own, update=update)
"""
    its = started(text)
    sent, _ = its.turn("train", run.params, 0)
    assert sent.params["images"].shape == (2, 1, 16, 16)
    assert sent.metrics["a"] == "a Tensor" and sent.metrics["c"] == "a bool"
    assert sent.metrics["b"] != sent.metrics["b"]
    with pytest.raises(Refusal, match="send tensors only"):
        its.turn("train", run.params, 1)
    with pytest.raises(Refusal, match="'x' is torch.complex64 .*dtypes that may cross"):
        its.turn("train", run.params, 2)
    assert Path(its.plan["account"]).is_dir()


IN_EPOCHS = """
import os, torch
from dataclasses import replace
from pathlib import Path
from fl_helpers.cross_silo import hospital

def client(data, settings):
    made = hospital.client(data, settings)
    def update(params, silo, *, round_index, rng):
        path = Path.home() / "epoch.pt"
        epoch, state = 0, params
        if path.exists():
            found = torch.load(path)
            if found["round"] == round_index:
                epoch, state = found["epoch"], found["state"]
                rng.set_state(found["rng"])
        for epoch in range(epoch, 3):
            print("epoch", epoch, file=open(Path.home() / "log", "a"))
            done = made.update(state, silo, round_index=round_index, rng=rng)
            state = done.params
            about = {"round": round_index, "epoch": epoch + 1, "rng": rng.get_state()}
            torch.save(about | {"state": state}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            if settings_dies and epoch == 1 and not (Path.home() / "died").exists():
                (Path.home() / "died").touch()
                os._exit(9)
        path.unlink()
        return done
    return replace(made, update=update)
"""


def test_a_turn_goes_on_from_its_last_epoch_when_its_process_was_killed(
    started, place, run
):
    """As the guide writes it: model and random numbers, in the process's home."""
    home = place[0] / "work" / ("0" * 32)
    dies = started(f"settings_dies = True\n{IN_EPOCHS}")
    found, own = dies.turn("train", run.params, 0)
    assert (home / "died").exists() and not (home / "epoch.pt").exists()
    assert (home / "log").read_text() == "epoch 0\nepoch 1\nepoch 2\n"
    dies.close()
    whole = started(f"settings_dies = False\n{IN_EPOCHS}")
    expected, own_expected = whole.turn("train", run.params, 0)
    assert all(found.params[k].equal(v) for k, v in expected.params.items())
    assert all(own[k].equal(v) for k, v in own_expected.items())
