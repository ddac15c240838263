#!/usr/bin/env python3
"""What runs on a host: it looks at the host, and carries out what it is told, one verb per call.

    fleet_host.py probe < request.json      the state of the host, as JSON; changes nothing
    fleet_host.py files < request.json      files put in place, then commands that make them count
    fleet_host.py job VERB < request.json   a long verb, as a unit that outlives the connection
    fleet_host.py gate < request.json       is each service really serving? JSON; changes nothing

Long verbs are `packages`, `driver`, `release`, `weights` and `cutover`. Requests come on standard
input, never in argv, so that no secret shows in a process list. Standard library only, Python 3.9 or
newer; decides nothing about models or flags: all of that is in the request, which the plan made.

Exit codes: 0 done, 1 could not be done (the last line on standard error says why), 2 wrong use.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import fnmatch
import hashlib
import http.client
import json
import os
import pathlib
import platform
import pwd
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

RECORDS = pathlib.Path("/var/lib/minimax-fleet")
JOBS = pathlib.Path("/run/minimax-fleet/jobs")
UNITS = pathlib.Path("/etc/systemd/system")
SERVICES = pathlib.Path("/etc/minimax/services")
PROXY = pathlib.Path("/etc/minimax/proxy")
PROXY_UNIT = "minimax-proxy.service"
DRAINING = pathlib.Path("/run/minimax-fleet/draining")
PCI = pathlib.Path("/sys/bus/pci/devices")
WEIGHTS_STAMP = ".fleet-weights.json"
MANIFEST = "fleet-release.json"
NVIDIA = "0x10de"
JOURNAL_LINES = 20
ERRORS = 8
LINE_LENGTH = 400
HEARTBEAT_S = 10


class HostError(Exception):
    """One line for a person: what could not be done here, and why."""


def say(text):
    """A line of progress, seen at once by whoever follows this run."""
    print(text, flush=True)


def run(*argv, check=True, timeout=None, env=None, stdin=None):
    """A command's completed process, output captured as text."""
    done = subprocess.run(
        argv,
        check=False,
        timeout=timeout,
        text=True,
        capture_output=True,
        env={**os.environ, **(env or {})},
        input=stdin,
    )
    if check and done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        tail = "\n".join(words[-20:])
        raise HostError(f"{' '.join(argv[:4])} … exited {done.returncode}:\n{tail}")
    return done


def run_long(label, *argv, env=None):
    """Like `run`, for what may take minutes: says every so often that it goes on."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, *argv, env=env)
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
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(content if isinstance(content, bytes) else content.encode())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


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
    packages = request["packages"].get(f"{system['id']}-{system['version_id']}", {})
    records = {path.stem: read_json(path) for path in RECORDS.glob("services/*.json")}
    units = {*request["units"], *(f"minimax-{name}.service" for name in records)}
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
        "units": units_state(sorted(units)),
        "records": records,
        "proxy": read_json(RECORDS / "proxy.json"),
        "draining": sorted(path.name for path in DRAINING.glob("*")),
        "ports": ports_state(request["ports"]),
        "disks": {path: disk_state(path) for path in request["disks"]},
        "releases": {path: release_complete(path) for path in request["releases"]},
        "weights": {path: weights_complete(path) for path in request["weights"]},
        "uv": os.access(request["uv"], os.X_OK),
    }
    state["needs"] = needs_state(request, state, packages)
    return state


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
        "kernel_headers": os.path.isdir(f"/lib/modules/{platform.release()}/build"),
    }


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


def packages_state(names):
    """Installed version and hold of each package; None for one that is not installed."""
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


def installed(state, version):
    """Is a package there, at a version where one is asked for? A version may end in apt's `*`."""
    return state is not None and (not version or fnmatch.fnmatchcase(state["version"], version))


def pci_state():
    """GPUs and NVSwitches on the PCI bus: known before any driver is there."""
    gpus = switches = 0
    for device in PCI.glob("*"):
        with contextlib.suppress(OSError):
            if (device / "vendor").read_text().strip() == NVIDIA:
                kind = (device / "class").read_text().strip()
                gpus += kind.startswith("0x0302") or kind.startswith("0x0300")
                switches += kind.startswith("0x0680")
    return {"gpus": gpus, "nvswitches": switches}


