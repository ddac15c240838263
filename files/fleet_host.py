#!/usr/bin/env python3
"""What runs on a host: it looks at the host, and carries out what it is told, one verb per call.

    fleet_host.py probe < request.json        the state of the host, as JSON; changes nothing
    fleet_host.py files < request.json        files put in place, then commands that make them count
    fleet_host.py job VERB < request.json     a long verb, as a unit that outlives the connection
    fleet_host.py follow VERB < request.json  a job that has begun: its lines from where they broke off
    fleet_host.py gate < request.json         is each service really serving? JSON; changes nothing
    fleet_host.py spare < request.json        what nothing here needs of releases and stages; changes nothing

Long verbs are `packages`, `exporter`, `driver`, `stage_driver`, `release`, `image`, `weights`, `cutover`,
`rollback` and `prune`; all but `cutover` and `rollback` are in modules beside this file. Requests come on
standard input, never in argv, so that no secret shows in a process list. Standard library only, Python
3.9 or newer; decides nothing about models or flags: all of that is in the request, which the plan made.

Exit codes: 0 done, 1 could not be done (the last line on standard error says why), 2 wrong use.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import hashlib
import http.client
import importlib
import json
import netrc
import os
import pathlib
import platform
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request

RECORDS = pathlib.Path("/var/lib/minimax-fleet")
JOBS = pathlib.Path("/run/minimax-fleet/jobs")
KEPT_JOBS = pathlib.Path("/var/lib/minimax-fleet/jobs")
"""Of cut-overs that exchange the driver: they may reboot the host, and go on afterwards."""
UNITS = pathlib.Path("/etc/systemd/system")
RUNTIME_UNITS = pathlib.Path("/run/systemd/system")
SERVICES = pathlib.Path("/etc/minimax/services")
PROXY = pathlib.Path("/etc/minimax/proxy")
AIM = pathlib.Path("/etc/minimax/rollout.json")
"""What the last roll-out that staged this host is to make of it, be it that its wave never came."""
USER = "minimax"
PROXY_UNIT = "minimax-proxy.service"
PROXY_RUN = pathlib.Path("/run/minimax-proxy")
DRAINING = pathlib.Path("/run/minimax-fleet/draining")
WRITTEN_BY_US = b"# Written by minimax-fleet for "
"""How the unit of a service begins."""
PCI = pathlib.Path("/sys/bus/pci/devices")
DRIVER = pathlib.Path("/proc/driver/nvidia/version")
NOUVEAU = pathlib.Path("/sys/module/nouveau")
KERNELS = pathlib.Path("/boot")
FABRIC_MANAGER = "nvidia-fabricmanager.service"
WEIGHTS_STAMP = ".fleet-weights.json"
MANIFEST = "fleet-release.json"
NVIDIA = "0x10de"
JOURNAL_LINES = 20
ERRORS = 8
LINE_LENGTH = 400
HEARTBEAT_S = 10
ODD_LINES = 3
"""Lines of nvidia-smi that are no row, of which so many are quoted."""


class HostError(Exception):
    """One line for a person: what could not be done here, and why."""


class SystemdSilentError(HostError):
    """systemd cannot be asked, as while a host goes down."""


def say(text):
    """A line of progress, seen at once by whoever follows this run."""
    # A full disk under the log must not end the work that the line is about.
    with contextlib.suppress(OSError):
        print(text, flush=True)


def explained(error):
    """One line for a person, and where in this program for an error that nobody foresaw."""
    if isinstance(error, HostError):
        return str(error)
    folder = os.path.dirname(explained.__code__.co_filename)
    places = [
        place
        for place in traceback.extract_tb(error.__traceback__)
        if os.path.dirname(place.filename) == folder
    ]
    where = ""
    if places:
        file, name, line = os.path.basename(places[-1].filename), places[-1].name, places[-1].lineno
        where = f" ({file}, {name}, line {line})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def run(*argv, check=True, timeout=None, env=None, stdin=None, cwd=None):
    """A command's completed process, output captured as text; bytes that are no UTF-8 are replaced."""
    done = subprocess.run(
        argv,
        check=False,
        timeout=timeout,
        encoding="utf-8",
        errors="replace",
        capture_output=True,
        env={**os.environ, **(env or {})},
        input=stdin,
        cwd=cwd,
    )
    if check and done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        tail = "\n".join(words[-20:])
        raise HostError(f"{' '.join(argv[:4])} … exited {done.returncode}:\n{tail}")
    return done


def run_long(label, *argv, **options):
    """Like `run`, for what may take minutes: says every so often that it goes on."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, *argv, **options)
        while True:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return done.result(HEARTBEAT_S)
            say(f"{label}: {time.monotonic() - began:.0f} s")


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path, content, mode=0o644):
    """The file appears whole, with its mode, or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content if isinstance(content, bytes) else content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError:
        # On a full disk even half a file is too much.
        partial.unlink()
        raise


def write_if_other(path, content):
    """Writes a file that has not this content; says whether it did. A full disk stops no other file."""
    with contextlib.suppress(FileNotFoundError):
        if pathlib.Path(path).read_bytes() == content:
            return False
    write_atomically(path, content)
    return True


def read_json(path):
    """The JSON in a file, or None where there is no such file or it was cut short."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


# --------------------------------------------------------------------------------------- looking


def probe(request):
    """The host's state, as far as the request asks for it."""
    system = os_release()
    # Packages are named differently from one distribution to another: the request has them for each.
    packages = dict(of_system(request["packages"], system) or {})
    packages.update(dict.fromkeys(engine_packages(of_system(request["engines"], system))))
    headers = of_system(request["kernel_headers"], system)
    without = [] if system["kernel_headers"] else [system["kernel"]]
    for kernel in (*without, system["next_kernel"]):
        if headers and kernel:
            packages[headers.format(kernel=kernel)] = None
    records = service_records()
    past = generations()
    served = {name for generation in past for name in generation["services"]}
    units = units_state(sorted({*request["units"], *map(unit_of, {*records, *served})}))
    driver = of_system(request["drivers"], system)
    state = {
        "time": time.time(),
        "os": system,
        "python": list(sys.version_info[:3]),
        "files": {path: file_state(path) for path in request["files"]},
        "users": {name: user_exists(name) for name in request["users"]},
        "directories": {path: directory_state(path) for path in request["directories"]},
        "sysctl": {key: sysctl(key) for key in request["sysctl"]},
        "packages": packages_state(list(packages)),
        "pci": pci_state(),
        "gpus": gpus_state() if request["gpus"] else None,
        "units": units,
        "records": records,
        "due": due({**request["cutover"], "driver": driver}, units),
        "driver": driver_state(request["fabric_manager"]),
        "applied": applied_plans(request["services"], records),
        "history": history_state(past, units),
        "ports": ports_state(request["ports"]),
        "disks": {path: disk_state(path) for path in request["disks"]},
        "releases": {path: release_complete(path) for path in request["releases"]},
        "accepted": {path: os.path.isfile(path) for path in request["accepted"]},
        "weights": {
            path: weights_complete(path, named) for path, named in dict(request["weights"]).items()
        },
        "uv": os.access(request["uv"], os.X_OK),
    }
    state["needs"] = needs_state(request, state, packages) if request["outside"] else None
    # Asking others may take its time; the middle of the two is when whoever asked us was half way.
    state["time"] = (state["time"] + time.time()) / 2
    return state


def applied_plans(folder, records):
    """What the services that passed the gate are made of, by name; see ServicePlan.document()."""
    paths = {
        name: pathlib.Path(folder) / name / str((record or {}).get("stamp")) / "plan.json"
        for name, record in records.items()
    }
    return {name: read_json(path) for name, path in paths.items()}


def os_release():
    values = {}
    for line in pathlib.Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        values[name] = value.strip('"')
    return {
        "id": values.get("ID", ""),
        "version_id": values.get("VERSION_ID", ""),
        "name": values.get("PRETTY_NAME", ""),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kernel_headers": has_headers(platform.release()),
        "next_kernel": kernel_without_headers(),
        "enforcing": read_word("/sys/fs/selinux/enforce") == "1",
    }


def of_system(by_system, system):
    """What a request has for this distribution: by `debian-12`, or by the major version (`rocky-9`)."""
    exact = f"{system['id']}-{system['version_id']}"
    return by_system.get(exact, by_system.get(exact.partition(".")[0]))


def read_word(path):
    """The text of a small file of the kernel's; None where there is no such file."""
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return None


def file_state(path):
    try:
        status = os.stat(path)
        return {
            "sha256": sha256_of(path),
            "mode": f"{status.st_mode & 0o7777:o}",
            "uid": status.st_uid,
        }
    except (FileNotFoundError, NotADirectoryError):
        return None


def user_exists(name):
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def numbers_of(user):
    """A user's id and group id, as `998:998`. Raises HostError where there is no such user."""
    try:
        known = pwd.getpwnam(user)
    except KeyError:
        raise HostError(f"there is no user {user} on this host; roll out once more") from None
    return f"{known.pw_uid}:{known.pw_gid}"


def directory_state(path):
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    return {"owner": owner, "mode": f"{status.st_mode & 0o7777:o}"}


def sysctl(key):
    try:
        return " ".join(pathlib.Path("/proc/sys", *key.split(".")).read_text().split())
    except OSError:
        return None


def package_manager():
    """`apt` or `dnf`; the first where both are there, for a Debian may have rpm's tools, too."""
    return "dnf" if shutil.which("apt-get") is None and shutil.which("dnf") else "apt"


def packages_state(names):
    """Installed version and hold of each package; None for one that is not installed."""
    if names and package_manager() == "dnf":
        return rpm_state(names)
    state = dict.fromkeys(names)
    if not names or shutil.which("dpkg-query") is None:
        return state
    # Exit 1 only says that some of the names are unknown to dpkg.
    form = "${Package}\t${db:Status-Abbrev}\t${Version}\n"
    for line in run("dpkg-query", "-W", "-f", form, *names, check=False).stdout.splitlines():
        name, status, version = line.split("\t")
        if status[1] == "i":
            state[name] = {"version": version, "held": status[0] == "h"}
    return state


def rpm_state(names):
    """As packages_state, of rpm's database. A name may be one with its version and architecture.

    Versions are without their epoch, as dnf takes them; of several that are installed the last is told.
    """
    state = dict.fromkeys(names)
    form = "%{NAME}\t%{EPOCHNUM}\t%{VERSION}-%{RELEASE}\t%{ARCH}\n"
    locks = version_locks()
    # Its exit status is the number of names that are not installed, for each of which it has a sentence.
    for line in run("rpm", "-q", "--qf", form, *names, check=False).stdout.splitlines():
        parts = line.split("\t")
        if len(parts) != 4:  # noqa: PLR2004 - fields of `form`
            continue
        name, epoch, version, architecture = parts
        held = is_locked(locks, name, f"{epoch}:{version}", architecture)
        for asked in {name, f"{name}-{version}.{architecture}"} & state.keys():
            state[asked] = {"version": version, "held": held}
    return state


