"""The driver on a host: when it is exchanged in a wave, how it is staged, and that it goes back.

apt, systemd and NVIDIA's tools are played by `Machine`; the program is the real one, its files are real.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OLD, NEW = "580.82.07", "580.95.05"
PERSISTENCED, FABRIC_MANAGER = "nvidia-persistenced.service", "nvidia-fabricmanager.service"
NAMES = ("nvidia-driver-cuda", "nvidia-fabricmanager")
LIBRARY = "libnvidia-ml1"


def done(stdout: str = "", returncode: int = 0, stderr: str = "") -> SimpleNamespace:
    """A finished command."""
    return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)


class Rebooted(BaseException):
    """The machine went down: what ran is no more, and nothing catches it."""


class Machine:
    """A host with a driver: packages, a module that stays until a reboot, daemons, and an apt."""

    def __init__(
        self, program: ModuleType, drivers: ModuleType, folder: Path, patch: pytest.MonkeyPatch
    ) -> None:
        self.program, self.drivers, self.folder = program, drivers, folder
        self.said: list[str] = []
        self.failing: set[str] = set()
        self.serving = ""
        self.held: set[str] = set()
        self.packages = dict.fromkeys((*NAMES, LIBRARY), f"{OLD}-1")
        self.loaded: str | None = OLD
        self.boots = 1
        self.broken: set[str] = set()
        self.mirror = {OLD, NEW}
        self.cuda = done("no CUDA torch\n")
        self.smi: dict[str, Any] | None = None
        self.fabric = "Completed, Success\n" * 8
        for name in ("RECORDS", "UNITS", "DRIVER", "NOUVEAU", "KERNELS", "DRAINING", "KEPT_JOBS"):
            patch.setattr(program, name, folder / name.lower())
        (folder / "records").mkdir()
        (folder / "python3").write_text("#!/bin/sh\n")
        (folder / "python3").chmod(0o755)
        patch.setattr(drivers, "APT_CACHE", folder / "cache")
        patch.setattr(drivers, "PREFERENCES", folder / "preferences.d")
        patch.setattr(drivers, "BOOT", folder / "boot_id")
        patch.setattr(drivers, "VERIFY_TIMEOUT_S", 0)
        patch.setattr(drivers, "FABRIC_TIMEOUT_S", 0)
        patch.setattr(drivers.shutil, "which", lambda name: None)
        patch.setattr(program, "goes_on_at_boot", lambda: True)
        patch.setattr(drivers.time, "sleep", lambda seconds: None)
        for module in (program, drivers.fleet_packages):
            patch.setattr(module, "run", self.run, raising=False)
        patch.setattr(program, "gpus_state", self.gpus)
        patch.setattr(program, "journal", lambda unit: [f"journal of {unit}"])
        patch.setattr(program, "packages_state", self.packages_state)
        patch.setattr(program, "package_manager", lambda: "apt")
        patch.setattr(
            program,
            "unit_state",
            lambda unit: {"active": "failed" if unit in self.failing else "active"},
        )
        self.boot()

    # -- what the program asks of the machine ----------------------------------------------------

    def run(self, *argv: str, **_: Any) -> SimpleNamespace:
        answers = {
            ("systemctl", "list-units"): done(self.serving),
            ("apt-mark", "showhold"): done("\n".join(sorted(self.held))),
            ("dpkg", "--audit"): done(),
        }
        known = answers.get((argv[0], argv[1]))
        if known:
            return known
        if argv[0] == "nvidia-smi":
            return done(self.fabric)
        if argv[0] == str(self.folder / "python3"):
            return self.cuda
        self.said.append(" ".join(argv))
        return self.act(argv)

    def act(self, argv: tuple[str, ...]) -> SimpleNamespace:
        if argv[:2] == ("apt-mark", "hold"):
            self.held |= set(argv[2:])
        if argv[:2] == ("apt-mark", "unhold"):
            self.held -= set(argv[2:])
        if argv == ("systemctl", "reboot"):
            self.boots += 1
            self.boot()
            raise Rebooted
        if argv[0] == "env":
            return self.download(argv)
        return self.apt(argv) if "install" in argv else done()

    def boot(self) -> None:
        (self.folder / "boot_id").write_text(f"{self.boots}\n")
        if self.boots > 1:
            self.loaded = self.packages["nvidia-driver-cuda"].partition("-")[0]
        text = (
            f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {self.loaded}  Release Build"
        )
        (self.folder / "driver").write_text(text if self.loaded else "")

    def gpus(self) -> dict[str, Any]:
        library = self.packages["nvidia-driver-cuda"].partition("-")[0]
        if self.smi is not None:
            return self.smi
        if self.loaded in self.broken:
            return {"error": "Unable to determine the device handle", "devices": None}
        if self.loaded != library:
            error = "Failed to initialize NVML: Driver/library version mismatch"
            return {"error": error, "devices": None}
        devices = [{"driver": library, "index": index} for index in range(8)]
        return {"error": None, "devices": devices}

    def packages_state(self, names: list[str]) -> dict[str, Any]:
        return {
            name: {"version": self.packages[name], "held": name in self.held}
            if name in self.packages
            else None
            for name in names
        }

    def apt(self, argv: tuple[str, ...]) -> SimpleNamespace:
        wanted = {}
        for word in argv[argv.index("install") + 1 :]:
            if word.endswith(".deb"):
                name, version, _ = Path(word).name.split("_")
                wanted[name] = version
            elif "=" in word and not word.startswith("-"):
                name, version = word.split("=")
                wanted |= {name: version, LIBRARY: version}
        if "-s" in argv or "--download-only" in argv:
            pool = self.program.driver_folder() / "packages"
            lines = []
            for name, version in wanted.items():
                if self.packages.get(name) != version:
                    now = f" [{self.packages[name]}]" if name in self.packages else ""
                    lines.append(f"Inst {name}{now} ({version} lab [amd64])")
                    if "-s" not in argv:
                        (pool / f"{name}_{version}_amd64.deb").write_text("deb")
            return done("\n".join(lines))
        self.packages |= wanted
        return done()

    def download(self, argv: tuple[str, ...]) -> SimpleNamespace:
        folder = Path(argv[1].removeprefix("--chdir="))
        name, version = argv[-1].split("=")
        if version.partition("-")[0] not in self.mirror:
            return done("", 100, f"E: Version '{version}' for '{name}' was not found")
        (folder / f"{name}_{version}_amd64.deb").write_text("deb")
        return done()

    def told(self, verb: str) -> list[str]:
        return [line for line in self.said if line.startswith(verb)]

    # -- what a test does ------------------------------------------------------------------------

    def request(self, version: str = NEW, **changes: Any) -> dict[str, Any]:
        return {
            "packages": dict.fromkeys(NAMES, f"{version}-1"),
            "mask": [],
            "unhold": [*NAMES, "nvidia-fabricmanager-570"],
            "lock": {},
            "start": [PERSISTENCED, FABRIC_MANAGER],
            "version": version,
            "gpus": 8,
            "nvswitch": True,
            "pin": {"path": str(self.folder / "preferences.d" / "pin"), "content": version},
            "reboot": "if-needed",
            "python": str(self.folder / "python3"),
            **changes,
        }

    def pin(self) -> str | None:
        path = self.folder / "preferences.d" / "pin"
        return path.read_text() if path.exists() else None

    def stage(self, request: dict[str, Any]) -> None:
        self.drivers.stage_driver(request)

    def exchange(self, request: dict[str, Any]) -> None:
        """As a cut-over does it, through all reboots. Raises HostError where it had to go back."""
        while True:
            exchange = self.program.under_way(request) or self.drivers.begin(request, {"a": 1})
            try:
                self.drivers.go_forward(exchange)
            except self.program.HostError as error:
                try:
                    self.drivers.go_back(exchange, str(error))
                except Rebooted:
                    continue
                self.drivers.finish(exchange)
                raise
            except Rebooted:
                continue
            self.drivers.finish(exchange)
            return


@pytest.fixture
def drivers(program: ModuleType) -> ModuleType:
    import importlib

    return importlib.import_module("fleet_driver")


@pytest.fixture
def machine(
    program: ModuleType, drivers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    (tmp_path / "preferences.d").mkdir()
    (tmp_path / "preferences.d" / "pin").write_text(OLD)
    return Machine(program, drivers, tmp_path, monkeypatch)


# ------------------------------------------------------------------------------ before the waves


def first(machine: Machine, monkeypatch: pytest.MonkeyPatch, *, installed: bool = True) -> None:
    """A host on which the declared driver works, or will once it is installed."""
    machine.packages = dict.fromkeys(machine.packages, f"{NEW}-1")
    machine.loaded = NEW
    monkeypatch.setattr(machine.drivers.fleet_packages, "packages", lambda request: installed)


def test_every_daemon_is_enabled_before_any_is_started(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(machine, monkeypatch)
    machine.failing = {PERSISTENCED}

    with pytest.raises(
        machine.program.HostError, match=f"{PERSISTENCED} does not run: .*\njournal"
    ):
        machine.drivers.driver(machine.request())

    assert machine.told("systemctl") == [
        f"systemctl enable --quiet {PERSISTENCED} {FABRIC_MANAGER}",
        f"systemctl restart {PERSISTENCED}",
        f"systemctl restart {FABRIC_MANAGER}",
    ]


def test_what_nvidia_smi_says_comes_before_what_the_daemons_say(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(machine, monkeypatch)
    machine.failing, machine.loaded = {PERSISTENCED}, OLD

    with pytest.raises(
        machine.program.HostError, match=r"driver 580\.95\.05: .*Driver/library version mismatch"
    ):
        machine.drivers.driver(machine.request())


@pytest.mark.parametrize(
    ("installed", "serving", "verb"),
    [
        (True, "", "restart"),
        (True, "minimax-m25.service loaded active running vLLM\n", "start"),
        (True, "minimax-m25.service loaded deactivating stop-sigterm vLLM\n", "start"),
        (True, "minimax-proxy.service a\nminimax-job-driver-1.service a\n", "restart"),
        (False, "", "start"),
    ],
    ids=["installed", "serving", "draining", "not a service", "nothing installed"],
)
def test_a_daemon_is_never_restarted_under_services(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, installed: bool, serving: str, verb: str
) -> None:
    first(machine, monkeypatch, installed=installed)
    machine.serving = serving

    machine.drivers.driver(machine.request())

    assert machine.told("systemctl ")[1:] == [
        f"systemctl {verb} {PERSISTENCED}",
        f"systemctl {verb} {FABRIC_MANAGER}",
    ]


def test_only_holds_of_driver_packages_are_released(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(machine, monkeypatch)
    machine.held = {"linux-image-amd64", "nvidia-container-toolkit", "nvidia-fabricmanager-570"}

    machine.drivers.driver(machine.request())

    assert machine.told("apt-mark") == ["apt-mark unhold nvidia-fabricmanager-570"]


def test_a_gpu_that_does_not_answer_is_counted_and_quoted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(machine, monkeypatch)
    lost = "Unable to determine the device handle for GPU0000:65:00.0"
    machine.smi = {"error": lost, "devices": [{"driver": NEW}] * 7}

    with pytest.raises(machine.program.HostError, match=f"sees 7/8 GPUs .*says: {lost}; kernel"):
        machine.drivers.driver(machine.request())


# ----------------------------------------------------------------------------------- what is due


def test_the_loaded_module_is_known_by_its_own_words(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel's file has them, of an open module and of the one before."""
    words = {
        "NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)": NEW,
        "NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024": "550.54.15",
        "NVIDIA UNIX Open Kernel Module for x86_64  590.44  Release Build": "590.44",
    }
    monkeypatch.setattr(program, "DRIVER", tmp_path / "version")
    assert program.loaded_driver() is None
    for said, version in words.items():
        (tmp_path / "version").write_text(f"NVRM version: {said}\nGCC version:  gcc 12.2.0\n")
        assert program.loaded_driver() == version


