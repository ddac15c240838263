"""The driver step puts right what is off, and leaves what serves alone."""

from __future__ import annotations

from fleet.drivers import FABRIC_MANAGER_UNIT, PERSISTENCE_UNIT
from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, wait_for

HOST = H20[1]
DRIVER = "driver | The NVIDIA driver is installed, held and running"


def state_of(unit: str) -> list[str]:
    said = lab.ssh(HOST, f"systemctl is-active {unit}; systemctl is-enabled {unit}")
    return said.stdout.split()


def pid_of(unit: str) -> str:
    return lab.ssh(HOST, f"systemctl show -p MainPID --value {unit}", check=True).stdout.strip()


def test_a_daemon_that_somebody_turned_off_runs_again_and_nothing_else_changes(
    site: Site,
) -> None:
    before, persistenced = main_pids(HOST), pid_of(PERSISTENCE_UNIT)
    lab.ssh(HOST, f"systemctl disable --now {FABRIC_MANAGER_UNIT}", check=True)

    run = site.roll_out_well("--limit", HOST)

    assert list(run.changed_operations()) == [DRIVER]
    assert state_of(FABRIC_MANAGER_UNIT) == ["active", "enabled"]
    assert main_pids(HOST) == before
    assert pid_of(PERSISTENCE_UNIT) == persistenced
    assert site.roll_out_well("--limit", HOST).changed == 0


def test_a_kernel_without_headers_gets_its_driver_from_the_roll_out(site: Site) -> None:
    """As after an update of the kernel: nvidia-smi has no driver to talk to, and nothing serves."""
    lab.ssh(HOST, "systemctl stop 'minimax-m25-*'", check=True)
    no_module = "/usr/lib/nvidia/lab-module remove; rm -f /run/lab/nvidia-module-version"
    lab.ssh(HOST, f"apt-get -q -y purge linux-headers-$(uname -r); {no_module}", check=True)
    stop = f"systemctl stop {PERSISTENCE_UNIT} {FABRIC_MANAGER_UNIT}"
    lab.ssh(HOST, stop, check=True)
    assert lab.ssh(HOST, "nvidia-smi").returncode != 0

    run = site.roll_out_well("--limit", HOST)

    assert DRIVER in run.changed_operations()
    assert state_of(FABRIC_MANAGER_UNIT) == state_of(PERSISTENCE_UNIT) == ["active", "enabled"]
    assert lab.ssh(HOST, "nvidia-smi").returncode == 0
    assert site.roll_out_well("--limit", HOST).changed == 0


def test_what_cannot_start_beside_the_old_module_starts_with_the_new(site: Site) -> None:
    """The documented exchange of a driver: stopped services, a run that asks for a reboot, a reboot."""
    lab.ssh(HOST, "systemctl stop 'minimax-m25-*'", check=True)
    site.edit("h20", r"580\.95\.05", "580.82.07")

    refused = site.roll_out("--limit", HOST)

    assert refused.exit_code == 1
    assert "driver 580.82.07: Failed to initialize NVML: Driver/library version" in refused.output
    assert state_of(FABRIC_MANAGER_UNIT)[1] == state_of(PERSISTENCE_UNIT)[1] == "enabled"

    lab.reboot(HOST)

    assert state_of(FABRIC_MANAGER_UNIT) == state_of(PERSISTENCE_UNIT) == ["active", "enabled"]
    site.roll_out_well("--limit", HOST)
    assert site.roll_out_well("--limit", HOST).changed == 0
    # What comes after this test declares the driver that was there, which is an exchange as well.
    lab.ssh(HOST, "systemctl stop 'minimax-m25-*'", check=True)
    site.edit("h20", r"580\.82\.07", "580.95.05")
    assert site.roll_out("--limit", HOST).exit_code == 1
    lab.reboot(HOST)
    wait_for(lambda: site.roll_out("--limit", HOST).exit_code == 0, 60, "the driver is back")