DNF_PLUGINS = pathlib.Path("/etc/dnf/plugins")


def version_locks():
    """Lines of dnf's versionlock plugin, NAME-EPOCH:VERSION-RELEASE.ARCHITECTURE with `*`."""
    # dnf itself takes a second to list them.
    configured = re.search(
        r"^\s*locklist\s*=\s*(\S+)", read_word(DNF_PLUGINS / "versionlock.conf") or "", re.M
    )
    path = configured[1] if configured else DNF_PLUGINS / "versionlock.list"
    lines = (read_word(path) or "").splitlines()
    return [line.strip() for line in lines if line.strip() and line.strip()[0] not in "#!"]


def is_locked(locks, name, version, architecture):
    """Is a package, of EPOCH:VERSION-RELEASE, kept at just that by one of the locks?"""
    exact = f"{name}-{version}.{architecture}"
    return any(lock.startswith(f"{name}-") and fnmatch.fnmatchcase(exact, lock) for lock in locks)


def installed(state, version):
    """Is a package there, at a version where one is asked for? A version may end in apt's `*`."""
    return state is not None and (not version or fnmatch.fnmatchcase(state["version"], version))


def engine_packages(sets):
    """Packages of the container engine that this host has, or else is to have: of sets that exclude each
    other, each begins with its own, the preferred one first."""
    if not sets:
        return []
    there = packages_state([names[0] for names in sets])
    return next((names for names in sets if there[names[0]]), sets[0])


def pci_state():
    """GPUs, with their addresses, and NVSwitches on the PCI bus: known before any driver is there."""
    gpus, switches = [], 0
    for device in PCI.glob("*"):
        with contextlib.suppress(OSError):
            if (device / "vendor").read_text().strip() == NVIDIA:
                kind = (device / "class").read_text().strip()
                gpus += [device.name] if kind.startswith(("0x0302", "0x0300")) else []
                switches += kind.startswith("0x0680")
    return {"gpus": len(gpus), "gpu_addresses": sorted(gpus), "nvswitches": switches}


def gpus_state():
    """What nvidia-smi says: `{"devices": [...]}`, or `{"error": its own words}`."""
    fields = "index,name,memory.total,compute_cap,driver_version,pci.bus_id"
    try:
        done = run(
            "nvidia-smi",
            f"--query-gpu={fields}",
            "--format=csv,noheader,nounits",
            check=False,
            timeout=60,
        )
    except FileNotFoundError:
        return {"error": None, "devices": None}
    except subprocess.TimeoutExpired:
        return {"error": "nvidia-smi did not answer in 60 s", "devices": None}
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())
        return {"error": words or f"nvidia-smi exited {done.returncode}", "devices": None}
    devices, odd = [], []
    for line in filter(str.strip, done.stdout.splitlines()):
        values = [value.strip() for value in line.split(",")]
        # A GPU that is lost is a sentence among the rows, and the exit status may be 0 all the same.
        if len(values) != len(fields.split(",")) or not values[0].isdigit():
            odd.append(" ".join(line.split()))
            continue
        devices.append(
            {
                "index": int(values[0]),
                "name": values[1],
                "memory_mib": int(values[2]) if values[2].isdigit() else 0,
                "compute_capability": values[3],
                "driver": values[4],
                # 00000000:18:00.0 is 0000:18:00.0 to the kernel.
                "address": values[5].lower()[-len("0000:18:00.0") :],
            }
        )
    error = "; ".join(odd[:ODD_LINES]) or None
    return {"error": error, "devices": None if error and not devices else devices}


UNIT_PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,Result,ExecMainStatus,"
    "ExecMainStartTimestampMonotonic,DropInPaths,NeedDaemonReload"
)


def unit_of(name):
    """The unit of a service."""
    return f"minimax-{name}.service"


def units_state(units):
    """Each unit as systemd sees it, with the stamp that its *running process* carries.

    `started_at` is when that process was started, in seconds of this host's clock as it is now.
    `drop_ins` are those of this unit alone; `needs_reload`: systemd has older files in mind.
    """
    if not units:
        return {}
    done = run("systemctl", "show", "-p", UNIT_PROPERTIES, "--", *units, check=False)
    if done.returncode:
        raise SystemdSilentError(f"systemd does not say how units are: {done.stderr.strip()}")
    shown = done.stdout
    booted_at = time.time() - time.monotonic()
    state = {}
    for block in shown.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        pid = int(values.get("MainPID", "0"))
        state[values["Id"]] = {
            "loaded": values["LoadState"] == "loaded",
            "active": values["ActiveState"],
            "sub": values["SubState"],
            "enabled": values["UnitFileState"] == "enabled",
            "disabled": values["UnitFileState"] == "disabled",
            "pid": pid,
            "restarts": int(values.get("NRestarts") or 0),
            "result": values.get("Result", ""),
            "exit_status": int(values.get("ExecMainStatus") or 0),
            "stamp": process_stamp(pid),
            "started_at": booted_at + int(values.get("ExecMainStartTimestampMonotonic") or 0) / 1e6,
            "drop_ins": [
                path
                for path in values.get("DropInPaths", "").split()
                if path.split("/")[-2] == f"{values['Id']}.d"
            ],
            "needs_reload": values.get("NeedDaemonReload") == "yes",
        }
    return state


def unit_state(unit):
    """One unit of units_state."""
    return units_state([unit])[unit]


STAMP = re.compile(rb"(?:^|[\0 ])FLEET_STAMP=([0-9a-f]+)")


def process_stamp(pid):
    """FLEET_STAMP of a process: which plan it was started from.

    It is in the environment, but for nginx, which writes its title over that.
    """
    for place in ("environ", "cmdline"):
        found = STAMP.search(process_bytes(pid, place))
        if found:
            return found.group(1).decode()
    return None


def process_argv(pid):
    """A process's arguments; none where there is no such process."""
    return process_bytes(pid, "cmdline").decode(errors="replace").split("\0")[:-1]


def process_bytes(pid, name):
    """A file of a process in /proc; empty where there is no such process."""
    if pid > 0:
        with contextlib.suppress(OSError):
            return pathlib.Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


LISTEN = "0A"


def listening_inodes():
    """TCP port to the socket inodes that listen on it."""
    inodes = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN:
                    inodes.setdefault(int(fields[1].rsplit(":", 1)[1], 16), set()).add(fields[9])
    return inodes


def ports_state(ports):
    """Who listens on each port: pid, command and systemd unit, or None."""
    state = dict.fromkeys(map(str, ports))
    inodes = listening_inodes()
    wanted = {f"socket:[{inode}]": port for port in ports for inode in inodes.get(port, ())}
    if not wanted:
        return state
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                port = wanted.get(os.readlink(descriptor)) if descriptor.is_symlink() else None
                if port is not None and state[str(port)] is None:
                    state[str(port)] = process_state(process)
    return state


def port_holder(port):
    """Who listens on one port, as in ports_state."""
    return ports_state([port])[str(port)]


def process_state(process):
    return {
        "pid": int(process.name),
        "command": (process / "comm").read_text().strip(),
        "unit": unit_of_cgroup((process / "cgroup").read_text()),
    }


CONTAINERS = pathlib.Path("/run/minimax-containers")
"""For each service that runs in a container: its id, as Docker's client of the unit has written it."""
IN_CONTAINER = re.compile(r"/docker[-/]([0-9a-f]{64})(?:\.scope)?(?:/|$)", re.M)
"""By Docker's systemd driver, /system.slice/docker-ID.scope; by its other one, /docker/ID."""


def unit_of_cgroup(text):
    """The unit that a process belongs to. A container is no part of one, but of the engine: it is its
    service's where the id is that of the service's own, and else nobody's."""
    inside = IN_CONTAINER.search(text)
    if inside:
        for path in CONTAINERS.glob("*/container.id"):
            if read_word(path) == inside[1]:
                return unit_of(path.parent.name)
        return None
    found = re.search(r"/([^/\s]+\.service)", text)
    return found[1] if found else None


DOCKER_TIMEOUT_S = 30


def docker(*words):
    """What Docker's client says; None where it fails, or there is none."""
    try:
        done = run("docker", *words, check=False, timeout=DOCKER_TIMEOUT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def image_id(name):
    """The id of an image, which is a digest of all that it is; None where there is no such image."""
    return docker("image", "inspect", "--format={{.Id}}", name)


def forget_image(release):
    """Takes a release's image from Docker, where it is one. Raises HostError where something uses it."""
    made_of_image = (read_json(pathlib.Path(release) / MANIFEST) or {}).get("image")
    if made_of_image and image_id(made_of_image["tag"]) is not None:
        run("docker", "rmi", made_of_image["tag"])


def disk_state(path):
    """Free bytes for root where `path` is or will be, and which file system that is."""
    place = pathlib.Path(path)
    while not place.exists():
        place = place.parent
    usage = os.statvfs(place)
    return {"free_bytes": usage.f_bavail * usage.f_frsize, "device": os.stat(place).st_dev}


def release_complete(path):
    """Is all of a release there, its image with it where it is one?"""
    manifest = pathlib.Path(path) / MANIFEST
    if not manifest.is_file():
        return False
    known = (read_json(manifest) or {}).get("image")
    return known is None or image_id(known["tag"]) == known["id"]


def weights_complete(path, named=None):
    """True when every file of the stamp is there with its size and modification time.

    `named`: what `weights_digest` says of the hashes that they must have; None for any.
    """
    stamp = read_json(pathlib.Path(path) / WEIGHTS_STAMP)
    if stamp is None:
        return False
    if named and named != weights_digest({n: f.get("sha256") for n, f in stamp["files"].items()}):
        return False
    for name, known in stamp["files"].items():
        try:
            status = os.stat(pathlib.Path(path) / name)
        except FileNotFoundError:
            return False
        if (status.st_size, status.st_mtime_ns) != (known["size"], known["mtime_ns"]):
            return False
    return True


def weights_digest(hashes):
    """12 hex digits that name the SHA-256 of all files of a model, as Weights.digest of the plan does."""
    parts = [f"{name} {hashes[name]}" for name in sorted(hashes)]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:12]


def active_jobs():
    return listed_units("active,activating,deactivating", "minimax-job-*")


def active_services():
    """Units that serve models, or still finish answers."""
    units = listed_units("active,deactivating", "minimax-*.service")
    return [unit for unit in units if unit != PROXY_UNIT and not unit.startswith("minimax-job-")]


def listed_units(states, pattern):
    listed = run(
        "systemctl", "list-units", "--plain", "--no-legend", f"--state={states}", pattern
    ).stdout
    return [line.split()[0] for line in listed.splitlines()]


