"""The GPUs that a host of the lab pretends to have, and how its model server misbehaves.

Both are files in the host's /etc/lab, a directory of this machine that the host sees read-only;
so they can be changed at any time, whatever state the host is in.

    hardware.json   read by the stand-in nvidia-smi
    pci/            what the host sees as /sys/bus/pci/devices
    vllm.json       read by the stand-in vllm; absent if it behaves
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from lab import LabError

NVIDIA = "0x10de"

# PCI device ids of the GPUs of the supported host classes, as in the PCI ID database.
DEVICE_IDS = {
    "NVIDIA H20": "0x2329",
    "NVIDIA H20-3e": "0x232c",
    "NVIDIA H200": "0x2335",
    "NVIDIA H800": "0x2324",
    "NVIDIA H100 80GB HBM3": "0x2330",
}
GPU_CLASS = "0x030200"  # 3D controller
NVSWITCH_ID = "0x22a3"  # third generation, on boards with Hopper GPUs
NVSWITCH_CLASS = "0x068000"  # bridge, other

MAX_DEVICES = 16


class Smi(str, Enum):
    """What nvidia-smi does on a host: works, is not there, fails, or does not match the driver."""

    OK = "ok"
    ABSENT = "absent"
    BROKEN = "broken"
    MISMATCH = "mismatch"


class Mode(str, Enum):
    """How the stand-in model server misbehaves."""

    NEVER_READY = "never-ready"
    DIE_LOADING = "die-loading"
    HANG = "hang"
    GARBAGE = "garbage"
    SLOW = "slow"
    WRONG_MODEL = "wrong-model"
    ENGINE_DEATH = "engine-death"
    OOM = "oom"


@dataclass(frozen=True)
class Hardware:
    """The simulated GPUs of a host.

    gpus: number of GPUs
    name: their name, as nvidia-smi has it
    memory_mib: memory of each, MiB
    compute_capability: e.g. "9.0"
    nvswitch: number of NVSwitch chips; a host with any needs fabric manager
    smi: how nvidia-smi behaves
    missing: indexes of GPUs that fell off the bus: the PCI device is still listed, the driver
        does not see it
    """

    gpus: int = 8
    name: str = "NVIDIA H20-3e"
    memory_mib: int = 143771
    compute_capability: str = "9.0"
    nvswitch: int = 4
    smi: str = Smi.OK.value
    missing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no host has. Raises LabError."""
        if self.name not in DEVICE_IDS:
            raise LabError(f"GPU name {self.name!r} is not known; use one of {list(DEVICE_IDS)}")
        if self.smi not in {smi.value for smi in Smi}:
            raise LabError(f"smi {self.smi!r}: use one of {[smi.value for smi in Smi]}")
        for what, count in (("gpus", self.gpus), ("nvswitch", self.nvswitch)):
            if not 0 <= count <= MAX_DEVICES:
                raise LabError(f"{what} {count}: use 0 to {MAX_DEVICES}")
        if any(not 0 <= index < self.gpus for index in self.missing):
            raise LabError(f"missing {list(self.missing)}: the host has GPUs 0 to {self.gpus - 1}")


@dataclass(frozen=True)
class Rule:
    """One way to misbehave, for the servers that it matches; the first match counts.

    mode: what goes wrong
    port: only the server on this port; any if None
    version: only this vLLM version; any if None
    text: what the server writes to its log, or answers
    exit_code: what it exits with, if it dies
    seconds: how long it takes, if it is slow or dies after a while
    """

    mode: Mode
    port: int | None = None
    version: str | None = None
    text: str | None = None
    exit_code: int | None = None
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The rule as the stand-in reads it: what is not set is left out, but for the matches."""
        rule = {key: value for key, value in asdict(self).items() if value is not None}
        return {"port": self.port, "version": self.version, **rule, "mode": self.mode.value}


@dataclass(frozen=True)
class Behaviour:
    """How the stand-in model server of a host behaves.

    load_seconds: how long it loads a model before it serves, the stand-in's own default if None
    rules: ways in which it misbehaves, the first match first
    """

    load_seconds: float | None = None
    rules: tuple[Rule, ...] = field(default=())


def default(group: str | None) -> Hardware:
    """What the hosts of an inventory group have when they are new."""
    return Hardware() if group == "h20" else Hardware(gpus=0, nvswitch=0, smi=Smi.ABSENT.value)


def read(directory: Path) -> Hardware:
    """The hardware in a host's /etc/lab, `directory` being that directory on this machine."""
    values = json.loads((directory / "hardware.json").read_text(encoding="utf-8"))
    return Hardware(**{**values, "missing": tuple(values["missing"])})


def write(directory: Path, hardware: Hardware) -> None:
    """Give a host this hardware, at once; a running host sees it, too."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_pci_devices(directory / "pci", hardware)
    _replace(directory / "hardware.json", asdict(hardware))


def change(directory: Path, **changes: Any) -> Hardware:
    """Change some of a host's hardware and return what it has now.

    Raises LabError for values that no host has.
    """
    hardware = replace(read(directory), **changes)
    write(directory, hardware)
    return hardware


def misbehave(directory: Path, behaviour: Behaviour) -> None:
    """Have a host's model servers behave so from now on; running ones see it, too."""
    document: dict[str, Any] = {"rules": [rule.as_json() for rule in behaviour.rules]}
    if behaviour.load_seconds is not None:
        document["load_seconds"] = behaviour.load_seconds
    _replace(directory / "vllm.json", document)


def behave(directory: Path) -> None:
    """Have a host's model servers behave as they should."""
    (directory / "vllm.json").unlink(missing_ok=True)


def pci_devices(hardware: Hardware) -> dict[str, dict[str, str]]:
    """The host's NVIDIA PCI devices: address to the contents of its files in sysfs."""
    gpu = {"vendor": NVIDIA, "device": DEVICE_IDS[hardware.name], "class": GPU_CLASS}
    switch = {"vendor": NVIDIA, "device": NVSWITCH_ID, "class": NVSWITCH_CLASS}
    # Buses as far apart as they are on such boards, where each device is behind its own bridge.
    gpus = {f"0000:{0x18 + 8 * index:02x}:00.0": gpu for index in range(hardware.gpus)}
    switches = {f"0000:{0x07 + index:02x}:00.0": switch for index in range(hardware.nvswitch)}
    return {**switches, **gpus}


def _write_pci_devices(directory: Path, hardware: Hardware) -> None:
    # The directory itself must stay the same: running hosts have it mounted.
    directory.mkdir(exist_ok=True)
    devices = pci_devices(hardware)
    for entry in directory.iterdir():
        if entry.name not in devices:
            shutil.rmtree(entry)
    for address, files in devices.items():
        (directory / address).mkdir(exist_ok=True)
        for name, text in files.items():
            (directory / address / name).write_text(f"{text}\n", encoding="utf-8")


def _replace(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
