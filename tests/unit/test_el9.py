"""Enterprise Linux 9: what its hosts answer, what they are told, and what keeps them from it.

What rpm and dnf print here was recorded from dnf 4.14 and rpm with packages of NVIDIA's names; that they
do what they are told is in tests/lab/test_dnf.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fleet.compare import packages_differ
from fleet.plan import DRIVER_PIN, MODULES, HostPlan
from fleet.planner import Planner, Texts
from fleet.preflight import problems
from fleet.spec import HostSpec
from tests.unit.state import converged, plan_of, service

KERNEL = "5.14.0-570.17.1.el9_6.x86_64"
HEADERS = f"kernel-devel-{KERNEL}"
SYSTEM: dict[str, Any] = {
    "id": "rocky",
    "version_id": "9.6",
    "name": "Rocky Linux 9.6 (Blue Onyx)",
    "architecture": "x86_64",
    "kernel": KERNEL,
    "kernel_headers": True,
    "next_kernel": None,
    "enforcing": False,
    "python": "3.9.21",
}
KEY = "keys/nvidia.asc"
VLLM = {"version": "0.33.0", "python": "3.12"}
PLAN = plan_of(service(), vllm=VLLM)


def state_of(plan: HostPlan, **system: Any) -> dict[str, Any]:
    """What the probe of a host answers that is as planned."""
    seen = converged(plan)
    seen["os"] = SYSTEM | system
    seen["packages"] = {
        name: {"version": (version or "1").replace("*", "1.el9"), "held": bool(version)}
        for name, version in plan.packages("rocky-9").items()
    }
    for file in plan.driver_files(SYSTEM):
        seen["files"][file.path] = {"sha256": file.sha256, "mode": file.mode, "uid": 0}
    return seen


# ------------------------------------------------------------------------------- what is planned


def test_a_host_as_planned_has_nothing_wrong_and_nothing_to_do() -> None:
    seen = state_of(PLAN)

    assert problems(PLAN, seen, 0.0) == []
    assert not packages_differ(PLAN.packages("rocky-9"), seen)


def test_packages_have_their_names_there() -> None:
    packages = PLAN.base_packages("rocky-9")

    assert {"nginx", "python3-devel", "git-lfs"} <= packages.keys()
    assert not {"nginx-light", "python3-dev"} & packages.keys()


def test_a_site_may_add_the_toolkit_and_packages_of_its_own() -> None:
    plan = plan_of(service(), vllm=VLLM, packages=["numactl"], cuda_toolkit="12.9")

    assert {"numactl", "cuda-toolkit-12-9"} <= plan.base_packages("rocky-9").keys()
    assert plan.release_request(plan.release)["cuda_home"] == "/usr/local/cuda-12.9"


def test_a_driver_is_kept_by_locks_and_not_by_files_of_apt() -> None:
    paths = [file.path for file in PLAN.driver_files(SYSTEM)]

    assert MODULES in paths
    assert DRIVER_PIN not in paths
    assert PLAN.driver_request(SYSTEM)["lock"] == {"*nvidia*": "580.95.05-*"}


def test_headers_are_asked_for_where_the_running_kernel_has_none() -> None:
    request = PLAN.driver_request(SYSTEM | {"kernel_headers": False})

    assert request["packages"][HEADERS] is None


def planned(**mirrors: Any) -> HostPlan:
    data: dict[str, Any] = {"vllm": VLLM, "services": [], "mirrors": mirrors}
    planner = Planner(dict.fromkeys(data, "group_data/h20.py"), Texts({}, {KEY: "a key"}, {}))
    plan = planner.plan("h20-01", "h20", HostSpec.model_validate(data))
    assert plan is not None, planner.problems
    return plan


def test_a_repository_is_a_file_with_its_key() -> None:
    nvidia = {"url": "https://mirror.example/rhel9", "key": KEY, "module_hotfixes": True}
    epel = {"url": "https://mirror.example/epel", "key": KEY}
    plan = planned(dnf={"nvidia": nvidia, "epel": epel})

    files = {file.path: file.content for file in plan.repository_files("dnf")}

    assert files["/etc/pki/rpm-gpg/RPM-GPG-KEY-minimax-nvidia"] == "a key"
    text = files["/etc/yum.repos.d/minimax-nvidia.repo"]
    assert text.splitlines()[1:] == [
        "[minimax-nvidia]",
        "name=minimax-nvidia",
        "baseurl=https://mirror.example/rhel9",
        "enabled=1",
        "gpgcheck=1",
        "gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-minimax-nvidia",
        "module_hotfixes=1",
    ]
    assert "module_hotfixes" not in files["/etc/yum.repos.d/minimax-epel.repo"]
    assert not [file.path for file in plan.repository_files("apt") if "nvidia" in file.path]


def test_a_repositorys_key_that_is_missing_is_refused() -> None:
    data: dict[str, Any] = {
        "vllm": VLLM,
        "services": [],
        "mirrors": {"dnf": {"nvidia": {"url": "https://mirror.example", "key": "nowhere.asc"}}},
    }
    planner = Planner(dict.fromkeys(data, "group_data/h20.py"), Texts({}, {}, {}))

    assert planner.plan("h20-01", "h20", HostSpec.model_validate(data)) is None
    assert "mirrors.dnf.nvidia.key: nowhere.asc is missing" in str(planner.problems[0]).replace(
        "\n", " "
    )


# ------------------------------------------------------------------------------ what is in the way


def lacking(seen: dict[str, Any], **versions: list[str]) -> None:
    for name in versions:
        seen["packages"][name.replace("_", "-")] = None
    found = {name.replace("_", "-"): there for name, there in versions.items()}
    seen["needs"]["packages"] = {"versions": found}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda seen: lacking(seen, kmod_nvidia_open_dkms=["595.58.03-1.el9"]),
            "dnf: no repository of this host has kmod-nvidia-open-dkms 580.95.05-* (it has "
            "595.58.03-1.el9); NVIDIA's repository is named in mirrors.dnf, with module_hotfixes",
        ),
        (
            lambda seen: lacking(seen, dkms=[]),
            "dnf: no repository of this host has dkms; see mirrors.dnf, and dkms is in EPEL",
        ),
        (
            lambda seen: seen["needs"].update(packages={"error": "Failed to download metadata"}),
            "dnf: the host's repositories cannot be read: Failed to download metadata",
        ),
        (lambda seen: seen["os"].update(enforcing=True), "SELinux is enforcing"),
        (
            lambda seen: seen["os"].update(version_id="10.0"),
            "Rocky Linux 9.6 (Blue Onyx) is not supported; known are debian-12",
        ),
    ],
    ids=["version", "dkms", "unreadable", "SELinux", "another major version"],
)
def test_what_keeps_a_host_from_it_is_named(
    change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    seen = state_of(PLAN)
    change(seen)

    assert says in "\n".join(problems(PLAN, seen, 0.0))


def test_its_own_python_is_too_old_for_a_release_that_is_to_be_built() -> None:
    plan = plan_of(service())
    seen = state_of(plan)
    assert problems(plan, seen, 0.0) == []
    seen["releases"][plan.release.path] = False

    (message,) = problems(plan, seen, 0.0)

    assert message.startswith("python: /usr/bin/python3 is 3.9.21")
    assert "set vllm.python" in message
    seen = state_of(PLAN)
    seen["releases"][PLAN.release.path] = False
    assert problems(PLAN, seen, 0.0) == []


def test_the_client_of_the_model_hub_is_built_on_the_same_python() -> None:
    assert PLAN.hub_tool.python == PLAN.release.python == "3.12"


# -------------------------------------------------------------------------------- what hosts answer

RPM = """\
kernel-devel	0	5.14.0-570.17.1.el9_6	x86_64
kernel-devel	0	5.14.0-611.5.1.el9_7	x86_64
package git-lfs is not installed
nvidia-driver-cuda	3	580.82.07-1.el9	x86_64
nvidia-fabricmanager	0	580.82.07-1	x86_64
kmod-nvidia-open-dkms	3	580.82.07-1.el9	noarch
"""
LOCKS = """\

