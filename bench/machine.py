"""What the benchmark ran on: the machine, and the versions of what took part."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from lab.paths import REPOSITORY
from lab.prerequisites import os_release
from lab.process import attempt

GIB = 2**30


def machine() -> dict[str, str]:
    """Cores, memory, CPU model and operating system, for a person."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPU": _cpu_model(),
        "cores": f"{cores}, shared by the control machine and all hosts",
        "memory": f"{memory / GIB:.0f} GiB",
        "system": os_release().get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Versions of what is installed here and takes part in a roll-out."""
    said = attempt(["ssh", "-V"]).stderr
    found = re.match(r"OpenSSH_([^ ,]+)", said)
    return {
        "minimax-fleet": version("minimax-fleet"),
        "pyinfra": version("pyinfra"),
        "Python": platform.python_version(),
        "OpenSSH": found[1] if found else "unknown",
    }


def commit() -> str | None:
    """The repository's commit, with a plus sign where files differ from it; None outside git."""
    git = ["git", "-C", str(REPOSITORY)]
    head = attempt([*git, "rev-parse", "--short", "HEAD"])
    if head.returncode:
        return None
    changed = attempt([*git, "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    # Not every architecture has it.
    model = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(model, platform.machine())
