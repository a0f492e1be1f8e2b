"""The parts of the on-premises run, each by itself: no process is started."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessagePropKey
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from safetensors.torch import load_file

from fl_helpers import exchange
from fl_helpers.cross_silo import secure
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.fixed_point import encode
from fl_helpers.cross_silo.hospital import load_silo
from fl_helpers.cross_silo.on_premises import (
    analyses,
    controller,
    executor,
    gate,
    job,
    provision,
    questions,
    runs,
    secure_controller,
    secure_questions,
    site,
    worker,
)
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.guards import HubGuard, SiteGuard
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.run import Run
from fl_helpers.silos import Examples, Silo
from fl_helpers.training import Update

from .conftest import SENT, STATE, wait_until

TESTS = Path(__file__).parents[1]

LIMITS = exchange.Limits()
EXAMPLE = Path(exchange.__file__).with_name("cross_silo") / "silos.yaml"


# ---- start-up kits


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    return provision.provision(read_federation(EXAMPLE), folder)


def test_keys_are_private_and_the_authority_stays_away_from_the_kits(kits):
    names = ["server", "admin", *(f"Hospital-{k}" for k in "ABCD")]
    assert sorted(path.name for path in kits.iterdir()) == sorted(names)
    keys = list(kits.rglob("*.key"))
    assert len(keys) == len(names)
    authority = kits.parent / "authority"
    for path in [*keys, *authority.rglob("cert.json")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700
    state = json.loads(next(authority.rglob("cert.json")).read_text())
    secret = state["root_pri_key"].split("\n")[1]
    for path in kits.rglob("*"):
        assert path.is_dir() or secret not in path.read_text(), path


def path_of(kind):
    return f"{kind.__module__}.{kind.__name__}"


def test_a_hospitals_policy(kits):
    local = kits / "Hospital-A" / "local"
    resources = json.loads((local / "resources.json").read_text())
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["class_allow_list"] == [path_of(executor.SiteExecutor)]
    assert resources["allow_log_streaming"] is False
    parts = {part["path"] for part in resources["components"]}
    assert {path_of(SiteGuard), path_of(worker.RelaunchLauncher)} <= parts
    rights = json.loads((local / "authorization.json").read_text())["permissions"]
    assert rights["project_admin"]["byoc"] == "none"
    assert rights["lead"] == {"view": "any"}
    scopes = json.loads((local / "privacy.json").read_text())
    gates = scopes["scopes"][0]["task_result_filters"]
    assert [g["path"] for g in gates] == [path_of(gate.EgressGate)]
    assert site.read_site(kits / "Hospital-A").silo == "Hospital A"


def test_the_policy_on_one_page(kits, tmp_path):
    kit = shutil.copytree(kits / "Hospital-A", tmp_path / "kit")
    page = gate.explain_policy(kit)
    assert page == {
        "who may start a run": "project_admin",
        "who may bring code": "nobody",
        "which class may answer": path_of(executor.SiteExecutor),
        "what every result passes": path_of(gate.EgressGate),
        "what every message passes": path_of(SiteGuard),
        "what may leave": "nothing, until the hospital agrees to a model",
    }
    params = {"w": torch.zeros(3, 2), "kept": torch.zeros(9)}
    gate.allow(kit, params, keep_local=["kept"], metrics=["auroc"])
    may = gate.explain_policy(kit)["what may leave"]
    assert may.startswith("1 entries of one model, 24 bytes; num_examples; auroc, ")
    assert "secure" not in may
    gate.allow(kit, params, keep_local=["kept"], secure=True)
    assert gate.explain_policy(kit)["what may leave"].endswith("; in secure sums only")
    questions.allow_questions(kit, minimum=20)
    page = gate.explain_policy(kit)
    assert page["which class may answer"].endswith(site.ANSWERS)
    assert page["what may leave"].endswith(
        f"; answers of {len(questions.KNOWN)} functions of an analysis, about 20 "
        "patients or more"
    )
    rights = json.loads((kit / "local" / "authorization.json").read_text())
    rights["permissions"]["lead"]["byoc"] = "any"  # it shows what is there
    site.write_local(kit, "authorization.json", rights)
    assert gate.explain_policy(kit)["who may bring code"] == "lead"


def test_settings_of_an_older_kit_are_refused_with_what_to_do(kit):
    path = kit / "local" / "site.json"
    before = {k: v for k, v in json.loads(path.read_text()).items() if k != "version"}
    path.write_text(json.dumps(before))  # as it was hardened then
    with pytest.raises(ValueError, match=r"site.json is of version 1, .* takes 2: har"):
        site.read_site(kit)
    again = site.Site(**before | {"data": "/new"})
    site.harden_site(kit, again)
    assert site.read_site(kit) == again
    site.write_local(kit, "site.json", {"version": site.VERSION, "organization": "x"})
    with pytest.raises(TypeError, match="organization"):
        site.read_site(kit)


def test_the_servers_policy(kits):
    local = kits / "server" / "local"
    resources = json.loads((local / "resources.json").read_text())
    allowed = [controller.RoundController, secure_controller.SecureController]
    allowed += [analyses.QuestionController]
    allowed += [secure_questions.SecureQuestionController]
    assert resources["class_allow_list"] == [path_of(kind) for kind in allowed]
    assert path_of(HubGuard) in {part["path"] for part in resources["components"]}
    stores = [resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"]]
    stores += [
        part["args"]["uri_root"]
        for part in resources["components"]
        if part["id"] == "job_manager"
    ]
    assert all(store.startswith(str(kits / "server")) for store in stores)
    rights = json.loads((local / "authorization.json").read_text())["permissions"]
    assert rights["project_admin"]["shell_commands"] == "none"


def test_kits_are_not_overwritten(kits):
    with pytest.raises(FileExistsError, match="exists; delete it"):
        provision.provision(read_federation(EXAMPLE), kits.parent)


def test_kits_are_not_put_where_git_would_take_them(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("runs/\n")
    federation = read_federation(EXAMPLE)
    with pytest.raises(ValueError, match="would be taken by git.*below runs/"):
        provision.provision(federation, tmp_path / "kits")
    assert not (tmp_path / "kits").exists()
    assert provision.provision(federation, tmp_path / "runs" / "trial").exists()


def test_a_trial_is_written_anew_but_over_nothing_else(tmp_path):
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4) % 2
    silos = [Silo(f"Hospital {k}", Examples(x, y), Examples(x, y)) for k in "AB"]
    for _ in range(2):
        path = provision.write_trial(tmp_path / "trial", silos, client="mine:client")
    found = provision.sites_of(read_federation(path))
    assert [own.silo for own in found] == ["Hospital A", "Hospital B"]
    assert (
        load_silo(found[1].data).train.x.equal(x) and found[0].client == "mine:client"
    )
    with pytest.raises(ValueError, match="has other content than a trial"):
        provision.write_trial(tmp_path, silos, client="mine:client")


def test_another_port_reaches_every_kit(kits):
    provision.set_port(kits, 4711)
    texts = [p.read_text() for p in kits.glob("*/startup/fed_*.json")]
    assert len(texts) == 6 and all("4711" in text for text in texts)
    assert not any("8002" in text for text in texts)


# ---- guards


def message(sender, origin, target, topic="train", payload=None):
    """A message as a filter gets it: `sender` is the connection's peer."""
    header = {MessageHeaderKey.ORIGIN: origin, MessageHeaderKey.DESTINATION: target}
    header |= {MessageHeaderKey.CHANNEL: "task", MessageHeaderKey.TOPIC: topic}
    made = Message(header, payload)
    made.set_prop(MessagePropKey.ENDPOINT, Endpoint(sender))
    return made


