"""A process sees its own start-up kit and its own data folder, nothing else of ours.

Run as a program (`python -m fl_helpers.cross_silo.sandbox`) it ties itself to the
process that started it, locks itself in and becomes the real program: see `sandboxed`.
bubblewrap if it works, else Landlock (Linux >= 5.13, no privileges needed), else a loud
warning. A process that needs no network gets none (Landlock: no TCP); else firewalls
decide.
Standard library only: copy this file on its own.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SYSTEM = [  # what Python and torch read of a Linux machine; nothing of a user
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc", "/sys"),
    *("/etc/hosts", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/ssl"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/resolv.conf", "/etc/host.conf"),
    "/etc/mime.types",
]
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPABILITIES = 0x20080522  # version 3 of <linux/capability.h>
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system call numbers
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3  # <linux/landlock.h>
FILE_RIGHTS = 0b111 | 1 << 14 | 1 << 15  # execute, write, read, truncate, ioctl


@functools.cache
def works(kind: str) -> bool:
    """Whether "bubblewrap" or "landlock" can be used on this machine."""
    if kind == "landlock":
        # In a process of its own: some services are killed for asking (SIGSYS).
        ask = f"ctypes.CDLL(None).syscall({CREATE_RULESET}, None, 0, 1)"
        code = [sys.executable, "-S", "-c", f"import ctypes, sys; sys.exit({ask} < 1)"]
        linux = sys.platform.startswith("linux")
        return linux and not subprocess.run(code, capture_output=True).returncode
    if not shutil.which("bwrap"):
        return False
    command = _bubblewrap(["/bin/true"], read=[], write=[])
    return subprocess.run(command, capture_output=True, timeout=10).returncode == 0


def available_sandbox() -> str:
    """The best that this machine can do: "bubblewrap", "landlock" or "none"."""
    return next((kind for kind in ("bubblewrap", "landlock") if works(kind)), "none")


def sandboxed(
    command: Sequence[str],
    *,
    read: Iterable[str | Path],
    write: Iterable[str | Path],
    kind: str | None = None,
    network: bool = True,
    limits: Mapping[str, int] | None = None,
) -> list[str]:
    """Command line that runs `command` confined, and that dies with this process.

    read, write: files and folders that it may read, or read and write, beside the
    system's programs, Python itself and this package. kind: None takes the best one
    of this machine. network: whether it may use it. limits: what it may use at most, by
    the names of `resource`, such as RLIMIT_FSIZE. It leaves no core dump, which would
    hold records. Warns if there is no sandbox: then the process can read whatever the
    user can.
    """
    kind = kind or available_sandbox()
    if kind not in ("bubblewrap", "landlock", "none"):
        raise ValueError(f"kind must be bubblewrap, landlock or none, got {kind!r}")
    if kind == "none":
        warnings.warn(
            "NO SANDBOX: neither bubblewrap nor Landlock works here, so each local "
            "silo can read the others' files; never do this with patients' data",
            stacklevel=2,
        )
    read = [*map(str, read), sys.prefix, sys.base_prefix, str(_package())]
    plan = {"kind": kind, "read": read, "write": [*map(str, write)]}
    plan |= {"parent": os.getpid(), "network": network, "limits": dict(limits or {})}
    return [sys.executable, "-m", __spec__.name, json.dumps(plan), *command]


def _package() -> Path:
    """The package's folder: the confined process must be able to import this file."""
    depth = __spec__.name.count(".")
    return Path(__file__).resolve().parents[max(0, depth - 1)]


def _bubblewrap(
    command: Sequence[str],
    *,
    read: Iterable[str],
    write: Iterable[str],
    network: bool = True,
) -> list[str]:
    line = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--cap-drop"]
    line += ["ALL", "--die-with-parent", "--new-session", "--dev", "/dev"]
    line += [] if network else ["--unshare-net"]
    for path in SYSTEM:
        if os.path.islink(path):
            line += ["--symlink", os.readlink(path), path]
        elif path != "/proc":
            line += ["--ro-bind-try", path, path]
    line += ["--proc", "/proc", "--tmpfs", "/tmp"]
    for path in read:
        line += ["--ro-bind-try", path, path]
    for path in write:
        if path != "/dev/shm":  # it has its own
            line += ["--dev-bind" if path.startswith("/dev/") else "--bind", path, path]
    return [*line, "--chdir", [*write, "/"][0], "--", *command]


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64)] + [
        ("scoped", ctypes.c_uint64)
    ]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def _landlock_version() -> int:
    if not sys.platform.startswith("linux"):
        return 0
    return ctypes.CDLL(None).syscall(CREATE_RULESET, None, 0, 1)