def needs_state(request, state, packages):
    """Is there what this host will need, where it will look? Nothing is asked of what it will not need."""
    need = {}
    lacking = [
        name
        for name, version in packages.items()
        if not installed(state["packages"][name], version)
    ]
    manager = package_manager()
    if lacking:
        of_packages = request["mirrors"][manager]
        need.update((f"{manager} {name}", url) for name, url in of_packages.items())
    built = [path for path in state["releases"] if path not in request["images"]]
    if request["mirrors"]["index"] and not (
        state["uv"] and all(state["releases"][path] for path in built)
    ):
        need["index"] = request["mirrors"]["index"]
    if not all(state["releases"][path] for path in request["images"]):
        need["registry"] = request["mirrors"]["registry"]
    missing = [weights for weights in request["models"] if not state["weights"][weights["path"]]]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        reached = {name: pool.submit(reach, url) for name, url in need.items()}
        sizes = {
            weights["path"]: pool.submit(hub_bytes, request["mirrors"]["hub"], weights)
            for weights in missing
        }
        mirrors = {
            name: {"url": need[name], "error": done.result()} for name, done in reached.items()
        }
        # A mirror that cannot be reached is told once; apt or dnf would say it again.
        works = lacking and not any(
            mirror["error"] for name, mirror in mirrors.items() if name.startswith(f"{manager} ")
        )
        look = {"apt": apt_versions, "dnf": dnf_versions}[manager]
        return {
            "mirrors": mirrors,
            "packages": look(lacking, request["sources"][manager]) if works else None,
            "weights": {path: done.result() for path, done in sizes.items()},
        }


APT_SOURCES = "etc/apt/sources.list.d"
APT_KEYRINGS = "etc/apt/keyrings"
APT_AUTH = "etc/apt/auth.conf.d"
LOOK_TIMEOUT_S = 300


def apt_versions(names, sources):
    """Versions of packages that apt would find: `{"versions": {name: [...]}}` or `{"error": why}`.

    Asked of the host's own sources and of those that are still to be put there (`sources`: path and
    content of source and keyring files), with lists and cache of its own: nothing of the host changes.
    """
    with tempfile.TemporaryDirectory(prefix="minimax-fleet-apt-") as folder:
        place = pathlib.Path(folder)
        for part in (
            APT_SOURCES,
            APT_KEYRINGS,
            APT_AUTH,
            "lists/partial",
            "cache/archives/partial",
        ):
            (place / part).mkdir(parents=True)
        for part in (APT_SOURCES, APT_AUTH):
            for file in pathlib.Path("/", part).glob("*.*"):
                shutil.copy(file, place / part)
        for file in sources:
            content = file["content"].replace(f"/{APT_KEYRINGS}/", f"{place / APT_KEYRINGS}/")
            (place / file["path"].lstrip("/")).write_text(content)
        aside = (
            f"-o=Dir::Etc::SourceParts={place / APT_SOURCES}",
            f"-o=Dir::Etc::netrcparts={place / APT_AUTH}",
            f"-o=Dir::State::Lists={place / 'lists'}",
            f"-o=Dir::Cache={place / 'cache'}",
            # Programs that the host has hooked to its own updates have nothing to do here.
            "-o=#clear=APT::Update::Pre-Invoke",
            "-o=#clear=APT::Update::Post-Invoke",
            "-o=#clear=APT::Update::Post-Invoke-Success",
            "-o=Acquire::Languages=none",
            # apt's own user cannot enter this folder.
            "-o=APT::Sandbox::User=root",
        )
        try:
            done = run(*APT, *aside, "update", check=False, timeout=LOOK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"apt-get update did not end in {LOOK_TIMEOUT_S} s"}
        if done.returncode:
            said = [line[2:].strip() for line in done.stderr.splitlines() if line[:2] == "E:"]
            return {"error": "; ".join(said[:ERRORS]) or f"apt-get exited {done.returncode}"}
        listed = run("apt-cache", *aside, "madison", *names, check=False).stdout
    versions = {name: [] for name in names}
    for line in listed.splitlines():
        name, version = (part.strip() for part in line.split("|")[:2])
        versions[name].append(version)
    return {"versions": versions}


DNF_REPOSITORIES = "etc/yum.repos.d"
DNF_KEYS = "etc/pki/rpm-gpg"


def dnf_versions(names, sources):
    """As apt_versions, for dnf; versions are without their epoch. Locks of the host do not hide any."""
    with tempfile.TemporaryDirectory(prefix="minimax-fleet-dnf-") as folder:
        place = pathlib.Path(folder)
        for part in (DNF_REPOSITORIES, DNF_KEYS, "cache", "log"):
            (place / part).mkdir(parents=True)
        for file in pathlib.Path("/", DNF_REPOSITORIES).glob("*.repo"):
            shutil.copy(file, place / DNF_REPOSITORIES)
        for file in sources:
            content = file["content"].replace(f"/{DNF_KEYS}/", f"{place / DNF_KEYS}/")
            (place / file["path"].lstrip("/")).write_text(content)
        form = "%{name}\\t%{version}-%{release}\\t%{arch}"
        try:
            done = run(
                *(*DNF, "--quiet"),
                f"--setopt=reposdir={place / DNF_REPOSITORIES}",
                f"--setopt=cachedir={place / 'cache'}",
                f"--setopt=logdir={place / 'log'}",
                *("repoquery", "--available", "--qf", form, *names),
                check=False,
                timeout=LOOK_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"dnf repoquery did not end in {LOOK_TIMEOUT_S} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        words = "; ".join(line.partition(" ")[2].strip() for line in said[:ERRORS])
        return {"error": words or f"dnf exited {done.returncode}"}
    versions = {name: [] for name in names}
    for line in done.stdout.splitlines():
        parts = line.split("\t")
        if len(parts) == 3:  # noqa: PLR2004 - fields of `form`
            name, version, architecture = parts
            for asked in {name, f"{name}-{version}.{architecture}"} & versions.keys():
                versions[asked].insert(0, version)
    return {"versions": versions}


def reach(url):
    """None where a server answers at `url`, else why not. Any HTTP status is an answer."""
    try:
        open_url(url, method="HEAD", timeout=10).close()
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"HTTP {error.code}"  # noqa: PLR2004
    except (OSError, http.client.HTTPException, ValueError) as error:
        return reason(error)
    return None


ODD_JSON = (ValueError, LookupError, TypeError, AttributeError)
"""What is raised over an answer that is no JSON, or JSON of another shape than it has to be."""


def reason(error):
    """What an error says, in one line; that of an answer's shape says little without its kind."""
    words = " ".join(str(getattr(error, "reason", None) or error).split())
    if isinstance(error, ODD_JSON[1:]):
        return f"an answer of another shape ({type(error).__name__}: {words})"
    return words or type(error).__name__


def hub_bytes(hub, weights):
    """Size of a model at a revision, by the hub, and how much of it an interrupted run has left here:
    `{"bytes": n, "fetched_bytes": n}` or `{"error": why}`."""
    url = f"{hub}/api/models/{weights['repository']}/revision/{weights['revision']}?blobs=true"
    try:
        with open_url(url, timeout=20) as response:
            total = sum(file.get("size") or 0 for file in json.load(response)["siblings"])
    except urllib.error.HTTPError as error:
        return {"error": f"{url}: HTTP {error.code}"}
    except (OSError, http.client.HTTPException, *ODD_JSON) as error:
        return {"error": f"{url}: {reason(error)}"}
    return {"bytes": total, "fetched_bytes": size_of(partial_of(weights))}


def login_for(host):
    """Basic authentication by the netrc file that NETRC names, as pip, uv and curl do it; None without."""
    file = os.environ.get("NETRC")
    if not file or not os.access(file, os.R_OK):
        return None
    try:
        found = netrc.netrc(file).authenticators(host.partition(":")[0])
    except (netrc.NetrcParseError, OSError) as error:
        raise HostError(f"{file}, which NETRC names, cannot be read: {error}") from None
    if not found:
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def open_url(url, method="GET", timeout=30, body=None, headers=None):
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    login = login_for(request.host)
    if login:
        # Not for whoever a redirection leads to.
        request.add_unredirected_header("Authorization", login)
    return urllib.request.urlopen(request, timeout=timeout, context=ssl.create_default_context())


# ------------------------------------------------------------------------------------ small acts


def files(request):
    """Files in place, each atomically; then the commands that make them count."""
    for file in request["files"]:
        write_atomically(file["path"], file["content"], int(file["mode"], 8))
    for argv in request["then"]:
        run(*argv)


LOCK_TIMEOUT_S = 900

APT = (
    "apt-get",
    "--yes",
    "--no-install-recommends",
    f"-o=DPkg::Lock::Timeout={LOCK_TIMEOUT_S}",
    "-o=Dpkg::Options::=--force-confdef",
    "-o=Dpkg::Options::=--force-confold",
    "-o=Acquire::Retries=3",
    # Without it `update` exits 0 when a repository could not be fetched.
    "-o=APT::Update::Error-Mode=any",
)
DNF = (
    "dnf",
    "--assumeyes",
    "--setopt=install_weak_deps=False",
    # Else a repository that cannot be reached may be passed over, and what is there is older.
    "--setopt=skip_if_unavailable=False",
)


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def as_user(user, *argv):
    """A command as another user, with that user's groups and no more."""
    # setpriv itself still finds its program by root's rights; what env then runs is found by the user's.
    return ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "env", *argv)


def partial_of(weights):
    """Where a model lies while it is being fetched."""
    path = pathlib.Path(weights["path"])
    return path.with_name(f".{path.name}.partial")


def size_of(folder):
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


# ------------------------------------------------------------------------------------------ gate


POLL_S = 0.25
LOOK_S = 1
"""How often a process is looked at through systemd while something quicker is awaited."""


class GateError(HostError):
    """A service does not serve: at which step, what was expected, what came."""

    def __init__(self, step, expected, got):
        super().__init__(f"gate, {step}: expected {expected}, got {got}")


