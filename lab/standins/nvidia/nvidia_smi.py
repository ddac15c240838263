#!/usr/bin/python3
"""nvidia-smi on a lab host: the answers of the real one for the hardware that the lab describes.

Output and exit status are those of NVIDIA's tool (branches 570 to 590) in what this project reads:
the table, `-L`, `-q`, `--version`, `--query-gpu` and `--query-compute-apps` as CSV. The statuses of
its manual: 2 an invalid argument, 6 nothing found, 9 no driver; and NVML's 18, versions differ.

The hardware is /etc/lab/hardware.json. A stand-in service that uses a GPU says so by a file
/run/lab/gpu/<index>/<its process id> that holds its memory in MiB.
"""

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

VERSION = "@VERSION@"

ROOT = Path(os.environ.get("LAB_ROOT") or "/")
HARDWARE = Path(os.environ.get("LAB_HARDWARE") or ROOT / "etc/lab/hardware.json")
LOADED = ROOT / "run/lab/nvidia-module-version"
FABRIC = ROOT / "run/lab/nvidia-fabric"
PERSISTENCED = ROOT / "run/nvidia-persistenced/nvidia-persistenced.pid"
USERS = ROOT / "run/lab/gpu"
MACHINE_ID = ROOT / "etc/machine-id"
PCI_DEVICES = ROOT / "sys/bus/pci/devices"

OK, INVALID_ARGUMENT, NOT_FOUND, NO_DRIVER, VERSION_MISMATCH = 0, 2, 6, 9, 18

# The newest CUDA that a branch's driver can run.
CUDA_OF_BRANCH = {"570": "12.8", "580": "13.0", "590": "13.1"}

# What a driver without work holds of a GPU, in MiB: in use, and reserved for itself.
IDLE_MIB = 1
RESERVED_MIB = 700

# GPUs of an eight-GPU board, where sysfs does not tell.
BUS_NUMBERS = (0x18, 0x2A, 0x3A, 0x5D, 0x9A, 0xAB, 0xBA, 0xDB)

COMMUNICATION = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
    "the latest NVIDIA driver is installed and running.\n\n"
)
MISMATCH = (
    "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: {nvml}\n"
)
NO_DEVICES = "No devices were found\n"
BAD_COMBINATION = "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n"

TABLE_HEAD = """\
{time}
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {version:<22} Driver Version: {version:<14} CUDA Version: {cuda:<8} |
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
|                                         |                        |               MIG M. |
|=========================================+========================+======================|
"""
TABLE_ROW = (
    "| {gpu.index:>3}  {gpu.name:<31}{mode:>3} |   {gpu.bus_id:>16} Off |{errors:>21} |\n"
    "| N/A {gpu.temperature_c:>4}C    P0 {gpu.power_w:>14.0f}W / {gpu.model.power_w:>4}W "
    "| {gpu.used_mib:>7}MiB / {gpu.total_mib:>6}MiB | {gpu.utilization:>6}%      Default |\n"
    "|{none:41}|{none:24}|{mig:>21} |\n"
    "+-----------------------------------------+------------------------+----------------------+\n"
)
PROCESSES_HEAD = """\
{none:89}
+-----------------------------------------------------------------------------------------+
| Processes:                                                                              |
|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |
|        ID   ID                                                               Usage      |
|=========================================================================================|
"""
PROCESS_ROW = "|  {index:>3}   N/A  N/A {user.pid:>15}      C   {name:<35}{user.used_mib:>8}MiB |\n"
NO_PROCESS = """\
|  No running processes found                                                             |
"""
TABLE_END = """\
+-----------------------------------------------------------------------------------------+
"""


@dataclass(frozen=True)
class Model:
    """A GPU model: PCI device and subsystem (vendor 0x10de), highest power draw in watts."""

    device: int
    subsystem: int
    power_w: int


MODELS = {
    "NVIDIA A100-SXM4-80GB": Model(0x20B2, 0x1463, 400),
    "NVIDIA H20": Model(0x2329, 0x198B, 500),
    "NVIDIA H20-3e": Model(0x232C, 0x2063, 500),
    "NVIDIA H800": Model(0x2324, 0x17A6, 700),
    "NVIDIA H100 80GB HBM3": Model(0x2330, 0x16C1, 700),
    "NVIDIA H200": Model(0x2335, 0x18BE, 700),
}
UNKNOWN_MODEL = Model(0, 0, 700)


