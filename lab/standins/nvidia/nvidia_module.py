#!/usr/bin/python3
"""The kernel module of a lab host that has none: which version is built, which is loaded.

    lab-module build     what dkms does when the package is installed or updated
    lab-module load      what udev does at boot; a module that is loaded stays until the next boot
    lab-module remove    what dkms does when the package is removed

A real module takes the version of the driver that was loaded, whatever is installed since; that is
where "Driver/library version mismatch" comes from, so the two versions are two files here:
/var/lib/lab/nvidia-module (built, survives a reboot) and /run/lab/nvidia-module-version (loaded).
What is loaded is also where the real one says so: in /proc/driver/nvidia/version, in its words.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

VERSION = "@VERSION@"

ROOT = Path(os.environ.get("LAB_ROOT") or "/")
HARDWARE = Path(os.environ.get("LAB_HARDWARE") or ROOT / "etc/lab/hardware.json")
BUILT = ROOT / "var/lib/lab/nvidia-module"
LOADED = ROOT / "run/lab/nvidia-module-version"
# Where processes that use a GPU say so. Like a driver's devices it is below /dev, which stays
# writable for services whose file system is read-only otherwise.
USERS = ROOT / "run/lab/gpu"
USERS_STORE = ROOT / "dev/shm/lab-gpu"

# The kernel's own /proc has no such folder: another one, bound over its parent, stands in for it.
PROC = ROOT / "run/lab/proc-driver"
PROC_DRIVER = ROOT / "proc/driver"
NVRM = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (lab@minimax-fleet)
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14+deb12u1)
"""

NO_HEADERS = """\
Module build for kernel {kernel} was skipped since the
kernel headers for this kernel do not seem to be installed.
"""


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, with the directories that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def build() -> int:
    """Build the module for the running kernel; without its headers, leave none and say so."""
    kernel = os.uname().release
    if not (ROOT / "lib/modules" / kernel / "build").exists():
        sys.stdout.write(NO_HEADERS.format(kernel=kernel))
        BUILT.unlink(missing_ok=True)
        return 0
    write(BUILT, VERSION + "\n")
    return 0


def show(version: str) -> None:
    """Say in /proc what is loaded; in a folder of a test, without a mount."""
    write(PROC / "nvidia/version", NVRM.format(version=version))
    if Path("/") == ROOT and not (PROC_DRIVER / "nvidia").exists():
        subprocess.run(["mount", "--bind", PROC, PROC_DRIVER], check=True)


def load() -> int:
    """Load what is built, unless a module is loaded already or there is no GPU to drive."""
    if LOADED.exists():
        show(LOADED.read_text().strip())
        return 0
    if not BUILT.exists():
        return 0
    try:
        gpus = json.loads(HARDWARE.read_text()).get("gpus", 0)
    except (OSError, ValueError):
        gpus = 0
    if not gpus:
        return 0
    write(LOADED, BUILT.read_text())
    show(BUILT.read_text().strip())
    USERS_STORE.mkdir(parents=True, exist_ok=True)
    USERS_STORE.chmod(0o1777)
    if not USERS.exists():
        USERS.symlink_to(Path("/") / USERS_STORE.relative_to(ROOT))
    return 0


def remove() -> int:
    """Forget what was built."""
    BUILT.unlink(missing_ok=True)
    return 0


def main(arguments: list[str]) -> int:
    """Do what the first argument says; exit status 2 if it is none of the three."""
    actions = {"build": build, "load": load, "remove": remove}
    if len(arguments) != 1 or arguments[0] not in actions:
        sys.stderr.write("usage: lab-module build|load|remove\n")
        return 2
    return actions[arguments[0]]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
