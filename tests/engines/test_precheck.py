"""The pre-check finds what is planted, says what to do, and tells nothing of a record.

Kits are provisioned, the server is a few lines that speak TLS: no engine is started.
"""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fl_helpers.cross_silo import hospital, sandbox, secure
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises import (
    gate,
    job,
    precheck,
    precheck_data,
    precheck_kit,
    precheck_trial,
    provision,
    questions,
    site,
)
from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Limits
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo

ROOT = Path(__file__).parents[2]
PATIENT = "Meier-Lueders"  # planted in data, names of files, and texts of errors
METRICS = ("test_balanced_accuracy", "test_auroc")
SETTINGS = {"num_classes": 2, "rounds": 3, "epochs": 1, "lr": 0.05, "batch_size": 8}
SETTINGS_FRAME = b"\0\0\0\4\0\0\0\0\0"

CLIENT = """
from dataclasses import replace
from fl_helpers.cross_silo import hospital
from fl_helpers.silos import Examples
import torch

def honest(data, settings):
    return hospital.client(data, settings)

def raises(data, settings):
    print("loading Meier-Lueders")
    raise RuntimeError("cannot read the record of Meier-Lueders")

def named(data, settings):
    raise type("MeierLueders4711", (Exception,), {})("Meier-Lueders")

def no_file(data, settings):
    return open(data / "Meier-Lueders.dcm").read()

def other_form(data):
    return None

def no_client(data, settings):
    return {"Meier-Lueders": 1}

def ends(data, settings):
    import os
    print("Meier-Lueders", flush=True)
    os._exit(3)

def changed(change):
    def client(data, settings):
        own = hospital.client(data, settings)
        def update(params, silo, **options):
            return change(own.update(params, silo, **options), silo)
        return replace(own, update=update)
    return client

def greedy(done, silo):
    return replace(done, params=done.params | {"Meier-Lueders": silo.train.x[:8]})

def metric(done, silo):
    return replace(done, metrics=done.metrics | {"Meier-Lueders": 1.0})

def infinite(done, silo):
    return replace(done, metrics=done.metrics | {"train_loss": float("nan")})

def shape(done, silo):
    return replace(done, params={k: v[None] for k, v in done.params.items()})

def fails(done, silo):
    raise ValueError("Meier-Lueders has no image")

def nan(done, silo):
    return replace(done, params={k: v * float("nan") if v.is_floating_point() else v
                                 for k, v in done.params.items()})

def data_of(change):
    def client(data, settings):
        own = hospital.client(data, settings)
        return replace(own, silo=change(own.silo))
    return client

def unlabelled(silo):
    y = silo.train.y.clone()
    y[3] = -1
    return replace(silo, train=Examples(silo.train.x, y))

def one_class(silo):
    return replace(silo, train=Examples(silo.train.x, silo.train.y * 0))

def twice(silo):
    return replace(silo, test=Examples(silo.train.x[:5], silo.train.y[:5]))

def thousandfold(silo):
    return replace(silo, train=Examples(silo.train.x * 1000, silo.train.y))

class Named:
    def __init__(self, silo, test):
        self.name, self.train, self.test = silo.name, silo.train, silo.test
        self.train_patients = ["Meier-Lueders"] + [f"a{k}" for k in range(31)]
        self.test_patients = [*test, "Meier-Lueders"]

def patient_twice(silo):
    return Named(silo, [f"b{k}" for k in range(15)])
"""
for_name = "\n{name}_client = {kind}({name})\n"
CLIENT += "".join(
    for_name.format(name=name, kind=kind)
    for kind, names in {
        "changed": "greedy metric infinite shape fails nan",
        "data_of": "unlabelled one_class twice thousandfold patient_twice",
    }.items()
    for name in names.split()
)