@dataclass(frozen=True)
class User:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    used_mib: int


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it; indices count the GPUs that answer, in order of bus id."""

    index: int
    name: str
    uuid: str
    serial: str
    bus_id: str
    model: Model
    total_mib: int
    compute_capability: str
    persistence: bool
    fabric: tuple[str, str]
    users: tuple[User, ...]

    @property
    def used_mib(self) -> int:
        """Memory in use, in MiB."""
        return min(self.total_mib, IDLE_MIB + sum(user.used_mib for user in self.users))

    @property
    def free_mib(self) -> int:
        """Memory that a process can still get, in MiB."""
        return max(0, self.total_mib - RESERVED_MIB - self.used_mib)

    @property
    def utilization(self) -> int:
        """Share of the time in which a kernel ran, in percent; the lab's services never compute."""
        return 0

    @property
    def power_w(self) -> float:
        """Power draw in watts: idle, or with a model loaded."""
        return 118.41 if self.users else 74.58

    @property
    def temperature_c(self) -> int:
        """Temperature of the GPU in degrees Celsius."""
        return 36 if self.users else 30


def nvml_version() -> str:
    """The version that NVML reports of itself: the first two parts of the driver's."""
    return ".".join(VERSION.split(".")[:2])


def cuda_version() -> str:
    """The newest CUDA version of this driver."""
    return CUDA_OF_BRANCH.get(VERSION.partition(".")[0], "N/A")


def alive(pid: int) -> bool:
    """Whether a process exists, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def process_name(pid: int) -> str:
    """The process's first argument, which is where programs put a title of their own."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return "[Not Found]"


def users_of(index: int) -> tuple[User, ...]:
    """The living processes that say they hold memory of the GPU with this index."""
    users = []
    directory = USERS / str(index)
    for file in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not file.name.isdigit() or not alive(int(file.name)):
            continue
        try:
            used_mib = int(float(file.read_text()))
        except (OSError, ValueError):
            continue
        users.append(User(int(file.name), process_name(int(file.name)), used_mib))
    return tuple(users)


def bus_ids(count: int, missing: set[int]) -> list[str]:
    """Bus ids of the GPUs that are there, from sysfs if it shows as many, else made up."""
    found = []
    for device in sorted(PCI_DEVICES.iterdir()) if PCI_DEVICES.is_dir() else []:
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x0302"):
            domain, bus, function = device.name.split(":")
            found.append(f"{int(domain, 16):08X}:{bus.upper()}:{function.upper()}")
    if len(found) == count - len(missing):
        return found
    if len(found) != count:
        found = [f"00000000:{bus:02X}:00.0" for bus in BUS_NUMBERS[:count]]
        found += [f"00000001:{bus:02X}:00.0" for bus in range(1, count - len(BUS_NUMBERS) + 1)]
    return [bus_id for position, bus_id in enumerate(found) if position not in missing]


def gpus(hardware: dict[str, object]) -> list[Gpu]:
    """The GPUs that answer, on a machine with this hardware."""
    count = int(str(hardware.get("gpus", 0)))
    missing_value = hardware.get("missing", [])
    missing = set(missing_value) if isinstance(missing_value, list) else set()
    missing &= set(range(count))
    name = str(hardware.get("name", "NVIDIA H200"))
    try:
        machine = MACHINE_ID.read_text().strip()
    except OSError:
        machine = os.uname().nodename
    try:
        persistence = alive(int(PERSISTENCED.read_text()))
    except (OSError, ValueError):
        persistence = False
    fabric = ("N/A", "N/A")
    if hardware.get("nvswitch"):
        fabric = ("Completed", "Success") if FABRIC.exists() else ("In Progress", "N/A")

    positions = [position for position in range(count) if position not in missing]
    answering = []
    for index, (position, bus_id) in enumerate(
        zip(positions, bus_ids(count, missing), strict=True)
    ):
        identity = uuid.uuid5(uuid.NAMESPACE_OID, f"{machine}/{position}")
        answering.append(
            Gpu(
                index=index,
                name=name,
                uuid=f"GPU-{identity}",
                serial=f"{identity.int % 10**13:013d}",
                bus_id=bus_id,
                model=MODELS.get(name, UNKNOWN_MODEL),
                total_mib=int(str(hardware.get("memory_mib", 0))),
                compute_capability=str(hardware.get("compute_capability", "9.0")),
                persistence=persistence,
                fabric=fabric,
                users=users_of(index),
            )
        )
    return answering


