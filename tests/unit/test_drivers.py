"""Which packages a distribution has for a driver, a CUDA toolkit, the exporter and containers."""

from __future__ import annotations

import pytest

from fleet.drivers import (
    apt_pin,
    container_engines,
    container_packages,
    dcgm_packages,
    dnf_locks,
    driver_packages,
    driver_problems,
    kernel_headers,
    known_packages,
    package_manager,
    supported_systems,
    system_name,
    toolkit_home,
    toolkit_packages,
)
from fleet.spec import Driver

EL9 = ("rocky-9", "almalinux-9", "rhel-9")
DRIVER = Driver(version="580.95.05")
OLDER = Driver(version="570.172.08")


@pytest.mark.parametrize(
    ("identity", "version", "name"),
    [
        ("debian", "12", "debian-12"),
        ("ubuntu", "22.04", "ubuntu-22.04"),
        ("ubuntu", "22.10", "ubuntu-22.10"),
        ("rocky", "9.6", "rocky-9"),
        ("almalinux", "9.4", "almalinux-9"),
        ("rhel", "9.10", "rhel-9"),
        ("rhel", "8.10", "rhel-8.10"),
        ("arch", "", "arch-"),
    ],
)
def test_enterprise_linux_counts_by_its_major_version(
    identity: str, version: str, name: str
) -> None:
    assert system_name({"id": identity, "version_id": version}) == name


def test_each_system_has_a_package_manager() -> None:
    managers = {system: package_manager(system) for system in supported_systems()}

    assert {name for name, manager in managers.items() if manager == "dnf"} == set(EL9)
    assert set(managers.values()) == {"apt", "dnf"}


@pytest.mark.parametrize("system", EL9)
def test_a_driver_of_enterprise_linux_brings_what_builds_and_holds_it(system: str) -> None:
    packages = driver_packages(DRIVER, system, nvswitch=True)

    assert packages == {
        "python3-dnf-plugin-versionlock": None,
        "dkms": None,
        "kmod-nvidia-open-dkms": "580.95.05-*",
        "nvidia-driver-cuda": "580.95.05-*",
        "nvidia-persistenced": "580.95.05-*",
        "nvidia-fabricmanager": "580.95.05-*",
    }
    assert "nvidia-fabricmanager" not in driver_packages(DRIVER, system, nvswitch=False)
    assert dnf_locks(DRIVER, system) == {"*nvidia*": "580.95.05-*"}


def test_the_fabric_managers_name_changed_with_580_on_both_sides() -> None:
    for system, older, newer in [
        ("rocky-9", "nvidia-fabric-manager", "nvidia-fabricmanager"),
        ("debian-12", "nvidia-fabricmanager-570", "nvidia-fabricmanager"),
    ]:
        assert older in driver_packages(OLDER, system, nvswitch=True)
        assert newer in driver_packages(DRIVER, system, nvswitch=True)
        assert {older, newer} <= set(known_packages(system))


def test_what_only_stands_beside_a_driver_is_not_ours_to_release() -> None:
    assert "dkms" not in known_packages("rocky-9")
    assert "python3-dnf-plugin-versionlock" not in known_packages("rocky-9")


def test_locks_are_for_dnf_and_pins_for_apt() -> None:
    assert dnf_locks(DRIVER, "debian-12") == {}
    assert dnf_locks(None, "rocky-9") == {}
    assert "Pin: version 580.95.05-1\n" in apt_pin(DRIVER, "debian-12")


def test_headers_are_those_of_the_kernel_that_runs() -> None:
    kernel = "5.14.0-570.17.1.el9_6.x86_64"

    assert kernel_headers(kernel, "rhel-9") == f"kernel-devel-{kernel}"
    assert kernel_headers("6.1.0-40-amd64", "debian-12") == "linux-headers-6.1.0-40-amd64"


@pytest.mark.parametrize(
    ("system", "version", "says"),
    [
        ("debian-13", "580.95.05", "branch 580 is not known for debian-13; known are 595"),
        ("debian-13", "595.58.03", "no fabric manager of branch 595 is known for debian-13"),
        ("ubuntu-24.04", "570.172.08", "branch 570 is not known for ubuntu-24.04; known are 580"),
        ("rocky-9", "575.57.08", "branch 575 is not known for rocky-9; known are 570, 580"),
    ],
)
def test_what_could_not_be_verified_is_refused(system: str, version: str, says: str) -> None:
    (problem,) = driver_problems(Driver(version=version), system, nvswitch=True)

    assert says in problem


def test_a_toolkits_line_is_in_its_name_and_its_home() -> None:
    assert toolkit_packages("12.9") == {"cuda-toolkit-12-9": None}
    assert toolkit_packages(None) == {}
    assert toolkit_home("13.0") == "/usr/local/cuda-13.0"


def test_the_exporter_comes_without_diagnostics_for_a_cuda() -> None:
    assert not [name for name in dcgm_packages() if "cuda" in name]
    assert "datacenter-gpu-manager-exporter" in dcgm_packages()


@pytest.mark.parametrize("system", supported_systems())
def test_containers_get_an_engine_and_the_toolkit(system: str) -> None:
    packages = container_packages(system)

    assert set(packages) <= {*container_engines(system), "nvidia-container-toolkit"}
    assert len(packages) > 1
    assert set(packages.values()) == {None}
    assert container_packages(system, {"git"}) == packages


def test_an_engine_that_is_there_is_kept() -> None:
    """apt would remove it to install another one."""
    packages = container_packages("debian-12", {"docker-ce", "git"})

    assert list(packages) == [
        *("docker-ce", "docker-ce-cli", "containerd.io"),
        "nvidia-container-toolkit",
    ]
    assert container_packages("arch-") == {}