# Added lock on Sat Nov 21 22:05:18 2026
nvidia-driver-cuda-3:580.82.07-1.el9.*

# Added lock on Sat Nov 21 22:05:18 2026
kmod-nvidia-open-dkms-3:570.172.08-1.el9.*
!nvidia-fabricmanager-0:580.82.07-1.*
"""


def done(stdout: str = "", returncode: int = 0, stderr: str = "") -> SimpleNamespace:
    return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)


@pytest.fixture
def el9(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program on a host with dnf, with locks of its own."""
    monkeypatch.setattr(program.shutil, "which", lambda name: None if "apt" in name else name)
    monkeypatch.setattr(program, "DNF_PLUGINS", tmp_path)
    configured = f"[main]\nenabled = 1\nlocklist = {tmp_path}/locks\n"
    (tmp_path / "versionlock.conf").write_text(configured)
    (tmp_path / "locks").write_text(LOCKS)
    return program


def test_installed_and_held_are_told_by_rpm_and_the_locks(
    el9: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(*argv: str, **_: Any) -> SimpleNamespace:
        asked.append(argv)
        return done(RPM, 1)

    monkeypatch.setattr(el9, "run", run)
    names = [
        *(HEADERS, "git-lfs", "nvidia-driver-cuda", "nvidia-fabricmanager"),
        "kmod-nvidia-open-dkms",
    ]

    state = el9.packages_state(names)

    assert state == {
        HEADERS: {"version": "5.14.0-570.17.1.el9_6", "held": False},
        "git-lfs": None,
        "nvidia-driver-cuda": {"version": "580.82.07-1.el9", "held": True},
        # What is excluded is not held, and what is held at another version is not either.
        "nvidia-fabricmanager": {"version": "580.82.07-1", "held": False},
        "kmod-nvidia-open-dkms": {"version": "580.82.07-1.el9", "held": False},
    }
    assert len(asked) == 1
    assert el9.packages_state([]) == {}


def test_a_host_without_the_plugin_holds_nothing(el9: ModuleType, tmp_path: Path) -> None:
    for file in tmp_path.iterdir():
        file.unlink()

    assert el9.version_locks() == []


def test_a_host_with_both_package_managers_is_a_debian(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.shutil, "which", lambda name: name)

    assert program.package_manager() == "apt"


def test_what_a_host_is_asked_is_found_by_its_major_version(program: ModuleType) -> None:
    question = PLAN.question()["packages"]

    assert program.of_system(question, SYSTEM) == PLAN.packages("rocky-9")
    assert program.of_system(question, {"id": "debian", "version_id": "12"}) == PLAN.packages(
        "debian-12"
    )
    assert program.of_system(question, {"id": "arch", "version_id": ""}) is None


def test_only_mirrors_of_its_own_package_manager_are_tried(
    el9: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(el9, "reach", tried.append)
    monkeypatch.setattr(el9, "dnf_versions", lambda names, sources: {"versions": sources})
    mirrors = {"apt": {"a": "http://apt"}, "dnf": {"d": "http://dnf"}, "index": None, "hub": ""}
    sources = {"apt": ["no"], "dnf": ["yes"]}
    request = {"mirrors": mirrors, "models": [], "images": [], "sources": sources}
    state = {"packages": {"git": None}, "uv": True, "releases": {}, "weights": {}}

    needs = el9.needs_state(request, state, {"git": None})

    assert tried == ["http://dnf"]
    assert needs["packages"] == {"versions": ["yes"]}


# ------------------------------------------------------------------------------- what they are told

RPM_ALL = """\
nvidia-driver-cuda	580.95.05-1.el9
nvidia-driver-cuda-libs	580.95.05-1.el9
nvidia-container-toolkit	1.18.0-1
bash	5.1.8-9.el9
"""


class Told:
    """dnf and rpm of a host where nothing of the driver is installed yet."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.there = False

    def run(self, *argv: str, **_: Any) -> SimpleNamespace:
        if argv[:2] == ("rpm", "-qa"):
            return done(RPM_ALL)
        if argv[0] == "rpm":
            names = [name for name in argv[4:] if self.there]
            lines = [f"{name}\t3\t580.95.05-1.el9\tx86_64" for name in names]
            return done("\n".join(lines))
        self.commands.append(" ".join(word for word in argv if not word.startswith("--setopt")))
        self.there |= "install" in argv
        return done()


@pytest.fixture
def told(el9: ModuleType, packages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(el9, "run", told.run)
    monkeypatch.setattr(el9, "run_long", lambda label, *argv, **options: told.run(*argv))
    return told


def request() -> dict[str, Any]:
    wanted = {"dkms": None, "nvidia-driver-cuda": "580.95.05-*"}
    return {"packages": wanted, "mask": [], "lock": {"*nvidia*": "580.95.05-*"}}


def test_exact_versions_are_installed_over_locks_and_locked_with_what_belongs_to_them(
    packages: ModuleType, told: Told
) -> None:
    assert packages.packages(request())

    # First the locks of another version go, last come those of this one.
    assert told.commands == [
        "dnf --assumeyes --quiet versionlock delete kmod-nvidia-open-dkms nvidia-driver-cuda",
        "dnf --assumeyes --refresh --best --allowerasing install dkms nvidia-driver-cuda-580.95.05-*",
        "dnf --assumeyes --quiet versionlock delete nvidia-driver-cuda",
        "dnf --assumeyes --quiet versionlock add nvidia-driver-cuda nvidia-driver-cuda-libs",
    ]


def test_nothing_is_told_where_all_is_there_and_locked(
    packages: ModuleType, told: Told, tmp_path: Path
) -> None:
    told.there = True
    names = ("nvidia-driver-cuda", "nvidia-driver-cuda-libs")
    (tmp_path / "locks").write_text("".join(f"{name}-3:580.95.05-1.el9.*\n" for name in names))

    assert not packages.packages(request())
    assert told.commands == []


def test_the_whole_question_fits_the_hosts_program() -> None:
    """The request is JSON: what the plan makes of three systems is told in it."""
    question = json.loads(json.dumps(PLAN.question()))

    assert question["kernel_headers"]["rhel-9"] == "kernel-devel-{kernel}"
    assert question["sources"]["dnf"] == []