def on(flag: bool) -> str:
    """NVIDIA's word for a mode that is on or off."""
    return "Enabled" if flag else "Disabled"


@dataclass(frozen=True)
class Field:
    """A column of `--query-gpu`: its heading's name, its unit, its value."""

    name: str
    value: Callable[[Gpu], str]
    unit: str = ""


NOT_AVAILABLE = "[N/A]"

FIELDS = [
    Field("timestamp", lambda gpu: time.strftime("%Y/%m/%d %H:%M:%S.000")),
    Field("driver_version", lambda gpu: VERSION),
    # Of no single GPU: query_gpus fills it in.
    Field("count", lambda gpu: ""),
    Field("name", lambda gpu: gpu.name),
    Field("serial", lambda gpu: gpu.serial),
    Field("uuid", lambda gpu: gpu.uuid),
    Field("pci.bus_id", lambda gpu: gpu.bus_id),
    Field("pci.domain", lambda gpu: f"0x{gpu.bus_id[4:8]}"),
    Field("pci.bus", lambda gpu: f"0x{gpu.bus_id[9:11]}"),
    Field("pci.device", lambda gpu: f"0x{gpu.bus_id[12:14]}"),
    Field("pci.device_id", lambda gpu: f"0x{gpu.model.device:04X}10DE"),
    Field("pci.sub_device_id", lambda gpu: f"0x{gpu.model.subsystem:04X}10DE"),
    Field("pcie.link.gen.current", lambda gpu: "5"),
    Field("pcie.link.gen.max", lambda gpu: "5"),
    Field("pcie.link.width.current", lambda gpu: "16"),
    Field("pcie.link.width.max", lambda gpu: "16"),
    Field("index", lambda gpu: str(gpu.index)),
    Field("display_mode", lambda gpu: "Disabled"),
    Field("display_active", lambda gpu: "Disabled"),
    Field("persistence_mode", lambda gpu: on(gpu.persistence)),
    Field("accounting.mode", lambda gpu: "Disabled"),
    Field("vbios_version", lambda gpu: "96.00.A5.00.03"),
    Field("fan.speed", lambda gpu: NOT_AVAILABLE, "%"),
    Field("pstate", lambda gpu: "P0"),
    Field("memory.total", lambda gpu: str(gpu.total_mib), "MiB"),
    Field("memory.reserved", lambda gpu: str(RESERVED_MIB), "MiB"),
    Field("memory.used", lambda gpu: str(gpu.used_mib), "MiB"),
    Field("memory.free", lambda gpu: str(gpu.free_mib), "MiB"),
    Field("compute_mode", lambda gpu: "Default"),
    Field("compute_cap", lambda gpu: gpu.compute_capability),
    Field("utilization.gpu", lambda gpu: str(gpu.utilization), "%"),
    Field("utilization.memory", lambda gpu: "0", "%"),
    Field("ecc.mode.current", lambda gpu: "Enabled"),
    Field("ecc.mode.pending", lambda gpu: "Enabled"),
    Field("ecc.errors.corrected.volatile.total", lambda gpu: "0"),
    Field("ecc.errors.corrected.aggregate.total", lambda gpu: "0"),
    Field("ecc.errors.uncorrected.volatile.total", lambda gpu: "0"),
    Field("ecc.errors.uncorrected.aggregate.total", lambda gpu: "0"),
    Field("temperature.gpu", lambda gpu: str(gpu.temperature_c)),
    Field("temperature.memory", lambda gpu: str(gpu.temperature_c - 3)),
    Field("power.management", lambda gpu: "Enabled"),
    Field("power.draw", lambda gpu: f"{gpu.power_w:.2f}", "W"),
    Field("power.limit", lambda gpu: f"{gpu.model.power_w:.2f}", "W"),
    Field("enforced.power.limit", lambda gpu: f"{gpu.model.power_w:.2f}", "W"),
    Field("power.default_limit", lambda gpu: f"{gpu.model.power_w:.2f}", "W"),
    Field("power.max_limit", lambda gpu: f"{gpu.model.power_w:.2f}", "W"),
    Field("clocks.current.graphics", lambda gpu: "345", "MHz"),
    Field("clocks.current.sm", lambda gpu: "345", "MHz"),
    Field("clocks.current.memory", lambda gpu: "2619", "MHz"),
    Field("clocks.max.graphics", lambda gpu: "1980", "MHz"),
    Field("clocks.max.sm", lambda gpu: "1980", "MHz"),
    Field("clocks.max.memory", lambda gpu: "2619", "MHz"),
    Field("mig.mode.current", lambda gpu: "Disabled"),
    Field("mig.mode.pending", lambda gpu: "Disabled"),
    Field("gsp.mode.current", lambda gpu: "Enabled"),
    Field("gsp.mode.default", lambda gpu: "Enabled"),
    Field("fabric.state", lambda gpu: gpu.fabric[0]),
    Field("fabric.status", lambda gpu: gpu.fabric[1]),
]
# Other names that the tool takes for a column; the heading is the column's own.
ALIASES = {
    "gpu_name": "name",
    "gpu_serial": "serial",
    "gpu_uuid": "uuid",
    "gpu_bus_id": "pci.bus_id",
    "clocks.gr": "clocks.current.graphics",
    "clocks.sm": "clocks.current.sm",
    "clocks.mem": "clocks.current.memory",
    "clocks.max.gr": "clocks.max.graphics",
    "clocks.max.mem": "clocks.max.memory",
}
COLUMNS = {column.name: column for column in FIELDS}
COLUMNS.update({alias: COLUMNS[name] for alias, name in ALIASES.items()})