def gate(request):
    """Every service of the request judged at once; a list of results, in order."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(request["services"]))) as pool:
        return list(
            pool.map(lambda service: judge(service, request["answer"]), request["services"])
        )


def judge(service, answer):
    """The gate on a service that should be serving now, as data; with or without an answer."""
    try:
        timings = pass_gate(service, ready_timeout_s=5, answer=answer)
    except Exception as error:
        # Whatever a server answers, the others' results must not be lost to it.
        said = journal(service["unit"])
        return {"name": service["name"], "error": explained(error), "journal": said}
    return {"name": service["name"], "error": None, **timings}


def pass_gate(service, ready_timeout_s, answer=True, tell=lambda text: None):
    """Process, port, /health, model id, an answer. Timings in seconds; raises GateError.

    `tell` is given a line every so often while the service is not ready yet.
    """
    began = told = time.monotonic()
    deadline = began + ready_timeout_s
    restarts = unit_state(service["unit"])["restarts"]
    looked = began - LOOK_S
    while True:
        if time.monotonic() - looked >= LOOK_S:
            looked = time.monotonic()
            check_process(service, restarts)
        status = http_status(service, "/health")
        if status == 200:  # noqa: PLR2004
            break
        if time.monotonic() > deadline:
            holder = port_holder(service["engine_port"])
            step = "health" if holder else "port"
            raise GateError(step, f"/health 200 within {ready_timeout_s} s", status or "no answer")
        if time.monotonic() - told > HEARTBEAT_S:
            told = time.monotonic()
            last = last_line(service["unit"])
            tell(f"{service['name']}: {told - began:.0f} s, not ready yet: {last[:120]}")
        time.sleep(POLL_S)
    check_port(service)
    ready = time.monotonic()
    check_model(service)
    text = check_answer(service) if answer else ""
    return {
        "ready_s": round(ready - began, 2),
        "first_answer_s": round(time.monotonic() - ready, 2),
        "answer": text[-200:],
    }


def check_process(service, restarts):
    """The unit runs and has not been started anew since the gate began."""
    unit = unit_state(service["unit"])
    if unit["active"] == "active" and unit["pid"] and unit["restarts"] == restarts:
        return
    holder = port_holder(service["engine_port"])
    if holder and holder["unit"] != service["unit"]:
        raise GateError(
            "port", f"port {service['engine_port']} for {service['unit']}", held_by(holder)
        )
    if unit["result"] == "oom-kill":
        got = "killed by the kernel for want of memory (oom-kill)"
    elif unit["restarts"] > restarts or unit["active"] in ("activating", "failed"):
        got = f"it ended with exit status {unit['exit_status']} ({unit['result']})"
    else:
        got = f"{unit['active']} ({unit['sub']})"
    raise GateError("process", f"{service['unit']} running", got)


def held_by(holder):
    return f"held by PID {holder['pid']} ({holder['command']})"


def check_port(service):
    holder = port_holder(service["engine_port"])
    if holder is None or holder["unit"] != service["unit"]:
        got = held_by(holder) if holder else "nobody listens"
        raise GateError("port", f"port {service['engine_port']} for {service['unit']}", got)


MODELS_TIMEOUT_S = 30


def check_model(service):
    wanted = service["gate"]["model"]
    try:
        with ask(service, "/v1/models", timeout=MODELS_TIMEOUT_S) as response:
            document = json.loads(read_until(response, time.monotonic() + MODELS_TIMEOUT_S))
        ids = [str(model["id"]) for model in document["data"]]
    except (OSError, http.client.HTTPException, *ODD_JSON) as error:
        raise GateError("model", wanted, f"/v1/models: {reason(error)}") from error
    if wanted not in ids:
        raise GateError("model", wanted, ", ".join(ids) or "no model")


def check_answer(service):
    """The guides' request, answered in time and with sense."""
    expected = f"an answer that matches /{service['gate']['expect']}/"
    body = json.dumps(service["gate"]["request"]).encode()
    timeout = service["gate"]["answer_timeout_s"]
    try:
        with ask(service, "/v1/chat/completions", timeout=timeout, body=body) as response:
            text = answered(json.loads(read_until(response, time.monotonic() + timeout)))
    except TimeoutError as error:
        raise GateError("answer", f"{expected} within {timeout} s", "none") from error
    except urllib.error.HTTPError as error:
        got = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        raise GateError("answer", expected, got) from error
    except (OSError, http.client.HTTPException, *ODD_JSON) as error:
        raise GateError("answer", expected, reason(error)) from error
    if "\N{REPLACEMENT CHARACTER}" in text or not re.search(service["gate"]["expect"], text):
        raise GateError("answer", expected, repr(text[:200]))
    return text


def answered(document):
    """Text of a chat completion, reasoning and all. Raises one of ODD_JSON for another shape."""
    message = document["choices"][0]["message"]
    parts = (message.get(key) for key in ("reasoning", "reasoning_content", "content"))
    return " ".join(part for part in parts if part)


def read_until(response, deadline):
    """The whole body, or TimeoutError: a trickle of bytes must not outlive the deadline."""
    chunks = []
    while chunk := response.read1(65536):
        chunks.append(chunk)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(chunks)


def http_status(service, path):
    """HTTP status of a GET, or None where nobody answers."""
    try:
        with ask(service, path, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def ask(service, path, timeout, body=None):
    headers = {"Content-Type": "application/json"}
    key = api_key(service)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    url = f"http://127.0.0.1:{service['engine_port']}{path}"
    request = urllib.request.Request(url, data=body, headers=headers)
    # A proxy of the environment is for the outside, never for this host's own port.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        request, timeout=timeout
    )


def api_key(service):
    """VLLM_API_KEY of the service's own secrets, as vLLM will read it."""
    try:
        text = (SERVICES / service["name"] / service["stamp"] / "secrets.env").read_text()
    except FileNotFoundError:
        return None
    value = text.partition("=")[2].strip()[1:-1]
    return re.sub(r"\\(.)", r"\1", value)


ERROR = re.compile(r"\b\w*(?:Error|Exception): |error: |Xid|oom-kill")


JOURNAL_ENTRIES = 2000
"""How far back errors are looked for: a server that ran for months has written gigabytes."""
JOURNAL_TIMEOUT_S = 30


def journal(unit, lines=JOURNAL_LINES):
    """The last lines of the unit's present or last start, led by the errors that came before them.

    A traceback of vLLM's parent process only says that a child failed; the cause is further up. It
    explains something else that went wrong, so where it cannot be read it says so and raises nothing.
    """
    try:
        said = last_entries(unit, JOURNAL_ENTRIES)
    except (HostError, OSError, subprocess.SubprocessError) as error:
        return [f"the journal of {unit} cannot be read: {reason(error)}"]
    last = said[-lines:]
    errors = [line for line in said[:-lines] if ERROR.search(line)]
    return [line[:LINE_LENGTH] for line in (*dict.fromkeys(errors[:ERRORS]), *last)]


def last_line(unit):
    """The last line of the unit's journal."""
    with contextlib.suppress(HostError, OSError, subprocess.SubprocessError):
        return (last_entries(unit, 1) or ["nothing in its journal"])[-1]
    return "its journal cannot be read"


def last_entries(unit, entries):
    """Lines of the last entries of the unit's present or last start."""
    shown = run("systemctl", "show", "-p", "InvocationID", "--value", unit).stdout.strip()
    match = [f"_SYSTEMD_INVOCATION_ID={shown}", "+", f"INVOCATION_ID={shown}"]
    which = match if shown else ["-u", unit]
    wanted = ("journalctl", *which, f"--lines={entries}", "-o", "cat", "--no-pager")
    return run(*wanted, check=False, timeout=JOURNAL_TIMEOUT_S).stdout.splitlines()


# ------------------------------------------------------------------------------------------- due


START, JUDGE, RELOAD, MEND = "start", "judge", "reload", "mend"


def due(request, units):
    """What a cut-over has to do here, and why: `services` by name, those that are `gone`, the `proxy`, the
    `driver` with more than why (see driver_due).

    The cut-over itself goes by the same judgement, so no run finds what its cut-over does not put right.
    """
    services = {
        service["name"]: service_due(service, units[service["unit"]])
        for service in request["services"]
    }
    proxy = proxy_due(request["proxy"], units[PROXY_UNIT])
    return {
        "services": {name: found[1] for name, found in services.items() if found},
        "gone": gone(request),
        "proxy": proxy[1] if proxy else None,
        "driver": driver_due(request.get("driver")),
    }


def service_due(service, unit):
    """What a service lacks of its plan, as `(act, why)`; None where nothing.

    START: its process is not the plan's. JUDGE: it is, and has not passed the gate. MEND: only what
    systemd reads is not as planned, and the process need not know.
    """
    passed = record(service["name"]) or {}
    why = process_due(unit, service["stamp"], service["unit"], service["unit_sha256"])
    found = process_argv(unit["pid"])
    why = why or argv_due(as_started(service["argv"]), found, passed.get("argv"))
    why = why or container_due(service)
    if why:
        return START, why
    if passed.get("stamp") != service["stamp"]:
        return JUDGE, "it has not passed the gate"
    if (DRAINING / service["name"]).exists():
        return JUDGE, "its public port is out of service"
    why = unit_due(unit, service["unit"], service["unit_sha256"])
    return (MEND, why) if why else None


def proxy_due(proxy, unit):
    """What the proxy lacks of its plan, as `(act, why)`; None where nothing. As in service_due; RELOAD:
    nginx has another configuration than the plan's, or may have."""
    why = process_due(unit, proxy["unit_stamp"], PROXY_UNIT, proxy["unit_sha256"])
    if why:
        return START, why
    if loaded_configuration() != proxy["stamp"]:
        return RELOAD, "it has another configuration"
    if content_hash(PROXY / "nginx.conf") != proxy["sha256"]:
        return RELOAD, f"{PROXY / 'nginx.conf'} was changed by hand"
    why = unit_due(unit, PROXY_UNIT, proxy["unit_sha256"])
    return (MEND, why) if why else None


def process_due(unit, stamp, name, sha256):
    """Why a unit's process must be started anew; None where it need not."""
    if unit["active"] not in ("active", "reloading"):
        return f"its unit is {unit['active']}"
    if unit["stamp"] != stamp:
        return "its process is not the plan's"
    # An edit that came later than the process is not in it. One that was there may be: limits, user …
    if any(changed_at(path) < unit["started_at"] for path in edited(unit, name, sha256)):
        return "its process was started from files that were changed by hand"
    return None


def argv_due(planned, found, passed):
    """Why a process with arguments `found` is not the one that was planned, or that `passed` the gate.

    An interpreter may stand before the planned ones. A program that gives itself a title is known by
    what it was when it passed.
    """
    if found[-len(planned) :] == planned or found == passed:
        return None
    return "its process has other arguments than the plan's"


def as_started(argv):
    """A plan's arguments as a process has them: Docker is given the service's user by its numbers."""
    return [
        f"--user={numbers_of(USER)}" if word == f"--user={USER}:{USER}" else word for word in argv
    ]


def container_due(service):
    """Why a service's container is not of its release's image; None where it is, or where it has none."""
    if "image" not in service:
        return None
    known = (read_json(pathlib.Path(service["release"]) / MANIFEST) or {}).get("image") or {}
    name = service["unit"].rpartition(".")[0]
    found = docker("container", "inspect", "--format={{.Image}}", name)
    return None if found and found == known.get("id") else "its container is of another image"


