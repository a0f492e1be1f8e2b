"""Server and hospitals on machines of their own, as far as one machine can show it.

Each has a network namespace, a cable to the server, and a firewall that lets out one
connection: to the server's port. The kits are made as `docs/on-premises.md` says, so
that no private key leaves the folder it was made in.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import sandbox, secure
from fl_helpers.cross_silo.on_premises import executor, gate, runs
from fl_helpers.cross_silo.on_premises.secure_site import identity_of
from fl_helpers.cross_silo.on_premises.site import (
    Site,
    confirm,
    harden_server,
    harden_site,
    read_site,
)
from fl_helpers.simulation import run_rounds
from fl_helpers.training import ClientFunctions

from . import coordinator, hospital
from .conftest import METRICS, SIZES

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
PROJECT, HOST, PORT, ADDRESS = "trial", "fl.coordinator.example", 8002, "10.77.0.1"
ADMIN = "admin@coordinator.org"
SILOS = list(SIZES)[:2]
PROFILE = f"""\
name: {PROJECT}
scheme: grpc
connection_security: mtls
server: {{host: {HOST}, fed_learn_port: {PORT}, admin_port: {PORT}}}
"""
PARTICIPANTS = {  # folder: who, what, of which organisation, and more
    "server": [HOST, "server", "coordinator", {"fed_learn_port": PORT}],
    "admin": [ADMIN, "admin", "coordinator", {"role": "lead"}],
    "hospital_0": ["Hospital-A", "client", "h0", {}],
    "hospital_1": ["Hospital-B", "client", "h1", {}],
}


def nvflare(folder, *words):
    """Run the `nvflare` command in a folder, which is its home, too."""
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", *words],
        cwd=folder, env=os.environ | {"HOME": str(folder)}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def well(folder, *words):
    code, said = nvflare(folder, *words)
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder per participant, with a kit in `kit/`; only zip files were exchanged."""
    world = tmp_path_factory.mktemp("world")
    authority = world / "authority"
    authority.mkdir()
    (authority / "profile.yaml").write_text(PROFILE)
    profile = ["--profile", "profile.yaml"]
    said = well(authority, "cert", "init", *profile, "-o", "ca")
    told = re.search(r"SHA256:[0-9A-F:]{95}", said).group()  # by telephone
    for where, (name, kind, organisation, more) in PARTICIPANTS.items():
        own = world / where
        own.mkdir()
        entry = {"name": name, "type": kind, "org": organisation, **more}
        (own / "me.yaml").write_text(
            json.dumps({"name": PROJECT, "participants": [entry]})
        )
        well(own, "cert", "request", "--participant", "me.yaml", "--out", "request")
        shutil.copy(own / "request" / f"{name}.request.zip", authority)
        approve = ["cert", "approve", f"{name}.request.zip", "--ca-dir", "ca"]
        well(authority, *approve, *profile, "--out", f"{name}.signed.zip")
        shutil.copy(authority / f"{name}.signed.zip", own)
        package = ["package", f"{name}.signed.zip", "--request-dir", "request"]
        if where == "hospital_0":
            other = told[:-2] + f"{int(told[-2:], 16) ^ 1:02X}"
            code, said = nvflare(own, *package, "--fingerprint", other)
            assert code != 0 and "ingerprint" in said, said
            assert not (own / "workspace").exists()
        well(own, *package, "--fingerprint", told)
        (own / "workspace" / PROJECT / "prod_00" / name).rename(own / "kit")
    return world


@pytest.fixture(scope="module")
def hardened(world, silos_yaml, params):
    """The same, with our policy in the kits; each hospital writes its own."""
    harden_server(world / "server" / "kit", admin_role="lead")
    client = f"{hospital.__file__}:client"
    for number, silo in enumerate(SILOS):
        kit = world / f"hospital_{number}" / "kit"
        data = silos_yaml.parent / "data" / f"hospital_{number}"
        own = Site(silo, f"h{number}", str(data), client)
        harden_site(kit, own, admin_role="lead")
        gate.allow(kit, params, metrics=METRICS)
    return world


def test_certificates_of_way_b_sign_and_verify_the_keys_of_secure_runs(
    hardened, tmp_path
):
    kits = [hardened / f"hospital_{number}" / "kit" for number in (0, 1)]
    three = [*SILOS, "Hospital C"]
    a = secure.Member(tmp_path, SILOS[0], "run", three, identity_of(kits[0]))
    with pytest.raises(secure.Denied, match="'Hospital A' is not confirmed here"):
        secure.read_hello(a.hello(), SILOS[0], a.said, identity_of(kits[1]))
    told = secure.fingerprint((kits[0] / "startup" / "client.crt").read_bytes())
    for how in ({"independent": True}, {"fingerprints": {SILOS[0]: told}}):
        confirm(kits[1], **how)
        key = secure.read_hello(a.hello(), SILOS[0], a.said, identity_of(kits[1]))
        assert key == a.key.public_key().public_bytes_raw()