def gpus_state():
    """What nvidia-smi says: `{"devices": [...]}`, or `{"error": its own words}`."""
    fields = "index,name,memory.total,compute_cap,driver_version"
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
    devices = []
    for line in done.stdout.splitlines():
        values = [value.strip() for value in line.split(",")]
        devices.append(
            {
                "index": int(values[0]),
                "name": values[1],
                "memory_mib": int(values[2]) if values[2].isdigit() else 0,
                "compute_capability": values[3],
                "driver": values[4],
            }
        )
    return {"error": None, "devices": devices}


UNIT_PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,Result,"
    "ExecMainStatus,ExecMainCode,ActiveEnterTimestampMonotonic"
)


def units_state(units):
    """Each unit as systemd sees it, with the stamp that its *running process* carries."""
    if not units:
        return {}
    shown = run("systemctl", "show", "-p", UNIT_PROPERTIES, "--", *units).stdout
    state = {}
    for block in shown.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        pid = int(values.get("MainPID", "0"))
        state[values["Id"]] = {
            "loaded": values["LoadState"] == "loaded",
            "active": values["ActiveState"],
            "sub": values["SubState"],
            "enabled": values["UnitFileState"] == "enabled",
            "pid": pid,
            "restarts": int(values.get("NRestarts") or 0),
            "result": values.get("Result", ""),
            "exit_status": int(values.get("ExecMainStatus") or 0),
            "stamp": process_stamp(pid),
        }
    return state


def unit_state(unit):
    """One unit of units_state."""
    return units_state([unit])[unit]


def process_stamp(pid):
    """FLEET_STAMP in a process's environment: which plan it was started from."""
    if pid <= 0:
        return None
    try:
        entries = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    for entry in entries:
        if entry.startswith(b"FLEET_STAMP="):
            return entry.partition(b"=")[2].decode()
    return None


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
    cgroup = (process / "cgroup").read_text()
    unit = re.search(r"/([^/\s]+\.service)", cgroup)
    return {
        "pid": int(process.name),
        "command": (process / "comm").read_text().strip(),
        "unit": unit.group(1) if unit else None,
    }


def disk_state(path):
    """Free bytes for root where `path` is or will be, and which file system that is."""
    place = pathlib.Path(path)
    while not place.exists():
        place = place.parent
    usage = os.statvfs(place)
    return {"free_bytes": usage.f_bavail * usage.f_frsize, "device": os.stat(place).st_dev}


def release_complete(path):
    return (pathlib.Path(path) / MANIFEST).is_file()


def weights_complete(path):
    """True when every file of the stamp is there with its size and modification time."""
    stamp = read_json(pathlib.Path(path) / WEIGHTS_STAMP)
    if stamp is None:
        return False
    for name, known in stamp["files"].items():
        try:
            status = os.stat(pathlib.Path(path) / name)
        except FileNotFoundError:
            return False
        if (status.st_size, status.st_mtime_ns) != (known["size"], known["mtime_ns"]):
            return False
    return True


def active_jobs():
    listed = run(
        "systemctl",
        "list-units",
        "--plain",
        "--no-legend",
        "--state=active,activating",
        "minimax-job-*",
    ).stdout
    return [line.split()[0] for line in listed.splitlines()]


def needs_state(request, state, packages):
    """Can each mirror be reached that this host will need? Nothing is asked of one that it will not."""
    need = {}
    if any(not installed(state["packages"][name], version) for name, version in packages.items()):
        need.update((f"apt {name}", url) for name, url in request["mirrors"]["apt"].items())
    if not state["uv"] or not all(state["releases"].values()):
        need["index"] = request["mirrors"]["index"]
    need = {name: url for name, url in need.items() if url}
    missing = [weights for weights in request["models"] if not state["weights"][weights["path"]]]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        reached = {name: pool.submit(reach, url) for name, url in need.items()}
        sizes = {
            weights["path"]: pool.submit(hub_bytes, request["mirrors"]["hub"], weights)
            for weights in missing
        }
        return {
            "mirrors": {
                name: {"url": need[name], "error": done.result()} for name, done in reached.items()
            },
            "weights": {path: done.result() for path, done in sizes.items()},
        }