def unit_due(unit, name, sha256):
    """Why what systemd knows of a unit must be put right; None where it need not."""
    files = edited(unit, name, sha256)
    if files:
        return f"{files[0]} was changed by hand"
    if unit["needs_reload"]:
        return "systemd has not read its files yet"
    return None if unit["enabled"] else "its unit is not enabled"


def edited(unit, name, sha256):
    """The unit's file where it is not as planned, and drop-ins: the plan has none."""
    path = UNITS / name
    differing = [] if content_hash(path) == sha256 else [path]
    return [*differing, *map(pathlib.Path, unit["drop_ins"])]


def content_hash(path):
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None


def changed_at(path):
    """When a file was last changed, in seconds of this host's clock; just now if it is gone."""
    try:
        return os.stat(path).st_ctime
    except FileNotFoundError:
        return time.time()


def gone(request):
    """Services that are on this host and not in the plan, be it only as a unit that never served."""
    planned = {service["name"] for service in request["services"]}
    recorded = {path.stem for path in RECORDS.glob("services/*.json")}
    installed_here = {
        path.stem.partition("-")[2]
        for path in UNITS.glob("minimax-*.service")
        if path.is_file() and path.read_bytes().startswith(WRITTEN_BY_US)
    }
    return sorted((recorded | installed_here) - planned)


# ---------------------------------------------------------------------------------------- driver


LOADED = re.compile(r"NVRM version: .*?\s(\d{3}\.\d+(?:\.\d+)?)\s")


def loaded_driver():
    """Version of NVIDIA's kernel module that is loaded: it stays until a reboot. None where none is."""
    with contextlib.suppress(OSError):
        found = LOADED.search(DRIVER.read_text())
        return found.group(1) if found else None
    return None


def driver_due(driver):
    """Why a cut-over has to exchange the driver here, as `why`, `reboot` (does it take one?) and `staged`
    (does all that it needs lie on this host?); None where it need not.

    Where no module is loaded and nothing serves there is nobody to disturb: it is installed before.
    """
    if not driver:
        return None
    version, loaded = driver["version"], loaded_driver()
    nouveau = not loaded and NOUVEAU.exists()
    if not loaded and not nouveau and not active_services():
        return None
    state = packages_state(list(driver["packages"]))
    wrong = any(not installed(state[name], wanted) for name, wanted in driver["packages"].items())
    if not wrong and not nouveau and loaded in (None, version):
        return None
    module = "nouveau is loaded" if nouveau else f"kernel module {loaded or 'none'}"
    noted = read_json(RECORDS / "driver.json") or {}
    since = "; it was changed since it was installed" if noted.get("version") == version else ""
    return {
        "why": f"{module}, {in_words(state)}; {version} is declared{since}",
        "reboot": nouveau or loaded not in (None, version),
        "staged": under_way(driver) is not None or driver_staged(driver),
    }


def in_words(packages):
    """Versions of packages (see packages_state) in one phrase: names only where they differ."""
    names = {}
    for name, found in packages.items():
        names.setdefault(found["version"] if found else "not installed", []).append(name)
    if len(names) == 1:
        return f"packages {next(iter(names))}"
    return ", ".join(f"{' and '.join(found)} {version}" for version, found in names.items())


def driver_folder():
    """Where packages of drivers are kept: of the one to come, and of the one to go back to."""
    return RECORDS / "driver"


def driver_staged(driver):
    """Was all fetched that an exchange needs, on the grounds of what is still installed?"""
    staged = read_json(driver_folder() / "staged.json")
    return (
        staged is not None
        and staged["packages"] == driver["packages"]
        and staged["installed"] == versions_of(staged["installed"])
    )


def versions_of(names):
    """Installed version of each package, None where it is not."""
    state = packages_state(list(names))
    return {name: found and found["version"] for name, found in state.items()}


def exchange_file():
    """What an exchange of the driver that has begun goes by; see fleet_driver.py."""
    return driver_folder() / "exchange.json"


def under_way(driver):
    """The exchange to this driver that has begun, be it before a reboot; None where none has."""
    exchange = read_json(exchange_file())
    return exchange if exchange and driver and exchange["driver"] == driver else None


def driver_state(fabric_manager):
    """The driver that is loaded, and where `fabric_manager` asks for it, what that is: version, is its
    unit up, and what it says of another version. None of that where there is none."""
    state = {"loaded": loaded_driver(), "nouveau": NOUVEAU.exists(), "fabric_manager": None}
    if fabric_manager and shutil.which("nv-fabricmanager"):
        told = run("nv-fabricmanager", "--version", check=False, timeout=60).stdout
        version = re.search(r"\d{3}\.\d+(?:\.\d+)?", told)
        active = unit_state(FABRIC_MANAGER)["active"]
        said = [] if active == "active" else journal(FABRIC_MANAGER)
        state["fabric_manager"] = {
            "version": version and version.group(0),
            "active": active,
            "said": next((line for line in said if "don't match" in line), None),
        }
    return state


def has_headers(kernel):
    return os.path.isdir(f"/lib/modules/{kernel}/build")


def kernel_without_headers():
    """The kernel that a reboot starts, where it is another than now and no module can be built for it."""
    kernel = next_kernel()
    return None if kernel == platform.release() or has_headers(kernel) else kernel


def next_kernel():
    """The kernel that a reboot starts, as far as one can tell: the newest that is installed."""
    found = [path.name.partition("-")[2] for path in KERNELS.glob("vmlinuz-*[0-9]*")]
    numbers = {kernel: [int(part) for part in re.findall(r"\d+", kernel)] for kernel in found}
    return max(found, key=lambda kernel: (numbers[kernel], kernel), default=platform.release())


# --------------------------------------------------------------------------------------- history


GENERATIONS = 10
"""How many different things that a host served are remembered."""


def generations():
    """What this host has served, newest first: services and proxy that passed the gate together.

    A host without a history, which an earlier release of this program cut over, has what its records
    say.
    """
    known = read_json(RECORDS / "history.json")
    return recorded_generations() if known is None else known


def recorded_generations():
    """What serves and what served before it, by the records of services alone."""
    records, proxy = service_records(), read_json(RECORDS / "proxy.json")
    if proxy is None or not records or None in records.values():
        return []
    now = {name: record["stamp"] for name, record in records.items()}
    before = {name: record.get("previous") or record["stamp"] for name, record in records.items()}
    found = [generation(now, proxy, max(record.get("passed_at", 0) for record in records.values()))]
    if before != now:
        # The records do not say which proxy there was; for the same ports it is the same.
        same = all(ports_of(name, now[name]) == ports_of(name, before[name]) for name in now)
        found.append(generation(before, proxy if same else None, None))
    return found


def ports_of(name, stamp):
    """Public port and the engine's own of a service as it was staged."""
    plan = read_json(SERVICES / name / stamp / "plan.json") or {}
    return plan.get("port"), plan.get("engine_port")


def generation(stamps, proxy, passed_at):
    """Services (name to stamp) and the proxy that served together; `id` names their stamps."""
    services = {name: {"stamp": stamp, **made_of(name, stamp)} for name, stamp in stamps.items()}
    return {
        "id": generation_id(stamps, proxy),
        "passed_at": passed_at,
        "services": services,
        "proxy": proxy,
    }


def generation_id(stamps, proxy):
    proxy = proxy and [proxy["stamp"], proxy["unit_stamp"]]
    return hashlib.sha256(json.dumps([sorted(stamps.items()), proxy]).encode()).hexdigest()[:12]


def made_of(name, stamp):
    """Version, revision, and where release and weights lie, of a service as it was staged."""
    plan = read_json(SERVICES / name / stamp / "plan.json") or {}
    found = {key: plan.get(key) for key in ("vllm", "revision", "release", "weights")}
    if found["release"] is None:
        # Staged by an earlier release of this program: its argv has both.
        argv, model = plan.get("argv", ()), f"/{plan.get('repository')}/{plan.get('revision')}"
        found["release"] = argv[0].partition("/bin/")[0] if argv else None
        found["weights"] = next((word for word in argv if word.endswith(model)), None)
    return found


def aim():
    """What the last roll-out that staged this host is to make of it, as generation_id; None if unknown."""
    planned = read_json(AIM)
    return planned and generation_id(planned["services"], planned["proxy"])


def way_back(past, aimed):
    """What this host goes back to: the newest that is not what the last roll-out was to bring, and that
    nobody went back from. So a host where that never passed, or was never tried, stays as it is, and
    going back twice is going back once. None where nothing is left."""
    kept = (known for known in past if known["id"] != aimed and "withdrawn_at" not in known)
    return next(kept, None)


def history_state(past, units):
    """What this host served, each with what it lacks to serve again, and whether it is unlike what serves."""
    aimed = aim() or (past[0]["id"] if past else None)
    target = way_back(past, aimed)
    complete = {}
    states = []
    for known in past:
        lacking = missing(known, complete)
        differs = bool(lacking) or any(due(generation_request(known), units).values())
        states.append({**known, "missing": lacking, "differs": differs})
    return {"aim": aimed, "way_back": target and target["id"], "generations": states}


def missing(known, complete):
    """What a generation needs to serve again and this host has no more, one entry each.

    `complete` remembers which releases and weights were looked at.
    """
    lacking = []
    for name, made in known["services"].items():
        release, weights = made["release"], made["weights"]
        if not staged_whole(SERVICES / name / made["stamp"]):
            lacking.append(f"the unit {made['stamp']} of {name}")
        if release not in complete:
            complete[release] = bool(release) and release_complete(release)
        if weights not in complete:
            complete[weights] = bool(weights) and weights_complete(weights)
        if not complete[release]:
            lacking.append(f"the release {os.path.basename(release or '') or 'of ' + name}")
        if not complete[weights]:
            lacking.append(f"the weights {weights or 'of ' + name}")
    if not all(path.is_file() for path in proxy_stages(known["proxy"])):
        lacking.append("the proxy's configuration of that time")
    return list(dict.fromkeys(lacking))


def staged_whole(stage):
    """Is all there that was staged with a service?"""
    try:
        unit = (stage / "unit.service").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    documents = [read_json(stage / name) for name in ("gate.json", "plan.json")]
    secrets = stage / "secrets.env"
    return None not in documents and (str(secrets).encode() not in unit or secrets.is_file())


def proxy_stages(proxy):
    """Staged configuration and unit of a proxy; what is no path where the proxy is unknown."""
    if proxy is None:
        return (PROXY / "unknown",)
    return PROXY / f"{proxy['stamp']}.conf", PROXY / f"{proxy['unit_stamp']}.service"


def generation_request(known):
    """What a cut-over is told to bring a generation back, from what was staged with it."""
    services = []
    for name, made in known["services"].items():
        stage = SERVICES / name / made["stamp"]
        service = last_service(name, {"unit": unit_of(name), "stamp": made["stamp"]})
        service["unit_sha256"] = sha256_of(stage / "unit.service")
        plan = json.loads((stage / "plan.json").read_text())
        service.update((key, plan[key]) for key in ("argv", "image", "release") if key in plan)
        services.append(service)
    return {"services": services, "proxy": known["proxy"]}