def test_a_host_whose_driver_is_the_declared_one_exchanges_nothing(machine: Machine) -> None:
    assert machine.program.driver_due(machine.request(OLD)) is None
    assert machine.program.driver_due(None) is None


def test_a_bare_host_gets_its_driver_before_the_waves(machine: Machine) -> None:
    machine.loaded, machine.packages = None, {}
    machine.boot()

    assert machine.program.driver_due(machine.request()) is None


def test_another_version_is_exchanged_with_a_reboot_and_every_version_is_said(
    machine: Machine,
) -> None:
    machine.packages["nvidia-fabricmanager"] = f"{NEW}-1"

    assert machine.program.driver_due(machine.request()) == {
        "why": f"kernel module {OLD}, nvidia-driver-cuda {OLD}-1, nvidia-fabricmanager {NEW}-1; "
        f"{NEW} is declared",
        "reboot": True,
        "staged": False,
    }


def test_packages_that_changed_behind_our_back_are_exchanged_without_a_reboot(
    machine: Machine,
) -> None:
    machine.drivers.note(machine.request(OLD))
    machine.packages = dict.fromkeys(machine.packages, f"{NEW}-1")

    due = machine.program.driver_due(machine.request(OLD))

    assert due["why"] == (
        f"kernel module {OLD}, packages {NEW}-1; {OLD} is declared; it was changed since it was installed"
    )
    assert due["reboot"] is False


