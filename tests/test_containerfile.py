"""The image: what is in it, who runs in it, and that it can be built."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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


@pytest.fixture
def podman(tmp_path):
    """podman(words): what it says; its images are gone afterwards."""
    with tempfile.TemporaryDirectory() as run:  # it takes 50 characters at most

        def podman(*words):
            own = ["--root", tmp_path / "images", "--runroot", run]
            command = [*map(str, ["podman", *own, "--storage-driver", "vfs", *words])]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout.strip()

        yield podman


@pytest.fixture
def base(podman, tmp_path):
    """An empty image in the place of the one that a registry has: the system and Python
    are this machine's own, mounted while the image is built."""
    root = tmp_path / "base"
    for name in "dev etc opt proc root run srv sys tmp usr var".split():
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    subprocess.run(["tar", "-C", root, "-cf", tmp_path / "base.tar", "."], check=True)
    path = f"ENV PATH={Path(sys.executable).parent}:/usr/sbin:/usr/bin"
    podman("import", "--change", path, tmp_path / "base.tar", "fl-base")


@pytest.mark.skipif(
    not shutil.which("podman") or os.geteuid() != 0,
    reason="needs podman, as root: that the image can be built is NOT tested",
)
def test_it_can_be_built_and_what_is_in_it_belongs_to_root(base, podman, tmp_path):
    context = tmp_path / "context"
    left_behind = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fl_helpers", context / "fl_helpers", ignore=left_behind)
    # One that is there, and one that does not exist and must have been left out.
    (context / "requirements.txt").write_text("pip>=1\njupyterlab==0.0.0\n")
    mounted = dict.fromkeys(["/usr", sys.base_prefix, sys.prefix])
    volumes = [word for at in mounted for word in ("--volume", f"{at}:{at}:ro")]
    podman(
        "build", "--isolation", "chroot", "--network", "host", "--no-cache",
        "--build-arg", "BASE=localhost/fl-base", *volumes, "--file", FILE,
        "--tag", "fl-hospital", context,
    )  # fmt: skip
    (image,) = json.loads(podman("image", "inspect", "fl-hospital"))
    assert image["User"] == "10001:10001"
    assert image["Config"]["WorkingDir"] == "/srv/fl/kit"
    start = ["bash", "/srv/fl/kit/startup/sub_start.sh", "--once"]
    assert image["Config"]["Entrypoint"] == start
    root = Path(podman("image", "mount", "fl-hospital"))
    assert (root / "opt/fl/hospital.txt").read_text() == "pip>=1\n"
    assert ":10001:10001:" in (root / "etc/passwd").read_text()
    code = root / "opt/fl/code/fl_helpers"
    assert len([*code.rglob("*.py")]) == len([*(ROOT / "fl_helpers").rglob("*.py")])
    assert (code / "cross_silo/__pycache__").is_dir()
    for path in root.rglob("*"):
        if not path.is_symlink() and path != root / "tmp":
            found = path.stat()
            assert found.st_uid == 0 and not found.st_mode & 0o022, path
