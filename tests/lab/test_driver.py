"""The driver: what is off is put right, another version comes in the host's wave, or goes back; F14, F16."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from fleet.drivers import FABRIC_MANAGER_UNIT, PERSISTENCE_UNIT
from fleet.plan import DRIVER_PIN
from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, wait_for, written

HOST = H20[1]
PRESENT, OTHER = "580.95.05", "580.82.07"
PACKAGES = (
    *("nvidia-kernel-open-dkms", "nvidia-driver-cuda"),
    *("nvidia-persistenced", "nvidia-fabricmanager"),
)
SSH_FAILED = 255
STARTS = 5
"""After so many a unit is left down: StartLimitBurst of templates/service.service.j2."""
DRIVER = "driver | The NVIDIA driver is installed, held and running"


def state_of(unit: str, host: str = HOST) -> list[str]:
    said = lab.ssh(host, f"systemctl is-active {unit}; systemctl is-enabled {unit}")
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
    loaded_says = "/run/lab/nvidia-module-version /proc/driver/nvidia/version"
    no_module = f"/usr/lib/nvidia/lab-module remove; rm -f {loaded_says}"
    lab.ssh(HOST, f"apt-get -q -y purge linux-headers-$(uname -r); {no_module}", check=True)
    stop = f"systemctl stop {PERSISTENCE_UNIT} {FABRIC_MANAGER_UNIT}"
    lab.ssh(HOST, stop, check=True)
    assert lab.ssh(HOST, "nvidia-smi").returncode != 0

    run = site.roll_out_well("--limit", HOST)

    assert DRIVER in run.changed_operations()
    assert state_of(FABRIC_MANAGER_UNIT) == state_of(PERSISTENCE_UNIT) == ["active", "enabled"]
    assert lab.ssh(HOST, "nvidia-smi").returncode == 0
    assert site.roll_out_well("--limit", HOST).changed == 0


def loaded(host: str) -> str:
    """Version of the kernel module, in its own words."""
    said = lab.ssh(host, "cat /proc/driver/nvidia/version", check=True).stdout
    return said.split("x86_64")[1].split()[0]


def boot_of(host: str) -> str:
    return lab.ssh(host, "cat /proc/sys/kernel/random/boot_id").stdout.strip()


def driver_packages(host: str) -> set[str]:
    """Versions of all that the driver consists of, libraries included."""
    form = "dpkg-query -W -f '${db:Status-Abbrev} ${Version}\\n' '*nvidia*' libcuda1"
    lines = lab.ssh(host, form, check=True).stdout.splitlines()
    return {line.split()[1] for line in lines if line[1] == "i"}


def serves(site: Site, host: str) -> bool:
    health = ("-y", "inventories/lab.py", "tasks.health.check", "--limit", host)
    return site.pyinfra(*health).exit_code == 0


def declare(site: Site, version: str, reboot: str = "if-needed") -> None:
    driver = f'driver = {{"version": "{version}", "reboot": "{reboot}"}}'
    site.edit("h20", r"driver = .*", driver)


@pytest.fixture
def exchanging(gpu_site: Site) -> Iterator[Site]:
    """A site that declares another driver and lets hosts reboot for it; afterwards all is as before."""
    declare(gpu_site, OTHER)
    yield gpu_site
    declare(gpu_site, PRESENT)
    gpu_site.roll_out_well("--limit", "h20")


def is_exchanged(site: Site, host: str, version: str) -> bool:
    """Is this driver all that there is, and does everything serve and start at boot by it?"""
    assert loaded(host) == version
    assert driver_packages(host) == {f"{version}-1"}
    assert state_of(FABRIC_MANAGER_UNIT, host) == ["active", "enabled"]
    for service in site.plans().plans[host].services:
        assert state_of(service.unit, host) == ["active", "enabled"]
    assert lab.ssh(host, "systemctl list-unit-files 'minimax-job-*' --no-legend").stdout == ""
    assert f"Pin: version {version}-1" in lab.read_file(host, DRIVER_PIN)
    return serves(site, host)


def test_a_driver_is_exchanged_host_by_host_by_one_run(exchanging: Site) -> None:
    first, second = H20[:2]
    boots = {host: boot_of(host) for host in H20}
    before = {host: main_pids(host) for host in H20}
    both = ("--limit", first, "--limit", second)
    lab.misbehave(first, load_seconds=8)
    run = exchanging.start("-y", "inventories/lab.py", "deploy.py", *both)
    assert run.stdout is not None
    printed, meanwhile = [], []
    for line in run.stdout:
        printed.append(line)
        if f"[{first}] started " in line:
            # Its driver is another by now, and its services load.
            meanwhile = [main_pids(second), boot_of(second), loaded(second), loaded(first)]

    assert run.wait() == 0, "".join(printed)
    assert meanwhile == [before[second], boots[second], PRESENT, OTHER]
    assert any("the connection is lost" in line for line in printed)
    for host in (first, second):
        assert boot_of(host) != boots[host]
        assert is_exchanged(exchanging, host, OTHER)
        kept = lab.ssh(host, "ls -l /var/lib/minimax-fleet/jobs/*.log", check=True).stdout
        assert kept.startswith("-rw------- ")
    assert (main_pids(H20[2]), boot_of(H20[2])) == (before[H20[2]], boots[H20[2]])
    assert exchanging.roll_out_well(*both).changed == 0


@pytest.mark.thorough
@pytest.mark.parametrize("point", ["installing ", "rebooting this host"])
def test_a_host_finishes_without_the_control_machine(exchanging: Site, point: str) -> None:
    boot = boot_of(HOST)

    exchanging.kill_when(point, "--limit", HOST)

    wait_for(lambda: boot_of(HOST) not in ("", boot), 60, "the host reboots")
    wait_for(lambda: not kept_jobs(HOST), 90, "the host ends what it has begun")
    assert is_exchanged(exchanging, HOST, OTHER)
    assert exchanging.roll_out_well("--limit", HOST).changed == 0


def kept_jobs(host: str) -> list[str]:
    """Requests of jobs that have not ended."""
    listed = lab.ssh(host, "ls /var/lib/minimax-fleet/jobs/")
    return [name for name in listed.stdout.split() if name.endswith(".json")] or (
        ["unknown"] if listed.returncode == SSH_FAILED else []
    )


@pytest.mark.thorough
def test_a_second_run_joins_the_exchange_that_the_first_has_begun(exchanging: Site) -> None:
    boot = boot_of(HOST)
    lab.misbehave(HOST, load_seconds=15)
    exchanging.kill_when("rebooting this host", "--limit", HOST)
    wait_for(lambda: boot_of(HOST) not in ("", boot), 60, "the host reboots")
    once = boot_of(HOST)

    run = exchanging.roll_out_well("--limit", HOST)
    lab.behave(HOST)

    assert "cutover: under way already; following it" in run.output
    assert is_exchanged(exchanging, HOST, OTHER)
    assert exchanging.roll_out_well("--limit", HOST).changed == 0
    assert boot_of(HOST) == once


def test_power_that_is_cut_in_the_middle_keeps_services_down_until_the_driver_is_known_to_work(
    exchanging: Site,
) -> None:
    exchanging.kill_when("installing ", "--limit", HOST)
    lab.crash(HOST)

    lab.start(HOST)

    wait_for(lambda: not kept_jobs(HOST), 120, "the host ends what it has begun")
    assert is_exchanged(exchanging, HOST, OTHER)
    # Had they been started at boot, the job would have had to stop them.
    for unit in ("minimax-m25-a", "minimax-m25-b"):
        said = lab.ssh(HOST, f"journalctl -b -u {unit} -t systemd -o cat", check=True).stdout
        assert said.count(f"Started {unit}.service") == 1, said
    assert exchanging.roll_out_well("--limit", HOST).changed == 0


def test_a_driver_that_does_not_work_is_put_back_with_what_served(exchanging: Site) -> None:
    release = exchanging.plans().plans[HOST].release.path
    packages = lab.ssh(
        HOST, f"echo {release}/lib/python3*/site-packages", check=True
    ).stdout.strip()
    lab.write_file(HOST, f"{packages}/torch.py", TORCH)
    boot = boot_of(HOST)

    run = exchanging.roll_out("--limit", HOST)
    lab.ssh(HOST, f"rm {packages}/torch.py", check=True)

    assert run.exit_code == 1
    assert "CUDA fails: RuntimeError: CUDA error: system not yet initialized" in run.output
    assert f"kernel module {OTHER}, packages {OTHER}-1, {OTHER} declared" in run.output
    assert f"putting back the driver that was there before: {PRESENT}" in run.output
    assert "m25-a was put back and serves" in run.output
    assert "the cut-over failed and was undone: " in run.output
    assert boot_of(HOST) != boot
    assert is_exchanged(exchanging, HOST, PRESENT)


TORCH = f"""\
class version:
    cuda = "13.0"