def test_a_package_is_not_installed_under_services(machine: Machine) -> None:
    del machine.packages["nvidia-fabricmanager"]

    due = machine.program.driver_due(machine.request(OLD))

    assert "nvidia-fabricmanager not installed" in due["why"]


def test_nouveau_keeps_the_module_out_until_a_reboot(machine: Machine) -> None:
    machine.loaded, machine.packages = None, {}
    machine.boot()
    machine.program.NOUVEAU.mkdir()

    due = machine.program.driver_due(machine.request())

    assert due["why"].startswith("nouveau is loaded, packages not installed")
    assert due["reboot"] is True


@pytest.mark.parametrize(
    ("images", "newest"),
    [
        (["vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-40-amd64"], "6.1.0-40-amd64"),
        (
            [
                "vmlinuz-0-rescue-3f",
                "vmlinuz-5.14.0-503.el9.x86_64",
                "vmlinuz-5.14.0-70.el9.x86_64",
            ],
            "5.14.0-503.el9.x86_64",
        ),
    ],
)
def test_the_kernel_of_the_next_boot_is_the_newest(
    machine: Machine, images: list[str], newest: str
) -> None:
    assert machine.program.next_kernel() == machine.program.platform.release()
    machine.program.KERNELS.mkdir()
    for image in images:
        (machine.program.KERNELS / image).touch()

    assert machine.program.next_kernel() == newest
    assert machine.program.kernel_without_headers() == newest