def silo_of(name):
    """32 examples to train on, 16 to test with, positive by construction."""
    rng = torch.Generator().manual_seed(0)
    parts = []
    for n in (32, 16):
        y = torch.arange(n) % 2
        parts.append(Examples(torch.rand(n, 1, 16, 16, generator=rng) + 1, y))
    return Silo(name, *parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A federation of three: kits, data, clients, and a run from the coordinator."""
    folder = tmp_path_factory.mktemp("precheck")
    (folder / "client.py").write_text(CLIENT)
    names = [f"Hospital {k}" for k in "ABC"]
    client = f"{folder / 'client.py'}:honest"
    path = provision.write_trial(
        folder / "trial", [silo_of(name) for name in names], client=client
    )
    kits = provision.provision(read_federation(path), folder / "trial")
    torch.manual_seed(0)
    params = small_cnn(2).state_dict()
    limits = Limits(metrics=Limits().metrics | {*METRICS})
    run = Run("first", params, rounds=3, seed=0, settings=SETTINGS, limits=limits)
    asked = job.write_job(run, folder / "jobs", names) / "app" / job.CONFIG
    for name in names:
        kit = kits / site.site_name(name)
        gate.allow(kit, params, metrics=METRICS)
    found = {"folder": folder, "kits": kits, "params": params, "run": run}
    return SimpleNamespace(asked=asked, **found)


@pytest.fixture
def kit(place, tmp_path):
    """Hospital A's kit, to be spoilt."""
    return Path(shutil.copytree(place.kits / "Hospital-A", tmp_path / "kit"))


@contextmanager
def server(kits, *, answer=SETTINGS_FRAME, names=("server.crt", "server.key")):
    """What the engine's server does as far as the pre-check goes; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    startup = kits / "server" / "startup"
    context.load_cert_chain(*(startup / name for name in names))
    context.load_verify_locations(startup / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    def serve():
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(raw, server_side=True) as tls:
                    tls.recv(100)
                    tls.sendall(answer)
            except OSError:
                pass
            finally:
                raw.close()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def set_target(kit, host, port):
    path = kit / "startup" / "fed_client.json"
    found = json.loads(path.read_text())
    found["servers"][0]["service"]["target"] = f"{host}:{port}"
    path.write_text(json.dumps(found))


def look(kit, item):
    """One check of a hospital's kit alone."""
    return precheck._safely(item, precheck_kit.CHECKS["hospital"][item], kit)


def set_client(kit, place, name, **more):
    client = f"{place.folder / 'client.py'}:{name}"
    site.write_site(kit, replace(site.read_site(kit), client=client, **more))


def trial(kit, place, **options):
    """Rows of the agreement and the data, without the kit and the connection."""
    folder = kit.parent / "trial"
    folder.mkdir()
    given = {"ranges": None, "whole": False, "show_errors": False} | options
    run = given.pop("run", place.asked)
    rows = precheck._trial(kit, run, folder, **given)
    shutil.rmtree(folder)
    return {each["item"]: each for each in rows}


def outputs(rows):
    """All that the command can print of some rows."""
    return [
        precheck.as_table(rows),
        precheck.for_coordinator(rows),
        json.dumps(rows),
    ]


needs_sandbox = pytest.mark.skipif(
    sandbox.available_sandbox() == "none", reason="no sandbox here: nothing is trained"
)


# ---- a kit without fault


@needs_sandbox
def test_a_clean_kit_is_ready(kit, place, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()}
    line = precheck.shared_line()
    monkeypatch.setattr(precheck_kit.psutil, "virtual_memory", memory(8))
    with server(place.kits) as port:
        set_target(kit, "localhost", port)
        before[kit / "startup" / "fed_client.json"] = (
            kit / "startup" / "fed_client.json"
        ).read_bytes()
        command = [str(kit), "--run", str(place.asked), "--expect", line]
        code = precheck.main(command)
    table = capsys.readouterr().out
    assert code == 0, table
    assert table.splitlines()[-1].startswith("ready; ")
    assert "NOT OK" not in table and PATIENT not in table
    # 32 and 16 examples, half of each class, as in `silo_of`
    assert "train: {0: 16, 1: 16}; test: {0: 8, 1: 8}" in table
    assert "ok       gate" in table and "ok       connection" in table
    after = {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()}
    assert after == before, "the pre-check has changed the kit"


def test_a_policy_that_answers_questions_is_not_weaker(kit):
    questions.allow_questions(kit)
    assert precheck_kit._policy(kit)[0] is True
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text())
    resources["class_allow_list"].append("theirs.Executor")  # one that nobody knows
    path.write_text(json.dumps(resources))
    assert precheck_kit._policy(kit)[0] is False


