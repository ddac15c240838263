"""Keeps one host of the lab running: mounts its disk, boots it, boots it again when it reboots.

Run by path and without the lab's Python environment, in a mount namespace of its own: when it
ends, however it ends, the host's disk is no longer mounted anywhere. Its only argument is a JSON
file:

    overlay      lower, upper, work, merged: the directories of the host's disk
    cgroups      the host's cgroups, one per hierarchy
    argv         what boots the host: systemd-nspawn with its options
    environment  variables to add for it
    nspawn_pid   file that names the process of the running systemd-nspawn

TERM asks the host to power off, and the supervisor ends with it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# What systemd-nspawn exits with, under --keep-unit, when its host asked to be rebooted.
REBOOT_EXIT_STATUS = 133


def join(groups: list[str], child: str = "") -> None:
    """Move the calling process into a cgroup of each hierarchy."""
    for group in groups:
        Path(group, child, "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")


def clear(groups: list[str]) -> None:
    """Undo what the last boot made of the host's cgroups, so that the next one finds them fresh.

    systemd-nspawn hands all controllers of cgroup v2 down, after which the kernel takes no process
    into the host's own group any more.
    """
    for group in groups:
        for child in ("payload", "supervisor"):
            for directory, _, _ in os.walk(Path(group, child), topdown=False):
                os.rmdir(directory)
        handed_down = Path(group, "cgroup.subtree_control")
        if handed_down.exists():
            for controller in handed_down.read_text(encoding="utf-8").split():
                handed_down.write_text(f"-{controller}", encoding="utf-8")


def mount(overlay: dict[str, str]) -> None:
    """Mount the host's disk over the shared base, visible to this process and its children.

    A volatile overlay never waits for this machine's disk, neither when the host asks for it nor
    when it is unmounted. The kernel then marks it as unfit to be mounted again, in case the machine
    itself has crashed; a lab's host is worth that risk.
    """
    shutil.rmtree(Path(overlay["work"], "work", "incompat"), ignore_errors=True)
    layers = f"lowerdir={overlay['lower']},upperdir={overlay['upper']},workdir={overlay['work']}"
    argv = ["mount", "-t", "overlay", "overlay", "-o", f"{layers},volatile", overlay["merged"]]
    subprocess.run(argv, check=True)


def supervise(spec: dict[str, Any]) -> int:
    """Boot the host until it powers off; systemd-nspawn's last exit status."""
    running: subprocess.Popen[bytes] | None = None
    powering_off = False

    def power_off(_signal: int, _frame: FrameType | None) -> None:
        nonlocal powering_off
        powering_off = True
        if running is not None:
            running.terminate()

    signal.signal(signal.SIGTERM, power_off)
    while True:
        clear(spec["cgroups"])
        running = subprocess.Popen(
            spec["argv"],
            env={**os.environ, **spec["environment"]},
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: join(spec["cgroups"]),  # noqa: PLW1509 - there is one thread
        )
        Path(spec["nspawn_pid"]).write_text(str(running.pid), encoding="utf-8")
        if powering_off:
            running.terminate()
        status = running.wait()
        if status != REBOOT_EXIT_STATUS or powering_off:
            return status


def main() -> int:
    """Supervise the host that the JSON file named on the command line describes."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    join(spec["cgroups"], "keeper")
    mount(spec["overlay"])
    return supervise(spec)


if __name__ == "__main__":
    sys.exit(main())
