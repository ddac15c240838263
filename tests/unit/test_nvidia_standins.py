"""The stand-ins of NVIDIA's driver answer as the real one: words, columns, exit statuses.

Expected texts are the real tools' (drivers 550 to 595 on H20, H20-3e and H200 machines).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lab.site import apt

VERSION = "580.95.05"
H20 = {
    "gpus": 8,
    "name": "NVIDIA H20-3e",
    "memory_mib": 143771,
    "compute_capability": "9.0",
    "nvswitch": 4,
    "smi": "ok",
    "missing": [],
}


class LabHost:
    """A lab host's files under a directory, and the stand-ins run against them as scripts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hardware_file = root / "hardware.json"
        self.hardware(**H20)
        self.load(VERSION)

    def hardware(self, **values: Any) -> None:
        """Describe the hardware: the default's values but for these."""
        self.hardware_file.write_text(json.dumps({**H20, **values}))

    def write(self, path: str, text: str) -> None:
        """Write a file of the host."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def read(self, path: str) -> str:
        """The text of a file of the host."""
        return (self.root / path).read_text()

    def load(self, version: str) -> None:
        """Have the module of a driver version loaded."""
        self.write("run/lab/nvidia-module-version", f"{version}\n")

    def unload(self) -> None:
        """Have no module loaded, as after a boot without one."""
        (self.root / "run/lab/nvidia-module-version").unlink(missing_ok=True)

    def command(self, template: str, *arguments: str, version: str = VERSION) -> list[str]:
        """The command line of a stand-in, as a package of this version would install it."""
        script = self.root / template
        script.write_text((apt.STANDINS / template).read_text().replace("@VERSION@", version))
        return [sys.executable, str(script), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Where the stand-ins are to look."""
        return {"LAB_ROOT": str(self.root), "LAB_HARDWARE": str(self.hardware_file), "TZ": "UTC"}

    def run(
        self, template: str, *arguments: str, version: str = VERSION
    ) -> subprocess.CompletedProcess[str]:
        """Run a stand-in to its end."""
        return subprocess.run(
            self.command(template, *arguments, version=version),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, **self.environment},
        )

    def smi(self, *arguments: str) -> str:
        """What nvidia-smi prints; it has to succeed and to be silent on standard error."""
        result = self.run("nvidia_smi.py", *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    def smi_fails(self, *arguments: str) -> tuple[int, str]:
        """Exit status and standard output of nvidia-smi, which prints its errors there."""
        result = self.run("nvidia_smi.py", *arguments)
        assert result.stderr == ""
        return result.returncode, result.stdout


@pytest.fixture
def host(tmp_path: Path) -> LabHost:
    return LabHost(tmp_path)


def show_pci_devices(host: LabHost, addresses: list[str]) -> None:
    for address in addresses:
        host.write(f"sys/bus/pci/devices/{address}/vendor", "0x10de\n")
        host.write(f"sys/bus/pci/devices/{address}/class", "0x030200\n")
    host.write("sys/bus/pci/devices/0000:03:00.0/vendor", "0x10de\n")
    host.write("sys/bus/pci/devices/0000:03:00.0/class", "0x068000\n")


def query(host: LabHost, columns: str, *options: str) -> list[str]:
    return host.smi(f"--query-gpu={columns}", f"--format={','.join(('csv', *options))}").split("\n")


class TestTable:
    def test_is_the_real_one_to_the_byte(self, host: LabHost) -> None:
        host.hardware(name="NVIDIA H20", memory_mib=97871, gpus=1)
        show_pci_devices(host, ["0000:26:00.0"])

        lines = host.smi().split("\n")

        assert re.fullmatch(r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4} {7}", lines[0])
        assert lines[2:13] == [
            "| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      "
            "CUDA Version: 13.0     |",
            "|-----------------------------------------+------------------------"
            "+----------------------+",
            "| GPU  Name                 Persistence-M | Bus-Id          Disp.A "
            "| Volatile Uncorr. ECC |",
            "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage "
            "| GPU-Util  Compute M. |",
            "|                                         |                        "
            "|               MIG M. |",
            "|=========================================+========================"
            "+======================|",
            "|   0  NVIDIA H20                     Off |   00000000:26:00.0 Off "
            "|                    0 |",
            "| N/A   30C    P0             75W /  500W |       1MiB /  97871MiB "
            "|      0%      Default |",
            "|                                         |                        "
            "|             Disabled |",
            "+-----------------------------------------+------------------------"
            "+----------------------+",
            " " * 89,
        ]
        assert lines[-3] == f"|  {'No running processes found':<86} |"

    def test_lists_the_processes_that_use_a_gpu(self, host: LabHost) -> None:
        host.write(f"run/lab/gpu/3/{os.getpid()}", "134852")

        lines = host.smi().split("\n")

        assert lines[-3].startswith(f"|    3   N/A  N/A {os.getpid():>15}      C   ")
        assert lines[-3].endswith(" 134852MiB |")
        assert {len(line) for line in lines[1:-1]} == {91, 89}


class TestQueries:
    def test_list(self, host: LabHost) -> None:
        lines = host.smi("-L").splitlines()

        assert len(lines) == 8
        uuid = r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        assert re.fullmatch(rf"GPU 0: NVIDIA H20-3e \(UUID: {uuid}\)", lines[0])

    def test_version(self, host: LabHost) -> None:
        assert host.smi("--version") == (
            "NVIDIA-SMI version  : 580.95.05\n"
            "NVML version        : 580.95\n"
            "DRIVER version      : 580.95.05\n"
            "CUDA Version        : 13.0\n"
        )

    def test_columns(self, host: LabHost) -> None:
        expected = [
            ("index", "index", "0"),
            ("name", "name", "NVIDIA H20-3e"),
            ("gpu_name", "name", "NVIDIA H20-3e"),
            ("memory.total", "memory.total [MiB]", "143771 MiB"),
            ("memory.used", "memory.used [MiB]", "1 MiB"),
            ("memory.free", "memory.free [MiB]", "143070 MiB"),
            ("driver_version", "driver_version", VERSION),
            ("count", "count", "8"),
            ("compute_cap", "compute_cap", "9.0"),
            ("pci.bus_id", "pci.bus_id", "00000000:18:00.0"),
            ("pci.device_id", "pci.device_id", "0x232C10DE"),
            ("persistence_mode", "persistence_mode", "Disabled"),
            ("ecc.mode.current", "ecc.mode.current", "Enabled"),
            ("mig.mode.current", "mig.mode.current", "Disabled"),
            ("utilization.gpu", "utilization.gpu [%]", "0 %"),
            ("temperature.gpu", "temperature.gpu", "30"),
            ("power.limit", "power.limit [W]", "500.00 W"),
            ("clocks.sm", "clocks.current.sm [MHz]", "345 MHz"),
            ("fan.speed", "fan.speed [%]", "[N/A]"),
            ("fabric.state", "fabric.state", "In Progress"),
        ]

        lines = query(host, ",".join(column for column, _, _ in expected))

        assert lines[0].split(", ") == [heading for _, heading, _ in expected]
        assert lines[1].split(", ") == [cell for _, _, cell in expected]
        assert len(lines[1:-1]) == H20["gpus"]

    def test_without_header_and_units(self, host: LabHost) -> None:
        lines = query(host, "index, memory.total", "noheader", "nounits")

        assert lines == [*(f"{index}, 143771" for index in range(8)), ""]

    def test_of_chosen_gpus(self, host: LabHost) -> None:
        lines = host.smi("-i", "2,5", "--query-gpu=index", "--format=csv,noheader").split()

        assert lines == ["2", "5"]

    def test_bus_ids_are_those_of_sysfs(self, host: LabHost) -> None:
        host.hardware(gpus=2)
        show_pci_devices(host, ["0000:1a:00.0", "0000:ab:00.0"])

        assert query(host, "pci.bus_id", "noheader")[:2] == ["00000000:1A:00.0", "00000000:AB:00.0"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (
                ["--query-gpu=index,cuda_version", "--format=csv"],
                'Field "cuda_version" is not a valid field to query.\n\n',
            ),
            (
                ["--query-compute-apps=pids", "--format=csv"],
                'Field "pids" is not a valid field to query.\n\n',
            ),
            (
                ["--query-gpu=index"],
                "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n",
            ),
            (
                ["--frobnicate"],
                "Option \"--frobnicate\" is not recognized. Please run 'nvidia-smi -h'.\n\n",
            ),
        ],
    )
    def test_refuses_what_it_does_not_know(
        self, host: LabHost, arguments: list[str], says: str
    ) -> None:
        assert host.smi_fails(*arguments) == (2, says)

    def test_no_such_gpu(self, host: LabHost) -> None:
        assert host.smi_fails("-i", "8", "-q") == (6, "No devices were found\n")