APP_FIELDS: dict[str, tuple[str, str, Callable[[Gpu, User], str]]] = {
    "timestamp": ("timestamp", "", lambda gpu, user: time.strftime("%Y/%m/%d %H:%M:%S.000")),
    "gpu_name": ("gpu_name", "", lambda gpu, user: gpu.name),
    "gpu_bus_id": ("gpu_bus_id", "", lambda gpu, user: gpu.bus_id),
    "gpu_serial": ("gpu_serial", "", lambda gpu, user: gpu.serial),
    "gpu_uuid": ("gpu_uuid", "", lambda gpu, user: gpu.uuid),
    "pid": ("pid", "", lambda gpu, user: str(user.pid)),
    "process_name": ("process_name", "", lambda gpu, user: user.name),
    "used_gpu_memory": ("used_gpu_memory", "MiB", lambda gpu, user: str(user.used_mib)),
}
APP_FIELDS["name"] = APP_FIELDS["process_name"]
APP_FIELDS["used_memory"] = APP_FIELDS["used_gpu_memory"]


@dataclass
class Request:
    """A command line, taken apart."""

    action: str = "table"
    fields: list[str] = field(default_factory=list)
    format: set[str] = field(default_factory=set)
    ids: list[str] = field(default_factory=list)


ACTIONS = {"-L": "list", "--list-gpus": "list", "-q": "details", "--query": "details"}
ACTIONS |= {"-h": "help", "--help": "help", "--version": "version"}
QUERIES = {"--query-gpu": "gpus", "--query-compute-apps": "apps"}


def csv(headings: list[tuple[str, str]], rows: list[list[str]], options: set[str]) -> str:
    """Rows in the tool's CSV: units in the cells and headings unless told otherwise."""
    lines = []
    with_units = "nounits" not in options
    if "noheader" not in options:
        lines.append(", ".join(f"{name} [{unit}]" if unit else name for name, unit in headings))
    for row in rows:
        cells = [
            f"{value} {unit}" if unit and with_units and value != NOT_AVAILABLE else value
            for value, (_, unit) in zip(row, headings, strict=True)
        ]
        lines.append(", ".join(cells))
    return "".join(line + "\n" for line in lines)


def query_gpus(request: Request, selected: list[Gpu], count: int) -> str:
    """The answer to `--query-gpu`."""
    columns = [COLUMNS[name] for name in request.fields]
    rows = [
        [str(count) if column.name == "count" else column.value(gpu) for column in columns]
        for gpu in selected
    ]
    return csv([(column.name, column.unit) for column in columns], rows, request.format)


def query_apps(request: Request, selected: list[Gpu]) -> str:
    """The answer to `--query-compute-apps`."""
    columns = [APP_FIELDS[name] for name in request.fields]
    rows = [[value(gpu, user) for _, _, value in columns] for gpu in selected for user in gpu.users]
    return csv([(name, unit) for name, unit, _ in columns], rows, request.format)