def restrict(
    *, read: Iterable[str], write: Iterable[str], network: bool = True
) -> None:
    """Confine this process and its children for good, with Landlock.

    read: may be read and executed; write: anything. Without network: no socket but
    those of the machine itself (AF_UNIX). Raises OSError if the kernel refuses. Other
    processes' memory and environment are out of reach, too, their command lines not.
    """
    version, libc = _landlock_version(), ctypes.CDLL(None, use_errno=True)
    later = {2: 13, 3: 14, 5: 15}  # version: bit of the right that it added
    rights = (1 << 13) - 1
    rights |= sum(1 << bit for since, bit in later.items() if version >= since)
    tcp = 0 if network else 3  # bind and connect
    ruleset = _Ruleset(rights, tcp, 3 if version >= 6 else 0)  # 3: signals, sockets
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = _call(libc, CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    wanted = [(p, EXECUTE | READ_FILE | READ_DIR) for p in read]
    for path, access in [*wanted, *((p, rights) for p in write)]:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            access &= FILE_RIGHTS
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _PathRule(access & rights, opened)
        _call(libc, ADD_RULE, handle, 1, ctypes.byref(rule), 0)
        os.close(opened)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    _call(libc, RESTRICT_SELF, handle, 0)
    os.close(handle)
    if not network:
        _allow_no_sockets(libc)
    # Root could still read others' environments: give up all capabilities, for good.
    none = (ctypes.c_uint32 * 6)()
    if libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES, 0), none):
        raise OSError(ctypes.get_errno(), "capset")


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8)] + [
        ("no", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter))]


def _allow_no_sockets(libc: ctypes.CDLL) -> None:
    """Landlock knows TCP only: of all other sockets, let seccomp allow AF_UNIX alone.

    Does nothing on processors of which it does not know the numbers.
    """
    known = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
    if os.uname().machine not in known:
        return
    architecture, socket = known[os.uname().machine]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06  # <linux/bpf_common.h>
    steps = [  # what, steps to skip if so, if not, with which number
        (load, 0, 0, 4),  # which architecture
        (equal, 0, 7, architecture),
        (load, 0, 0, 0),  # which system call
        (at_least, 5, 0, 0x40000000),  # of the x32 interface
        (equal, 4, 0, 425),  # io_uring_setup, which has sockets of its own
        (equal, 0, 2, socket),
        (load, 0, 0, 16),  # of which family
        (equal, 0, 1, 1),  # AF_UNIX
        (end, 0, 0, 0x7FFF0000),  # allowed
        (end, 0, 0, 0x00050000 | errno.EACCES),
    ]
    program = _Program(len(steps), (_Filter * len(steps))(*steps))
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _call(libc: ctypes.CDLL, *arguments: object) -> int:
    result = libc.syscall(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result


def _die_with_parent(parent: int) -> None:
    """Linux kills this process when the one that started it ends, however it ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we got here
        sys.exit("the process that started this one has gone")


def main() -> None:
    """Tie to the parent, confine, and become the command on the command line."""
    plan, command = json.loads(sys.argv[1]), sys.argv[2:]
    _die_with_parent(plan["parent"])
    import resource  # not on Windows

    for name, most in {"RLIMIT_CORE": 0, **plan.get("limits", {})}.items():
        _, hard = resource.getrlimit(getattr(resource, name))
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(getattr(resource, name), (most, most))
    if plan["kind"] == "bubblewrap":
        command = _bubblewrap(
            command, read=plan["read"], write=plan["write"], network=plan["network"]
        )
    elif plan["kind"] == "landlock":
        restrict(
            read=[*SYSTEM, *plan["read"]],
            write=[*DEVICES, *plan["write"]],
            network=plan["network"],
        )
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