class Core:
    """Stands in for the engine's message layer."""

    def __init__(self, name):
        self.name, self.filters = name, []

    def get_fqcn(self):
        return self.name

    def add_incoming_filter(self, channel, topic, check):
        self.filters.append((channel, topic, check))

    add_incoming_request_filter = add_incoming_filter


def installed(guard, name):
    core = Core(name)
    guard.install(core)
    ((channel, topic, check),) = core.filters
    assert (channel, topic) == ("*", "*")
    return check


@pytest.mark.parametrize(
    "sender, origin, target, passes",
    [
        ("A", "A", "server", True),
        ("A.job", "A.job", "server.job", True),
        ("server.job", "server.job", "A.job", True),
        ("server.job", "server", "A", True),
        ("A", "A", "B", False),
        ("A.job", "A.job", "B.job", False),
        ("A", "A", "A.job", False),
        ("A", "server", "B", False),  # says that it is someone else
        ("A", "B", "server", False),
        ("A", "", "server", False),
        ("admin", "admin", "B", False),
    ],
)
def test_hub_guard(sender, origin, target, passes):
    check = installed(HubGuard(), "server")
    assert (check(message(sender, origin, target)) is None) == passes


@pytest.mark.parametrize(
    "sender, origin, topic, inner, passes",
    [
        ("server", "server", "train", None, True),
        ("server", "server.job", "train", None, True),
        ("B.job", "B.job", "heartbeat", None, True),  # its own worker
        ("server", "A", "train", None, False),
        ("A", "A", "train", None, False),
        ("A", "server", "train", None, False),
        ("server", "admin", "train", None, False),
        ("server", "server", "sys.shell", None, False),
        ("server", "server", "admin", "sys.shell", False),
        ("server", "server", "admin", "sys.info", True),
    ],
)
def test_site_guard(sender, origin, topic, inner, passes):
    check = installed(SiteGuard(), "B")
    payload = SimpleNamespace(topic=inner) if inner else None
    made = message(sender, origin, "B", topic, payload)
    assert (check(made) is None) == passes