class TestUse:
    def test_memory_is_what_living_processes_say(self, host: LabHost) -> None:
        host.write(f"run/lab/gpu/1/{os.getpid()}", "1000\n")
        host.write(f"run/lab/gpu/1/{os.getppid()}", "234\n")
        # A process that is no more: process ids end at 2^22.
        host.write(f"run/lab/gpu/1/{2**22 + 1}", "5000\n")

        lines = query(host, "memory.used,memory.free", "noheader", "nounits")

        assert lines[0] == "1, 143070"
        assert lines[1] == "1235, 141836"

    def test_compute_processes(self, host: LabHost) -> None:
        host.write(f"run/lab/gpu/7/{os.getpid()}", "4096")
        uuid = query(host, "uuid", "noheader")[7]

        lines = host.smi(
            "--query-compute-apps=pid,used_memory,gpu_uuid,process_name", "--format=csv"
        ).splitlines()

        assert lines[0] == "pid, used_gpu_memory [MiB], gpu_uuid, process_name"
        assert lines[1].startswith(f"{os.getpid()}, 4096 MiB, {uuid}, ")
        assert len(lines) == 2

    def test_no_compute_processes(self, host: LabHost) -> None:
        assert host.smi("--query-compute-apps=pid", "--format=csv,noheader") == ""

    def test_persistence_mode_is_that_of_a_living_daemon(self, host: LabHost) -> None:
        host.write("run/nvidia-persistenced/nvidia-persistenced.pid", f"{os.getpid()}\n")

        assert query(host, "persistence_mode", "noheader")[0] == "Enabled"