def reach(url):
    """None where a server answers at `url`, else why not. Any HTTP status is an answer."""
    try:
        open_url(url, method="HEAD", timeout=10).close()
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"HTTP {error.code}"  # noqa: PLR2004
    except (OSError, http.client.HTTPException, ValueError) as error:
        return reason(error)
    return None


def reason(error):
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def hub_bytes(hub, weights):
    """Size of a model at a revision, by the hub: `{"bytes": n}` or `{"error": why}`."""
    url = f"{hub}/api/models/{weights['repository']}/revision/{weights['revision']}?blobs=true"
    try:
        with open_url(url, timeout=20) as response:
            siblings = json.load(response)["siblings"]
    except urllib.error.HTTPError as error:
        return {"error": f"{url}: HTTP {error.code}"}
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return {"error": f"{url}: {reason(error)}"}
    return {"bytes": sum(file.get("size") or 0 for file in siblings)}


def open_url(url, method="GET", timeout=30, body=None, headers=None):
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    return urllib.request.urlopen(request, timeout=timeout, context=ssl.create_default_context())


# ------------------------------------------------------------------------------------ small acts


def files(request):
    """Files in place, each atomically; then the commands that make them count."""
    for file in request["files"]:
        write_atomically(file["path"], file["content"], int(file["mode"], 8))
    for argv in request["then"]:
        run(*argv)


# -------------------------------------------------------------------------------------- packages


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


def packages(request):
    """Distribution packages installed, at exact versions where one is given, and those held.

    Says whether any was installed.
    """
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_MODE": "l"}
    finish_interrupted_installation(quiet)
    for unit in request["mask"]:
        run("systemctl", "mask", unit)
    state = packages_state(list(request["packages"]))
    wanted = [
        f"{name}={version}" if version else name
        for name, version in request["packages"].items()
        if not installed(state[name], version)
    ]
    if wanted:
        say(f"packages: {', '.join(wanted)}")
        run_long("packages: reading the repositories", *APT, "update", env=quiet)
        run_long(
            "packages: installing",
            *APT,
            "install",
            "--allow-downgrades",
            "--allow-change-held-packages",
            *wanted,
            env=quiet,
        )
    pinned = [name for name, version in request["packages"].items() if version]
    if pinned:
        run("apt-mark", "hold", *pinned)
    return bool(wanted)


