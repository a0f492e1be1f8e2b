"""What a cluster's node makes of the shipped pod, as an OCI bundle for `runc`.

The settings are read from `deploy/kubernetes.yaml`, so a run in the bundle says that
they let a hospital work. No image is needed: Python and this package are this machine's
own, read-only.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fl_helpers.cross_silo.on_premises.site import read_site, write_site

ROOT = Path(__file__).parents[2]
DEFAULT_SECCOMP = Path("/usr/share/containers/seccomp.json")  # Debian's, of podman
SIZES = {"Mi": 2**20, "Gi": 2**30}
MACHINES = {"x86_64": ("SCMP_ARCH_X86_64", "amd64")}  # its names in the profile
MACHINES |= {"aarch64": ("SCMP_ARCH_AARCH64", "arm64")}

needs_runc = pytest.mark.skipif(
    not shutil.which("runc") or not DEFAULT_SECCOMP.exists() or os.geteuid() != 0,
    reason="needs runc and podman's seccomp profile, as root: containers NOT tested",
)


def shipped_pod():
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    (found,) = [d for d in documents if d["kind"] == "StatefulSet"]
    return found["spec"]["template"]["spec"]


def size(text):
    return int(text[:-2]) * SIZES[text[-2:]]


def as_mounted(source, target):
    """Copy a folder as a cluster mounts a Secret or a ConfigMap: links to a version."""
    version = target / "..2026_11_29"
    version.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, version)
            (target / path.name).symlink_to(f"..data/{path.name}")
    (target / "..data").symlink_to(version.name)
    return target


def seccomp():
    """The default profile for a process without any capability."""
    found = json.loads(DEFAULT_SECCOMP.read_text())
    machine, short = MACHINES[os.uname().machine]
    rules = []
    for rule in found["syscalls"]:
        needed, spared = rule.get("includes") or {}, rule.get("excludes") or {}
        here = not needed.get("arches") or short in needed["arches"]
        if here and not needed.get("caps") and not spared.get("arches"):
            keys = ("names", "action", "args", "errnoRet")
            rules.append({k: rule[k] for k in keys if rule.get(k) is not None})
    return {
        "defaultAction": found["defaultAction"],
        "defaultErrnoRet": found["defaultErrnoRet"],
        "architectures": [machine],
        "syscalls": rules,
    }


def write_bundle(folder, volumes, command, *, network=None):
    """Write `config.json` and an empty root; volumes: {name: folder of this machine}.

    network: path of a network namespace; None is one of its own, with nothing in it.
    """
    pod = shipped_pod()
    (box,) = pod["containers"]
    own, all_of_it = box["securityContext"], pod["securityContext"]
    subprocess.run(["runc", "spec", "--bundle", folder], check=True)
    root = make_root(folder)
    hosts = [f"{a['ip']} {' '.join(a['hostnames'])}" for a in pod["hostAliases"]]
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(hosts))
    config = json.loads((folder / "config.json").read_text())
    config["root"]["readonly"] = own["readOnlyRootFilesystem"]
    config["process"] |= {
        "terminal": False,
        "args": [str(word) for word in command],
        "cwd": "/srv/fl/kit",
        "env": environment(),
        "user": {
            "uid": all_of_it["runAsUser"],
            "gid": all_of_it["runAsGroup"],
            "additionalGids": [all_of_it["fsGroup"]],
        },
        "noNewPrivileges": not own["allowPrivilegeEscalation"],
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}],
    }
    if own["capabilities"]["drop"] == ["ALL"]:
        config["process"]["capabilities"] = {}
    linux = config["linux"]
    if all_of_it["seccompProfile"]["type"] == "RuntimeDefault":
        linux["seccomp"] = seccomp()
    linux["resources"]["memory"] = {"limit": size(box["resources"]["limits"]["memory"])}
    linux["resources"]["pids"] = {"limit": 2048}
    for space in linux["namespaces"]:
        if space["type"] == "network" and network:
            space["path"] = network
    config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/dev/shm"]
    config["mounts"] += [*machine_mounts(), *pod_mounts(pod, box, volumes)]
    (folder / "config.json").write_text(json.dumps(config))


def make_root(folder):
    """An empty root file system, for what is mounted into it."""
    root = folder / "rootfs"
    (root / "etc").mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    return root


def podman_line(folder, volumes, command):
    """The guide's `podman run` in the foreground, with this machine's Python for an
    image and no network at all."""
    text = (ROOT / "docs" / "on-premises.md").read_text()
    (said,) = re.findall(r"```bash\n(podman run .*?)```", text, re.DOTALL)
    options = said.partition("podman run ")[2].partition("registry.")[0]
    (box,) = shipped_pod()["containers"]
    places = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
    line = ["podman", "--root", folder / "images", "--runroot", folder / "run"]
    line += ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]
    line += ["--runtime", "runc", "run", "--rm"]
    for kind in ("nofile", "nproc"):  # its own default is above what this machine has
        line += ["--ulimit", f"{kind}=4096:4096"]
    words = iter(shlex.split(options.replace("\\\n", " ")))
    for word in words:
        if word in ("--detach", "--init"):  # --init needs one more package
            continue
        value = next(words) if word != "--read-only" else None
        if word == "--volume":
            _, target, *how = value.split(":")
            value = ":".join([str(volumes[places[target]]), target, *how])
        elif word == "--network":
            value = "none"
        if word not in ("--name", "--restart"):
            line += [word, value] if value else [word]
    for mount in machine_mounts():
        line += ["--volume", f"{mount['source']}:{mount['destination']}:ro"]
    for setting in environment():
        line += ["--env", setting]
    line += ["--workdir", "/srv/fl/kit", "--rootfs", make_root(folder)]
    return [str(word) for word in [*line, *command]]


def containerfile(word):
    """What the only line of `deploy/Containerfile` says that begins with this word."""
    text = (ROOT / "deploy" / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line]
    (found,) = [rest for first, *rest in lines if first == word]
    return found[0]


ENTRYPOINT = json.loads(containerfile("ENTRYPOINT"))


def environment():
    """Of the image, with this machine's Python."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return [*containerfile("ENV").split(), f"PATH={path}"]