def listing(selected: list[Gpu]) -> str:
    """The answer to `-L`."""
    return "".join(f"GPU {gpu.index}: {gpu.name} (UUID: {gpu.uuid})\n" for gpu in selected)


def version() -> str:
    """The answer to `--version`."""
    lines = {
        "NVIDIA-SMI version": VERSION,
        "NVML version": nvml_version(),
        "DRIVER version": VERSION,
        "CUDA Version": cuda_version(),
    }
    return "".join(f"{name:<20}: {value}\n" for name, value in lines.items())


def table(selected: list[Gpu]) -> str:
    """The answer without arguments."""
    text = TABLE_HEAD.format(
        time=time.strftime("%a %b %e %H:%M:%S %Y       "), version=VERSION, cuda=cuda_version()
    )
    for gpu in selected:
        text += TABLE_ROW.format(
            gpu=gpu, mode="On" if gpu.persistence else "Off", errors=0, mig="Disabled", none=""
        )
    text += PROCESSES_HEAD.format(none="")
    rows = [
        PROCESS_ROW.format(index=gpu.index, user=user, name=user.name[:34])
        for gpu in selected
        for user in gpu.users
    ]
    return text + "".join(rows or [NO_PROCESS]) + TABLE_END


def details(selected: list[Gpu], count: int) -> str:
    """The answer to `-q`: the sections of the real one that tell what the lab knows."""

    def row(depth: int, name: str, value: str | None = None) -> str:
        text = "    " * depth + name
        return f"{text}\n" if value is None else f"{text:<42}: {value}\n"

    text = "\n==============NVSMI LOG==============\n\n"
    text += row(0, "Timestamp", time.strftime("%a %b %e %H:%M:%S %Y"))
    text += row(0, "Driver Version", VERSION) + row(0, "CUDA Version", cuda_version()) + "\n"
    text += row(0, "Attached GPUs", str(count))
    for gpu in selected:
        text += f"GPU {gpu.bus_id}\n"
        text += row(1, "Product Name", gpu.name) + row(1, "Product Brand", "NVIDIA")
        text += row(1, "Persistence Mode", on(gpu.persistence))
        text += row(1, "MIG Mode") + row(2, "Current", "Disabled") + row(2, "Pending", "Disabled")
        text += row(1, "Serial Number", gpu.serial) + row(1, "GPU UUID", gpu.uuid)
        text += row(1, "Minor Number", str(gpu.index)) + row(1, "VBIOS Version", "96.00.A5.00.03")
        text += row(1, "GSP Firmware Version", VERSION)
        text += row(1, "PCI") + row(2, "Device Id", f"0x{gpu.model.device:04X}10DE")
        text += row(2, "Bus Id", gpu.bus_id)
        text += row(2, "Sub System Id", f"0x{gpu.model.subsystem:04X}10DE")
        text += row(1, "Performance State", "P0")
        text += row(1, "FB Memory Usage") + row(2, "Total", f"{gpu.total_mib} MiB")
        text += row(2, "Reserved", f"{RESERVED_MIB} MiB") + row(2, "Used", f"{gpu.used_mib} MiB")
        text += row(2, "Free", f"{gpu.free_mib} MiB")
        text += row(1, "Compute Mode", "Default")
        text += row(1, "Utilization") + row(2, "Gpu", f"{gpu.utilization} %")
        text += row(2, "Memory", "0 %")
        text += row(1, "ECC Mode") + row(2, "Current", "Enabled") + row(2, "Pending", "Enabled")
        text += row(1, "Temperature") + row(2, "GPU Current Temp", f"{gpu.temperature_c} C")
        text += row(1, "GPU Power Readings") + row(2, "Power Draw", f"{gpu.power_w:.2f} W")
        text += row(2, "Current Power Limit", f"{gpu.model.power_w:.2f} W")
        registered = gpu.fabric[0] == "Completed"
        text += row(1, "Fabric") + row(2, "State", gpu.fabric[0]) + row(2, "Status", gpu.fabric[1])
        text += row(2, "CliqueId", "0" if registered else "N/A")
        text += row(2, "ClusterUUID", str(uuid.UUID(int=0)) if registered else "N/A")
        text += row(2, "Health") + row(3, "Bandwidth", "N/A")
        if not gpu.users:
            text += row(1, "Processes", "None")
            continue
        text += row(1, "Processes")
        for user in gpu.users:
            text += row(2, "GPU instance ID", "N/A") + row(2, "Compute instance ID", "N/A")
            text += row(2, "Process ID", str(user.pid)) + row(3, "Type", "C")
            text += row(3, "Name", user.name) + row(3, "Used GPU Memory", f"{user.used_mib} MiB")
    return text + "\n"


