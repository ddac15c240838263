"""A site that a test may edit: the shipped files, with inventories and group data of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.inventory import Site as Plans
from fleet.inventory import load
from lab import hosts as lab
from tests.lab import progress

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("config.py", "deploy.py", "tasks", "templates", "files", "fleet", "lab", ".lab")
COPIED = ("inventories", "group_data")
PYINFRA = str(Path(sys.executable).with_name("pyinfra"))
ROLLOUT_TIMEOUT_S = 900


@dataclass(frozen=True)
class Run:
    """A finished pyinfra command."""

    exit_code: int
    output: str
    results: Mapping[str, Any]
    plan: Sequence[Mapping[str, Any]]
    seconds: float

    @property
    def changed(self) -> int:
        """Operations that did something, over all hosts. pyinfra's JSON calls them "success"."""
        return int(self.results["totals"]["success"])

    def changed_operations(self) -> dict[str, list[str]]:
        """Names of the operations that did something, with the hosts on which they did."""
        return {
            operation["name"]: operation["success"]
            for operation in self.results["operations"]
            if operation["success"]
        }


class Site:
    """The lab's site in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in SHARED:
            (folder / name).symlink_to(ROOT / name)
        for name in COPIED:
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )

    def write(self, group: str, text: str) -> None:
        (self.folder / "group_data" / f"{group}.py").write_text(text)

    def append(self, group: str, line: str) -> None:
        """Add a line to a group's data."""
        file = self.folder / "group_data" / f"{group}.py"
        file.write_text(f"{file.read_text()}{line}\n")

    def edit(self, group: str, pattern: str, replacement: str) -> None:
        """Replace every match of a regular expression in a group's data; there must be one."""
        file = self.folder / "group_data" / f"{group}.py"
        text, count = re.subn(pattern, lambda _match: replacement, file.read_text())
        assert count, f"{file.name}: nothing matches {pattern}"
        file.write_text(text)

    def set_in_services(self, group: str, line: str) -> None:
        """Add a key to every service of a group."""
        self.edit(group, r'"name": ', f'{line}, "name": ')

    def plans(self) -> Plans:
        return load(self.folder / "inventories" / "lab.py", cwd=self.folder)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """pyinfra, started and not waited for; its output comes through one pipe."""
        progress.say(f"pyinfra {' '.join(arguments)}")
        return subprocess.Popen(
            [PYINFRA, *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYINFRA_PROGRESS": "off"},
        )

    def pyinfra(self, *arguments: str) -> Run:
        """`pyinfra …` to its end."""
        progress.say(f"pyinfra {' '.join(arguments)}")
        began = time.monotonic()
        done = subprocess.run(
            [PYINFRA, *arguments],
            cwd=self.folder,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=ROLLOUT_TIMEOUT_S,
            env={**os.environ, "PYINFRA_PROGRESS": "off"},
        )
        seconds = time.monotonic() - began
        document = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return Run(
            exit_code=done.returncode,
            output=done.stdout + done.stderr,
            results=document.get("results") or {},
            plan=document.get("plan") or [],
            seconds=seconds,
        )

    def roll_out(self, *arguments: str) -> Run:
        """The command that users type, with its results as JSON."""
        return self.pyinfra("--json", "-y", "inventories/lab.py", "deploy.py", *arguments)

    def roll_out_well(self, *arguments: str) -> Run:
        run = self.roll_out(*arguments)
        assert run.exit_code == 0, run.output
        assert run.results["totals"]["error"] == 0, run.output
        return run

    def kill_when(self, says: str, *arguments: str) -> str:
        """Starts a roll-out and kills pyinfra (SIGKILL) as soon as it prints `says`; what it printed."""
        process = self.start("-y", "inventories/lab.py", "deploy.py", *arguments)
        printed = []
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if says in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        text = "".join(printed)
        assert says in text, text
        return text


def main_pids(host: str) -> dict[str, int]:
    """MainPID of each of a host's services that run, the proxy's included."""
    shown = lab.ssh(
        host,
        "for unit in $(systemctl list-units --plain --no-legend 'minimax-*.service' | cut -d' ' -f1);"
        " do echo $unit $(systemctl show -p MainPID --value $unit); done",
        check=True,
    ).stdout
    return {unit: int(pid) for unit, pid in (line.split() for line in shown.splitlines())}


def argv_of(host: str, pid: int) -> list[str]:
    """A process's argv, read back from /proc."""
    raw = lab.ssh(host, f"base64 -w0 /proc/{pid}/cmdline", check=True).stdout
    import base64

    return base64.b64decode(raw).decode().split("\0")[:-1]


def written(host: str) -> str:
    """Every file of the host that a roll-out could write, with size, owner, mode and time."""
    places = "/etc /opt /usr/local /var/lib/minimax /var/lib/minimax-fleet /var/lib/apt"
    look = f"find {places} -xdev -path /etc/lab -prune -o -printf '%p %y %s %u %m %T@\\n'"
    return lab.ssh(host, f"{look} 2>/dev/null | sort").stdout


def unit_text(host: str, unit: str) -> str:
    return lab.read_file(host, f"/etc/systemd/system/{unit}")


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)