@needs_sandbox
def test_without_the_run_it_trains_what_was_agreed_to(kit, place):
    rows = trial(kit, place, run=None)
    assert rows["data"]["ok"] is None, "the function needs the run's settings"
    assert "--run" in rows["data"]["remedy"]
    assert rows["what may leave"]["ok"] is None


@needs_sandbox
def test_a_whole_turn_goes_further_than_a_batch(kit, place):
    """The norm of both is measured by a limit between them."""
    found = {}
    for whole in (False, True):
        folder = kit.parent / f"trial_{whole}"
        folder.mkdir()
        asked = precheck_trial.read_asked(place.asked)
        own = site.read_site(kit)
        precheck_trial.try_out(own, asked, folder, whole=whole)
        update = precheck_data.load_file(folder / "out" / precheck_trial.UPDATE)
        steps = (
            update["body.1.num_batches_tracked"]
            - asked.start["body.1.num_batches_tracked"]
        )
        found[whole] = int(steps)
    # 32 examples in batches of 8
    assert found == {False: 1, True: 4}


# ---- injected defects of the kit


def memory(gib):
    return lambda: SimpleNamespace(available=gib * 2**30)


def new_certificate(kit, place, *, subject="Hospital-A", days=(-1, 300), foreign=False):
    """Replace a kit's certificate and key by ones of another kind."""
    state = next((place.kits.parent / "authority").rglob("cert.json"))
    state = json.loads(state.read_text())
    root = x509.load_pem_x509_certificate(state["root_cert"].encode())
    signer = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    if foreign:
        signer = rsa.generate_private_key(65537, 2048)
    key, now = rsa.generate_private_key(65537, 2048), datetime.now(timezone.utc)
    oids = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME
    own = subject, "Hospital_A"
    names = [x509.NameAttribute(*pair) for pair in zip(oids, own, strict=True)]
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(names))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.TraditionalOpenSSL
    secret = key.private_bytes(pem, form, serialization.NoEncryption())
    (kit / "startup" / "client.crt").write_bytes(made.public_bytes(pem))
    (kit / "startup" / "client.key").write_bytes(secret)


def expired(kit, place):
    new_certificate(kit, place, days=(-300, -2))


def not_yet(kit, place):
    new_certificate(kit, place, days=(2, 300))


def other_authority(kit, place):
    new_certificate(kit, place, foreign=True)


def other_key(kit, place):
    shutil.copy(place.kits / "Hospital-B" / "startup" / "client.key", kit / "startup")


def other_identity(kit, place):
    new_certificate(kit, place, subject="Hospital-B")


def other_silo(kit, place):
    site.write_site(kit, replace(site.read_site(kit), silo="Hospital Z"))


def readable_key(kit, place):
    (kit / "startup" / "client.key").chmod(0o644)


def writable_policy(kit, place):
    (kit / "local" / "egress.json").chmod(0o666)


def soft_policy(kit, place):
    path = kit / "local" / "resources.json"
    found = json.loads(path.read_text())
    found["class_allow_list"].append("nvflare.app_common.executors.Anything")
    path.write_text(json.dumps(found))


def no_gate(kit, place):
    path = kit / "local" / "privacy.json"
    found = json.loads(path.read_text())
    found["scopes"][0]["task_result_filters"] = []
    path.write_text(json.dumps(found))


