"""The lab as a whole: `lab down` leaves nothing on this machine, and `make demo` brings it back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab import hosts as lab
from lab import network, topology
from lab.cgroups import ROOT_NAME
from lab.paths import STATE
from lab.process import attempt
from tests.lab import progress
from tests.lab.conftest import CPU, H20
from tests.lab.site import ROOT, Site


@pytest.fixture
def up_again() -> Iterator[None]:
    """The lab stays up after a test session."""
    yield
    lab.up(len(H20), progress=progress.say)


def test_lab_down_leaves_nothing(lab_is_up: None, up_again: None) -> None:
    names = [host.name for host in (topology.site(), *topology.hosts())]
    before = traces(names)
    assert all(before.values()), before

    lab.down(progress=progress.say)

    assert traces(names) == dict.fromkeys(before, "")
    assert lab.leftovers() == []
    assert {entry.state for entry in lab.status()} == {"off"}


def traces(names: list[str]) -> dict[str, str]:
    """What this machine has of the lab, as its own tools list it."""

    def listed(*argv: str) -> str:
        lines = attempt(list(argv)).stdout.splitlines()
        ours = (*names, network.SWITCH, topology.CONTROL_LINK, str(STATE), ROOT_NAME)
        return "\n".join(line for line in lines if any(name in line for name in ours))

    return {
        "namespaces": listed("ip", "netns", "list"),
        "interfaces": listed("ip", "-oneline", "link", "show"),
        "processes": listed("pgrep", "--list-full", "systemd-nspawn"),
        # In whatever process's view: each host's disk is mounted in a view of its own.
        "mounts": listed("sh", "-c", f"grep -h ' {STATE}/' /proc/[0-9]*/mountinfo"),
        "cgroups": listed("find", "/sys/fs/cgroup", "-type", "d", "-path", f"*/{ROOT_NAME}/*"),
    }


def test_the_demo_ends_with_an_answer_from_every_public_port(served: Site, restarted: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab.demo"],
        cwd=ROOT,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=600,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    for host in (*H20, CPU):
        for service in served.plans().plans[host].services:
            where = f"http://{served.plans().addresses[host]}:{service.port}"
            (answer,) = (line for line in done.stdout.splitlines() if line.startswith(where))
            assert "Dodgers" in answer
    assert "make lab-down" in done.stdout


@pytest.fixture
def restarted(served: Site) -> None:
    """The model server that takes longest has only just begun to load, as when its host has booted."""
    (service,) = served.plans().plans[CPU].services
    lab.ssh(CPU, f"systemctl restart {service.unit}", check=True)