def test_the_worker_is_guarded_too(monkeypatch):
    monkeypatch.setattr(executor, "end_with_parent", lambda: None)
    threads = torch.get_num_threads()
    trainer, core = executor.SiteExecutor(), Core("B.job")
    torch.set_num_threads(threads)
    link = SimpleNamespace(timeout=300.0)  # seconds: the engine's own
    engine = SimpleNamespace(get_cell=lambda: SimpleNamespace(core_cell=core))
    engine.client = SimpleNamespace(communicator=link)
    told = {FLContextKey.RUNNER: SimpleNamespace(get_task_timeout=20.0)}
    context = SimpleNamespace(get_engine=lambda: engine, get_prop=told.get)
    for event in (EventType.START_RUN, EventType.START_RUN):  # installed once
        trainer.handle_event(event, context)
    assert link.timeout == 20
    ((_, _, check),) = core.filters
    assert check(message("server", "server.job", "B.job")) is None
    assert check(message("A", "A.job", "B.job")) is not None


# ---- the gate


def through(kit, result, task="train"):
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(kit)))
    context.set_prop(FLContextKey.TASK_NAME, task)
    return gate.EgressGate().process(result, context)


def result(params=SENT, metrics=None, silo="Hospital A", round_index=4):
    made = make_reply(ReturnCode.OK)
    update = Update(silo, dict(params), 10, metrics or {"test_loss": 0.5})
    made["update"] = gate.Unreleased(update, round_index)
    return made


def ledger(kit):
    if not (kit / "ledger.jsonl").exists():
        return []
    return exchange.read_ledger(kit / "ledger.jsonl")[0]


def test_what_is_agreed_leaves_as_two_files_and_is_in_the_ledger(kit, tmp_path):
    made = result()
    made["more"] = made["update"].update.params  # whatever else is there stays
    sent = through(kit, made)
    files = {k for k in sent if k not in ("__headers__", "__cookies__")}
    assert files == {exchange.UPDATE, exchange.MANIFEST}
    assert made["update"].update is None  # a large one is held once, as what leaves
    folder = gate.unpack(sent, tmp_path / "in", exchange.UPDATE)
    found = exchange.read_update(
        folder, SENT, silo="Hospital A", round_index=4,
        limits=exchange.Limits(metrics=frozenset({"test_loss"})),
    )  # fmt: skip
    assert found.params["w"].equal(STATE["w"]) and found.metrics == {"test_loss": 0.5}
    # 4 float32 are 16 bytes, one int64 is 8.
    lines = {e["what"]: e["bytes"] for e in ledger(kit) if e["verdict"] == "accepted"}
    assert lines["w"] == 16 and lines["n"] == 8


@pytest.mark.parametrize(
    "bad",
    [
        result(SENT | {"own": STATE["own"]}),
        result({"w": STATE["w"]}),
        result(SENT | {"w": torch.ones(4, 2)}),
        result(SENT | {"w": STATE["w"].double()}),
        result(SENT | {"w": STATE["w"] * torch.nan}),
        result(metrics={"patient_4711": 1.0}),
        result(metrics={"test_loss": [0.5, 0.6]}),
        result(metrics={"test_loss": "text"}),
        result(silo="Hospital B"),
        result(round_index="4"),
        make_reply(ReturnCode.OK),
    ],
)
def test_what_is_not_agreed_does_not_leave_at_all(kit, bad):
    sent = through(kit, bad)
    assert sent.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert set(sent) == {"__headers__"}
    left = [e["what"] for e in ledger(kit) if e["verdict"] == "accepted"]
    assert left == ["code TASK_RESULT_FILTER_ERROR"]