def finish_interrupted_installation(env):
    """Configures what a killed installation left unpacked; waits for whoever holds dpkg's lock."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while run("dpkg", "--audit").stdout.strip():
        done = run("dpkg", "--configure", "-a", check=False, env=env)
        if (done.returncode and "lock" not in done.stderr) or time.monotonic() > deadline:
            raise HostError(f"dpkg --configure -a: {done.stderr.strip()}")
        time.sleep(1)


def driver(request):
    """The NVIDIA driver at its version: installed, its daemons running, every GPU answering."""
    # Packages of two branches exclude each other, which apt cannot solve around a hold.
    held = [name for name in run("apt-mark", "showhold").stdout.split() if "nvidia" in name]
    if held:
        run("apt-mark", "unhold", *held)
    changed = packages(request)
    if shutil.which("modprobe"):
        # Best effort: whether the driver works is what nvidia-smi is asked below.
        run("modprobe", "nvidia-uvm", check=False)
    for unit in request["start"]:
        run("systemctl", "enable", "--quiet", unit)
        # Restarting the fabric manager under running services would end them.
        run("systemctl", "restart" if changed else "start", unit, check=False)
        if unit_state(unit)["active"] != "active":
            raise HostError(f"{unit} does not run:\n" + "\n".join(journal(unit)))
    seen = gpus_state()
    if seen["devices"] is None:
        raise HostError(f"driver {request['version']}: {seen['error'] or 'nvidia-smi is missing'}")
    versions = sorted({device["driver"] for device in seen["devices"]})
    if len(seen["devices"]) != request["gpus"] or versions != [request["version"]]:
        raise HostError(
            f"driver {request['version']}: nvidia-smi sees {len(seen['devices'])}/{request['gpus']} "
            f"GPUs with driver {', '.join(versions)}"
        )
    say(f"driver {request['version']}: {len(seen['devices'])} GPUs")


# --------------------------------------------------------------------------------------- release


def release(request):
    """A Python environment built beside the running one: under a temporary name, checked, renamed."""
    path = pathlib.Path(request["path"])
    if release_complete(path):
        return
    uv = install_uv(request["uv"], request["index"])
    began = time.monotonic()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    env = {
        "UV_CACHE_DIR": str(path.parent / ".cache"),
        "UV_NO_PROGRESS": "1",
        "UV_LINK_MODE": "hardlink",
        "UV_NO_CONFIG": "1",
    }
    if request["index"]:
        env["UV_DEFAULT_INDEX"] = request["index"]
        host = urllib.parse.urlsplit(request["index"])
        if host.scheme == "http":
            env["UV_INSECURE_HOST"] = host.netloc
    say(f"{path.name}: building")
    run(uv, "venv", "--relocatable", "--python", request["python"], str(partial), env=env)
    backend = ["--torch-backend", request["torch_backend"]] if request["torch_backend"] else []
    python = str(partial / "bin" / "python3")
    bytecode = ["--compile-bytecode"] if request["bytecode"] else []
    # --refresh: a version that came to the index a moment ago counts, whatever uv has cached of it.
    install = (uv, "pip", "install", "--refresh", *bytecode, "--python", python, *backend)
    run_long(f"{path.name}: installing", *install, *request["requirements"], env=env)
    program, *arguments = request["check"]
    check = (str(partial / "bin" / program), *arguments)
    checked = run_long(f"{path.name}: checking", *check, env={"HF_HUB_OFFLINE": "1"})
    frozen = run(uv, "pip", "freeze", "--python", python, env=env).stdout.split("\n")
    manifest = {
        "requirements": request["requirements"],
        "packages": [line for line in frozen if line],
        "checked": checked.stdout.strip().splitlines()[-1:],
        "seconds": round(time.monotonic() - began, 1),
        "built_at": time.time(),
    }
    # The manifest is what makes a release complete, so it comes last; the rename makes it appear whole.
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    os.sync()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    say(
        f"{path.name}: complete after {manifest['seconds']:.0f} s, {len(manifest['packages'])} packages"
    )


def install_uv(uv, index):
    """uv at its pinned version, from the package index, by hash; the path of its program."""
    program = pathlib.Path(uv["path"])
    if os.access(program, os.X_OK):
        return str(program)
    folder = program.parent.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if os.access(program, os.X_OK):
            return str(program)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        machine = platform.machine()
        if machine not in uv["sha256"]:
            raise HostError(f"uv {uv['version']} is not pinned for {machine}")
        wanted = partial.with_suffix(".txt")
        write_atomically(wanted, f"uv=={uv['version']} --hash=sha256:{uv['sha256'][machine]}\n")
        source = []
        if index:
            host = urllib.parse.urlsplit(index)
            source = ["--index-url", index]
            source += ["--trusted-host", host.hostname] if host.scheme == "http" else []
        say(f"uv {uv['version']}: installing")
        run(
            *("/usr/bin/python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"),
            *("--disable-pip-version-check", "--root-user-action=ignore", "--only-binary=:all:"),
            *(*source, "--require-hashes", "--target", str(partial), "-r", str(wanted)),
        )
        wanted.unlink()
        partial.rename(folder)
    return str(program)


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------- weights


HUB_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3], max_workers=8)
"""
PROGRESS_EVERY_S = 5
FETCHES = 2
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def weights(request):
    """A model at a pinned revision: fetched beside its place, every hash checked, then renamed."""
    path = pathlib.Path(request["path"])
    if weights_complete(path):
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    expected = hub_files(request)
    total = sum(file["size"] for file in expected.values())
    free = disk_state(path)["free_bytes"] + size_of(partial)
    if total > free:
        raise HostError(
            f"{request['repository']}: needs {total / 2**30:.1f} GiB at {path.parent}, "
            f"{free / 2**30:.1f} GiB free"
        )
    for attempt in range(1, FETCHES + 1):
        download(request, partial, total)
        bad = [name for name, file in expected.items() if not verified(partial / name, file)]
        if not bad:
            break
        for name in bad:
            explain_bad(partial / name, expected[name], last=attempt == FETCHES)
            (partial / name).unlink(missing_ok=True)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
    stamp = {"repository": request["repository"], "revision": request["revision"], "files": {}}
    for name, file in expected.items():
        status = os.stat(partial / name)
        stamp["files"][name] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": file["sha256"],
        }
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    write_atomically(partial / WEIGHTS_STAMP, json.dumps(stamp, indent=1))
    os.sync()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    say(f"{request['repository']}: {len(expected)} files verified, {total / 1e9:.2f} GB")