# --------------------------------------------------------------------------------------- staging


def test_both_drivers_lie_on_the_host_before_anything_is_stopped(machine: Machine) -> None:
    request = machine.request()
    assert not machine.program.driver_staged(request)

    machine.stage(request)

    pool = machine.program.driver_folder() / "packages"
    staged = {tuple(file.name.split("_")[:2]) for file in pool.glob("*.deb")}
    assert staged == {(name, f"{v}-1") for name in (*NAMES, LIBRARY) for v in (OLD, NEW)}
    assert machine.packages == dict.fromkeys((*NAMES, LIBRARY), f"{OLD}-1")
    assert machine.pin() == OLD
    assert machine.program.driver_staged(request)
    assert machine.program.driver_due(request)["staged"]


def test_what_was_staged_counts_only_for_what_was_installed_then(machine: Machine) -> None:
    request = machine.request()
    machine.stage(request)
    machine.packages["nvidia-driver-cuda"] = "580.90-1"

    assert not machine.program.driver_staged(request)
    with pytest.raises(machine.program.HostError, match="is not staged, or packages changed since"):
        machine.drivers.begin(request, {})


def test_a_present_driver_that_cannot_be_had_is_an_error_before_anything_is_touched(
    machine: Machine,
) -> None:
    machine.mirror = {NEW}

    with pytest.raises(machine.program.HostError) as raised:
        machine.stage(machine.request())

    (line,) = str(raised.value).splitlines()
    assert f"going back would not be possible: nvidia-driver-cuda {OLD}-1" in line
    assert "put its .deb into" in line
    assert not machine.program.driver_staged(machine.request())


def test_apts_own_cache_does_where_no_source_has_the_present_driver(machine: Machine) -> None:
    machine.mirror = {NEW}
    (machine.folder / "cache").mkdir()
    for name in (*NAMES, LIBRARY):
        (machine.folder / "cache" / f"{name}_{OLD}-1_amd64.deb").write_text("deb")

    machine.stage(machine.request())

    assert machine.program.driver_staged(machine.request())


def test_a_driver_that_is_in_no_package_is_refused(machine: Machine) -> None:
    machine.packages = {}

    with pytest.raises(
        machine.program.HostError, match=r"580\.82\.07 is loaded and belongs to no pack"
    ):
        machine.stage(machine.request())