class TestDriverStates:
    BROKEN = (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
        "Make sure that the latest NVIDIA driver is installed and running.\n\n"
    )
    MISMATCH = (
        "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95\n"
    )

    @pytest.mark.parametrize(
        ("state", "arguments", "status", "says"),
        [
            ("broken", [], 9, BROKEN),
            ("broken", ["--version"], 9, BROKEN),
            ("mismatch", [], 18, MISMATCH),
            ("mismatch", ["-L"], 18, MISMATCH),
        ],
    )
    def test_as_described(
        self, host: LabHost, state: str, arguments: list[str], status: int, says: str
    ) -> None:
        host.hardware(smi=state)

        assert host.smi_fails(*arguments) == (status, says)

    def test_no_gpu_answers(self, host: LabHost) -> None:
        host.hardware(smi="absent")

        answer = host.smi_fails("--query-gpu=index", "--format=csv")

        assert answer == (6, "No devices were found\n")

    def test_no_module_is_loaded(self, host: LabHost) -> None:
        host.unload()

        assert host.smi_fails() == (9, self.BROKEN)

    def test_the_module_of_another_version_is_loaded(self, host: LabHost) -> None:
        host.load("570.172.08")

        assert host.smi_fails("-L") == (18, self.MISMATCH)

    def test_gpus_that_fell_off_the_bus(self, host: LabHost) -> None:
        before = query(host, "uuid", "noheader")
        host.hardware(missing=[6])

        lines = query(host, "index,uuid", "noheader")

        expected = [uuid for position, uuid in enumerate(before[:8]) if position != 6]
        assert lines[:-1] == [f"{index}, {uuid}" for index, uuid in enumerate(expected)]


class TestFabric:
    def fabric(self, host: LabHost) -> list[str]:
        lines = host.smi("-q", "-i", "0").split("\n")
        start = lines.index("    Fabric")
        return lines[start + 1 : start + 3]

    def test_before_the_fabric_manager_has_run(self, host: LabHost) -> None:
        assert self.fabric(host) == [
            "        State                             : In Progress",
            "        Status                            : N/A",
        ]

    def test_without_switches(self, host: LabHost) -> None:
        host.hardware(nvswitch=0)

        assert self.fabric(host)[0] == "        State                             : N/A"

    def test_fabric_manager_runs_until_it_is_told_to_stop(self, host: LabHost) -> None:
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notified.settimeout(20)
        notified.bind(str(host.root / "notify"))
        with notified:
            process = subprocess.Popen(
                host.command("nv_fabricmanager.py", "-c", "/etc/fabricmanager.cfg"),
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    **host.environment,
                    "NOTIFY_SOCKET": str(host.root / "notify"),
                },
            )
            assert notified.recv(64) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)

        assert process.returncode == 0
        assert "Successfully configured all the available NVSwitches" in said
        assert self.fabric(host) == [
            "        State                             : Completed",
            "        Status                            : Success",
        ]

    def test_fabric_manager_of_another_version(self, host: LabHost) -> None:
        host.load("570.172.08")

        result = host.run("nv_fabricmanager.py")

        assert result.returncode == 1
        assert result.stdout.endswith(
            "fabric manager NVIDIA GPU driver interface version 580.95.05 don't match with driver "
            "version 570.172.08. Please update with matching NVIDIA driver package.\n"
        )

    def test_fabric_manager_without_switches(self, host: LabHost) -> None:
        host.hardware(nvswitch=0)

        result = host.run("nv_fabricmanager.py")

        assert result.returncode == 1
        assert result.stdout.endswith(
            "request to query NVSwitch device information from NVSwitch driver failed with error:"
            "WARNING Nothing to do [NV_WARN_NOTHING_TO_DO]\n"
        )

    def test_fabric_manager_version(self, host: LabHost) -> None:
        result = host.run("nv_fabricmanager.py", "--version")

        assert result.stdout == "Fabric Manager version is : 580.95.05\n"


