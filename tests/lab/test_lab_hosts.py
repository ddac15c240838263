"""The lab's hosts are real hosts: they boot, reboot, lose power and are made new."""

import os
import signal
from collections.abc import Iterator

import pytest

from lab import LabError, topology
from lab import hosts as lab

SANDBOXED_UNIT = """\
[Service]
Type=oneshot
User=daemon
ExecStart=/bin/sh -c 'touch /tmp/mine && ! touch /usr/mine && echo in its sandbox'
NoNewPrivileges=yes
PrivateTmp=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LimitMEMLOCK=infinity
LimitNOFILE=1048576
"""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """A GPU host more than the session has: whatever happens to it, the others go on serving."""
    before = sum(host.group == "h20" for host in topology.hosts())
    lab.up(before + 1)
    yield f"h20-{before + 1:02d}"
    lab.up(before)


@pytest.fixture
def new_host(host: str) -> str:
    lab.reset(host)
    return host


def boot_id(host: str) -> str:
    return str(lab.read_file(host, "/proc/sys/kernel/random/boot_id"))


def gpus_in_sysfs(host: str) -> int:
    listed = lab.ssh(host, "grep -l 0x030200 /sys/bus/pci/devices/*/class | wc -l", check=True)
    return int(listed.stdout)


def test_a_new_host_runs_and_lacks_nothing(new_host: str) -> None:
    state = lab.ssh(new_host, "systemctl is-system-running; ps -p 1 -o comm=; hostname")

    assert state.stdout.split() == ["running", "systemd", new_host]
    assert gpus_in_sysfs(new_host) == 8


def test_hosts_know_each_other_and_nothing_beyond(host: str) -> None:
    site = topology.site()

    assert lab.ssh(host, f"getent hosts {site.name}").stdout.startswith(site.address)
    assert lab.ssh(host, "ip route show default", check=True).stdout == ""
    beyond = lab.ssh(host, "curl --silent --show-error --max-time 5 http://192.0.2.1/")
    assert beyond.returncode == 7  # cannot connect, at once


def test_a_sandboxed_unit_starts(host: str) -> None:
    lab.write_file(host, "/run/systemd/system/lab-sandbox.service", SANDBOXED_UNIT)

    lab.ssh(host, "systemctl daemon-reload && systemctl start lab-sandbox.service", check=True)

    journal = lab.ssh(host, "journalctl --unit=lab-sandbox.service --output=cat", check=True)
    assert "in its sandbox" in journal.stdout.splitlines()


def test_a_reboot_from_inside_keeps_the_disk(host: str) -> None:
    lab.write_file(host, "/root/kept", "kept")
    before = boot_id(host)

    lab.reboot(host)

    assert boot_id(host) != before
    assert lab.read_file(host, "/root/kept") == "kept"
    assert len(lab.ssh(host, "journalctl --list-boots --quiet").stdout.splitlines()) >= 2
    assert gpus_in_sysfs(host) == 8


def test_a_host_that_lost_its_power_stays_off_and_keeps_its_disk(host: str) -> None:
    lab.write_file(host, "/root/kept", "kept")

    lab.crash(host)

    assert {entry.host.name: entry.state for entry in lab.status()}[host] == "off"
    with pytest.raises(LabError, match=f"{host}: is off; `lab start {host}`"):
        lab.reboot(host)
    lab.start(host)
    assert lab.read_file(host, "/root/kept") == "kept"


def test_power_off_and_on(host: str) -> None:
    before = boot_id(host)

    lab.stop(host)
    lab.stop(host)
    lab.start(host)
    after = boot_id(host)
    lab.start(host)

    assert before != after == boot_id(host)


def test_reset_makes_new_with_the_same_keys(host: str) -> None:
    lab.write_file(host, "/root/lost", "lost")
    lab.set_hardware(host, gpus=2)
    key = lab.read_file(host, "/etc/ssh/ssh_host_ed25519_key.pub")

    lab.reset(host)

    # That ssh connects shows that the key is the known one, too: host keys are checked strictly.
    assert lab.ssh(host, "test -e /root/lost").returncode == 1
    assert lab.read_file(host, "/etc/ssh/ssh_host_ed25519_key.pub") == key
    assert gpus_in_sysfs(host) == 8


def test_a_running_host_sees_its_hardware_change(new_host: str) -> None:
    lab.set_hardware(new_host, gpus=7)

    assert gpus_in_sysfs(new_host) == 7
    assert '"gpus": 7' in lab.read_file(new_host, "/etc/lab/hardware.json")


def test_up_leaves_running_hosts_alone_and_restores_a_crashed_one(host: str) -> None:
    other = topology.hosts()[0].name
    undisturbed, crashed = boot_id(other), boot_id(host)
    # The supervisor alone: the container goes on without anyone who would ever end it.
    os.kill(lab.supervisors()[host], signal.SIGKILL)

    lab.up()

    assert boot_id(other) == undisturbed
    assert boot_id(host) != crashed


def test_unknown_hosts_are_named_with_those_that_there_are() -> None:
    with pytest.raises(LabError, match="h99: no such host in the lab; it has site, h20-01"):
        lab.reset("h99")
