"""A silo's `prepare` function that tries to get out, and to talk. See test_azure_local.

It is copied into the code snapshot, as a user's own file is.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def prepare(data, target, settings):
    """Try everything that settings name; write what worked into the own store."""
    other, pid = Path(settings["other"]), settings["pid"]
    name, port = settings["socket"], settings["port"]
    secret = other / "data.safetensors"

    def link():
        (target / "link").symlink_to(secret)
        return (target / "link").read_bytes()

    def connect(family, address):
        with socket.socket(family) as client:
            client.connect(address)

    attempts = {
        "read own": lambda: (data / "data.safetensors").read_bytes(),
        "read other": secret.read_bytes,
        "list other": lambda: os.listdir(other),
        "by a link": link,
        "by a hard link": lambda: os.link(secret, target / "hard"),
        "by a child": lambda: subprocess.run(["cat", secret], check=True),
        "environment of another process": lambda: Path(
            f"/proc/{pid}/environ"
        ).read_bytes(),
        "root of another process": lambda: os.listdir(f"/proc/{pid}/root{other}"),
        "memory of another process": lambda: open(f"/proc/{pid}/mem", "rb"),
        "socket of another process": lambda: connect(socket.AF_UNIX, "\0" + name),
        "port of another process": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
        "write own data": lambda: (data / "x").write_text("x"),
        "write into the code": lambda: Path(__file__).with_name("x").write_text("x"),
        "write beside": lambda: (target.parent.parent / "x").write_text("x"),
    }
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except (OSError, subprocess.CalledProcessError):
            pass
    (target / "done.json").write_text(json.dumps(done))


def talk(data, target, settings):
    """Say a patient's name in every way there is, then fail with it."""
    print("patient_4711")
    print("patient_4711", file=sys.stderr)
    os.write(1, b"patient_4711")
    subprocess.run(["echo", "patient_4711"], check=True)
    Path("outputs").mkdir()
    Path("outputs/patient_4711").write_text("patient_4711")
    raise ValueError("cannot read patient_4711.dcm")


def wait(data, target, settings):
    """Sleep, in a child too."""
    (target / "started").write_text("x")
    subprocess.run(["sleep", "60.25"], check=True)