def test_a_hospital_can_hold_updates_to_its_own_norm_limit(kit):
    gate.allow(kit, SENT, metrics=["test_loss"], max_norm=1.0)
    near, far = ({"w": STATE["w"] + step, "n": STATE["n"]} for step in (0.4, 0.6))
    for params, code in ((near, "OK"), (far, "TASK_RESULT_FILTER_ERROR")):
        made = make_reply(ReturnCode.OK)
        update = Update("Hospital A", params, 10, {"test_loss": 0.5})
        made["update"] = gate.Unreleased(update, 4, SENT)
        # Four weights, each 0.4 or 0.6 further: norms 0.8 and 1.2.
        assert through(kit, made).get_return_code() == code


def test_a_hospital_of_secure_runs_lets_no_plain_update_out(kit):
    gate.allow(kit, SENT, metrics=["test_loss"], secure=True)
    assert through(kit, result()).get_return_code() == "TASK_RESULT_FILTER_ERROR"
    made = result()
    made["update"].seal = lambda update: Update("Hospital A", {"m": STATE["w"]}, 1, {})
    sent = through(kit, made)
    assert sent.get_return_code() == ReturnCode.OK and exchange.UPDATE in sent
    (line,) = [e for e in ledger(kit) if e["what"] == "m"]
    assert line["bytes"] == 16 and not any(e["what"] == "w" for e in ledger(kit))
    bad = result(SENT | {"own": STATE["own"]})
    bad["update"].seal = made["update"].seal  # the plain update is looked at first
    assert through(kit, bad).get_return_code() == "TASK_RESULT_FILTER_ERROR"


@pytest.mark.parametrize(
    "what, content, code",
    [
        ("hello", b"x" * 20_000, "OK"),
        ("mask", b"x" * 32, "OK"),
        ("mask", b"x" * 33, "TASK_RESULT_FILTER_ERROR"),
        ("hello", b"x" * 20_001, "TASK_RESULT_FILTER_ERROR"),
        ("hello", "text", "TASK_RESULT_FILTER_ERROR"),
        ("records", b"x", "TASK_RESULT_FILTER_ERROR"),
    ],
)
def test_of_the_protocol_of_sums_two_short_messages_pass(kit, what, content, code):
    made = make_reply(ReturnCode.OK)
    made["update"] = gate.Spoken(what, content)
    sent = through(kit, made)
    assert sent.get_return_code() == code
    passed = [e for e in ledger(kit) if e["verdict"] == "accepted"]
    assert [e["what"] for e in passed] == [what if code == "OK" else f"code {code}"]


def test_a_hospital_that_lies_about_its_weight_or_update_is_seen_in_the_sum_only():
    """Two keep to the norm limit of 1; the third has changed its gate, and pulls."""
    start = {"w": torch.zeros(4)}
    run = Run("x", start, rounds=1, seed=1, limits=exchange.Limits(max_norm=1.0))
    silos = ("A", "B", "C")

    def mean(of_c, examples):
        updates = [Update(k, {"w": torch.full((4,), 0.4)}, 10, {}) for k in "AB"]
        updates.append(Update("C", {"w": torch.full((4,), of_c)}, examples, {}))
        parts = [encode(u, start, total=30, metrics=LIMITS.metrics) for u in updates]
        for part in parts[1:]:
            parts[0].plus(part)
        asked = secure.Question("x", "train", 0, 0, silos, total=30)
        added = SimpleNamespace(asked=asked, read=lambda: parts[0])
        here = SimpleNamespace(job=SimpleNamespace(run=run), sum=added, params=start)
        return secure_controller.SecureController._mean(here, "train")

    # Norms: 0.8 = sqrt(4 * 0.4^2). Mean with an honest C at 0.5: (0.4 + 0.4 + 0.5) / 3.
    assert torch.allclose(mean(0.5, 10).params["w"], torch.tensor(1.3 / 3))
    # It counts itself twice: within the limits, nobody can see that.
    assert torch.allclose(mean(0.5, 20).params["w"], torch.tensor(1.8 / 4))
    with pytest.raises(exchange.Refused, match=r"norm .* did not keep .* hides which"):
        mean(5.0, 10)
    with pytest.raises(ValueError, match="silo .C. has 31 of 30 examples"):
        mean(0.5, 31)  # its own code refuses; other code could send anything