class RefusalError(Exception):
    """What the tool prints when it cannot answer, and its exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.text, self.status = text, status


def parse(arguments: list[str]) -> Request:
    """Take a command line apart; RefusalError if the tool would not understand it."""
    request = Request()
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if argument in ACTIONS:
            request.action = ACTIONS[argument]
            continue
        if name not in {"-i", "--id", "--format", *QUERIES}:
            text = f"Option \"{argument}\" is not recognized. Please run 'nvidia-smi -h'.\n\n"
            raise RefusalError(text, INVALID_ARGUMENT)
        if not equals and not queue:
            raise RefusalError(BAD_COMBINATION, INVALID_ARGUMENT)
        values = re.split(r"\s*,\s*", (value if equals else queue.pop(0)).strip())
        if name in QUERIES:
            request.action, request.fields = QUERIES[name], values
        elif name == "--format":
            request.format = set(values)
        else:
            request.ids = values
    check_query(request)
    return request


def check_query(request: Request) -> None:
    """RefusalError if a query's columns or format are unknown, or a format has no query."""
    known = {"gpus": set(COLUMNS), "apps": set(APP_FIELDS)}.get(request.action)
    if known is None:
        if request.format:
            raise RefusalError(BAD_COMBINATION, INVALID_ARGUMENT)
        return
    if "csv" not in request.format or not request.format <= {"csv", "noheader", "nounits"}:
        raise RefusalError(BAD_COMBINATION, INVALID_ARGUMENT)
    for name in request.fields:
        if name not in known:
            text = f'Field "{name}" is not a valid field to query.\n\n'
            raise RefusalError(text, INVALID_ARGUMENT)


def driver_state() -> dict[str, object]:
    """The hardware behind a driver that answers; RefusalError if it does not."""
    try:
        hardware: dict[str, object] = json.loads(HARDWARE.read_text())
    except (OSError, ValueError):
        hardware = {}
    state = hardware.get("smi", "ok")
    loaded = LOADED.read_text().strip() if LOADED.exists() else ""
    if state == "broken" or not loaded:
        raise RefusalError(COMMUNICATION, NO_DRIVER)
    if state == "mismatch" or loaded != VERSION:
        raise RefusalError(MISMATCH.format(nvml=nvml_version()), VERSION_MISMATCH)
    return {} if state == "absent" else hardware


def select(ids: list[str], present: list[Gpu]) -> list[Gpu]:
    """The GPUs that `-i` names, by index, UUID, serial number or bus id; all without it.

    RefusalError if there is none.
    """
    names = {name.lower() for name in ids}
    selected = [
        gpu
        for gpu in present
        if not names
        or names
        & {
            str(gpu.index),
            gpu.uuid.lower(),
            gpu.serial,
            gpu.bus_id.lower(),
            gpu.bus_id[4:].lower(),
        }
    ]
    if not selected:
        raise RefusalError(NO_DEVICES, NOT_FOUND)
    return selected


def answer(arguments: list[str]) -> str:
    """What the tool prints for a command line; RefusalError if it fails."""
    request = parse(arguments)
    if request.action == "help":
        return f"NVIDIA System Management Interface -- v{VERSION} (lab stand-in)\n"
    hardware = driver_state()
    if request.action == "version":
        return version()
    present = gpus(hardware)
    selected = select(request.ids, present)
    answers: dict[str, Callable[[], str]] = {
        "list": lambda: listing(selected),
        "details": lambda: details(selected, len(present)),
        "table": lambda: table(selected),
        "gpus": lambda: query_gpus(request, selected, len(present)),
        "apps": lambda: query_apps(request, selected),
    }
    return answers[request.action]()


def main(arguments: list[str]) -> int:
    """Answer a command line on standard output."""
    try:
        text, status = answer(arguments), OK
    except RefusalError as refusal:
        text, status = refusal.text, refusal.status
    sys.stdout.write(text)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