def bind(source, target, *, write=False):
    how = ["rbind", "nosuid", "nodev", "rw" if write else "ro"]
    pair = {"source": str(source), "destination": str(target)}
    return {"type": "bind", "options": how, **pair}


def machine_mounts():
    """Python and this package, in the place of an image; no bubblewrap, as in there."""
    found = [bind("/usr", "/usr")]
    if Path("/usr/bin/bwrap").exists():
        found.append(bind("/dev/null", "/usr/bin/bwrap"))
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        if not Path(prefix).is_relative_to("/usr"):
            found.append(bind(prefix, prefix))
    return [*found, bind(ROOT / "fl_helpers", "/opt/fl/code/fl_helpers")]


def pod_mounts(pod, box, volumes):
    empty = {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v}
    for mount in box["volumeMounts"]:
        name, target = mount["name"], mount["mountPath"]
        if name in empty:
            how = ["nosuid", "nodev", "mode=1777"]
            how.append(f"size={size(empty[name]['sizeLimit'])}")
            kind = {"type": "tmpfs", "source": "tmpfs", "options": how}
            yield {"destination": target, **kind}
        else:
            yield bind(volumes[name], target, write=not mount.get("readOnly"))


def volumes_of(kit, data, client, folder):
    """The pod's volumes, from a kit, data and a hospital's file as they lie here."""
    own = {"data": "/srv/fl/data", "client": "/opt/fl/client/hospital.py:client"}
    write_site(kit, type(found := read_site(kit))(**vars(found) | own))
    found = {"kit": folder / "kit", "data": folder / "data"}
    (folder / "code").mkdir()
    (folder / "code" / "hospital.py").write_text(client)
    found["kit"].mkdir()
    shutil.copytree(data, found["data"])
    for name, source in (
        ("startup", kit / "startup"), ("local", kit / "local"),
        ("client", folder / "code"),
    ):  # fmt: skip
        found[name] = as_mounted(source, folder / name)
    user = shipped_pod()["securityContext"]
    shutil.chown(found["kit"], user["runAsUser"], user["runAsGroup"])
    for name in ("startup", "local", "client", "data"):
        for path in (found[name], *found[name].rglob("*")):
            shutil.chown(path, 0, user["fsGroup"])
            path.chmod(0o750 if path.is_dir() else 0o440)
    for name in ("startup", "local", "client"):
        found[name].chmod(0o2777)  # a cluster does, and mounts it read-only
    return found