def private_keys(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if b"PRIVATE KEY" in path.read_bytes()]


def test_a_private_key_stays_where_it_was_made(world):
    keys = {}
    for where in ("authority", *PARTICIPANTS):
        found = private_keys(world / where)
        assert found and all(p.stat().st_mode & 0o777 == 0o600 for p in found), found
        keys[where] = {path.read_bytes() for path in found}
        assert len(keys[where]) == 1, found
    assert len(set.union(*keys.values())) == len(keys)
    sent = [*world.rglob("*.zip")]
    assert len(sent) == 4 * len(PARTICIPANTS)  # two kinds, at both ends
    for path in sent:
        folder = path.with_suffix(".content")
        shutil.unpack_archive(path, folder)
        assert any(folder.iterdir()) and not private_keys(folder)
        shutil.rmtree(folder)


def test_such_a_kit_takes_our_policy(hardened):
    kit = hardened / "hospital_0" / "kit"
    assert read_site(kit).name == "Hospital-A"
    assert "0.weight" in gate.read_policy(kit)[0]
    found = json.loads((kit / "local" / "resources.json").read_text())
    assert found["class_allow_list"] == [
        f"{executor.__name__}.{executor.SiteExecutor.__name__}"
    ]
    roles = json.loads((kit / "local" / "authorization.json").read_text())
    roles = roles["permissions"]
    assert roles["lead"]["submit_job"] == "any" and roles["lead"]["byoc"] == "none"
    assert roles["project_admin"] == roles["member"] == {"view": "any"}
    with pytest.raises(ValueError, match="admin_role must be one of"):
        harden_site(kit, read_site(kit), admin_role="root")


# ---- machines of their own


def can_make_networks():
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    probe = ["ip", "netns", "add", f"fl-{os.getpid()}-probe"]
    if subprocess.run(probe, capture_output=True).returncode:
        return False
    subprocess.run([*probe[:2], "del", probe[3]], check=True)
    return True


needs_networks = pytest.mark.skipif(
    not can_make_networks(), reason="needs root and `ip netns`, on Linux"
)


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def inside(space, *command):
    return ["ip", "netns", "exec", space, *map(str, command)]


@pytest.fixture(scope="module")
def network():
    """Namespaces of the server and of two hospitals; gone afterwards, with all in them.

    Each hospital has a cable to the server and sends everything there; the server
    forwards nothing.
    """
    remove_networks()
    spaces = {w: f"fl-{os.getpid()}-{w}" for w in PARTICIPANTS if w != "admin"}
    server = spaces["server"]
    try:
        for space in spaces.values():
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            etc = Path("/etc/netns", space)
            etc.mkdir(parents=True)
            names = f"127.0.0.1 localhost\n{ADDRESS} {HOST}\n"
            (etc / "hosts").write_text(names)
        ip("-n", server, "addr", "add", f"{ADDRESS}/32", "dev", "lo")
        for number, space in enumerate([*spaces.values()][1:], start=1):
            link, here = f"down{number}", f"10.77.{number}"
            peer = ["type", "veth", "peer", "name", "cable", "netns", space]
            ip("-n", server, "link", "add", link, *peer)
            for end, name, host in ((server, link, 1), (space, "cable", 2)):
                ip("-n", end, "addr", "add", f"{here}.{host}/30", "dev", name)
                ip("-n", end, "link", "set", "dev", name, "up")
            ip("-n", space, "route", "add", "default", "via", f"{here}.1")
        yield spaces
    finally:
        remove_networks()


def remove_networks():
    """Those of this process, and of processes that are gone."""
    for space in re.findall(r"(?m)^fl-\d+-\w+", ip("netns", "list")):
        owner = int(space.split("-")[1])
        if owner != os.getpid() and psutil.pid_exists(owner):
            continue
        for pid in ip("netns", "pids", space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", space)
        shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)
    with contextlib.suppress(OSError):
        Path("/etc/netns").rmdir()  # if nobody else has one


@pytest.fixture(scope="module")
def firewall(network):
    """What `docs/on-premises.md` tells each side, or the same with routing rules."""
    if shutil.which("nft"):
        text = (ROOT / "docs" / "on-premises.md").read_text()
        hospital_rules, server_rules = re.findall(r"```nft\n(.*?)```", text, re.DOTALL)
        for where, space in network.items():
            rules = server_rules if where == "server" else hospital_rules
            rules = re.sub(r"(define server = )\S+", rf"\g<1>{ADDRESS}", rules)
            rules = re.sub(r"(define hospitals = ).*", r"\g<1>{ 10.77.0.0/16 }", rules)
            load = inside(space, "nft", "-f", "-")
            subprocess.run(load, input=rules, text=True, check=True, timeout=20)
        return "nft"
    for where, space in network.items():
        to = [] if where == "server" else ["to", ADDRESS]
        port = "sport" if where == "server" else "dport"
        rule = ["-n", space, "rule", "add", "pref"]
        ip(*rule, "100", *to, "ipproto", "tcp", port, str(PORT), "lookup", "main")
        ip(*rule, "200", "prohibit")
    return "ip rule"


