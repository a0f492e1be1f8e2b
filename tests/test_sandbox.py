"""Ways out of the sandbox that must be closed, and the control: without it they are
open."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fl_helpers.cross_silo import sandbox

KINDS = ("bubblewrap", "landlock")

ATTEMPTS = """
import json, os, subprocess, sys
from pathlib import Path
own, kit, other, outside = (Path(arg) for arg in sys.argv[1:4] + sys.argv[4:5])
pid = sys.argv[5]

def link():
    (kit / "link").symlink_to(other / "x")
    return (kit / "link").read_text()

def name():
    if "other" not in os.listdir(other.parent):
        raise PermissionError

def child():
    code = f"print(open({str(other / 'x')!r}).read())"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

attempts = {
    "read own": lambda: (own / "x").read_text(),
    "write own kit": lambda: (kit / "y").write_text("y"),
    "read other": lambda: (other / "x").read_text(),
    "list other": lambda: os.listdir(other),
    "name of other": name,
    "by a link": link,
    "hard link": lambda: os.link(other / "x", kit / "z"),
    "by a child": child,
    "write own data": lambda: (own / "y").write_text("y"),
    "write outside": lambda: (outside / "y").write_text("y"),
    "environment of another process": lambda: Path(f"/proc/{pid}/environ").read_text(),
    "root of another process": lambda: os.listdir(f"/proc/{pid}/root{other}"),
    "memory of another process": lambda: open(f"/proc/{pid}/mem", "rb"),
    "open files of another process": lambda: os.readlink(f"/proc/{pid}/fd/0"),
    "signal another process": lambda: os.kill(int(pid), 0),
    "be root of a new namespace": lambda: subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "cat", other / "x"],
        check=True, capture_output=True),
    "home": lambda: os.listdir(os.path.expanduser("~")),
}
done = []
for name, attempt in attempts.items():
    try:
        attempt()
        done.append(name)
    except (OSError, subprocess.CalledProcessError):
        pass
print(json.dumps(done))
"""


@pytest.fixture
def folders(tmp_path):
    found = [tmp_path / name for name in ("own", "kit", "other", "outside")]
    for folder in found:
        folder.mkdir()
        (folder / "x").write_text("patients")
    return found


def attempt(folders, kind):
    own, kit, *_ = folders
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=-1)
    try:
        command = [sys.executable, "-c", ATTEMPTS, *map(str, folders)]
        command = sandbox.sandboxed(
            [*command, str(stranger.pid)], read=[own], write=[kit], kind=kind
        )
        environment = os.environ | {"HOME": str(folders[3])}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment
        )
    finally:
        stranger.communicate(b"\n", timeout=10)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_own_kit_and_data_are_seen(folders, kind):
    if not sandbox.works(kind):
        pytest.skip(f"{kind} does not work on this machine: isolation is NOT tested")
    assert attempt(folders, kind) == ["read own", "write own kit"]


def test_without_a_sandbox_all_of_it_is_open_and_a_warning_says_so(folders):
    with pytest.warns(UserWarning, match="NO SANDBOX.*can read the others' files"):
        done = attempt(folders, "none")
    assert {"read other", "by a child", "by a link", "write outside"} <= set(done)


NETWORK = """
import socket, sys
for family, address in ((socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))),
                        (socket.AF_UNIX, "\\0" + sys.argv[2])):
    try:
        socket.socket(family).connect(address)
        print("connected")
    except OSError:
        print("not")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_without_network_nobody_is_reached(tmp_path, kind):
    if not sandbox.works(kind):
        pytest.skip(f"{kind} does not work on this machine: isolation is NOT tested")
    if kind == "landlock" and sandbox._landlock_version() < 6:
        pytest.skip("this Landlock confines neither TCP nor sockets: NOT tested")
    name = f"fl-test-{os.getpid()}"  # of a socket without a file
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as other,
    ):
        other.bind(f"\0{name}")
        other.listen()
        code = [sys.executable, "-c", NETWORK, str(server.getsockname()[1]), name]
        for network, expected in ((True, "connected"), (False, "not")):
            done = subprocess.run(
                sandbox.sandboxed(
                    code, read=[], write=[tmp_path], kind=kind, network=network
                ),
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.stdout.split()[0] == expected, done.stderr
    assert done.stdout.split() == ["not", "not"]


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be .* got 'chroot'"):
        sandbox.sandboxed(["true"], read=[], write=[], kind="chroot")


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_ends_when_its_parent_is_killed(tmp_path, kind):
    if not sandbox.works(kind):
        pytest.skip(f"{kind} does not work on this machine: isolation is NOT tested")
    import psutil

    code = f"""
import subprocess, sys, time
from fl_helpers.cross_silo import sandbox
child = [sys.executable, "-c", "import time; time.sleep(61.5)"]
subprocess.Popen(sandbox.sandboxed(child, read=[], write=[{str(tmp_path)!r}],
                                   kind={kind!r}))
time.sleep(60)
"""

    def children():
        return [
            p
            for p in psutil.process_iter(["cmdline"])
            if (p.info["cmdline"] or [""])[-1] == "import time; time.sleep(61.5)"
            and p.info["cmdline"][1] == "-c"
        ]

    from engines.conftest import wait_until

    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(children, 30, "the confined process starts")
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not children(), 10, "the confined process ends")


def test_a_process_whose_parent_has_gone_does_not_start():
    plan = {"kind": "none", "read": [], "write": [], "parent": 1, "network": True}
    command = [sys.executable, "-m", sandbox.__name__, json.dumps(plan), "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "has gone" in done.stderr


def test_it_can_be_copied_alone(tmp_path):
    (tmp_path / "sandbox.py").write_text(Path(sandbox.__file__).read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import sandbox; print(sandbox.available_sandbox())"],
        cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.stdout.strip() == sandbox.available_sandbox(), done.stderr