def test_apts_plan_is_read(drivers: ModuleType) -> None:
    """As apt prints it; a branch's fabric manager makes way for that of another branch."""
    said = """\
Reading package lists...
Remv nvidia-fabricmanager-570 [570.172.08-1] [nvidia-x:amd64 ]
Inst nvidia-driver-cuda [570.172.08-1] (580.95.05-1 lab:/ [amd64]) [nvidia-y:amd64 ]
Inst nvidia-fabricmanager (580.95.05-1 lab:/ [amd64])
Conf nvidia-driver-cuda (580.95.05-1 lab:/ [amd64])
"""
    assert drivers.planned(said) == [
        {"name": "nvidia-fabricmanager-570", "old": "570.172.08-1", "new": None},
        {"name": "nvidia-driver-cuda", "old": "570.172.08-1", "new": "580.95.05-1"},
        {"name": "nvidia-fabricmanager", "old": None, "new": "580.95.05-1"},
    ]


# -------------------------------------------------------------------------------------- exchange


def installed_offline(machine: Machine) -> bool:
    """Was everything installed from files, with no source to ask?"""
    lines = [
        line
        for line in machine.told("apt-get")
        if " install " in line and ".deb" in line.split()[-1]
    ]
    return bool(lines) and all("SourceParts=/dev/null" in line for line in lines)


def test_a_driver_is_exchanged_over_one_reboot(machine: Machine) -> None:
    request = machine.request()
    machine.stage(request)
    machine.mirror = set()

    machine.exchange(request)

    assert machine.boots == 2
    assert machine.loaded == NEW
    assert set(machine.packages.values()) == {f"{NEW}-1"}
    assert installed_offline(machine)
    assert machine.pin() == NEW
    assert machine.held == set(NAMES)
    assert machine.program.driver_due(request) is None
    assert machine.program.under_way(request) is None


@pytest.mark.parametrize("broken", ["gpus", "cuda", "cuda count"])
def test_a_driver_that_does_not_work_is_put_back_over_a_second_reboot(
    machine: Machine, broken: str
) -> None:
    request = machine.request()
    machine.held = {"nvidia-driver-cuda"}
    machine.stage(request)
    machine.mirror = set()
    if broken == "gpus":
        machine.broken = {NEW}
    elif broken == "cuda":
        machine.cuda = done(
            "", 1, "Traceback\nRuntimeError: CUDA error: system not yet initialized\n"
        )
    else:
        machine.cuda = done("7\n")
    what = {"gpus": "device handle", "cuda": "system not yet", "cuda count": "CUDA sees 7/8 GPUs"}

    with pytest.raises(machine.program.HostError, match=what[broken]) as raised:
        machine.exchange(request)

    assert f"kernel module {NEW}, packages {NEW}-1, {NEW} declared" in str(raised.value)
    assert machine.boots == 3
    assert machine.loaded == OLD
    assert set(machine.packages.values()) == {f"{OLD}-1"}
    assert machine.pin() == OLD
    assert machine.held == {"nvidia-driver-cuda"}
    assert machine.program.under_way(request) is None
    assert machine.program.driver_due(machine.request(OLD)) is None


def test_gpus_that_do_not_join_the_fabric_are_a_driver_that_does_not_work(machine: Machine) -> None:
    request = machine.request()
    machine.stage(request)
    machine.fabric = "Completed, Success\n" * 7 + "In Progress, N/A\n"

    with pytest.raises(
        machine.program.HostError,
        match="the NVLink fabric is Completed, Success, In Progress, N/A, expected Completed, Success",
    ):
        machine.exchange(request)

    assert machine.loaded == OLD


@pytest.mark.parametrize(
    "said",
    [
        'Field "fabric.state" is not a valid field to query.\n',
        "[N/A], [N/A]\n" * 8,
    ],
    ids=["an older driver", "no NVLink"],
)
def test_a_fabric_that_is_not_told_of_is_not_waited_for(machine: Machine, said: str) -> None:
    request = machine.request()
    machine.stage(request)
    machine.fabric = said

    machine.exchange(request)

    assert machine.loaded == NEW