def damaged_settings(kit, place):
    path = kit / "local" / "site.json"
    path.write_text(path.read_text()[:30])


def old_settings(kit, place):
    path = kit / "local" / "site.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))


def no_data(kit, place):
    data = str(kit.parent / "nothing")
    site.write_site(kit, replace(site.read_site(kit), data=data))


def no_name(kit, place):
    set_target(kit, "server.invalid", 8002)  # RFC 2606: never has an address


def damaged_certificate(kit, place):
    (kit / "startup" / "client.crt").write_text("-----BEGIN CERTIFICATE-----")


def secure_answers(kit, place):
    questions.allow_questions(kit, secure=True)
    site.confirm(kit, {"Hospital A": "00"})


def too_few_confirmed(kit, place):
    questions.allow_questions(kit, secure=True)
    own = secure.fingerprint((kit / "startup" / "client.crt").read_bytes())
    site.confirm(kit, {"Hospital A": own, "Hospital B": "00"})


def nobody_confirmed(kit, place):
    questions.allow_questions(kit, secure=True)
    (kit / "local" / "peers.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("defect", "item", "said", "remedy"),
    [
        (nobody_confirmed, "confirmed certificates", "0 certificates", "site.confirm"),
        (too_few_confirmed, "confirmed certificates", "1 certificates", "telephone"),
        (secure_answers, "confirmed certificates", "is another", "was it renewed?"),
        (expired, "certificate dates", "ended on", "renew it"),
        (not_yet, "certificate dates", "is valid from", "set the clock"),
        (damaged_certificate, "certificate dates", "cannot be read", "renew it"),
        (other_authority, "certificate chain", "not signed by this", "put back"),
        (other_key, "certificate chain", "key is not the one", "put back"),
        (other_identity, "identity", "is of ('Hospital-B'", "use your own kit"),
        (other_silo, "identity", "settings say ('Hospital-Z'", "correct silo"),
        (readable_key, "private key", "other users", "chmod 600"),
        (writable_policy, "policy is protected", "can change it", "chown root"),
        (soft_policy, "policy", "weaker", "harden_site"),
        (no_gate, "policy", "weaker", "harden_site"),
        (damaged_settings, "own settings", "site.json", "copy the kit again"),
        (old_settings, "own settings", "version 1", "copy the kit again"),
        (no_data, "data folder", "there is no", "put the data there"),
        (no_name, "server's name", "has no address", "/etc/hosts"),
        (no_name, "connection", "has no address", "server's name"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_defect_of_the_kit_is_found(kit, place, defect, item, said, remedy):
    if item not in ("server's name", "connection"):
        assert look(kit, item)["ok"] is not False, "it is found without the defect"
    defect(kit, place)
    found = look(kit, item)
    assert found["ok"] is False, found
    assert said in found["found"] and remedy in found["remedy"], found


def test_confirmed_certificates_are_looked_at_for_secure_sums_only(kit):
    questions.allow_questions(kit)
    item = "confirmed certificates"
    (kit / "local" / "peers.json").unlink(missing_ok=True)
    assert look(kit, item)["found"].startswith("not asked for")
    questions.allow_questions(kit, secure=True)
    own = secure.fingerprint((kit / "startup" / "client.crt").read_bytes())
    site.confirm(kit, {"Hospital A": own, "Hospital B": "00", "Hospital C": "11"})
    assert look(kit, item)["found"] == "2 certificates of others, and the own one"
    site.confirm(kit, independent=True)
    assert look(kit, item)["ok"] is True


def test_a_closed_port(kit):
    set_target(kit, "localhost", provision.free_port())
    found = look(kit, "connection")
    assert found["ok"] is False and "nothing listens" in found["found"]
    assert "is the server started?" in found["remedy"]


def test_a_server_that_is_not_the_federations(kit, place, tmp_path):
    """Another authority; then a name that its certificate does not have; then a
    program that speaks TLS and is no server of the engine."""
    federation = read_federation(place.folder / "trial" / "silos.yaml")
    foreign = provision.provision(federation, tmp_path / "foreign")
    with server(foreign) as port:
        set_target(kit, "localhost", port)
        found = look(kit, "connection")
        assert "not of this federation's authority" in found["found"]
        assert "proxy" in found["remedy"]
    with server(place.kits) as port:
        set_target(kit, "127.0.0.1", port)
        found = look(kit, "connection")
        assert "is of another address" in found["found"], found
    with server(place.kits, answer=b"HTTP/1.1 400") as port:
        set_target(kit, "localhost", port)
        found = look(kit, "connection")
        assert found["ok"] is False and "is not the federation's" in found["found"]


def test_the_server_does_not_accept_the_kits_certificate(kit, place):
    expired(kit, place)
    with server(place.kits) as port:
        set_target(kit, "localhost", port)
        found = look(kit, "connection")
    assert found["ok"] is False and "does not accept this kit" in found["found"], found
    assert "Telephone the coordinator" in found["remedy"]


def test_a_server_that_never_answers(kit, monkeypatch):
    monkeypatch.setattr(
        precheck_kit.socket,
        "create_connection",
        lambda *_, **__: (_ for _ in ()).throw(TimeoutError("timed out")),
    )
    found = look(kit, "connection")
    assert found["ok"] is False and "no answer from localhost" in found["found"]
    assert "firewall" in found["remedy"]


def test_a_full_disk_and_little_memory(kit, monkeypatch):
    """A GiB, and 20 models of 30,232 bytes on the disk, 8 in memory."""
    usage = SimpleNamespace(total=10**12, used=10**12, free=2**30)
    monkeypatch.setattr(precheck_kit.shutil, "disk_usage", lambda path: usage)
    found = look(kit, "free disk")
    assert found["ok"] is False and "delete old runs" in found["remedy"]
    usage.free += 10**6
    assert look(kit, "free disk")["ok"] is True
    monkeypatch.setattr(precheck_kit.psutil, "virtual_memory", memory(1))
    assert look(kit, "memory")["ok"] is False
    monkeypatch.setattr(precheck_kit.psutil, "virtual_memory", memory(1.1))
    assert look(kit, "memory")["ok"] is True


def test_data_that_this_user_may_not_read(kit, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        precheck_kit.os,
        "access",
        lambda path, mode: real(path, mode) and Path(path).name != hospital.DATA,
    )
    found = look(kit, "data folder")
    assert found["ok"] is False and "cannot read 1 of its files" in found["found"]
    assert "chmod -R g+rX" in found["remedy"]


def test_another_version_or_other_code(tmp_path, monkeypatch):
    line = precheck.shared_line()
    assert precheck._versions("")["ok"] is None, "nobody has compared it"
    assert precheck._versions(line)["ok"] is True
    code = line.split(" · ")[0]
    for there in (
        line.replace(code, "code 0000-0000-0000"),
        line.replace("python 3", "python 2"),
    ):
        found = precheck._versions(there)
        assert found["ok"] is False and "same version" in found["remedy"]
    monkeypatch.setattr(precheck, "version", lambda name: "2.8.0")
    found = precheck._versions("")
    assert found["ok"] is False and "nvflare must be 2.9.0" in found["found"]


def test_the_version_is_the_one_that_is_installed_by_requirements():
    text = (ROOT / "requirements.txt").read_text()
    assert f"nvflare=={precheck.NVFLARE} " in text


def test_the_code_of_the_line_changes_with_one_character(monkeypatch, tmp_path):
    package = tmp_path / "fl_helpers"
    shutil.copytree(Path(precheck.__file__).parents[2], package)
    copied = package / "cross_silo" / "on_premises" / "precheck.py"
    before = precheck.shared_line()
    monkeypatch.setattr(precheck, "__file__", str(copied))
    assert precheck.shared_line() == before, "the place of the code does not matter"
    (package / "turn.py").write_text("#")
    assert precheck.shared_line() != before


# ---- injected defects of the agreement, the function and the data


def egress_of_another_model(kit, place):
    gate.allow(kit, small_cnn(3).state_dict(), metrics=METRICS)


def egress_that_is_damaged(kit, place):
    (kit / "local" / "egress.json").write_text("{")


def egress_that_is_missing(kit, place):
    (kit / "local" / "egress.json").unlink()


def secure_only(kit, place):
    gate.allow(kit, place.params, metrics=METRICS, secure=True)


@pytest.mark.parametrize(
    ("defect", "said", "remedy"),
    [
        (egress_of_another_model, "2 entries are not those of the run", "agree to the"),
        (egress_that_is_damaged, "egress.json cannot be read", "agree to a model"),
        (egress_that_is_missing, "no model is agreed to", "agree to the model"),
        (secure_only, "the run is a plain one", "ask the coordinator"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_agreement_that_does_not_fit(kit, place, monkeypatch, defect, said, remedy):
    monkeypatch.setattr(precheck, "data_rows", lambda *_, **__: [])
    assert trial(kit, place)["what may leave"]["ok"] is True
    defect(kit, place)
    found = trial(kit, place)["what may leave"]
    assert found["ok"] is False, found
    assert said in found["found"] and remedy in found["remedy"], found


def small_norm(kit, place):
    gate.allow(kit, place.params, metrics=METRICS, max_norm=1e-4)


def fewer_metrics(kit, place):
    gate.allow(kit, place.params)


def other_data(kit, place):
    data = read_federation(place.folder / "trial" / "silos.yaml").silos[1]
    own = replace(site.read_site(kit), data=data.on_premises.data)
    site.write_site(kit, own)


def cut_data(kit, place):
    data = shutil.copytree(site.read_site(kit).data, kit.parent / "data")
    content = (data / hospital.DATA).read_bytes()
    (data / hospital.DATA).write_bytes(content[: len(content) // 2])
    site.write_site(kit, replace(site.read_site(kit), data=str(data)))


def client_is(name):
    def defect(kit, place):
        set_client(kit, place, name)

    defect.__name__ = name
    return defect


def unbooked_budget(kit, place):
    own = site.read_site(kit)
    site.write_site(kit, replace(own, epsilon=3.0, delta=1e-3))


DEFECTS = [
    (unbooked_budget, "one batch", "privacy budget", "private_client"),
    (client_is("nobody"), "client function", "AttributeError", "--show-errors"),
    (client_is("raises"), "data", "RuntimeError (line", "--show-errors"),
    (client_is("named"), "data", "raised an error (line", "--show-errors"),
    (client_is("no_file"), "data", "FileNotFoundError", "may the service's user"),
    (client_is("other_form"), "data", "does not take", "hospital.py"),
    (client_is("no_client"), "data", "returns no `Client`", "hospital.py"),
    (client_is("ends"), "client function", "was ended", "enough memory"),
    (cut_data, "data", "SafetensorError", "--show-errors"),
    (no_data, "data", "FileNotFoundError", "right folder"),
    (other_data, "silo name", "name another silo", "correct `silo` or `data`"),
    (client_is("unlabelled_client"), "labels", "1 of train have no label", "column"),
    (client_is("twice_client"), "patients", "5 examples", "split by patient"),
    (client_is("patient_twice_client"), "patients", "1 patients", "split by patient"),
    (client_is("thousandfold_client"), "units", "1,000 times too large", "convert"),
    (client_is("fails_client"), "one batch", "ValueError (line", "--show-errors"),
    (client_is("infinite_client"), "one batch", "NaN or infinite", "smaller lr"),
    (client_is("greedy_client"), "gate", "nobody agreed to", "return its state"),
    (client_is("metric_client"), "gate", "does not allow", "metrics=[...]"),
    (client_is("shape_client"), "gate", "another shape", "agreed to"),
    (client_is("nan_client"), "gate", "NaN or infinite", "smaller lr"),
    (small_norm, "gate", "further than max_norm", "smaller lr or fewer epochs"),
    (fewer_metrics, "gate", "does not allow", "metrics=[...]"),
]


@needs_sandbox
@pytest.mark.parametrize(
    ("defect", "item", "said", "remedy"),
    DEFECTS,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_defect_of_function_or_data_is_found(kit, place, defect, item, said, remedy):
    """Found with its remedy, alone, and without the patient in any output."""
    agreed = {"brightness": {"column": 0, "low": 0, "high": 3}}  # see `silo_of`
    ranges = kit.parent / "ranges.json"
    ranges.write_text(json.dumps(agreed))
    defect(kit, place)
    rows = trial(kit, place, ranges=ranges)
    found = rows[item]
    assert found["ok"] is False, rows
    assert said in found["found"] and remedy in found["remedy"], found
    wrong = [name for name, each in rows.items() if each["ok"] is False]
    assert wrong == [item], rows
    for text in outputs(list(rows.values())):
        assert PATIENT not in text and "MeierLueders" not in text


# ---- what leaves the machine


@needs_sandbox
def test_texts_of_errors_are_shown_to_the_hospital_only_if_it_asks(
    kit, place, capsys, monkeypatch
):
    monkeypatch.setattr(precheck_kit.psutil, "virtual_memory", memory(8))
    set_client(kit, place, "raises")
    set_target(kit, "localhost", provision.free_port())
    command = [str(kit), "--run", str(place.asked)]
    assert precheck.main([*command, "--for-coordinator"]) == 1
    said = capsys.readouterr()
    assert PATIENT not in said.out + said.err
    assert str(kit) not in said.out and not any(map(str.isdigit, said.out)), said.out
    words = {line.rpartition(": ")[2] for line in said.out.splitlines()}
    assert words == {"ok", "not ok", "not checked"}
    assert precheck.main([*command, "--show-errors"]) == 1
    assert "cannot read the record of Meier-Lueders" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        precheck.main([*command, "--show-errors", "--for-coordinator"])


@needs_sandbox
def test_the_confined_process_cannot_put_words_into_the_answer(kit, place, tmp_path):
    """What the function itself writes as the process's answer is taken for codes."""
    text = f'''
import json, os
from pathlib import Path
def client(data, settings):
    failed = {{"stage": "{PATIENT}", "code": "{PATIENT}", "error": "{PATIENT}"}}
    Path("found.json").write_text(json.dumps({{"failed": failed}}))
    os._exit(0)
'''
    (tmp_path / "own.py").write_text(text)
    own = replace(site.read_site(kit), client=f"{tmp_path / 'own.py'}:client")
    site.write_site(kit, own)
    rows = trial(kit, place)
    assert rows["client function"]["ok"] is False
    assert all(PATIENT not in text for text in outputs(list(rows.values())))


@needs_sandbox
def test_the_function_reaches_neither_key_nor_policy_nor_network(kit, place, tmp_path):
    text = f"""
import socket
from pathlib import Path
from fl_helpers.cross_silo import hospital
def client(data, settings):
    done = []
    for path in ("startup/client.key", "local/egress.json", "ledger.jsonl"):
        try:
            Path({str(kit)!r}, path).read_bytes()
            done.append(path)
        except OSError:
            pass
    try:
        Path({str(kit)!r}, "local/egress.json").write_text("")
        done.append("write")
    except OSError:
        pass
    try:
        socket.create_connection(("localhost", int(settings["port"])))
        done.append("network")
    except OSError:
        pass
    assert not done
    return hospital.client(data, settings)
"""
    (tmp_path / "own.py").write_text(text)
    own = replace(site.read_site(kit), client=f"{tmp_path / 'own.py'}:client")
    site.write_site(kit, own)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        folder = shutil.copytree(place.asked, tmp_path / "asked")
        found = json.loads((folder / job.RUN).read_text())
        found["run"]["settings"]["port"] = port
        (folder / job.RUN).write_text(json.dumps(found))
        rows = trial(kit, place, run=folder)
    assert rows["gate"]["ok"] is True, rows


def test_what_is_no_kit(tmp_path):
    with pytest.raises(ValueError, match="is no start-up kit.*give the folder"):
        precheck.precheck(tmp_path)


def test_the_coordinators_kits(place, tmp_path, monkeypatch):
    monkeypatch.setattr(precheck_kit.psutil, "virtual_memory", memory(8))
    with server(place.kits) as port:
        for name in ("server", "admin"):
            kit = Path(shutil.copytree(place.kits / name, tmp_path / name))
            path = next((kit / "startup").glob("fed_*.json"))
            path.write_text(path.read_text().replace("8002", str(port)))
            rows = precheck.precheck(kit)
            assert not [each for each in rows if each["ok"] is False], rows
    resources = kit.parent / "server" / "local" / "resources.json"
    resources.write_text(resources.read_text().replace("HubGuard", "NoGuard"))
    rows = {each["item"]: each for each in precheck.precheck(kit.parent / "server")}
    assert rows["policy"]["ok"] is False and "harden_server" in rows["policy"]["remedy"]
    assert rows["connection"]["ok"] is None, "before the server is started"


# ---- the page for the hospital's administrator


def blocks(language):
    text = (ROOT / "docs" / "hospital-administrator.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_page_has_two_screens_at_most():
    text = (ROOT / "docs" / "hospital-administrator.md").read_text()
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 800


@needs_sandbox
def test_from_the_kit_to_ready_with_the_page_alone(place, tmp_path, capsys):
    """The page's commands, with other folders and without what only root can do:
    installing, another user and a firewall."""
    here = tmp_path / "fl"
    here.mkdir()
    shutil.copytree(place.kits / "Hospital-A", here / "kit")
    (here / "kit" / "local" / "egress.json").unlink()
    shutil.copytree(place.asked, here / "run")
    shutil.copytree(site.read_site(here / "kit").data, here / "data")
    shutil.copy(hospital.__file__, here / "hospital.py")

    def moved(text):
        text = text.replace("/srv/fl", str(here))
        return text.replace("/opt/fl/hospital.py", str(here / "hospital.py"))

    path = here / "kit" / "local" / "site.json"
    settings = path.read_text()
    for line in moved(blocks("json")[0]).splitlines():
        key = line.split(":")[0]
        settings, changes = re.subn(rf"{key}: .*", line, settings)
        assert changes == 1, line
    path.write_text(settings)
    (script,) = blocks("python")
    exec(compile(moved(script), "agree.py", "exec"), {})
    assert "what may leave: 20 entries of one model" in capsys.readouterr().out

    _, rights, check = blocks("bash")
    rights = re.sub(r"(?m)^chown \S+ \S+ [^&\n]*(&& )?", "", rights)
    assert rights.count("chmod") == 2 and "chown" not in rights
    python = "runuser -u fl -- /opt/fl/venv/bin/python"
    assert python in check
    check = check.replace(python, sys.executable)
    with server(place.kits) as port:
        set_target(here / "kit", "localhost", port)
        done = subprocess.run(
            ["bash", "-ec", moved(rights + check)], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ready"), done.stdout
    assert (here / "kit" / "startup" / "client.key").stat().st_mode & 0o077 == 0


def test_the_page_and_the_command_name_the_same_options():
    text = (ROOT / "docs" / "hospital-administrator.md").read_text()
    rows = {
        line.split("`")[1].split()[0] for line in re.findall(r"(?m)^\| `--.*", text)
    }
    source = Path(precheck.__file__).read_text()
    assert rows | {"--run"} == set(
        re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source)
    )