def rollback(request):
    """A generation of this host serves again, by a cut-over like any other: gate, or back.

    What the host goes back from is withdrawn: no later rollback leads to it by itself. Raises HostError,
    before anything is changed, where something that is needed is gone.
    """
    past = generations()
    chosen = next((known for known in past if known["id"] == request["generation"]), None)
    if chosen is None:
        raise HostError(f"{request['generation']} is not in this host's history any more")
    lacking = missing(chosen, {})
    if lacking:
        raise HostError(f"cannot serve again: {', '.join(lacking)} is gone; nothing was changed")
    say(f"going back to {', '.join(releases_of(chosen))}")
    withdrawn = {past[0]["id"], aim()} - {chosen["id"]}
    cutover({**generation_request(chosen), "withdrawn": sorted(filter(None, withdrawn))})


def releases_of(known):
    """Names of the releases that a generation's services run from."""
    return sorted({os.path.basename(made["release"] or "") for made in known["services"].values()})


def note_generation(request, past):
    """What the request says serves now, and is the newest of this host's history."""
    stamps = {service["name"]: service["stamp"] for service in request["services"]}
    now = time.time()
    new = generation(stamps, request["proxy"], now)
    if past and past[0]["id"] == new["id"]:
        new["passed_at"] = past[0]["passed_at"]
    older = [
        {"withdrawn_at": now, **known} if known["id"] in request.get("withdrawn", ()) else known
        for known in past
        if known["id"] != new["id"]
    ]
    write_history([new, *older][:GENERATIONS])


def write_history(past):
    write_if_other(RECORDS / "history.json", json.dumps(past).encode())


def stages_of(past):
    """Staged services that are needed: of these generations, of what serves, of what is to serve."""
    planned = read_json(AIM) or {"services": {}}
    needed = {*planned["services"].items()}
    for known in past:
        needed |= {(name, made["stamp"]) for name, made in known["services"].items()}
    needed |= {(name, last["stamp"]) for name, last in service_records().items() if last}
    return {SERVICES / name / stamp for name, stamp in needed}


def stages_unlike(needed):
    """Staged services that are not among those needed."""
    return sorted(stage for stage in SERVICES.glob("*/*") if stage not in needed)


def remove_stages(stages):
    for stage in stages:
        shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):
            stage.parent.rmdir()


# ----------------------------------------------------------------------------------------- spare


RECENT_S = 24 * 3600
"""A release that has not served yet may belong to a roll-out that goes on, or that is being mended."""
PROXY_STAGE = re.compile(r"[0-9a-f]{12}\.(?:conf|service)")


def spare(request):
    """What of releases, stages and uv's cache nothing on this host needs, with bytes and reasons.

    `kept` and `remove` are folders, `archives` are unpacked wheels of uv's cache that no release shares
    any more, `files` what was staged with releases that are gone.
    """
    folder = pathlib.Path(request["releases"])
    past, building = generations(), jobs_building()
    complete = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    reasons = release_reasons(request, past, [*map(str, complete)])
    kept = [
        {"path": str(path), "why": why}
        for path in complete
        if (why := reasons.get(str(path)) or recent(path, past))
    ]
    stays = {entry["path"] for entry in kept}
    lost = {}
    going = [
        (path, "nothing needs it", lose(path, lost)) for path in complete if str(path) not in stays
    ]
    for path in sorted(folder.glob(".*.partial")):
        if building is None or str(path) in building:
            kept.append({"path": str(path), "why": "a build is under way"})
        else:
            going.append((path, "a killed build left it", lose(path, lost)))
    for path in sorted(folder.glob(".wheels/*")):
        partial = str(folder / f".{path.name}.partial")
        needed = building is None or partial in building or str(folder / path.name) in stays
        if not needed:
            going.append((path, "it was built for a release that is gone", lose(path, lost)))
    # A wheel of the cache costs nothing while a release has hard links of its files.
    idle = [] if building is None or building else sorted((folder / ".cache").glob("archive-v*/*"))
    archives = [path for path in idle if unshared(path, lost)]
    # All links are counted before any size is asked.
    wheels = [lose(path, lost) for path in archives]
    usable = [
        known for known in past if {made["release"] for made in known["services"].values()} <= stays
    ]
    return {
        "kept": kept,
        "remove": [
            {"path": str(path), "why": why, "bytes": freed() + image_bytes(path)}
            for path, why, freed in going
        ],
        "archives": [*map(str, archives)],
        "archive_bytes": sum(freed() for freed in wheels),
        "files": [*map(str, spare_files(request, usable))],
    }


def jobs_building():
    """Partial folders that builds under way work on; None where one does not say which."""
    found = set()
    for unit in active_jobs():
        if unit.startswith(("minimax-job-release-", "minimax-job-image-")):
            told = read_json(JOBS / f"{unit.removesuffix('.service')}.json")
            if told is None:
                return None
            path = pathlib.Path(told["request"]["path"])
            found.add(str(path.with_name(f".{path.name}.partial")))
    return found


def release_reasons(request, past, paths):
    """Why releases must stay, by path: the first reason that holds."""
    reasons = dict.fromkeys(request["named"], "the plan names it")
    planned = read_json(AIM) or {"services": {}}
    for name, stamp in planned["services"].items():
        reasons.setdefault(made_of(name, stamp)["release"], "the last roll-out names it")
    named = [(path, word.encode()) for path in paths for word in names_of_release(path)]
    for who, text in (*unit_texts(), *process_texts()):
        for path, word in named:
            if word in text:
                reasons.setdefault(path, f"{who} uses it")
    target = way_back(past, aim() or (past[0]["id"] if past else None))
    for known in (target,) if target else ():
        for made in known["services"].values():
            reasons.setdefault(made["release"], "it is the way back")
    served = dict.fromkeys(made["release"] for known in past for made in known["services"].values())
    for path in [*served][: request["keep"]]:
        reasons.setdefault(path, f"it is one of the last {request['keep']} that served")
    return reasons


def names_of_release(path):
    """By what units and processes name a release: where it lies, or its image's tag."""
    image = (read_json(pathlib.Path(path) / MANIFEST) or {}).get("image")
    return [str(path), *([image["tag"]] if image else [])]


def unit_texts():
    """Each unit of the host with its text, drop-ins included."""
    for folder in (UNITS, RUNTIME_UNITS):
        for path in (*folder.glob("*.service"), *folder.glob("*.service.d/*.conf")):
            with contextlib.suppress(OSError):
                name = path.name if path.suffix == ".service" else path.parent.name[: -len(".d")]
                yield name, path.read_bytes()


