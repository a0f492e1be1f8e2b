"""The image: what is in it, who runs in it, and that it can be built."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE = ROOT / "deploy" / "Containerfile"
LEFT_OUT = ["jupyterlab", "ipykernel", "papermill", "nbformat", "matplotlib"]
LEFT_OUT += ["azure-ai-ml", "azure-identity"]  # what a hospital does not need
MODULES = "executor gate guards precheck questions secure_questions trainer worker"


def test_the_base_is_pinned_and_nothing_compiles_or_stays_root():
    text = FILE.read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    words = [line.split(maxsplit=1) for line in lines if line[:1] not in ("", "#")]
    base = dict(words)["ARG"]
    assert re.fullmatch(r"BASE=\S+/python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert [rest for first, rest in words if first == "FROM"] == ["${BASE}"]
    assert "--only-binary :all:" in text and "apt-get" not in text
    assert dict(words)["USER"] == "10001:10001"
    last = [first for first, _ in words][-3:]
    assert last == ["USER", "WORKDIR", "ENTRYPOINT"]
    sources = [rest.split()[:-1] for first, rest in words if first == "COPY"]
    assert sources == [["requirements.txt"], ["fl_helpers"]]  # no kit, no data


def left_out():
    (pattern,) = re.findall(r"grep -vE '(.*?)'", FILE.read_text())
    names = re.findall(r"(?m)^([\w-]+)[<>=]", (ROOT / "requirements.txt").read_text())
    return [name for name in names if re.match(pattern, name)]


def test_a_hospital_needs_none_of_what_the_image_leaves_out():
    assert {*LEFT_OUT} < {*left_out()}
    blocked = [name.partition("-")[0] for name in left_out()]
    modules = [f"fl_helpers.cross_silo.on_premises.{name}" for name in MODULES.split()]
    modules += [f"fl_helpers.cross_silo.hospital{end}" for end in ("", "_images")]
    modules += ["fl_helpers.cross_silo.hospital_tables", "fl_helpers.privacy"]
    modules += ["nvflare.private.fed.app.client.client_train"]
    modules += ["nvflare.private.fed.app.client.worker_process"]
    # Others' packages may look for Jinja2, which torch brings; ours must not.
    blocked.remove("Jinja2")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    code += "\n".join(f"import {name}" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
