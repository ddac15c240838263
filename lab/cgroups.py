"""A control group per host, so that its processes are known, counted and killed together.

Each host has one under every hierarchy of this machine that can be written, whether cgroup v2, v1
or both at once. It holds three: `supervisor` and `payload` are made by systemd-nspawn, `keeper`
holds our own supervisor, because under cgroup v2 a group with processes of its own cannot hand
controllers down.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from lab import LabError

ROOT_NAME = "minimax-fleet-lab"

# What hosts' services may be limited by; a systemd of this machine hands the same ones down.
CONTROLLERS = frozenset({"cpu", "io", "memory", "pids"})

KILL_TIMEOUT_S = 15.0


def hierarchies() -> list[Path]:
    """Mount points of this machine's cgroup hierarchies that can be written."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, tail = line.partition(" - ")
        mount_point, kind = Path(fields.split()[4]), tail.split()[0]
        if kind in {"cgroup", "cgroup2"} and os.access(mount_point, os.W_OK):
            found.append(mount_point)
    return found


def create(host: str) -> list[Path]:
    """Make the host's cgroups and return them, one per hierarchy.

    Raises LabError if no hierarchy can be written: hosts could then not be told apart.
    """
    groups = [_create(mount_point, host) for mount_point in hierarchies()]
    if not groups:
        raise LabError("/sys/fs/cgroup: no hierarchy is writable; run the lab with full privileges")
    return groups


def _create(mount_point: Path, host: str) -> Path:
    group = mount_point / ROOT_NAME / host
    keeper = group / "keeper"
    keeper.mkdir(parents=True, exist_ok=True)
    for parent in (mount_point, group.parent):
        _hand_down_controllers(parent)
    for parent, child in ((mount_point, group.parent), (group.parent, group), (group, keeper)):
        _hand_down_cpuset(parent, child)
    return group


def _hand_down_controllers(parent: Path) -> None:
    """Let the groups below `parent` limit CPU, memory and so on; cgroup v2 only."""
    available = _read(parent / "cgroup.controllers").split()
    for controller in sorted(CONTROLLERS.intersection(available)):
        # The kernel refuses some, such as cpu while a real-time process is in the root.
        with contextlib.suppress(OSError):
            (parent / "cgroup.subtree_control").write_text(f"+{controller}", encoding="utf-8")


def _hand_down_cpuset(parent: Path, child: Path) -> None:
    """Give `child` the CPUs and memory nodes without which it takes no process; cgroup v1 only."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (child / "tasks").exists() and (child / name).exists():
            (child / name).write_text(_read(parent / name), encoding="utf-8")


def hosts() -> set[str]:
    """Names of all hosts that have a cgroup, whatever state they are in."""
    return {
        group.parent.name
        for mount_point in hierarchies()
        for group in (mount_point / ROOT_NAME).glob("*/cgroup.procs")
    }


def processes(host: str) -> set[int]:
    """Process ids of everything that runs in a host, with what supervises it."""
    return {
        int(pid)
        for mount_point in hierarchies()
        for members in (mount_point / ROOT_NAME / host).rglob("cgroup.procs")
        for pid in _read(members).split()
    }


def supervised(host: str) -> bool:
    """Whether a host's supervisor runs."""
    return any(
        _read(mount_point / ROOT_NAME / host / "keeper" / "cgroup.procs").strip()
        for mount_point in hierarchies()
    )


def kill(host: str) -> None:
    """Kill everything in a host at once and wait until it is gone.

    Raises LabError if something does not die.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while pids := processes(host):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"{host}: processes {sorted(pids)} do not die; see `ps -o pid,stat,cmd`")
        time.sleep(0.02)


def remove(host: str) -> None:
    """Remove a host's cgroups, which must hold no process any more."""
    for mount_point in hierarchies():
        remove_tree(mount_point / ROOT_NAME / host)
        with contextlib.suppress(OSError):
            (mount_point / ROOT_NAME).rmdir()


def remove_tree(group: Path) -> None:
    """Remove a cgroup with all below it, as far as no process is in it."""
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def leftovers() -> list[Path]:
    """Cgroups of the lab that are still there."""
    return [
        mount_point / ROOT_NAME
        for mount_point in hierarchies()
        if (mount_point / ROOT_NAME).exists()
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # removed meanwhile
        return ""