def process_texts():
    """Each process with all that may name a file: arguments, environment, program, folder, libraries."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        text = b"".join(process_bytes(pid, name) for name in ("cmdline", "environ", "maps"))
        for link in ("exe", "cwd"):
            with contextlib.suppress(OSError):
                text += b"\0" + os.readlink(process / link).encode(errors="replace") + b"/"
        if pid != os.getpid():
            yield f"PID {pid}", text


def recent(path, past):
    """Why a release that has not served yet stays; None where it goes."""
    if any(made["release"] == str(path) for known in past for made in known["services"].values()):
        return None
    built_at = (read_json(path / MANIFEST) or {}).get("built_at", 0)
    age = time.time() - built_at
    return f"it was built {age / 3600:.0f} h ago and has not served yet" if age < RECENT_S else None


def links(folder):
    """Each link to a file below a folder: which file it is, how many links that has, and its bytes."""
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(base, name))
                yield (status.st_dev, status.st_ino), status.st_nlink, status.st_size


def lose(folder, lost):
    """Counts in `lost` the links that go with a folder; how many bytes that frees, to be asked at the end.

    A file goes with the last of its links, and counts for the folder where it was met first.
    """
    mine = {}
    for file, count, size in links(folder):
        if file not in lost:
            mine[file] = (count, size)
        lost[file] = lost.get(file, 0) + 1
    return lambda: sum(size for file, (count, size) in mine.items() if lost[file] == count)


def image_bytes(release):
    """What a release's image takes; its layers may be another image's, too, and then stay."""
    known = read_json(release / MANIFEST) or {}
    return known.get("bytes", 0) if known.get("image") else 0


def unshared(folder, lost):
    """Has no file below `folder` a link elsewhere, but for those that are lost?"""
    left = {}
    for file, count, _ in links(folder):
        left[file] = left.get(file, count - lost.get(file, 0)) - 1
    return not any(left.values())


def spare_files(request, usable):
    """Staged units and proxy configurations that belong to nothing that could serve here."""
    planned = {SERVICES / name / stamp for name, stamp in request["stages"]}
    yield from stages_unlike(stages_of(usable) | planned)
    proxies = [known["proxy"] for known in usable]
    proxies += [
        read_json(RECORDS / "proxy.json"),
        (read_json(AIM) or {}).get("proxy"),
        request["proxy"],
    ]
    needed = {path for proxy in proxies if proxy for path in proxy_stages(proxy)}
    for path in sorted(PROXY.glob("*")):
        if PROXY_STAGE.fullmatch(path.name) and path not in needed:
            yield path


# --------------------------------------------------------------------------------------- cutover


def cutover(request):
    """This host goes from what it runs to what the plan says, or back to what it ran.

    All services that change are stopped first (a new one may want the GPUs of an old one), switched,
    started together and judged. If one fails the gate, or anything else goes wrong, every one of them
    is put back. Where the driver is exchanged, all services are down meanwhile, and stay down over a
    reboot until it is known to work.
    """
    services = {service["name"]: service for service in request["services"]}
    exchanging = exchange_due(request)
    if exchanging:
        say(f"driver: {exchanging}")
    units = units_state([service["unit"] for service in services.values()])
    found = {
        name: service_due(service, units[service["unit"]]) for name, service in services.items()
    }
    for name, lacking in found.items():
        # After a reboot in the middle all of them are down, and what they lacked before was said then.
        if lacking and not under_way(request.get("driver")):
            say(f"{name}: {lacking[1]}")
    acts = {name: lacking[0] if lacking else None for name, lacking in found.items()}
    if exchanging:
        acts = dict.fromkeys(acts, START)
    changing = [services[name] for name, act in acts.items() if act in (START, JUDGE)]
    starting = [services[name] for name, act in acts.items() if act == START]
    leaving = gone(request)
    before = {
        "records": {name: record(name) for name in [*(s["name"] for s in changing), *leaving]},
        "proxy": read_json(RECORDS / "proxy.json") or request["proxy"],
        "past": generations(),
    }
    for service in services.values():
        check_staged(service)
    exchange = exchange_of(request, before) if exchanging else None
    before = exchange["before"] if exchange else before
    try:
        install_units(staged_units(s for s in services.values() if s not in starting))
        go_forward(exchange, changing, leaving)
        timings = bring_up(changing, starting, leaving, request["proxy"])
        note_generation(request, before["past"])
        for service in changing:
            note_serving(service, timings[service["name"]])
    except Exception as error:
        say(explained(error))
        why = explained(error).splitlines()[0]
        try:
            go_back(exchange, changing, leaving, why)
            put_back(changing, before["records"], before["proxy"])
            if generations() != before["past"]:
                write_history(before["past"])
        except Exception as second:
            raise HostError(
                f"OUT OF SERVICE: the cut-over failed ({why}), and so did going back: "
                f"{explained(second)}"
            ) from second
        raise HostError(f"the cut-over failed and was undone: {why}") from error
    finally:
        end_exchange(exchange)
    for name in leaving:
        remove(name)
        (RECORDS / "services" / f"{name}.json").unlink(missing_ok=True)
        say(f"{name}: not in the plan; removed")
    remove_stages(stages_unlike(stages_of(generations())))


def exchange_due(request):
    """Why this cut-over exchanges the driver, or goes on with it; None where it does not."""
    driver = request.get("driver")
    if under_way(driver):
        return "its exchange goes on"
    lacking = driver_due(driver)
    return lacking and lacking["why"]


def exchange_of(request, before):
    """The exchange of the driver that this cut-over makes: begun now, or before a reboot."""
    return under_way(request["driver"]) or drivers().begin(request["driver"], before)


def go_forward(exchange, services, leaving):
    """The declared driver, under services that are down; nothing where no exchange is due."""
    if exchange:
        take_down(services, leaving)
        drivers().go_forward(exchange)


def go_back(exchange, services, leaving, why):
    """The driver that was there before, likewise."""
    if exchange:
        take_down(services, leaving)
        drivers().go_back(exchange, why)


def end_exchange(exchange):
    """An exchange has ended, forward or back. A job that a reboot or a kill ends does not come here."""
    if exchange:
        drivers().finish(exchange)


def drivers():
    return importlib.import_module("fleet_driver")


def take_down(services, leaving):
    """These services, and those that leave, are drained and stopped, and do not start at boot."""
    drain([*(service["name"] for service in services), *leaving])
    ports = {service["unit"]: service["engine_port"] for service in services}
    ports |= {unit_of(name): None for name in leaving}
    stop(ports)
    run("systemctl", "disable", "--quiet", *ports, check=False)


def record(name):
    return read_json(RECORDS / "services" / f"{name}.json")


def service_records():
    """Name of each service that passed the gate to its record."""
    return {path.stem: read_json(path) for path in RECORDS.glob("services/*.json")}


def staged_unit(name, stamp):
    return SERVICES / name / stamp / "unit.service"


def staged_units(services):
    """Unit to its staged copy."""
    return {service["unit"]: staged_unit(service["name"], service["stamp"]) for service in services}


def check_staged(service):
    if not staged_unit(service["name"], service["stamp"]).is_file():
        raise HostError(f"{service['name']}: {service['stamp']} is not staged on this host")


def bring_up(changing, starting, leaving, proxy):
    """Stop, switch, start, judge; what the gate found of each service of `changing`, by name.

    `starting` are those of them that are started anew: one that already runs as planned was
    interrupted while being judged, and judging is what it lacks. `leaving` are names of services that
    only stop. Raises HostError where one does not pass.
    """
    drain([*(service["name"] for service in changing), *leaving])
    stop(
        {service["unit"]: service["engine_port"] for service in starting}
        | {unit_of(name): None for name in leaving}
    )
    for service in starting:
        check_port_free(service)
    install_units(staged_units(starting))
    switch_proxy(proxy)
    if starting:
        names = [service["unit"] for service in starting]
        run("systemctl", "reset-failed", *names, check=False)
        run("systemctl", "start", *names)
        say(f"started {', '.join(service['name'] for service in starting)}")
    return judge_all(changing)


def install_units(staged):
    """Units (each with its staged copy) put where systemd reads them, without drop-ins, and enabled."""
    if not staged:
        return
    stale = False
    for unit, state in units_state(list(staged)).items():
        stale |= state["needs_reload"] | write_if_other(UNITS / unit, staged[unit].read_bytes())
        for path in state["drop_ins"]:
            say(f"{path} is removed: what a unit needs belongs into group data")
            pathlib.Path(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                pathlib.Path(path).parent.rmdir()
            stale = True
    if stale:
        run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--quiet", *staged)


def judge_all(services):
    """Services judged at once, each made public as soon as it passes; what the gate found, by name.

    Raises HostError for the first that fails, with its journal, once all have been judged.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, len(services))) as pool:
        judged = {service["name"]: pool.submit(pass_and_open, service) for service in services}
    for service in services:
        error = judged[service["name"]].exception()
        if error:
            tail = "\n".join(f"    {line}" for line in journal(service["unit"]))
            raise HostError(f"{service['name']}: {explained(error)}\n{tail}") from error
    return {name: done.result() for name, done in judged.items()}


def pass_and_open(service):
    """The gate, and then the public port; what is to be remembered of it."""
    found = pass_gate(service, service["gate"]["ready_timeout_s"], tell=say)
    found["argv"] = process_argv(unit_state(service["unit"])["pid"])
    (DRAINING / service["name"]).unlink(missing_ok=True)
    say(
        f"{service['name']} serves: ready after {found['ready_s']:.1f} s, "
        f"first answer after {found['first_answer_s']:.1f} s"
    )
    return found


def note_serving(service, found):
    """From now on the service is as planned, and what it was before is what it can go back to."""
    old = record(service["name"]) or {}
    previous = old.get("stamp") if old.get("stamp") != service["stamp"] else old.get("previous")
    new = {"stamp": service["stamp"], "unit": service["unit"], "previous": previous}
    new.update(found, passed_at=time.time())
    write_atomically(RECORDS / "services" / f"{service['name']}.json", json.dumps(new))


def drain(names):
    """Takes the services' public ports out of service, so that what is sent now is not lost later."""
    DRAINING.mkdir(parents=True, exist_ok=True)
    for name in names:
        (DRAINING / name).touch()


def stop(ports):
    """Units (each with its engine's port, None where unknown) drained and stopped, verified."""
    loaded = [
        unit for unit, state in units_state(list(ports)).items() if state["active"] != "inactive"
    ]
    if not loaded:
        return
    say(f"draining and stopping {', '.join(loaded)}")
    for unit in loaded:
        # While its engine loads, vLLM loses SIGTERM: nothing drains, and the stop would take all its time.
        if (
            ports[unit] is not None
            and http_status({"name": "", "stamp": "", "engine_port": ports[unit]}, "/health")
            is None
        ):
            run("systemctl", "stop", "--no-block", unit, check=False)
            run("systemctl", "kill", "--signal=KILL", unit, check=False)
    run("systemctl", "stop", *loaded, check=False)
    for unit, state in units_state(loaded).items():
        if state["active"] not in ("inactive", "failed") or state["pid"]:
            raise HostError(f"{unit} did not stop: {state['active']}, PID {state['pid']}")


def check_port_free(service):
    holder = port_holder(service["engine_port"])
    if holder:
        raise HostError(f"port {service['engine_port']} of {service['name']} is {held_by(holder)}")


PROXY_TIMEOUT_S = 15


def switch_proxy(proxy):
    """The proxy's unit and configuration put in place; remembered only once nginx answers by it."""
    found = proxy_due(proxy, unit_state(PROXY_UNIT))
    if found is None:
        return
    act, why = found
    say(f"proxy: {why}")
    staged = PROXY / f"{proxy['stamp']}.conf"
    # The test makes nginx's temporary folders, in the folder that the running unit has.
    PROXY_RUN.mkdir(exist_ok=True)
    run("nginx", "-t", "-q", "-c", str(staged))
    write_if_other(PROXY / "nginx.conf", staged.read_bytes())
    install_units({PROXY_UNIT: PROXY / f"{proxy['unit_stamp']}.service"})
    if act == START:
        run("systemctl", "reset-failed", PROXY_UNIT, check=False)
        run("systemctl", "restart", PROXY_UNIT, check=False)
    elif act == RELOAD:
        run("systemctl", "reload", PROXY_UNIT, check=False)
    await_configuration(proxy["stamp"])
    write_if_other(RECORDS / "proxy.json", json.dumps(proxy).encode())


def await_configuration(stamp):
    """nginx keeps its old configuration, without a word to whoever reloads it, when it cannot have all
    of the new one, for example a port. Raises HostError with what its journal says."""
    deadline = time.monotonic() + PROXY_TIMEOUT_S
    while loaded_configuration() != stamp:
        if time.monotonic() > deadline:
            tail = "\n".join(journal(PROXY_UNIT))
            raise HostError(f"{PROXY_UNIT} does not take its configuration {stamp}:\n{tail}")
        time.sleep(0.1)


def loaded_configuration():
    """Stamp of the configuration by which nginx answers now; None where it does not answer."""
    answer = b""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(str(PROXY_RUN / "stamp.sock"))
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while part := connection.recv(4096):
            answer += part
    return answer.partition(b"\r\n\r\n")[2].decode(errors="replace").strip() or None


def put_back(changing, before, proxy):
    """What served before the cut-over serves again, gate included. Raises HostError if it cannot.

    `before` has the records of all services that were touched, None for one that never passed.
    """
    say("putting this host back")
    # One that passed has been made public meanwhile.
    drain(before)
    stop({service["unit"]: service["engine_port"] for service in changing})
    old, lost = [], []
    for name, last in before.items():
        if last is None:
            remove(name)
            say(f"{name}: nothing served here before; left stopped")
        elif staged_unit(name, last["stamp"]).is_file():
            old.append(last_service(name, last))
        else:
            lost.append(f"{name}: {last['stamp']}, which served before, is gone; it stays stopped")
    bring_up(old, old, [], proxy)
    for service in old:
        say(f"{service['name']} was put back and serves {service['stamp']} again")
    # Where some services passed and were noted before the failure, their old records count again.
    for name, last in before.items():
        path = RECORDS / "services" / f"{name}.json"
        if last is None:
            path.unlink(missing_ok=True)
        else:
            write_if_other(path, json.dumps(last).encode())
    if lost:
        raise HostError("; ".join(lost))


def remove(name):
    """A stopped service's unit, and what holds its public port."""
    unit = unit_of(name)
    run("systemctl", "disable", "--quiet", unit, check=False)
    (UNITS / unit).unlink(missing_ok=True)
    shutil.rmtree(UNITS / f"{unit}.d", ignore_errors=True)
    (DRAINING / name).unlink(missing_ok=True)
    run("systemctl", "daemon-reload")