def hub_files(request):
    """Name to size and hashes of every file of the revision, as the hub states them."""
    url = f"{request['hub']}/api/models/{request['repository']}/revision/{request['revision']}?blobs=true"
    try:
        with open_url(url) as response:
            siblings = json.load(response)["siblings"]
    except (OSError, ValueError, KeyError) as error:
        raise HostError(f"{url}: {reason(error)}") from error
    expected = {}
    for file in siblings:
        name = file["rfilename"]
        if name.startswith("/") or ".." in name.split("/"):
            raise HostError(f"{url}: refuses the file name {name!r}")
        lfs = file.get("lfs") or {}
        expected[name] = {
            "size": file["size"],
            "sha256": lfs.get("sha256"),
            "blob": None if lfs else file.get("blobId"),
        }
    return expected


def download(request, partial, total):
    """Runs huggingface_hub in its own environment; it resumes what an earlier run left."""
    env = {
        **os.environ,
        "HF_ENDPOINT": request["hub"],
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ENABLE_HF_TRANSFER": "0",
    }
    program = [request["python"], "-c", HUB_DOWNLOAD]
    arguments = [request["repository"], request["revision"], str(partial)]
    began, before = time.monotonic(), size_of(partial)
    with (
        subprocess.Popen(
            program + arguments,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as fetch,
        concurrent.futures.ThreadPoolExecutor(1) as reader,
    ):
        output = reader.submit(fetch.stdout.read)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                fetch.wait(PROGRESS_EVERY_S)
                break
            have = size_of(partial)
            rate = max(1, have - before) / (time.monotonic() - began)
            left = max(0, total - have) / rate
            say(
                f"{request['repository']}: {have / 1e9:.1f} of {total / 1e9:.1f} GB, "
                f"{rate / 1e6:.0f} MB/s, {left / 60:.0f} min left"
            )
        words = output.result().strip().splitlines()
    if fetch.returncode:
        raise HostError(f"{request['repository']}: {words[-1] if words else 'download failed'}")


def size_of(folder):
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def verified(path, file):
    """Is the file the one that the hub named? Its SHA-256 goes into `file` for the stamp."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return False
    if size != file["size"]:
        return False
    if file["blob"] is not None:
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        content = path.read_bytes()
        blob.update(content)
        file["found"] = hashlib.sha256(content).hexdigest()
        if blob.hexdigest() != file["blob"]:
            return False
        file["sha256"] = file["found"]
        return True
    file["found"] = sha256_of(path)
    return file["found"] == file["sha256"]


def explain_bad(path, file, last):
    """Names a file that did not arrive as it is at the hub; the second time that is final."""
    if not path.exists():
        what = "is missing"
    else:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
        if pointer:
            what = f"is a Git LFS pointer of {size} bytes in place of {file['size']} bytes"
        elif size != file["size"]:
            what = f"has {size} bytes, not {file['size']}"
        else:
            what = f"is corrupt: its hash is {file['found'][:12]}…"
    if last:
        raise HostError(f"{path.name} {what}, twice; look at the source")
    say(f"{path.name} {what}; fetching it again")


# ------------------------------------------------------------------------------------------ gate


POLL_S = 0.25
LOOK_S = 1
"""How often a process is looked at through systemd while something quicker is awaited."""


class GateError(HostError):
    """A service does not serve: at which step, what was expected, what came."""

    def __init__(self, step, expected, got):
        super().__init__(f"gate, {step}: expected {expected}, got {got}")
        self.step, self.expected, self.got = step, expected, got


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
    except GateError as error:
        return {
            "name": service["name"],
            "error": str(error),
            "step": error.step,
            "journal": journal(service["unit"]),
        }
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
            last = (journal(service["unit"], lines=1) or ["nothing in its journal"])[-1]
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


def check_model(service):
    try:
        with ask(service, "/v1/models", timeout=30) as response:
            ids = [model["id"] for model in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        raise GateError(
            "model", service["gate"]["model"], f"/v1/models: {reason(error)}"
        ) from error
    if service["gate"]["model"] not in ids:
        raise GateError("model", service["gate"]["model"], ", ".join(ids) or "no model")


def check_answer(service):
    """The guides' request, answered in time and with sense."""
    expected = f"an answer that matches /{service['gate']['expect']}/"
    body = json.dumps(service["gate"]["request"]).encode()
    timeout = service["gate"]["answer_timeout_s"]
    try:
        with ask(service, "/v1/chat/completions", timeout=timeout, body=body) as response:
            message = json.loads(read_until(response, time.monotonic() + timeout))["choices"][0][
                "message"
            ]
    except TimeoutError as error:
        raise GateError("answer", f"{expected} within {timeout} s", "none") from error
    except urllib.error.HTTPError as error:
        got = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        raise GateError("answer", expected, got) from error
    except (OSError, ValueError, KeyError, IndexError, http.client.HTTPException) as error:
        raise GateError("answer", expected, reason(error)) from error
    parts = (message.get(key) for key in ("reasoning", "reasoning_content", "content"))
    text = " ".join(part for part in parts if part)
    if "\N{REPLACEMENT CHARACTER}" in text or not re.search(service["gate"]["expect"], text):
        raise GateError("answer", expected, repr(text[:200]))
    return text


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


def journal(unit, lines=JOURNAL_LINES):
    """The last lines of the unit's present or last start, led by the errors that came before them.

    A traceback of vLLM's parent process only says that a child failed; the cause is further up.
    """
    invocation = run("systemctl", "show", "-p", "InvocationID", "--value", unit).stdout.strip()
    match = [f"_SYSTEMD_INVOCATION_ID={invocation}", "+", f"INVOCATION_ID={invocation}"]
    which = match if invocation else ["-u", unit]
    said = run("journalctl", *which, "-o", "cat", "--no-pager", check=False).stdout.splitlines()
    last = said[-lines:]
    errors = [line for line in said[:-lines] if ERROR.search(line)]
    return [line[:LINE_LENGTH] for line in (*dict.fromkeys(errors[:ERRORS]), *last)]


# --------------------------------------------------------------------------------------- cutover


def cutover(request):
    """This host goes from what it runs to what the plan says, or back to what it ran.

    All services that change are stopped first (a new one may want the GPUs of an old one), switched,
    started together and judged. If one fails the gate, every one of them is put back.
    """
    changing = [service for service in request["services"] if service["stamp"] != serving(service)]
    known = {service["name"] for service in request["services"]}
    retired = [
        path.stem for path in (RECORDS / "services").glob("*.json") if path.stem not in known
    ]
    before = {name: record(name) for name in [*(s["name"] for s in changing), *retired]}
    proxy_before = read_json(RECORDS / "proxy.json")
    for service in changing:
        check_staged(service)
    try:
        bring_up(changing, retired, request["proxy"])
    except HostError as error:
        say(f"{error}")
        why = str(error).splitlines()[0]
        try:
            put_back(request, changing, before, proxy_before)
        except HostError as second:
            raise HostError(
                f"OUT OF SERVICE: the cut-over failed ({why}), and so did going back: {second}"
            ) from second
        raise HostError(f"the cut-over failed and was undone: {why}") from error
    for name in retired:
        (DRAINING / name).unlink(missing_ok=True)
        (UNITS / f"minimax-{name}.service").unlink(missing_ok=True)
        (RECORDS / "services" / f"{name}.json").unlink()
        shutil.rmtree(SERVICES / name, ignore_errors=True)
    if retired:
        run("systemctl", "daemon-reload")


def serving(service):
    """The stamp that a service serves under: its process's, when that passed the gate and is public."""
    unit = unit_state(service["unit"])
    good = (record(service["name"]) or {}).get("stamp")
    drained = (DRAINING / service["name"]).exists()
    return (
        unit["stamp"]
        if unit["active"] == "active" and unit["stamp"] == good and not drained
        else None
    )


def record(name):
    return read_json(RECORDS / "services" / f"{name}.json")


def staged_unit(name, stamp):
    return SERVICES / name / stamp / "unit.service"


def check_staged(service):
    if not staged_unit(service["name"], service["stamp"]).is_file():
        raise HostError(f"{service['name']}: {service['stamp']} is not staged on this host")


def bring_up(changing, retired, proxy):
    """Stop, switch, start, judge; records what passed. Raises HostError where one does not."""
    units = {service["name"]: service["unit"] for service in changing}
    # One that already runs the right stamp was interrupted while being judged: judging is what it lacks.
    to_start = [
        service for service in changing if unit_state(service["unit"])["stamp"] != service["stamp"]
    ]
    drain([*(service["name"] for service in changing), *retired])
    stop(
        {units[service["name"]]: service["engine_port"] for service in to_start}
        | {f"minimax-{name}.service": None for name in retired}
    )
    for service in to_start:
        check_port_free(service)
        content = staged_unit(service["name"], service["stamp"]).read_bytes()
        write_atomically(UNITS / service["unit"], content)
    switch_proxy(proxy)
    if to_start:
        run("systemctl", "daemon-reload")
        names = [service["unit"] for service in to_start]
        run("systemctl", "reset-failed", *names, check=False)
        run("systemctl", "enable", "--quiet", *names)
        run("systemctl", "start", *names)
        say(f"started {', '.join(service['name'] for service in to_start)}")
    with concurrent.futures.ThreadPoolExecutor(max(1, len(changing))) as pool:
        judged = {
            service["name"]: pool.submit(
                pass_gate, service, service["gate"]["ready_timeout_s"], tell=say
            )
            for service in changing
        }
        failed = None
        for service in changing:
            try:
                timings = judged[service["name"]].result()
            except HostError as error:
                tail = "\n".join(f"    {line}" for line in journal(service["unit"]))
                failed = failed or HostError(f"{service['name']}: {error}\n{tail}")
                continue
            say(
                f"{service['name']} serves: ready after {timings['ready_s']:.1f} s, "
                f"first answer after {timings['first_answer_s']:.1f} s"
            )
            note_serving(service, timings)
    if failed:
        raise failed


def note_serving(service, timings):
    old = record(service["name"]) or {}
    previous = old.get("stamp") if old.get("stamp") != service["stamp"] else old.get("previous")
    new = {"stamp": service["stamp"], "unit": service["unit"], "previous": previous}
    new.update(timings, passed_at=time.time())
    write_atomically(RECORDS / "services" / f"{service['name']}.json", json.dumps(new))
    (DRAINING / service["name"]).unlink(missing_ok=True)
    for stage in (SERVICES / service["name"]).iterdir():
        if stage.name not in (service["stamp"], previous):
            shutil.rmtree(stage, ignore_errors=True)


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


def switch_proxy(proxy):
    """The proxy's configuration put in place and loaded; remembered only once nginx has it."""
    state = unit_state(PROXY_UNIT)
    loaded = (read_json(RECORDS / "proxy.json") or {}).get("stamp")
    if loaded == proxy["stamp"] and state["active"] == "active":
        return
    config = (PROXY / f"{proxy['stamp']}.conf").read_text()
    # The test makes nginx's temporary folders, in the folder that the running unit has.
    pathlib.Path("/run/minimax-proxy").mkdir(exist_ok=True)
    run("nginx", "-t", "-q", "-c", str(PROXY / f"{proxy['stamp']}.conf"))
    write_atomically(PROXY / "nginx.conf", config)
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--quiet", PROXY_UNIT)
    run("systemctl", "reload-or-restart", PROXY_UNIT)
    state = unit_state(PROXY_UNIT)
    if state["active"] != "active":
        raise HostError(f"{PROXY_UNIT} does not run:\n" + "\n".join(journal(PROXY_UNIT)))
    write_atomically(RECORDS / "proxy.json", json.dumps({"stamp": proxy["stamp"]}))


def put_back(request, changing, before, proxy_before):
    """What served before the cut-over serves again, gate included. Raises HostError if it cannot."""
    say("putting this host back")
    stop({service["unit"]: service["engine_port"] for service in changing})
    services = {service["name"]: service for service in changing}
    old = []
    for name, last in before.items():
        if last is None:
            run("systemctl", "disable", "--quiet", services[name]["unit"], check=False)
            (UNITS / services[name]["unit"]).unlink(missing_ok=True)
            (DRAINING / name).unlink(missing_ok=True)
            say(f"{name}: nothing served here before; left stopped")
            continue
        if not staged_unit(name, last["stamp"]).is_file():
            raise HostError(
                f"{name}: {last['stamp']}, which served before, is gone; it stays stopped"
            )
        old.append(last_service(name, last))
    run("systemctl", "daemon-reload")
    # note_serving has written the new stamp where a sibling service passed; the old ones count again.
    for name, last in before.items():
        path = RECORDS / "services" / f"{name}.json"
        if last is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, json.dumps(last))
    bring_up(old, [], proxy_before or request["proxy"])
    for service in old:
        say(f"{service['name']} was put back and serves {service['stamp']} again")