def test_where_neither_driver_works_every_version_is_said(machine: Machine) -> None:
    request = machine.request()
    machine.stage(request)
    machine.broken = {OLD, NEW}

    with pytest.raises(machine.program.HostError) as raised:
        machine.exchange(request)

    assert str(raised.value).endswith(f"kernel module {OLD}, packages {OLD}-1, {NEW} declared")


def test_a_module_that_another_reboot_would_not_change_is_not_waited_for(machine: Machine) -> None:
    """As where the initramfs has the old module: one reboot forward, and then back."""
    request = machine.request()
    machine.stage(request)
    boot = machine.boot

    def stubborn() -> None:
        boot()
        machine.loaded = OLD
        (machine.folder / "driver").write_text(f"NVRM version: Module  {OLD}  Release")

    machine.boot = stubborn  # type: ignore[method-assign]

    with pytest.raises(machine.program.HostError, match=f"after the reboot {OLD} is loaded"):
        machine.exchange(request)

    assert machine.boots == 2
    assert set(machine.packages.values()) == {f"{OLD}-1"}


def test_a_module_that_was_not_built_is_found_before_the_reboot(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = machine.request()
    machine.stage(request)
    which = {"dkms": "/usr/sbin/dkms"}
    monkeypatch.setattr(machine.drivers.shutil, "which", which.get)

    with pytest.raises(
        machine.program.HostError, match=r"its module was not built for kernel .*dkms"
    ):
        machine.exchange(request)

    assert machine.boots == 1
    assert set(machine.packages.values()) == {f"{OLD}-1"}


def test_without_leave_nothing_is_rebooted(machine: Machine) -> None:
    """Preflight has refused that already; this is for a host that changed meanwhile."""
    request = machine.request(reboot="never")
    machine.stage(request)

    with pytest.raises(
        machine.program.HostError, match=r"takes a reboot, and driver\.reboot is 'never'"
    ):
        machine.exchange(request)

    assert machine.boots == 1
    assert set(machine.packages.values()) == {f"{OLD}-1"}


def test_packages_that_were_changed_are_repaired_and_stay_repaired(machine: Machine) -> None:
    """Going back to what did not match its module would be to break it again."""
    machine.packages = dict.fromkeys(machine.packages, f"{NEW}-1")
    request = machine.request(OLD, reboot="never")
    machine.stage(request)
    exchange = machine.drivers.begin(request, {})
    machine.drivers.go_forward(exchange)
    assert machine.gpus()["error"] is None

    machine.drivers.go_back(exchange, "a service failed")

    assert machine.boots == 1
    assert set(machine.packages.values()) == {f"{OLD}-1"}


@pytest.mark.parametrize("act", ["install", "remember", "bring_up", "note"])
def test_power_that_is_cut_anywhere_is_gone_on_from(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    request = machine.request()
    machine.stage(request)
    real = getattr(machine.drivers, act)

    def cut(*arguments: Any) -> Any:
        monkeypatch.setattr(machine.drivers, act, real)
        if act in ("install", "remember"):
            real(*arguments)
        machine.boots += 1
        machine.boot()
        raise Rebooted

    monkeypatch.setattr(machine.drivers, act, cut)
    try:
        machine.exchange(request)
    except Rebooted:
        machine.exchange(request)

    assert machine.loaded == NEW
    assert machine.program.driver_due(request) is None


def test_what_is_kept_is_of_now_and_of_before(machine: Machine) -> None:
    pool = machine.program.driver_folder() / "packages"
    pool.mkdir(parents=True)
    (pool / "nvidia-driver-cuda_570.172.08-1_amd64.deb").write_text("deb")
    request = machine.request()
    machine.stage(request)

    machine.exchange(request)

    versions = {file.name.split("_")[1] for file in pool.glob("*.deb")}
    assert versions == {f"{OLD}-1", f"{NEW}-1"}


# -------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (None, "no CUDA torch"),
        ("class version: cuda = None", "no CUDA torch"),
        (
            """
class version: cuda = "13.0"
class cuda:
    device_count = staticmethod(lambda: 2)
class Tensor:
    def __matmul__(self, other): return self
    def sum(self): return 64.0 ** 3
def ones(*shape, device): return Tensor()
""",
            "2",
        ),
    ],
    ids=["none", "of the CPU", "two GPUs"],
)
def test_the_probe_is_the_releases_own_torch(
    drivers: ModuleType, tmp_path: Path, torch: str | None, said: str
) -> None:
    import subprocess
    import sys

    if torch is not None:
        (tmp_path / "torch.py").write_text(torch)
    else:
        (tmp_path / "torch.py").write_text("raise ImportError")

    ran = subprocess.run(
        [sys.executable, "-c", drivers.CUDA_PROBE],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert ran.stdout.strip() == said


# ------------------------------------------------------------------------------------------- jobs


def test_a_job_that_may_reboot_has_its_unit_and_files_on_disk(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = machine.program
    monkeypatch.setattr(program, "JOBS", machine.folder / "jobs")
    monkeypatch.setattr(program, "is_running", lambda unit: False)
    followed: list[str] = []
    monkeypatch.setattr(program, "follow", lambda unit, log, code: followed.append(unit))
    machine.program.UNITS.mkdir()
    request = machine.request()

    program.job("cutover", {"services": [], "driver": request})

    (unit,) = followed
    text = (program.UNITS / f"{unit}.service").read_text()
    assert not text.startswith(program.WRITTEN_BY_US.decode())
    assert f"run cutover {unit}\n" in text
    assert "WantedBy=multi-user.target" in text
    files = {path.suffix: path for path in program.KEPT_JOBS.iterdir()}
    assert {path.stem for path in files.values()} == {unit}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files.values())
    assert json.loads(files[".json"].read_text())["request"]["driver"] == request
    assert machine.told(f"systemctl enable --quiet {unit}.service")
    assert program.pending(unit)
    program.forget_job(unit, program.KEPT_JOBS)
    assert not (program.UNITS / f"{unit}.service").exists()


def test_whoever_comes_back_reads_on_where_the_lines_broke_off(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job has ended meanwhile: it is not begun a second time."""
    program = machine.program
    monkeypatch.setattr(program, "JOBS", machine.folder / "jobs")
    program.JOBS.mkdir()
    unit = program.job_unit("weights", {"path": "/m"})
    (program.JOBS / f"{unit}.log").write_text("one\ntwo\nthree\n")
    (program.JOBS / f"{unit}.exit").write_text("1")

    assert program.attach("weights", {"request": {"path": "/m"}, "seen": 2}) == 1

    assert capsys.readouterr().out == "three\n"
    assert machine.told("systemd-run") == []


def test_a_job_whose_host_was_restarted_is_told_to_be_gone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.program, "JOBS", machine.folder / "jobs")

    with pytest.raises(
        machine.program.HostError, match="this host was restarted meanwhile; run ag"
    ):
        machine.program.attach("weights", {"request": {}, "seen": 3})


def test_a_job_that_goes_on_after_a_reboot_is_waited_for_and_started_if_it_does_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = machine.program
    monkeypatch.setattr(program, "is_running", lambda unit: False)
    monkeypatch.setattr(program.time, "sleep", lambda seconds: None)
    program.KEPT_JOBS.mkdir()
    (program.KEPT_JOBS / "minimax-job-cutover-1.json").write_text("{}")

    with pytest.raises(
        program.HostError, match="minimax-job-cutover-1 does not go on; see journalctl"
    ):
        program.wait_for_others("packages", "minimax-job-packages-2")

    starts = machine.told("systemctl start --no-block minimax-job-cutover-1.service")
    assert len(starts) == program.RESUMES


def test_a_job_that_had_ended_before_the_power_was_cut_is_not_done_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = machine.program
    program.KEPT_JOBS.mkdir()
    program.UNITS.mkdir()
    for suffix, text in ((".json", "{}"), (".exit", "1"), (".log", "")):
        (program.KEPT_JOBS / f"unit{suffix}").write_text(text)

    assert not program.pending("unit")
    assert program.run_job("cutover", "unit") == 0
    assert (program.KEPT_JOBS / "unit.exit").read_text() == "1"
    assert not (program.KEPT_JOBS / "unit.json").exists()


def test_lines_of_a_follower_are_known_from_those_of_the_job(program: ModuleType) -> None:
    from fleet.ops import FOLLOWERS_OWN

    source = Path(program.__file__ or "").read_text()
    own = re.findall(r'say\(f"(\{verb\}: [^"]*)', source)

    assert len(own) == 2
    for text in own:
        assert FOLLOWERS_OWN.match(text.replace("{verb}", "cutover"))