def last_service(name, last):
    """The service as it was, from what was staged with it."""
    gate_data = json.loads((SERVICES / name / last["stamp"] / "gate.json").read_text())
    return {"name": name, "unit": last["unit"], "stamp": last["stamp"], **gate_data}


# ------------------------------------------------------------------------------------------ jobs


LONG = {
    "packages": "fleet_packages",
    "exporter": "fleet_packages",
    "driver": "fleet_driver",
    "stage_driver": "fleet_driver",
    "release": "fleet_release",
    "arguments": "fleet_release",
    "image": "fleet_image",
    "image_arguments": "fleet_image",
    "weights": "fleet_weights",
    "cutover": "fleet_host",
    "rollback": "fleet_host",
    "prune": "fleet_prune",
}
"""Each long verb with the module that has it, all of them beside this file."""
EXCLUSIVE = (("packages", "exporter"), ("driver", "stage_driver"), ("cutover", "rollback", "prune"))
"""Verbs of each of which only one job can sensibly run at a time on a host."""
AFTERWARDS = dict.fromkeys(("cutover", "rollback"), ("/bin/rm", "-rf", str(DRAINING)))
"""What systemd does when a job has ended, be it killed: a service that somebody then starts by hand is
public, as after a reboot, and not kept out by a cut-over that is no more."""
OUTSIDE = (
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NETRC"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
"""Variables of a login session by which the outside world is reached; a unit has none of them."""


def job(verb, request):
    """A long verb in a transient unit of its own, followed until it ends; attaches to one under way.

    The unit is named for the request, so that the same work is never started twice: whoever comes
    second follows the first. Its output and exit code stay in a file, so that nothing is lost when the
    connection is. A cut-over that exchanges the driver has these files and its unit on disk.
    """
    unit = job_unit(verb, request)
    JOBS.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_running(unit) and not pending(unit):
        # What an earlier job of that name said is nobody's answer any more: see attach.
        for folder in (JOBS, KEPT_JOBS):
            (folder / f"{unit}.log").unlink(missing_ok=True)
    wait_for_others(verb, unit)
    with locked(JOBS / f"{unit}.lock"):
        if is_running(unit) or pending(unit):
            say(f"{verb}: under way already; following it")
        else:
            kept = verb == "cutover" and exchange_due(request) is not None
            if verb == "cutover":
                shutil.rmtree(KEPT_JOBS, ignore_errors=True)
            folder = KEPT_JOBS if kept else JOBS
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            log = folder / f"{unit}.log"
            (folder / f"{unit}.exit").unlink(missing_ok=True)
            write_atomically(log, "", 0o600)
            # In a file, and not in the unit: an address of a proxy may have a password in it.
            told = {"request": request, "environment": environment_outside()}
            write_atomically(folder / f"{unit}.json", json.dumps(told), 0o600)
            if kept:
                return begin_kept(verb, unit, log)
            afterwards = AFTERWARDS.get(verb, ())
            post = [f"--property=ExecStopPost={' '.join(afterwards)}"] if afterwards else []
            run(
                *("systemd-run", "--quiet", "--collect", f"--unit={unit}", "--no-block"),
                *("--property=KillMode=mixed", f"--property=StandardOutput=append:{log}"),
                *(f"--property=StandardError=append:{log}", "--setenv=PYTHONUNBUFFERED=1"),
                *(*post, "/usr/bin/python3", os.path.abspath(__file__), "run", verb, unit),
            )
    folder = folder_of(unit)
    return follow(unit, folder / f"{unit}.log", folder / f"{unit}.exit")


def job_unit(verb, request):
    """The unit of a job, without its suffix: the same for the same request."""
    text = json.dumps(request, sort_keys=True)
    return f"minimax-job-{verb}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def attach(verb, told):
    """Follows a job that was begun, from its line number `seen` on; its exit code, though it has ended.

    For whoever has lost the connection meanwhile: a job that has begun is not started again.
    """
    unit = job_unit(verb, told["request"])
    folder = folder_of(unit)
    log = folder / f"{unit}.log"
    if not log.exists() and not told["seen"]:
        # It still had to wait for others.
        return job(verb, told["request"])
    if not log.exists():
        raise HostError(f"{unit} is gone: this host was restarted meanwhile; run again")
    return follow(unit, log, folder / f"{unit}.exit", told["seen"])


KEPT_UNIT = """\
# Written by minimax-fleet: a cut-over that exchanges the driver and goes on after a reboot. It removes
# itself at its end.
[Unit]
Description=minimax-fleet {verb} with another NVIDIA driver
Wants=network-online.target
After=network-online.target nvidia-persistenced.service nvidia-fabricmanager.service

[Service]
Type=exec
KillMode=mixed
Restart=on-abnormal
RestartSec=5
Environment=PYTHONUNBUFFERED=1
StandardOutput=append:{log}
StandardError=append:{log}
ExecStart=/usr/bin/python3 {program} run {verb} {unit}
ExecStopPost={afterwards}

[Install]
WantedBy=multi-user.target
"""


def begin_kept(verb, unit, log):
    """A job as a unit of its own on disk, started, and followed until it ends."""
    text = KEPT_UNIT.format(
        verb=verb,
        unit=unit,
        log=log,
        program=os.path.abspath(__file__),
        afterwards=" ".join(AFTERWARDS[verb]),
    )
    write_atomically(UNITS / f"{unit}.service", text)
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--quiet", f"{unit}.service")
    run("systemctl", "start", "--no-block", f"{unit}.service")
    return follow(unit, log, log.with_suffix(".exit"))


def pending(unit):
    """Was a job that goes on after a reboot begun, and not ended?"""
    kept = KEPT_JOBS / f"{unit}.json"
    return kept.exists() and not kept.with_suffix(".exit").exists()


def goes_on_at_boot():
    """Will a job that has begun be started again at boot?"""
    wanted = (UNITS / "multi-user.target.wants").glob("minimax-job-*.service")
    return any(pending(path.stem) for path in wanted)


def folder_of(unit):
    """Where the files of a job are."""
    return KEPT_JOBS if (KEPT_JOBS / f"{unit}.log").exists() else JOBS


def environment_outside():
    """What this session has of OUTSIDE, so that a job reaches what preflight has reached."""
    names = {*OUTSIDE, *map(str.upper, OUTSIDE)}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def wait_for_others(verb, unit):
    """Waits for another request's job of verbs of which no two must run at once."""
    kinds = tuple(f"minimax-job-{one}-" for verbs in EXCLUSIVE if verb in verbs for one in verbs)
    said, resumed = False, {}
    while others := [
        other
        for other in (active_jobs() if kinds else ())
        if other.startswith(kinds) and other != f"{unit}.service"
    ] + (others_pending(unit, resumed) if kinds else []):
        if not said:
            say(f"{verb}: waiting for {others[0]}, which an earlier run started")
            said = True
        time.sleep(1)


def others_pending(unit, resumed):
    """Jobs of other requests that exchange the driver and have not ended: nothing else is installed
    meanwhile. One that does not run goes on now; `resumed` counts how often."""
    kept = (path.stem for path in KEPT_JOBS.glob("*.json"))
    others = [other for other in kept if other != unit and pending(other)]
    for other in others:
        resume(other, resumed)
    return [f"{other}.service" for other in others]


RESUMES = 3


def resume(unit, resumed):
    """Starts a job that was begun and is neither ended nor running. Raises HostError where it will not."""
    if is_running(unit) or not pending(unit):
        return
    if resumed.get(unit, 0) == RESUMES:
        raise HostError(f"{unit} does not go on; see journalctl -u {unit}")
    resumed[unit] = resumed.get(unit, 0) + 1
    # While the host goes down nothing can be started: whoever comes after the reboot does it.
    run("systemctl", "start", "--no-block", f"{unit}.service", check=False)
    time.sleep(LOOK_S)


def is_running(unit):
    state = unit_state(f"{unit}.service")
    return state["active"] in ("active", "activating", "deactivating")


def follow(unit, log, code, seen=0):
    """Passes the job's lines on until it has ended, but for those that were `seen`; its exit code."""
    resumed = {}
    with open(log, encoding="utf-8", errors="replace") as stream:
        for _ in range(seen):
            stream.readline()
        looked = time.monotonic()
        while True:
            ended = code.exists()
            # The exit code is the usual end; asking systemd is for a job that was killed.
            if not ended and time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                # While the host goes down for a reboot, systemd answers nobody any more.
                with contextlib.suppress(SystemdSilentError):
                    resume(unit, resumed)
                    ended = not is_running(unit) and not pending(unit)
            for line in stream:
                print(line, end="", flush=True)
            if ended:
                break
            time.sleep(0.1)
    if not code.exists():
        raise HostError(f"{unit} ended without a word; see journalctl -u {unit}")
    return int(code.read_text())


def run_job(verb, unit):
    """The inside of a job's unit."""
    status, folder = 1, folder_of(unit)
    if (folder / f"{unit}.exit").exists():
        # It ended right before the power was cut.
        forget_job(unit, folder)
        return 0
    try:
        told = json.loads((folder / f"{unit}.json").read_text())
        os.environ.update(told["environment"])
        getattr(importlib.import_module(LONG[verb]), verb)(told["request"])
        status = 0
    except Exception as error:
        say(explained(error))
    finally:
        write_atomically(folder / f"{unit}.exit", str(status))
        forget_job(unit, folder)
    return status


def forget_job(unit, folder):
    """What a job that has ended needs no more: its request, and its unit where that is on disk."""
    (folder / f"{unit}.json").unlink(missing_ok=True)
    # systemd keeps in mind what the unit says until it is asked to read its files again.
    for path in (UNITS / "multi-user.target.wants", UNITS):
        (path / f"{unit}.service").unlink(missing_ok=True)


def main(argv):
    # A hardened session's would keep nginx from seeing what drains, and apt from its keyrings.
    os.umask(0o022)
    if argv[:1] == ["run"] and len(argv) == 3 and argv[1] in LONG:  # noqa: PLR2004
        return run_job(argv[1], argv[2])
    quick = {"probe": probe, "files": files, "gate": gate, "spare": spare}
    is_quick = len(argv) == 1 and argv[0] in quick
    is_job = len(argv) == 2 and argv[0] in ("job", "follow") and argv[1] in LONG  # noqa: PLR2004
    if not (is_quick or is_job):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        request = json.load(sys.stdin)
        if is_job:
            return (job if argv[0] == "job" else attach)(argv[1], request)
        answer = quick[argv[0]](request)
    except Exception as error:
        print(explained(error), file=sys.stderr)
        return 1
    if answer is not None:
        json.dump(answer, sys.stdout)
        print()
    return 0


if __name__ == "__main__":
    # What the modules of long verbs import is this very program, not a second copy of it.
    sys.modules["fleet_host"] = sys.modules["__main__"]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # Whatever a session's locale can show, a line that it cannot must not end the work.
        stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main(sys.argv[1:]))
