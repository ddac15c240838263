"""The same desired state as an Ansible playbook, run by ansible-core in three configurations.

Inventory, variables and files come from this project's own plan, so that both sides mean the same;
afterwards the probe of this project looks whether that is what the hosts have become.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import BenchError
from bench.labhosts import Fleet, on_each
from bench.measuring import Command, Meter, Series, shown
from bench.results import ANSIBLE
from fleet.compare import files_to_write, packages_differ, system_differs
from fleet.facts import BOOTSTRAP, packed_program
from fleet.inventory import Site
from fleet.plan import (
    ETC,
    MODULES,
    PROXY_UNIT,
    RECORDS,
    STATE,
    USER,
    File,
    HostPlan,
    Release,
)
from fleet.render import repository_file
from lab import hosts
from lab.paths import CONTROL_KEY, KNOWN_HOSTS, REPOSITORY
from lab.prerequisites import os_release
from lab.process import Progress, attempt, run

PLAYBOOK = Path(__file__).with_name("playbook") / "site.yml"
LOCK = REPOSITORY / "requirements-bench.lock"
OLDEST_PYTHON = (3, 11)
RECAP = re.compile(
    r"^(?P<host>\S+)\s+: ok=\d+\s+changed=(?P<changed>\d+)\s+unreachable=(?P<unreachable>\d+)"
    r"\s+failed=(?P<failed>\d+)",
    re.MULTILINE,
)
# What Ansible's apt module is written with. A server's Debian has it; the lab's small base has not.
APT_BINDING = ("python3-apt", "python-apt-common", "distro-info-data")
# No-op runs end after this many seconds although more were asked for.
NO_OPS_AT_MOST_S = 180.0


@dataclass(frozen=True)
class Variant:
    """A configuration of Ansible.

    name: what makes it different
    settings: section to lines of ansible.cfg, beyond what every run needs; {forks} is one per host,
        {strategies} where mitogen's plugins are
    """

    name: str
    settings: Mapping[str, tuple[str, ...]]

    @property
    def title(self) -> str:
        """Its name in results."""
        return f"{ANSIBLE}{self.name}"


# Quickest first, so that a benchmark that is cut short has what counts.
VARIANTS = (
    Variant(
        "mitogen",
        {
            "defaults": (
                "forks = {forks}",
                "strategy_plugins = {strategies}",
                "strategy = mitogen_linear",
            )
        },
    ),
    Variant(
        "pipelining",
        {"defaults": ("forks = {forks}",), "connection": ("pipelining = True",)},
    ),
    Variant("as it comes", {}),
)


class Ansible:
    """ansible-core in an environment of its own, with what it needs to know of a fleet.

    folder: where all of that is kept
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs = folder / "venv" / "bin"
        self._project = folder / "ansible"
        self._packages = folder / "packages"

    def install(self, progress: Progress) -> None:
        """ansible-core and mitogen, from requirements-bench.lock.

        Raises BenchError where this machine's Python is too old for them.
        """
        if sys.version_info < OLDEST_PYTHON:
            needed = ".".join(map(str, OLDEST_PYTHON))
            raise BenchError(f"Python {needed} or newer is needed for Ansible; see {LOCK.name}")
        complete = self.folder / "venv" / ".complete"
        lock = LOCK.read_text(encoding="utf-8")
        if complete.is_file() and complete.read_text(encoding="utf-8") == lock:
            return
        progress(f"installing Ansible from {LOCK.name} into {self.folder / 'venv'}")
        shutil.rmtree(self.folder / "venv", ignore_errors=True)
        run([sys.executable, "-m", "venv", self.folder / "venv"])
        pip = [str(self._programs / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--require-hashes", "-r", LOCK])
        complete.write_text(lock, encoding="utf-8")

    def versions(self) -> dict[str, str]:
        """Versions of ansible-core and mitogen."""
        names = ("ansible-core", "mitogen")
        code = "import sys, importlib.metadata as m; [print(m.version(n)) for n in sys.argv[1:]]"
        listed = run([self._programs / "python", "-c", code, *names]).split()
        return dict(zip(names, listed, strict=True))

    def give_hosts_the_apt_binding(self, fleet: Fleet, progress: Progress) -> None:
        """python3-apt on hosts that lack it, before any clock runs."""
        if not attempt(hosts.ssh_argv(fleet.names[0], "python3 -c 'import apt'")).returncode:
            return
        self._packages.mkdir(parents=True, exist_ok=True)
        if not list(self._packages.glob("*.deb")):
            progress(
                f"fetching {', '.join(APT_BINDING)}, which Ansible's apt module needs on hosts"
            )
            download = ["env", f"--chdir={self._packages}", "apt-get", "-q", "download"]
            # Fetching as another user fails in a directory that only root can enter.
            run([*download, "-oAPT::Sandbox::User=root", *APT_BINDING])
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for package in self._packages.glob("*.deb"):
                tar.add(package, arcname=package.name)
        packed = base64.b64encode(archive.getvalue()).decode()
        on_each(fleet.names, UNPACK_AND_INSTALL, stdin=packed)

    def describe(self, fleet: Fleet, site: Site) -> None:
        """Write inventory, variables and files for these hosts.

        Raises BenchError if hosts differ, or have what the playbook has no words for.
        """
        plans = [site.plans[name] for name in fleet.names]
        shutil.rmtree(self._project, ignore_errors=True)
        variables = [host_variables(plan, self._keep) for plan in plans]
        if any(other != variables[0] for other in variables):
            raise BenchError("the lab's simulated hosts differ; the playbook is for hosts alike")
        shared = {
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_private_key_file": str(CONTROL_KEY),
            "ansible_ssh_common_args": shlex.join(
                f"-o{option}"
                for option in (
                    f"UserKnownHostsFile={KNOWN_HOSTS}",
                    "GlobalKnownHostsFile=/dev/null",
                    "StrictHostKeyChecking=yes",
                    "IdentitiesOnly=yes",
                )
            ),
        }
        addresses = {
            name: {"ansible_host": site.addresses[name], "address": site.addresses[name]}
            for name in fleet.names
        }
        inventory = {"all": {"hosts": addresses, "vars": shared}}
        self._write("inventory.json", json.dumps(inventory, indent=1))
        self._write("group_vars/all.json", json.dumps(variables[0], indent=1))
        for variant in VARIANTS:
            self._write(_configuration_name(variant), self._configuration(variant, fleet))

    def _keep(self, file: File) -> str:
        """A file that hosts get, kept in the project; its path there."""
        path = self._write(f"files{file.path}", file.content)
        path.chmod(0o600)
        return str(path)

    def _write(self, name: str, text: str) -> Path:
        path = self._project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def _configuration(self, variant: Variant, fleet: Fleet) -> str:
        sections: dict[str, list[str]] = {
            "defaults": [
                f"inventory = {self._project / 'inventory.json'}",
                f"home = {self._project / 'home'}",
                f"local_tmp = {self._project / 'tmp'}",
                "retry_files_enabled = False",
                "nocows = True",
                "nocolor = True",
            ],
        }
        packages = self.folder / "venv" / "lib"
        strategies = next(packages.glob("python3*/site-packages/ansible_mitogen/plugins/strategy"))
        for section, lines in variant.settings.items():
            filled = (line.format(forks=len(fleet.names), strategies=strategies) for line in lines)
            sections.setdefault(section, []).extend(filled)
        return "".join(
            f"[{section}]\n" + "".join(f"{line}\n" for line in lines)
            for section, lines in sections.items()
        )

    def first(self, meter: Meter, variant: Variant) -> Series:
        """The playbook on hosts that are new."""
        name = f"{variant.title}, first"
        return Series(
            (meter.run(name, [self._command()], cwd=self._project, env=self._env(variant)),)
        )

    def no_op(self, meter: Meter, fleet: Fleet, variant: Variant, times: int) -> Series:
        """The playbook again, several times.

        Raises BenchError if it changes anything.
        """
        name = f"{variant.title}, no-op"

        def nothing_changed() -> None:
            recap = meter.log(name).read_text(encoding="utf-8")
            problem = not_a_no_op(recap, fleet.names)
            if problem:
                raise BenchError(f"{name}: {problem}; see {shown(meter.log(name))}")

        with fleet.counting_sessions() as sessions:
            samples = meter.series(
                name,
                times,
                [self._command()],
                cwd=self._project,
                env=self._env(variant),
                at_most_s=NO_OPS_AT_MOST_S,
                after_each=nothing_changed,
            )
        return Series(samples, sessions=sessions[0] / len(samples))

    def _command(self) -> Command:
        return Command([self._programs / "ansible-playbook", PLAYBOOK])

    def _env(self, variant: Variant) -> dict[str, str]:
        # Ansible insists on a UTF-8 locale.
        return {
            "ANSIBLE_CONFIG": str(self._project / _configuration_name(variant)),
            "LC_ALL": "C.UTF-8",
        }


UNPACK_AND_INSTALL = (
    "folder=$(mktemp -d) && base64 --decode | tar --extract --directory=$folder && "
    "dpkg --install $folder/*.deb && rm -r $folder"
)


def _configuration_name(variant: Variant) -> str:
    return f"{variant.name.replace(' ', '-')}.cfg"


def not_a_no_op(output: str, names: Iterable[str]) -> str | None:
    """What is wrong with a run of which Ansible's recap must say, of each host, that nothing changed."""
    recap = {found["host"]: found for found in RECAP.finditer(output)}
    for name in names:
        if name not in recap:
            return f"{name} is not in the recap"
        for what in ("changed", "unreachable", "failed"):
            if int(recap[name][what]):
                return f"{name}: {what}={recap[name][what]}"
    return None


def host_variables(plan: HostPlan, keep: Callable[[File], str]) -> dict[str, Any]:
    """Variables of the playbook for a host, from its plan.

    keep: takes a file that hosts get, and says where the playbook finds it

    Raises BenchError for what the playbook has no words for.
    """
    release = os_release()
    system = {"id": release["ID"], "version_id": release["VERSION_ID"]}
    if any(service.api_key for service in plan.services):
        raise BenchError(f"{plan.name}: the playbook has no words for services with an API key")
    if plan.spec.driver is None or plan.spec.mirrors.index is None:
        raise BenchError(f"{plan.name}: the playbook wants a driver and a package index")
    whole = (*plan.system_files, *plan.repository_files("apt"), *plan.staged_files)
    files = {file.path: file for file in whole}

    def kept(*chosen: File) -> list[dict[str, str]]:
        return [{"path": file.path, "mode": file.mode, "src": keep(file)} for file in chosen]

    # With headers taken as given: the playbook asks for those of the kernel that it finds.
    kernel = {"kernel": "", "kernel_headers": True, "next_kernel": None}
    driver = plan.driver_request({**system, **kernel})
    name, comment, home, shell = service_user(repository_file("files/sysusers.conf"))
    return {
        "apt_files": kept(*(file for path, file in files.items() if path.startswith("/etc/apt/"))),
        "user": {"name": name, "comment": comment, "home": home, "shell": shell},
        "directories": [
            {"path": path, "owner": owner, "mode": mode}
            for path, (owner, mode) in {
                **plan.directories,
                f"{ETC}/proxy": ("root", "755"),
                str(Path(plan.uv["path"]).parents[2]): ("root", "755"),
            }.items()
            if path != RECORDS
        ],
        "sysctl_file": kept(files["/etc/sysctl.d/60-minimax.conf"])[0],
        "packages": list(_unversioned(plan, f"{system['id']}-{system['version_id']}")),
        "driver": {
            "files": kept(*plan.driver_files(system)),
            "requirements": [f"{key}={version}" for key, version in driver["packages"].items()],
            "held": list(driver["packages"]),
            "units": driver["start"],
            "version": driver["version"],
            "gpus": driver["gpus"],
        },
        "uv": _uv(plan, plan.spec.mirrors.index),
        "releases": [_release(release) for release in plan.releases],
        "weights": [asdict(weights) for weights in plan.weights],
        "hub": plan.mirrors["hub"],
        "hf": f"{plan.hub_tool.path}/bin/hf",
        "hub_environment": {
            "HF_ENDPOINT": plan.mirrors["hub"],
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
        "service_files": [
            {**file, "unit": unit}
            for unit, wanted in _service_files(plan).items()
            for file in kept(*wanted)
        ],
        "units": [*(service.unit for service in plan.services), PROXY_UNIT],
        "services": [
            {
                "name": service.name,
                "port": service.port,
                "engine_port": service.engine_port,
                **{key: service.gate[key] for key in GATE_KEYS},
            }
            for service in plan.services
        ],
    }


GATE_KEYS = ("model", "request", "expect", "ready_timeout_s", "answer_timeout_s")


def service_user(sysusers: str) -> tuple[str, str, str, str]:
    """Name, comment, home and shell of the user that a sysusers.d file declares."""
    for line in sysusers.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["u"]:
            _, name, _, comment, home, shell = words
            return name, comment, home, shell
    raise BenchError("files/sysusers.conf declares no user")


def _unversioned(plan: HostPlan, system: str) -> Iterable[str]:
    return (name for name, version in plan.packages(system).items() if version is None)


def _uv(plan: HostPlan, index: str) -> dict[str, Any]:
    host = urlsplit(index)
    trusted = host.scheme == "http"
    program = Path(plan.uv["path"])
    environment = {
        "UV_CACHE_DIR": f"{plan.spec.paths.releases}/.cache",
        "UV_NO_PROGRESS": "1",
        "UV_NO_CONFIG": "1",
        "UV_DEFAULT_INDEX": index,
    }
    if trusted:
        environment["UV_INSECURE_HOST"] = host.netloc
    return {
        "path": str(program),
        "install": [
            *("/usr/bin/python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"),
            *("--disable-pip-version-check", "--root-user-action=ignore", "--only-binary=:all:"),
            *("--index-url", index, *(("--trusted-host", str(host.hostname)) if trusted else ())),
            *("--require-hashes", "--target", str(program.parents[1]), "-r", "/dev/stdin"),
        ],
        "requirement": {
            machine: f"uv=={plan.uv['version']} --hash=sha256:{digest}"
            for machine, digest in plan.uv["sha256"].items()
        },
        "environment": environment,
    }


def _release(release: Release) -> dict[str, str]:
    backend = ("--torch-backend", release.torch_backend) if release.torch_backend else ()
    bytecode = ("--compile-bytecode",) if release.bytecode else ()
    program, *arguments = release.check
    return {
        "path": release.path,
        "python": release.python,
        "arguments": shlex.join([*bytecode, *backend, *release.requirements]),
        "check": shlex.join([f"{release.path}/bin/{program}", *arguments]),
        "program": f"{release.path}/bin/{program}",
    }


def _service_files(plan: HostPlan) -> dict[str, list[File]]:
    """Unit to the files that it reads, where it reads them."""
    units = {service.unit: [service.unit_file] for service in plan.services}
    return {**units, PROXY_UNIT: list(plan.proxy_files)}


def check_same_state(fleet: Fleet, site: Site) -> None:
    """Ask this project's own probe whether Ansible has made these hosts what their plans say.

    Raises BenchError, naming all that differs.
    """
    different = [
        f"{name}: {difference}"
        for name in fleet.names
        for difference in differences(site.plans[name], _look(name, site.plans[name]))
    ]
    if different:
        raise BenchError("\n".join(["Ansible has left another state:", *different]))


def differences(plan: HostPlan, seen: Mapping[str, Any]) -> Iterable[str]:
    """What is not as planned, of what the playbook is to bring about."""
    whole = (*plan.system_files, *plan.repository_files("apt"), *plan.driver_files(seen["os"]))
    files = [
        file
        for file in (*whole, *plan.installed_files)
        if file.path.startswith(("/etc/apt/", "/etc/sysctl.d/", "/etc/systemd/", MODULES))
    ]
    for file in files_to_write(files, seen):
        yield f"{file.path} differs"
    # Our records are no part of what the playbook is told.
    directories = {**seen["directories"], RECORDS: {"owner": "root", "mode": "755"}}
    if system_differs(plan, {**seen, "directories": directories}):
        yield f"user {USER}, directories such as {STATE} or kernel settings differ"
    system = f"{seen['os']['id']}-{seen['os']['version_id']}"
    if packages_differ(plan.packages(system), seen):
        yield "packages, their versions or holds differ"
    for service in plan.services:
        unit = seen["units"][service.unit]
        if unit["active"] != "active" or not unit["enabled"] or unit["stamp"] != service.stamp:
            yield f"{service.unit} does not run as planned"
    proxy = seen["units"][PROXY_UNIT]
    if proxy["active"] != "active" or not proxy["enabled"]:
        yield f"{PROXY_UNIT} does not run"


def _look(name: str, plan: HostPlan) -> dict[str, Any]:
    question = plan.question()
    question["files"] += [file.path for file in plan.installed_files]
    text = f"{packed_program()}\n{json.dumps(question)}\n"
    done = hosts.ssh(name, f'python3 -c "{BOOTSTRAP}" probe', check=True, stdin=text)
    state: dict[str, Any] = json.loads(done.stdout)
    return state
