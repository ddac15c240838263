"""Enterprise Linux' side of the hosts' program, by the real dnf and rpm of this machine.

Its dnf is the 4.14 that EL9 has. It runs in a mount namespace, where rpm's database, dnf's state and
configuration and the repositories are those of a machine that has nothing yet, and where there is no apt.
The packages have NVIDIA's names, epochs, versions and dependencies, and are empty.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fleet.compare import packages_differ
from fleet.plan import HostPlan
from fleet.planner import Planner, Texts
from fleet.spec import HostSpec

FILES = Path(__file__).resolve().parents[2] / "files"
VERSIONS = ("570.172.08", "580.82.07", "580.95.05", "595.58.03")
KERNEL = "5.14.0-570.17.1.el9_6.x86_64"
SYSTEM = {
    "id": "rocky",
    "version_id": "9.6",
    "name": "Rocky Linux 9.6 (Blue Onyx)",
    "architecture": "x86_64",
    "kernel": KERNEL,
    "kernel_headers": False,
    "next_kernel": None,
    "enforcing": False,
    "python": "3.9.21",
}
REVISION = "f710177d938eff80b684d42c5aa84b382612f21f"
KEY = "keys/nvidia.asc"
PLACES = ("/var/lib/dnf", "/var/cache/dnf", "/var/log", "/etc/dnf")
REPOSITORIES = ("/etc/yum.repos.d", "/etc/pki/rpm-gpg")
CONFIGURATION = """\
[main]
gpgcheck=1
installonly_limit=3
clean_requirements_on_remove=True
best=True
skip_if_unavailable=False
releasever=9
"""


class Machine:
    """A machine of Enterprise Linux 9, as far as dnf and rpm are concerned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        for place in (*PLACES, *REPOSITORIES):
            (folder / "root" / place.lstrip("/")).mkdir(parents=True)
        plugins = folder / "root/etc/dnf/plugins"
        plugins.mkdir()
        (folder / "root/etc/dnf/dnf.conf").write_text(CONFIGURATION)
        locks = "[main]\nenabled = 1\nlocklist = /etc/dnf/plugins/versionlock.list\n"
        (plugins / "versionlock.conf").write_text(locks)
        (plugins / "versionlock.list").touch()
        programs = folder / "bin"
        programs.mkdir()
        for program in Path("/usr/bin").iterdir():
            if not program.name.startswith(("apt", "dpkg")):
                (programs / program.name).symlink_to(program)

    def run(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command on that machine."""
        mounts = "".join(
            f"mkdir -p {place}; mount --bind {self.folder}/root{place} {place}; "
            for place in (*PLACES, *REPOSITORIES)
        )
        # Debian's rpm keeps its database in the home directory.
        environment = f"HOME={self.folder}/root PATH={self.folder}/bin"
        shell = f'set -e; {mounts} export {environment}; exec "$@"'
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", shell, "sh", *argv],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        """A function of the hosts' program, called there; what it returns. Raises with what it says."""
        code = (
            f"import json, sys; sys.path.insert(0, {str(FILES)!r}); import {module};"
            "arguments = json.load(sys.stdin); sys.stdout, out = sys.stderr, sys.stdout;"
            f"json.dump({module}.{function}(*arguments), out)"
        )
        done = self.run(sys.executable, "-c", code, stdin=json.dumps(arguments))
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)

    def put(self, plan: HostPlan) -> None:
        for file in plan.repository_files("dnf"):
            (self.folder / "root" / file.path.lstrip("/")).write_text(file.content)

    def installed(self) -> list[str]:
        return sorted(self.run("rpm", "-qa", "--qf", "%{NAME}-%{VERSION}\\n").stdout.split())


def build(folder: Path, spec: str, name: str) -> None:
    path = folder / f"{name}.spec"
    path.write_text(spec)
    subprocess.run(
        [
            *("rpmbuild", "-bb", "--quiet", f"--define=_topdir {folder}/build"),
            *(f"--define=_rpmdir {folder}/repository", "--define=_build_id_links none", str(path)),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "HOME": str(folder)},
    )