def test_more_bytes_than_agreed_do_not_leave(kit):
    gate.allow(kit, SENT, metrics=["test_loss"], max_bytes=20)
    sent = through(kit, result())
    assert sent.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


def test_an_evaluation_sends_numbers_only(kit):
    assert through(kit, result({}), "evaluate").get_return_code() == ReturnCode.OK
    sent = through(kit, result(SENT), "evaluate")
    assert sent.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


def test_of_an_error_only_the_code_leaves(kit):
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION, {"why": "patient_4711.dcm"})
    failed["text"] = "patient_4711.dcm"
    sent = through(kit, failed)
    assert sent.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "4711" not in str(dict(sent))
    failed.set_return_code("patient_4711.dcm")
    assert through(kit, failed).get_return_code() == ReturnCode.ERROR
    assert [e["what"] for e in ledger(kit)][0] == "code EXECUTION_EXCEPTION"
    assert "4711" not in (kit / "ledger.jsonl").read_text()


def test_without_a_policy_nothing_leaves(kit):
    (kit / "local" / "egress.json").unlink()
    sent = through(kit, result())
    assert sent.get_return_code() == "MODEL_REFUSED" and set(sent) == {"__headers__"}


def test_without_the_gate_the_engine_cannot_send_an_update():
    # In a process of its own: an attempt that fails leaves the engine's serialisation
    # unable to connect to any server.
    code = """
from nvflare.fuel.utils import fobs
from engines.test_on_premises_parts import result
fobs.dumps(result())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS
    )
    assert "Unreleased" in done.stderr and "can't be serialized" in done.stderr


def test_unpack_takes_bytes_only(tmp_path):
    with pytest.raises(ValueError, match="lacks update.safetensors; it must be bytes"):
        gate.unpack(Shareable(), tmp_path, exchange.UPDATE)
    with pytest.raises(ValueError, match="must be bytes"):
        gate.unpack({exchange.UPDATE: "text"}, tmp_path, exchange.UPDATE)


# ---- launcher, executor, controller, fleet


def new_worker(code, relaunches, **hour):
    command = [sys.executable, "-S", "-c", code]
    return worker.Worker(command, dict(os.environ), relaunches, **hour)


def test_a_worker_that_dies_is_started_again_so_often_in_an_hour(tmp_path):
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); import sys; sys.exit(3)"
    started = new_worker(code, relaunches=1, hour=1.5)
    waiting = threading.Thread(target=started.wait)
    begun = time.monotonic()
    waiting.start()
    wait_until(lambda: count.exists() and count.read_text() == "xxx", 30, "3 starts")
    # The second start is a second after the first; the third an "hour" after that.
    assert time.monotonic() - begun >= 2.5
    assert started.poll() == JobReturnCode.UNKNOWN  # the run is not failed for all
    started.terminate()
    waiting.join(10)
    assert not waiting.is_alive() and started.over


def test_a_worker_that_ends_or_is_stopped_is_not_started_again():
    done = new_worker("pass", relaunches=5)
    done.wait()
    assert done.poll() == JobReturnCode.SUCCESS and not done.restarts and done.over
    never = new_worker("raise SystemExit(3)", relaunches=0)
    never.wait()
    assert never.over and not never.restarts
    stopped = new_worker("import time; time.sleep(60)", relaunches=5)
    stopped.terminate()
    before = time.monotonic()
    stopped.wait()
    assert time.monotonic() - before < 10 and not stopped.restarts


def test_of_jobs_that_are_over_a_kit_keeps_the_logs(tmp_path):
    jobs = [str(uuid.uuid4()) for _ in range(3)]
    for name in ("startup", "local", "kept", "secure"):
        (tmp_path / name / "app").mkdir(parents=True)
    for job_id in jobs:
        folder = Path(Workspace(str(tmp_path), "A").get_app_dir(job_id)) / job.CONFIG
        folder.mkdir(parents=True)
        (folder / job.INITIAL).write_bytes(b"model")
        (tmp_path / job_id / "log.txt").write_text("said")
    worker.remove_models(tmp_path, jobs[2:])
    left = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob(job.INITIAL)]
    assert left == jobs[2:]
    assert sorted(p.parent.name for p in tmp_path.rglob("log.txt")) == sorted(jobs)
    for name in ("local", "kept", "secure"):
        assert (tmp_path / name / "app").exists()


def test_who_waits_asks_after_a_tenth_of_the_time_that_it_waits():
    rounds, engine = controller.RoundController(), SimpleNamespace()
    runner, silo = SimpleNamespace(config=engine), SimpleNamespace()
    silo.get_identity_name = lambda: "Hospital-A"
    context = SimpleNamespace(get_prop={FLContextKey.RUNNER: runner}.get)
    context.get_peer_context = lambda: silo
    for ago, after in {None: 0.1, 0.3: 0.1, 5.0: 0.5, 3600.0: 1.0}.items():
        rounds.started = time.monotonic() - ago if ago else 0.0
        rounds.handle_event(EventType.BEFORE_PROCESS_TASK_REQUEST, context)
        assert engine.task_request_interval == pytest.approx(after, abs=0.01)


@pytest.mark.parametrize("size, seconds", [(1000, 20), (10**6, 120)])
def test_a_small_model_is_sooner_asked_for_again(tmp_path, size, seconds):
    """When a reply was lost on its way."""
    run = Run("x", {"w": torch.zeros(size // 4)}, rounds=1, seed=1)
    folder = job.write_job(run, tmp_path, ["Hospital A"]) / "site" / job.CONFIG
    told = json.loads((folder / "config_fed_client.json").read_text())
    assert told["submit_task_result_timeout"] == told["get_task_timeout"] == seconds


@pytest.mark.parametrize("name", ["executor", "controller", "trainer"])
def test_a_process_looks_for_garbage_less_often_before_it_imports_torch(name):
    package = "fl_helpers.cross_silo"
    code = f"import {package}.on_premises.{name}, gc, sys\nfound = list(sys.modules)\n"
    code += f"assert found.index('{package}.short_lived') < found.index('torch')\n"
    code += "assert gc.get_threshold()[0] == 20_000"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_ends_with_its_parent(tmp_path):
    """The child of a process that is killed is gone, too, soon after."""
    child = (
        "from fl_helpers.cross_silo.on_premises.worker import end_with_parent\n"
        "import os, sys, time\n"
        "end_with_parent()\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])\n"
    )
    started = subprocess.Popen([sys.executable, "-c", parent, tmp_path / "pid"])
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    grandchild = psutil.Process(int((tmp_path / "pid").read_text()))
    started.kill()
    started.wait()
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


# ---- the executor


def own_entry(kit):
    kept = sorted((kit / "kept").glob("*/*.safetensors"))
    return {path.stem: load_file(path)["own"][0].item() for path in kept}


def test_entries_that_stay_are_kept_for_three_rounds_and_a_round_can_be_repeated(
    train, kit
):
    for round_index in (0, 1, 2, 3):
        update = train(round_index)["update"].update
        assert update.params.keys() == SENT.keys()
    after = {"000001": 2.0, "000002": 3.0, "000003": 4.0}  # each round adds one
    assert own_entry(kit) == after
    for round_index in (3, 2, 3):  # again: from the round before, not their own result
        train(round_index)
        assert own_entry(kit) == after
    # What round 1 began with is gone: not the initial entries, which would be wrong.
    assert train(1).get_return_code() == "OWN_ENTRIES_LOST"


def test_metrics_that_are_no_numbers_stay(train):
    metrics = train(0)["update"].update.metrics
    assert metrics == {"train_loss": 0.5, "test_loss": 0.25}
    tested = train(0, task="evaluate")["update"].update
    assert tested.params == {} and tested.metrics == {"test_loss": 0.25}


def test_data_of_another_silo_are_not_trained_on(train, kit):
    own = replace(site.read_site(kit), data="/Hospital B")
    site.write_site(kit, own)
    assert train(0).get_return_code() == "DATA_UNREADABLE"


def test_of_an_exception_only_a_code_is_handed_on(train, kit):
    site.write_local(kit, "egress.json", {"entries": {}})  # then reading it fails
    answer = train(0)
    assert answer.get_return_code() == "KIT_DAMAGED"
    assert "update" not in answer and "KeyError" not in str(answer)


# ---- runs


def test_a_runs_name_belongs_to_its_content(tmp_path):
    def start(**change):
        run = Run(**dict(name="x", params=STATE, rounds=1, seed=1) | change)
        folder = job.write_job(run, tmp_path, ["Hospital A"])
        return json.loads((folder / "app" / job.CONFIG / job.RUN).read_text())

    first = start()
    assert first["silos"] == {"Hospital-A": "Hospital A"}
    assert start(keep_local=set())["id"] == first["id"]
    again = start(rounds=9, deadline=5)
    assert again["id"] == first["id"] and again["run"]["rounds"] == 9
    with pytest.raises(ValueError, match=r"'x' was started before .* \['seed'\]"):
        start(seed=2)
    with pytest.raises(ValueError, match=r"'x' was started before .* \['initial'\]"):
        start(params=STATE | {"n": torch.tensor(4)})
    assert start()["id"] == first["id"]  # nothing of the others is left


def test_only_whole_events_are_read(tmp_path):
    path = tmp_path / "events.jsonl"
    assert runs.new_events(path, 0) == ([], 0)
    path.write_text('{"event": "a"}\n{"event": "b"')
    events, seen = runs.new_events(path, 0)
    assert events == [{"event": "a"}] and seen == 15
    assert runs.new_events(path, seen) == ([], 15)
    path.write_text('{"event": "a"}\n{"event": "b"}\n')
    assert runs.new_events(path, seen) == ([{"event": "b"}], 30)


def test_spans_of_a_run_are_from_its_rounds_to_the_answers():
    events = [
        {"event": "start", "time": 10.0},
        {"event": "round_start", "time": 11.0},
        {"event": "update", "silo": "a", "time": 13.0},
        {"event": "round_end", "time": 14.0},
        {"event": "round_start", "time": 15.0},
        {"event": "refused", "silo": "a", "time": 15.5},
        {"event": "missing", "silo": "b", "time": 17.0},
    ]
    assert [*runs.spans(events)] == [
        ("a", 1.0, 3.0, "update"),
        ("a", 5.0, 5.5, "refused"),
        ("b", 5.0, 7.0, "missing"),
    ]


def test_a_quorum_that_cannot_be_reached(tmp_path):
    run = Run("x", STATE, rounds=1, seed=1, quorum=2)
    with pytest.raises(ValueError, match="quorum 2, but there are 1 silos"):
        job.write_job(run, tmp_path, ["Hospital A"])


class Engine:
    """A session whose runs begin, and end at once with the same verdict."""

    def __init__(self, verdict, log):
        self.verdict, self.log, self.submitted = verdict, log, 0

    def submit_job(self, folder):
        self.submitted += 1
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write('{"event": "start", "round": 0}\n')
        return "job"

    def get_job_meta(self, job):
        return {"status": self.verdict}

    def abort_job(self, job):
        pass


@pytest.mark.parametrize(
    "verdict, submitted, message",
    [
        (
            "FINISHED:EXECUTION_EXCEPTION",
            3,
            "ended 3 times .* as FINISHED:EXEC",
        ),
        ("FINISHED:ABORTED", 1, "ended as FINISHED:ABORTED"),  # somebody wanted that
    ],
)
def test_a_run_goes_on_only_if_nobody_stopped_it(
    kit, tmp_path, monkeypatch, verdict, submitted, message
):
    clock = iter(range(10**6))
    fast = SimpleNamespace(
        monotonic=lambda: next(clock), time=time.time, sleep=lambda seconds: None
    )
    monkeypatch.setattr(runs, "time", fast)
    run = Run("stopped", STATE, rounds=1, seed=0, quorum=1)
    engine = Engine(verdict, tmp_path / "server" / "runs" / run.name / "events.jsonl")
    events = runs.play(
        run,
        engine,
        silos=["Hospital A"],
        server_kit=tmp_path / "server",
        jobs=tmp_path / "jobs",
    )
    with pytest.raises(RunError, match=message):
        list(events)
    assert engine.submitted == submitted


def test_damaged_lines_of_a_ledger_are_named(tmp_path):
    fleet = Fleet(EXAMPLE, tmp_path)
    path = tmp_path / "kits" / "Hospital-A" / "ledger.jsonl"
    about = {"direction": "out", "silo": "Hospital A", "round_index": 0}
    for name in ("first", "second", "third"):
        exchange.Ledger(path).add([{"what": name}], **about, verdict="accepted")
    assert len(fleet.ledger("Hospital A")) == 3
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    with pytest.warns(UserWarning, match=r"A/ledger.jsonl: lines \[2\] are dam"):
        found = fleet.ledger("Hospital A")
    assert [entry["what"] for entry in found] == ["first", "third"]