def last_service(name, last):
    """The service as it was, from what was staged with it."""
    gate_data = json.loads((SERVICES / name / last["stamp"] / "gate.json").read_text())
    return {"name": name, "unit": last["unit"], "stamp": last["stamp"], **gate_data}


# ------------------------------------------------------------------------------------------ jobs


LONG = {
    "packages": packages,
    "driver": driver,
    "release": release,
    "weights": weights,
    "cutover": cutover,
}
EXCLUSIVE = ("packages", "driver", "cutover")
"""Verbs of which only one can sensibly run at a time on a host."""


def job(verb, request):
    """A long verb in a transient unit of its own, followed until it ends; attaches to one under way.

    The unit is named for the request, so that the same work is never started twice: whoever comes
    second follows the first. Its output and exit code stay in a file, so that nothing is lost when the
    connection is.
    """
    text = json.dumps(request, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    unit = f"minimax-job-{verb}-{name}"
    JOBS.mkdir(parents=True, exist_ok=True, mode=0o700)
    wait_for_others(verb, unit)
    log, code = JOBS / f"{unit}.log", JOBS / f"{unit}.exit"
    with locked(JOBS / f"{unit}.lock"):
        if is_running(unit):
            say(f"{verb}: under way already; following it")
        else:
            code.unlink(missing_ok=True)
            write_atomically(log, "")
            write_atomically(JOBS / f"{unit}.json", text, 0o600)
            run(
                *("systemd-run", "--quiet", "--collect", f"--unit={unit}", "--no-block"),
                *("--property=KillMode=mixed", f"--property=StandardOutput=append:{log}"),
                *(f"--property=StandardError=append:{log}", "--setenv=PYTHONUNBUFFERED=1"),
                *("/usr/bin/python3", os.path.abspath(__file__), "run", verb, unit),
            )
    return follow(unit, log, code)


def wait_for_others(verb, unit):
    """Waits for another request's job of a verb that must not run twice at once."""
    if verb not in EXCLUSIVE:
        return
    said = False
    while others := [
        other
        for other in active_jobs()
        if other.startswith(f"minimax-job-{verb}-") and other != f"{unit}.service"
    ]:
        if not said:
            say(f"{verb}: waiting for {others[0]}, which an earlier run started")
            said = True
        time.sleep(1)


def is_running(unit):
    state = unit_state(f"{unit}.service")
    return state["active"] in ("active", "activating", "deactivating")


def follow(unit, log, code):
    """Passes the job's lines on until it has ended; its exit code."""
    with open(log) as stream:
        looked = time.monotonic()
        while True:
            ended = code.exists()
            # The exit code is the usual end; asking systemd is for a job that was killed.
            if not ended and time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                ended = not is_running(unit)
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
    status = 1
    try:
        LONG[verb](json.loads((JOBS / f"{unit}.json").read_text()))
        status = 0
    except HostError as error:
        say(f"{error}")
    finally:
        (JOBS / f"{unit}.json").unlink(missing_ok=True)
        write_atomically(JOBS / f"{unit}.exit", str(status))
    return status


def main(argv):
    if argv[:1] == ["run"] and len(argv) == 3 and argv[1] in LONG:  # noqa: PLR2004
        return run_job(argv[1], argv[2])
    quick = {"probe": probe, "files": files, "gate": gate}
    is_quick = len(argv) == 1 and argv[0] in quick
    is_job = len(argv) == 2 and argv[0] == "job" and argv[1] in LONG  # noqa: PLR2004
    if not (is_quick or is_job):
        print(__doc__, file=sys.stderr)
        return 2
    request = json.load(sys.stdin)
    try:
        if argv[0] == "job":
            return job(argv[1], request)
        answer = quick[argv[0]](request)
    except HostError as error:
        print(error, file=sys.stderr)
        return 1
    if answer is not None:
        json.dump(answer, sys.stdout)
        print()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