class TestPersistenceDaemon:
    @pytest.mark.parametrize("prepare", [LabHost.unload, lambda host: host.load("570.172.08")])
    def test_fails_without_a_driver_of_its_version(
        self, host: LabHost, prepare: Callable[[LabHost], None]
    ) -> None:
        prepare(host)

        result = host.run("nvidia_persistenced.py", "--verbose")

        assert result.returncode == 1
        assert (
            "Failed to query NVIDIA devices. Please ensure that the NVIDIA device files "
            "(/dev/nvidia*) exist, and that user " in result.stdout
        )


class TestModule:
    def headers(self, host: LabHost) -> None:
        host.write(f"lib/modules/{os.uname().release}/build/Makefile", "")

    def module(self, host: LabHost, action: str, version: str = VERSION) -> str:
        result = host.run("nvidia_module.py", action, version=version)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    def test_is_not_built_without_the_kernels_headers(self, host: LabHost) -> None:
        host.unload()

        said = self.module(host, "build")
        self.module(host, "load")

        assert "kernel headers for this kernel do not seem to be installed" in said
        assert host.smi_fails() == (9, TestDriverStates.BROKEN)

    def test_that_is_loaded_stays_until_the_next_boot(self, host: LabHost) -> None:
        self.headers(host)
        host.load("570.172.08")

        self.module(host, "build")
        self.module(host, "load")
        assert host.read("run/lab/nvidia-module-version") == "570.172.08\n"

        host.unload()
        self.module(host, "load")
        assert host.read("run/lab/nvidia-module-version") == f"{VERSION}\n"
        assert host.smi("-L")
        # Any user's process may say that it uses a GPU.
        assert (host.root / "run/lab/gpu").readlink() == Path("/dev/shm/lab-gpu")
        assert (host.root / "dev/shm/lab-gpu").stat().st_mode & 0o7777 == 0o1777

    def test_says_what_is_loaded_where_the_kernel_does(
        self, host: LabHost, program: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In words that the hosts' program reads."""
        self.headers(host)
        host.unload()
        self.module(host, "build", version="580.82.07")
        self.module(host, "load", version="580.82.07")
        self.module(host, "build")
        self.module(host, "load")

        monkeypatch.setattr(program, "DRIVER", host.root / "run/lab/proc-driver/nvidia/version")
        assert program.loaded_driver() == "580.82.07"

    def test_dkms_says_what_is_built(self, host: LabHost) -> None:
        self.headers(host)
        assert host.run("nvidia_dkms.py", "status").stdout == ""
        self.module(host, "build")

        said = host.run("nvidia_dkms.py", "status", "-k", "6.1.0-40-amd64").stdout

        assert said == f"nvidia/{VERSION}, 6.1.0-40-amd64, x86_64: installed\n"
        assert host.run("nvidia_dkms.py", "build").returncode == 1

    def test_is_not_loaded_without_a_gpu(self, host: LabHost) -> None:
        self.headers(host)
        host.unload()
        host.hardware(gpus=0)

        self.module(host, "build")
        self.module(host, "load")

        assert not (host.root / "run/lab/nvidia-module-version").exists()


class TestPackages:
    @pytest.fixture
    def packages(self) -> list[apt.StandIn]:
        return list(apt.standins(yaml.safe_load((apt.STANDINS / "packages.yaml").read_text())))

    def test_depend_on_each_other_at_their_own_version(self, packages: list[apt.StandIn]) -> None:
        built = {(package.name, package.package_version) for package in packages}

        needed = {
            match.groups()
            for package in packages
            for match in re.finditer(r"(\S+) \(= (\S+)\)", package.relations.get("Depends", ""))
        }

        assert needed
        assert needed <= built

    def test_the_fabric_managers_name_has_its_branch_before_580(
        self, packages: list[apt.StandIn]
    ) -> None:
        names = {
            package.version: package.name
            for package in packages
            if package.name.startswith("nvidia-fabricmanager")
        }

        assert names["570.172.08"] == "nvidia-fabricmanager-570"
        assert names["580.95.05"] == names["590.48.01"] == "nvidia-fabricmanager"

    def test_have_all_their_templates(self, packages: list[apt.StandIn]) -> None:
        for package in packages:
            for template in [*package.files, *package.scripts.values()]:
                assert (apt.STANDINS / template).is_file()