class cuda:
    @staticmethod
    def device_count():
        if "{OTHER}" in open("/proc/driver/nvidia/version").read():
            raise RuntimeError("CUDA error: system not yet initialized")
        return 0
"""
"""A torch that cannot work with one version of the driver."""


def test_a_host_that_must_not_reboot_is_refused_untouched(gpu_site: Site) -> None:
    gpu_site.roll_out_well("--limit", HOST)
    before = (main_pids(HOST), written(HOST), boot_of(HOST))
    declare(gpu_site, OTHER, "never")

    run = gpu_site.roll_out("--limit", HOST, "--limit", H20[2])

    assert run.exit_code == 1
    assert (
        f"driver: kernel module {PRESENT}, packages {PRESENT}-1; {OTHER} is declared: that takes a "
        "reboot of this host; allow it"
    ) in run.output
    assert (main_pids(HOST), written(HOST), boot_of(HOST)) == before


def test_f14_packages_that_were_changed_by_hand_are_put_right_without_a_reboot(
    gpu_site: Site,
) -> None:
    """As unattended-upgrades would, were it not kept away: nvidia-smi then speaks of a mismatch."""
    gpu_site.roll_out_well("--limit", HOST)
    boot, before = boot_of(HOST), main_pids(HOST)
    by_hand = "apt-get -qq -y --allow-downgrades --allow-change-held-packages install"
    lab.ssh(HOST, "mv /etc/apt/preferences.d/minimax-nvidia /root/", check=True)
    names = f"{' '.join(PACKAGES)} libcuda1 libnvidia-ml1 nvidia-modprobe nvidia-kernel-support"
    names += " libnvidia-cfg1 libnvidia-ptxjitcompiler1 firmware-nvidia-gsp"
    lab.ssh(HOST, f"{by_hand} $(printf '%s={OTHER}-1 ' {names})", check=True)
    lab.ssh(HOST, "mv /root/minimax-nvidia /etc/apt/preferences.d/", check=True)
    assert "Driver/library version mismatch" in lab.ssh(HOST, "nvidia-smi").stdout
    assert lab.ssh(HOST, f"systemctl restart {FABRIC_MANAGER_UNIT}").returncode != 0
    driver = (gpu_site.folder / "group_data" / "h20.py").read_text()
    gpu_site.edit("h20", r"driver = .*", "")

    refused = gpu_site.roll_out("--limit", HOST)
    gpu_site.write("h20", driver)

    assert refused.exit_code == 1
    assert (
        f"version mismatch NVML library version: {OTHER[:6]}; kernel module {PRESENT} is loaded: "
        "reboot this host, or declare driver.version"
    ) in refused.output
    assert (
        f"fabric manager: {OTHER} is installed and kernel module {PRESENT} is loaded: fabric manager "
        f"NVIDIA GPU driver interface version {OTHER} don't match with driver version {PRESENT}"
    ) in refused.output
    assert main_pids(HOST) == before

    run = gpu_site.roll_out_well("--limit", HOST)

    assert (
        f"driver: kernel module {PRESENT}, packages {OTHER}-1; {PRESENT} is declared; it was changed "
        "since it was installed"
    ) in run.output
    assert boot_of(HOST) == boot
    assert is_exchanged(gpu_site, HOST, PRESENT)
    for unit in ("minimax-m25-a.service", "minimax-m25-b.service"):
        assert main_pids(HOST)[unit] != before[unit]
    assert gpu_site.roll_out_well("--limit", HOST).changed == 0


def test_unattended_upgrades_leave_the_driver_alone_and_nouveau_stays_out(site: Site) -> None:
    dumped = lab.ssh(
        HOST, "apt-config dump Unattended-Upgrade::Package-Blacklist", check=True
    ).stdout
    blacklist = re.findall(r':: "(.*)";', dumped)

    for name in (*PACKAGES, "libnvidia-ml1", "libcuda1"):
        assert any(re.match(pattern, name) for pattern in blacklist), name
    for name in ("nvidia-container-toolkit", "linux-image-amd64"):
        assert not any(re.match(pattern, name) for pattern in blacklist), name
    assert "blacklist nouveau" in lab.read_file(HOST, "/etc/modprobe.d/minimax-nvidia.conf")
    assert "nvidia-uvm" in lab.read_file(HOST, "/etc/modules-load.d/minimax-nvidia.conf")


def test_f16_a_service_whose_gpu_died_is_started_a_few_times_and_its_neighbour_serves_on(
    site: Site,
) -> None:
    before = main_pids(HOST)
    first, second = (service.unit for service in site.plans().plans[HOST].services)
    lab.set_hardware(HOST, missing=(7,))
    lab.ssh(HOST, f"kill -KILL {before[second]}", check=True)

    wait_for(lambda: state_of(second)[0] == "failed", 180, "systemd gives up")
    restarts = lab.ssh(HOST, f"systemctl show -p NRestarts --value {second}", check=True).stdout
    assert 1 <= int(restarts) <= STARTS
    assert main_pids(HOST)[first] == before[first]
    assert lab.ssh(HOST, "curl -sf http://127.0.0.1:18000/health").returncode == 0

    refused = site.roll_out("--limit", HOST)

    lab.set_hardware(HOST, missing=())
    assert refused.exit_code == 1
    assert "GPUs: 7/8 GPUs (silent on the PCI bus: 0000:50:00.0)" in refused.output
    assert main_pids(HOST)[first] == before[first]
    site.roll_out_well("--limit", HOST)
    assert main_pids(HOST)[first] == before[first]
    assert state_of(second) == ["active", "enabled"]