def package(
    name: str,
    version: str,
    release: str = "1.el9",
    *,
    epoch: int = 0,
    relations: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A spec file. `relations`: requires, obsoletes, provides."""
    lines = [f"Name: {name}", f"Version: {version}", f"Release: {release}"]
    lines += [f"Epoch: {epoch}"] if epoch else []
    lines += [
        f"{key.capitalize()}: {value}"
        for key, values in (relations or {}).items()
        for value in values
    ]
    lines += ["Summary: stand-in", "License: none", "%description", "stand-in", "%files", ""]
    return "\n".join(lines)


def specs() -> Iterator[tuple[str, str]]:
    for version in VERSIONS:
        exactly = f"= 3:{version}"
        packages: dict[str, dict[str, Sequence[str]]] = {
            "kmod-nvidia-open-dkms": {
                "requires": ("dkms", f"nvidia-kmod-common {exactly}"),
                "provides": (f"nvidia-kmod {exactly}",),
            },
            "nvidia-kmod-common": {"requires": (f"nvidia-kmod {exactly}",)},
            "nvidia-driver-cuda-libs": {},
            "nvidia-driver-cuda": {
                "requires": (f"nvidia-driver-cuda-libs {exactly}", f"nvidia-kmod-common {exactly}")
            },
            "nvidia-persistenced": {},
        }
        for name, relations in packages.items():
            yield f"{name}-{version}", package(name, version, epoch=3, relations=relations)
        if version.startswith("570"):
            # Without a version, so that it would take the place of every later one.
            other = dict.fromkeys(("obsoletes", "provides"), ("nvidia-fabricmanager",))
            spec = package("nvidia-fabric-manager", version, "1", relations=other)
            yield f"fm-{version}", spec
        else:
            yield f"fm-{version}", package("nvidia-fabricmanager", version, "1")
    yield "dkms", package("dkms", "3.2.1")
    yield "git-lfs", package("git-lfs", "3.4.1", "4.el9")
    yield "toolkit", package("nvidia-container-toolkit", "1.18.0", "1")
    kernel, release = KERNEL.removesuffix(".x86_64").split("-")
    yield "kernel", package("kernel-devel", kernel, release)
    yield "kernel-later", package("kernel-devel", kernel, "611.5.1.el9_7")
    yield "versionlock", package("python3-dnf-plugin-versionlock", "4.3.0", "20.el9")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dnf repository of signed packages, with its key; made once."""
    folder = tmp_path_factory.mktemp("rpms")
    for name, spec in specs():
        build(folder, spec, name)
    home = folder / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    who = "lab <lab@minimax-fleet.invalid>"
    subprocess.run([*gpg, "--quick-generate-key", who, "rsa2048", "sign", "never"], check=True)
    armoured = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True)
    (folder / "key.asc").write_bytes(armoured.stdout)
    rpms = [str(path) for path in folder.glob("repository/*/*.rpm")]
    subprocess.run(
        [
            *("rpmsign", f"--define=_gpg_path {home}", f"--define=_gpg_name {who}"),
            *(f"--define=__gpg {shutil.which('gpg')}", "--addsign", *rpms),
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)
    subprocess.run(["createrepo_c", "--quiet", str(folder / "repository")], check=True)
    return folder


@pytest.fixture
def machine(repository: Path, tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.repository = repository / "repository"
    return machine


def plan_of(machine: Machine, version: str = "580.82.07", **changes: Any) -> HostPlan:
    """The plan of a host whose dnf repository is the one at hand."""
    # Group data takes http and https; dnf takes a file as well.
    url = "http://repository.invalid/rhel9"
    data: dict[str, Any] = {
        "gpu": "h20-141",
        "gpu_count": 8,
        "driver": {"version": version},
        "vllm": {"version": "0.33.0+cu129", "python": "3.12"},
        "mirrors": {"dnf": {"nvidia": {"url": url, "key": KEY, "module_hotfixes": True}}},
        "services": [
            {
                "name": "m25",
                "model": "MiniMaxAI/MiniMax-M2.5",
                "revision": REVISION,
                "recipe": "tp4",
                "gpus": [0, 1, 2, 3],
                "port": 8000,
            }
        ],
    }
    key = (machine.repository.parent / "key.asc").read_text()
    planner = Planner(dict.fromkeys(data, "group_data/h20.py"), Texts({}, {KEY: key}, {}))
    plan = planner.plan("el9", "h20", HostSpec.model_validate(data | changes))
    assert plan is not None, planner.problems
    return plan


def sources(machine: Machine, plan: HostPlan) -> list[dict[str, str]]:
    """The repositories that the plan would put there, at this machine's address of them."""
    return [
        {
            "path": file.path,
            "content": file.content.replace(
                "http://repository.invalid/rhel9", machine.repository.as_uri()
            ),
        }
        for file in plan.repository_files("dnf")
    ]


def put(machine: Machine, plan: HostPlan) -> None:
    for file in sources(machine, plan):
        (machine.folder / "root" / file["path"].lstrip("/")).write_text(file["content"])


def install(machine: Machine, version: str) -> bool:
    """The packages of the driver step; whether any was installed."""
    plan = plan_of(machine, version)
    put(machine, plan)
    return bool(machine.call("fleet_packages", "packages", plan.driver_request(SYSTEM)))


def as_planned(machine: Machine, version: str) -> bool:
    packages = plan_of(machine, version).driver_request(SYSTEM)["packages"]
    seen = {"packages": machine.call("fleet_host", "packages_state", list(packages))}
    return not packages_differ(packages, seen)


def driver_there(machine: Machine) -> set[str]:
    """Versions of all packages of a driver that are installed."""
    names = ("kmod-nvidia", "nvidia-driver", "nvidia-kmod", "nvidia-pers", "nvidia-fabric")
    return {line.rpartition("-")[2] for line in machine.installed() if line.startswith(names)}


def test_a_driver_is_installed_at_its_version_and_kept_there(machine: Machine) -> None:
    assert install(machine, "580.82.07")

    assert as_planned(machine, "580.82.07")
    assert driver_there(machine) == {"580.82.07"}
    assert machine.run("rpm", "-q", f"kernel-devel-{KERNEL}").returncode == 0
    assert not install(machine, "580.82.07")
    assert as_planned(machine, "580.82.07")


def test_an_update_of_the_host_leaves_the_driver_and_does_not_fail_over_it(
    machine: Machine,
) -> None:
    """Locks on the packages that were asked for alone make it fail over what those require."""
    install(machine, "580.82.07")

    done = machine.run("dnf", "--assumeyes", "upgrade")

    assert done.returncode == 0, done.stdout + done.stderr
    assert driver_there(machine) == {"580.82.07"}
    locked = (machine.folder / "root/etc/dnf/plugins/versionlock.list").read_text()
    assert "nvidia-driver-cuda-libs-3:580.82.07-1.el9.*" in locked


@pytest.mark.parametrize("version", ["580.95.05", "570.172.08"], ids=["newer", "older branch"])
def test_another_version_takes_its_place_and_it_goes_back(machine: Machine, version: str) -> None:
    install(machine, "580.82.07")

    assert install(machine, version)

    assert driver_there(machine) == {version}
    assert as_planned(machine, version)
    assert not as_planned(machine, "580.82.07")
    assert install(machine, "580.82.07")
    assert driver_there(machine) == {"580.82.07"}
    assert as_planned(machine, "580.82.07")


def test_what_a_driver_does_not_belong_to_is_not_locked(machine: Machine) -> None:
    put(machine, plan_of(machine))
    machine.run("dnf", "--assumeyes", "install", "nvidia-container-toolkit")
    install(machine, "580.82.07")

    state = machine.call("fleet_host", "packages_state", ["nvidia-container-toolkit", "dkms"])

    assert state["nvidia-container-toolkit"] == {"version": "1.18.0-1", "held": False}
    assert state["dkms"]["held"] is False


def test_versions_are_asked_of_repositories_to_come_whatever_is_locked(machine: Machine) -> None:
    install(machine, "580.82.07")
    before = sorted(str(path) for path in (machine.folder / "root").rglob("*"))
    plan = plan_of(machine)
    headers = f"kernel-devel-{KERNEL}"

    found = machine.call(
        "fleet_host",
        "dnf_versions",
        ["kmod-nvidia-open-dkms", "git-lfs", "nothing", headers],
        sources(machine, plan),
    )

    newest_first = [f"{version}-1.el9" for version in reversed(VERSIONS)]
    assert found == {
        "versions": {
            "kmod-nvidia-open-dkms": newest_first,
            "git-lfs": ["3.4.1-4.el9"],
            "nothing": [],
            headers: [KERNEL.removesuffix(".x86_64")],
        }
    }
    assert sorted(str(path) for path in (machine.folder / "root").rglob("*")) == before


def test_a_repository_that_cannot_be_reached_is_told_in_dnfs_words(machine: Machine) -> None:
    plan = plan_of(machine)
    nowhere = [
        {"path": file.path, "content": file.content.replace("http://", "http://127.0.0.1:9/")}
        for file in plan.repository_files("dnf")
    ]

    found = machine.call("fleet_host", "dnf_versions", ["git-lfs"], nowhere)

    assert "Failed to download metadata for repo 'minimax-nvidia'" in found["error"]


def test_a_package_with_another_key_is_refused(machine: Machine) -> None:
    put(machine, plan_of(machine))
    key = machine.folder / "root/etc/pki/rpm-gpg/RPM-GPG-KEY-minimax-nvidia"
    other = machine.folder / "gnupg"
    other.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(other), "--batch", "--quiet", "--passphrase", ""]
    who = "other <other@minimax-fleet.invalid>"
    subprocess.run([*gpg, "--quick-generate-key", who, "rsa2048", "sign", "never"], check=True)
    exported = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True)
    subprocess.run(["gpgconf", "--homedir", str(other), "--kill", "all"], check=True)
    key.write_bytes(exported.stdout)

    with pytest.raises(RuntimeError, match="GPG"):
        machine.call("fleet_packages", "packages", {"packages": {"git-lfs": None}, "mask": []})

    assert not [line for line in machine.installed() if line.startswith("git-lfs")]