@needs_networks
def test_nobody_reaches_anything_but_the_servers_port(network, firewall):
    a, b, server = (network[w] for w in ("hospital_0", "hospital_1", "server"))
    doors = [listen(server, PORT), listen(server, 8003), listen(b, PORT)]
    try:
        for space, address in ((a, HOST), (b, HOST), (server, "localhost")):
            assert reaches(space, address, PORT), (space, address)
        assert reaches(server, "localhost", 8003) and reaches(b, "localhost", PORT)
        for space, address, port in (
            (a, HOST, 8003),
            (a, "10.77.1.1", 8003),  # the server's end of the cable
            (a, "10.77.2.2", PORT),  # the other hospital
            (server, "10.77.2.2", PORT),
        ):
            assert not reaches(space, address, port), (space, address, port)
    finally:
        for door in doors:
            door.kill()
            door.wait(10)


def listen(space, port):
    """Somebody who listens on all addresses there."""
    code = f"""
import socket
door = socket.create_server(("", {port}), backlog=9)
print("open", flush=True)
while True:
    door.accept()[0].close()
"""
    door = subprocess.Popen(
        inside(space, sys.executable, "-c", code), stdout=subprocess.PIPE, text=True
    )
    assert door.stdout.readline() == "open\n"
    door.stdout.close()
    return door


def reaches(space, address, port):
    code = f"import socket; socket.create_connection(({address!r}, {port}), timeout=2)"
    done = subprocess.run(
        inside(space, sys.executable, "-c", code), capture_output=True, text=True,
        timeout=20,
    )  # fmt: skip
    errors = ("timed out", "unreachable", "Permission denied", "refused")
    assert done.returncode == 0 or any(e in done.stderr for e in errors), done.stderr
    return done.returncode == 0


@pytest.fixture
def processes(hardened, network, firewall, silos_yaml):
    """The server and both hospitals, each on its own machine, confined to its kit."""
    code = hardened / "code"
    code.mkdir()
    (code / "fl_helpers").symlink_to(ROOT / "fl_helpers")
    started = {}
    for where, space in network.items():
        kit, read = hardened / where / "kit", [code]
        if where != "server":
            read += [read_site(kit).data, hospital.__file__]
        command = [str(kit / "startup" / "sub_start.sh"), "--once"]
        (kit / "tmp").mkdir()
        own = {"HOME": str(kit), "TMPDIR": str(kit / "tmp"), "PYTHONPATH": str(code)}
        own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (hardened / f"{where}.log").open("wb") as log:
            started[where] = subprocess.Popen(
                inside(space, *sandbox.sandboxed(command, read=read, write=[kit])),
                cwd=kit, env=os.environ | own | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.wait(10)


@needs_networks
@pytest.mark.filterwarnings("ignore:NO SANDBOX")
def test_a_run_equals_the_simulation(world, network, processes, silos):
    kit = world / "server" / "kit"
    words = [ADMIN, world / "admin" / "kit", kit, *SILOS]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        inside(network["server"], sys.executable, "-m", coordinator.__name__, *words),
        cwd=ROOT / "tests", env=os.environ | environment, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    logs = "\n".join(
        "\n".join((world / f"{w}.log").read_text().splitlines()[-8:]) for w in processes
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + logs
    events = [json.loads(line) for line in done.stdout.splitlines() if line[0] == "{"]
    assert events[-1]["event"] == "done"
    run = coordinator.new_run()
    expected = run_rounds(
        run.params, silos[:2], ClientFunctions(*hospital.functions({})),
        weighted_average, rounds=run.rounds, seed=run.seed,
    )  # fmt: skip
    found = runs.result(run, kit)
    assert list(found) == list(expected.params)
    for name, value in expected.params.items():
        assert found[name].dtype == value.dtype and found[name].equal(value), name
    check_listeners(network)


def check_listeners(network):
    """The hospitals listen to themselves only, the server to others on one port."""
    for where, space in network.items():
        listeners = subprocess.run(
            inside(space, "ss", "-Htln"), capture_output=True, text=True, check=True
        )
        found = [line.split()[3] for line in listeners.stdout.splitlines()]
        own = re.compile(r"(\[(::ffff:)?127\.0\.0\.1\]|127\.0\.0\.1|\[::1\]):")
        ports = {at.rpartition(":")[2] for at in found if not own.match(at)}
        assert found and ports == ({str(PORT)} if where == "server" else set()), found
