"""The NVIDIA driver: the long verbs `driver` and `stage_driver`, and its exchange inside a cut-over.

An exchange may reboot the host and goes on afterwards: what it goes to, what it can go back to and how
far it is lies on disk before anything is stopped, and each of its acts may be done twice.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import tempfile
import time

import fleet_host as core
import fleet_packages

QUIET = {**fleet_packages.QUIET, "LC_ALL": "C.UTF-8"}
APT_CACHE = pathlib.Path("/var/cache/apt/archives")
PREFERENCES = pathlib.Path("/etc/apt/preferences.d")
OFFLINE = ("-o=Dir::Etc::SourceList=/dev/null", "-o=Dir::Etc::SourceParts=/dev/null")
"""apt then knows what is installed and the files that it is given, and nothing else."""
INSTALL = ("install", "--allow-downgrades", "--allow-change-held-packages")
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
VERIFY_TIMEOUT_S = 60
"""How long a driver may take until its GPUs answer; the fabric manager is awaited by systemd."""
FABRIC_TIMEOUT_S = 300
SMI_TIMEOUT_S = 60
NO_COLUMN = "is not a valid field to query"
PROBE_TIMEOUT_S = 600
REBOOT_TIMEOUT_S = 900
POLL_S = 1


# --------------------------------------------------------------------------- where nothing is loaded


def driver(request):
    """The NVIDIA driver at its version: installed, its daemons running, every GPU answering.

    For hosts where nothing uses a driver yet, and for what is put right under services.
    """
    # Packages of two branches exclude each other, which apt cannot solve around a hold of ours.
    fleet_packages.unhold(request["unhold"])
    changed = fleet_packages.packages(request)
    # Restarting the fabric manager under running services would end them.
    start(request, restart=changed and not core.active_services())
    verify(request, request["gpus"])
    note(request)


def start(request, restart):
    """The module loaded and the daemons started, best effort: `verify` asks whether they work."""
    if shutil.which("modprobe"):
        core.run("modprobe", "nvidia-uvm", check=False)
    # All of them before any is started: what cannot run beside the old module runs after a reboot.
    core.run("systemctl", "enable", "--quiet", *request["start"])
    for unit in request["start"]:
        core.run("systemctl", "restart" if restart else "start", unit, check=False)


def verify(request, gpus):
    """All of `gpus` answer with the version of the request, and its daemons run. Raises HostError."""
    version = request["version"]
    deadline = time.monotonic() + VERIFY_TIMEOUT_S
    while True:
        seen = core.gpus_state()
        said, answering = seen["error"] or "", len(seen["devices"] or [])
        # A driver that has just been loaded may need a moment; a mismatch does not go away.
        settled = answering == gpus or "mismatch" in said or (seen["devices"] is None and not said)
        if settled or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if seen["devices"] is None:
        raise core.HostError(
            f"driver {version}: {said or 'nvidia-smi is missing'}; {versions(request)}"
        )
    for unit in request["start"]:
        if core.unit_state(unit)["active"] != "active":
            tail = "\n".join(core.journal(unit))
            raise core.HostError(f"{unit} does not run: {versions(request)}\n{tail}")
    found = sorted({device["driver"] for device in seen["devices"]})
    if answering != gpus or found != [version]:
        raise core.HostError(
            f"driver {version}: nvidia-smi sees {answering}/{gpus} "
            f"GPUs with driver {', '.join(found)}{said and f' and says: {said}'}; {versions(request)}"
        )
    core.say(f"driver {version}: {answering} GPUs")


def versions(request):
    """Every version that a driver consists of on this host, in one line."""
    state = core.packages_state(sorted({*request["packages"], *request["unhold"]}))
    there = {name: found for name, found in state.items() if found}
    return (
        f"kernel module {core.loaded_driver() or 'none'}, "
        f"{core.in_words(there) if there else 'no packages'}, {request['version']} declared"
    )


def note(request):
    """From now on another version on this host is one that somebody else has put there."""
    document = {"version": request["version"], "at": time.time()}
    core.write_if_other(core.RECORDS / "driver.json", json.dumps(document).encode())


# ------------------------------------------------------------------------------------------ staging


def stage_driver(request):
    """All that an exchange of the driver will install, and all that going back will: on this host's disk.

    Nothing is installed. Afterwards neither way needs a mirror. Raises HostError where going back would
    not be possible.
    """
    if request["pin"] is None:
        raise core.HostError(
            f"driver {request['version']}: a driver that is loaded is exchanged with apt only; stop the "
            "services of this host, install by hand, reboot, and roll out again"
        )
    fleet_packages.finish_interrupted_installation(QUIET)
    pool = core.driver_folder() / "packages"
    (pool / "partial").mkdir(parents=True, exist_ok=True)
    exact = {name: version for name, version in request["packages"].items() if version}
    wanted = fleet_packages.words(request["packages"])
    with tempfile.TemporaryDirectory(prefix="minimax-fleet-apt-") as folder:
        options = (
            f"-o=Dir::Etc::PreferencesParts={preferences(request, pathlib.Path(folder))}",
            f"-o=Dir::Cache::Archives={pool}",
            "-o=APT::Ignore-Hold=true",
            # apt's own user cannot enter these folders.
            "-o=APT::Sandbox::User=root",
        )
        core.run_long("driver: reading the repositories", *core.APT, "update", env=QUIET)
        changes = planned(core.run(*core.APT, *options, *INSTALL, "-s", *wanted, env=QUIET).stdout)
        refuse_without_packages(request, changes)
        core.say(f"driver {request['version']}: fetching {len(changes)} packages")
        core.run_long(
            "driver: fetching",
            *(*core.APT, *options, *INSTALL, "--download-only", *wanted),
            env=QUIET,
        )
        for change in changes:
            if change["old"]:
                keep(change["name"], change["old"], pool, options)
    lacking = [c["name"] for c in changes if c["new"] and not deb(pool, c["name"], c["new"])]
    if lacking:
        raise core.HostError(f"driver {request['version']}: apt did not fetch {', '.join(lacking)}")
    staged = {"packages": exact, "installed": core.versions_of(exact), "changes": changes}
    core.write_atomically(core.driver_folder() / "staged.json", json.dumps(staged))
    back = sorted({change["old"] for change in changes if change["old"]})
    core.say(
        f"driver {request['version']}: staged" + (f", and {', '.join(back)} kept" if back else "")
    )


def preferences(request, folder):
    """The host's own apt preferences with the pin of the driver to come, in a folder of their own."""
    for file in PREFERENCES.glob("*"):
        if file.is_file() and str(file) != request["pin"]["path"]:
            shutil.copy(file, folder)
    (folder / pathlib.Path(request["pin"]["path"]).name).write_text(request["pin"]["content"])
    return folder


INSTALLED_LINE = re.compile(r"Inst (\S+)(?: \[(\S+)\])? \((\S+) ")
REMOVED_LINE = re.compile(r"Remv (\S+) \[(\S+)\]")


def planned(simulated):
    """What `apt-get -s install` would change: name, version now and then, None where there is none."""
    changes = []
    for line in simulated.splitlines():
        found = INSTALLED_LINE.match(line)
        if found:
            changes.append({"name": found[1], "old": found[2], "new": found[3]})
        found = REMOVED_LINE.match(line)
        if found:
            changes.append({"name": found[1], "old": found[2], "new": None})
    return changes


def refuse_without_packages(request, changes):
    """A driver that came by NVIDIA's .run file is in no package: nothing could bring it back."""
    loaded = core.loaded_driver()
    there = any(core.packages_state(request["unhold"]).values())
    if loaded and changes and not there and not any(change["old"] for change in changes):
        raise core.HostError(
            f"driver {request['version']}: going back would not be possible: kernel module {loaded} is "
            "loaded and belongs to no package (NVIDIA's .run file?); take it away first, with "
            "nvidia-uninstall and a reboot"
        )


def deb(folder, name, version):
    """The file of a package in a folder, as apt names it; None where it is not there."""
    names = f"{name}_{version.replace(':', '%3a')}_*.deb"
    return next((file for file in sorted(folder.glob(names)) if file.stat().st_size), None)


def keep(name, version, pool, options):
    """A package that is installed now, kept for going back. Raises HostError where it cannot be had."""
    if deb(pool, name, version):
        return
    cached = deb(APT_CACHE, name, version)
    if cached:
        shutil.copy(cached, pool)
        return
    done = core.run(
        *("env", f"--chdir={pool}", "apt-get", *options, "download", f"{name}={version}"),
        check=False,
        env=QUIET,
    )
    if done.returncode or not deb(pool, name, version):
        said = " ".join(done.stderr.split())[:200]
        raise core.HostError(
            f"driver: going back would not be possible: {name} {version}, which is installed now, is in "
            f"no apt source of this host ({said}); put its .deb into {APT_CACHE}, or name a source that "
            "has it"
        )


# ----------------------------------------------------------------------------- inside the cut-over


FORWARD, BACK = "forward", "back"


def begin(request, before):
    """The exchange that is to be made, remembered on disk: from now on it ends, forward or back.

    `before` is the cut-over's own: what it needs to know of the time before. Raises HostError where the
    driver is not staged.
    """
    if not core.driver_staged(request):
        raise core.HostError(
            f"driver {request['version']} is not staged, or packages changed since; roll out once more"
        )
    staged = core.read_json(core.driver_folder() / "staged.json")
    answering = core.gpus_state()["devices"] or []
    pin = pathlib.Path(request["pin"]["path"])
    loaded, packaged = core.loaded_driver(), packaged_version(request)
    exchange = {
        "driver": request,
        "way": FORWARD,
        "why": None,
        "rebooted": {},
        "changes": staged["changes"],
        "before": before,
        # Packages that were changed behind a module of the declared version are repaired for good: to put
        # them back would be to break the driver again.
        "repair": loaded == request["version"],
        "old": {
            # What a reboot would load is what the packages have, whatever is loaded now.
            "version": packaged if loaded and packaged else loaded,
            "gpus": len(answering) or request["gpus"],
            "start": [
                unit for unit in request["start"] if core.unit_state(unit)["active"] == "active"
            ],
            "held": core.run("apt-mark", "showhold").stdout.split(),
            "pin": pin.read_text() if pin.is_file() else None,
        },
    }
    remember(exchange)
    return exchange


def packaged_version(request):
    """The driver's version by its packages that are installed; None where they are of none or of several."""
    found = core.versions_of(request["unhold"]).values()
    plain = {re.match(r"(?:\d+:)?([\d.]+)", version).group(1) for version in found if version}
    return plain.pop() if len(plain) == 1 else None


def remember(exchange):
    core.write_atomically(core.exchange_file(), json.dumps(exchange), 0o600)


def go_forward(exchange):
    """The declared driver installed from what was staged, booted into where needed, and verified.

    Raises HostError with what kept it from that; at once where the host is on its way back already.
    """
    request = exchange["driver"]
    if exchange["way"] == BACK:
        raise core.HostError(exchange["why"])
    install(exchange, "new", request["pin"]["content"])
    fleet_packages.hold(sorted(request["packages"]), {})
    bring_up(exchange, request, request["gpus"])
    check_fabric(request)
    check_cuda(request)
    note(request)


def go_back(exchange, why):
    """The driver that was there before: installed from what was kept, booted into, and verified."""
    request, old = exchange["driver"], exchange["old"]
    if exchange["way"] != BACK:
        exchange.update(way=BACK, why=why)
        remember(exchange)
    try:
        if exchange["repair"]:
            core.say(f"the driver stays {request['version']}: what was there before did not match")
            bring_up(exchange, request, request["gpus"])
            return
        core.say(f"putting back the driver that was there before: {old['version'] or 'none'}")
        install(exchange, "old", old["pin"])
        held = sorted({change["name"] for change in exchange["changes"]} & set(old["held"]))
        fleet_packages.hold(held, {})
        if old["version"]:
            bring_up(exchange, {**request, **old, "unhold": request["unhold"]}, old["gpus"])
    except Exception as error:
        raise core.HostError(f"{core.explained(error)}; {versions(request)}") from error


def finish(exchange):
    """What an exchange that has ended leaves: the packages of now and of before, and no more."""
    pool = core.driver_folder() / "packages"
    of_use = {
        deb(pool, change["name"], change[which])
        for change in exchange["changes"]
        for which in ("old", "new")
        if change[which]
    }
    for file in pool.glob("*.deb"):
        if file not in of_use:
            file.unlink()
    core.exchange_file().unlink(missing_ok=True)


def install(exchange, which, pin):
    """The packages of one side of the exchange, `new` or `old`, from this host's own disk."""
    fleet_packages.finish_interrupted_installation(QUIET)
    path = pathlib.Path(exchange["driver"]["pin"]["path"])
    if pin is None:
        path.unlink(missing_ok=True)
    else:
        core.write_if_other(path, pin.encode())
    pool, ours = core.driver_folder() / "packages", exchange["driver"]["unhold"]
    state = core.packages_state([change["name"] for change in exchange["changes"]])
    words = []
    for change in exchange["changes"]:
        name, version, there = change["name"], change[which], state[change["name"]]
        if version is None:
            # What only the other side has; but the headers of a kernel are of use to both.
            words += [f"{name}-"] if there and (which == "new" or name in ours) else []
        elif not core.installed(there, version):
            words.append(str(deb(pool, name, version) or f"{name}={version}"))
    if not words:
        return
    fleet_packages.unhold(ours)
    version = next((change[which] for change in exchange["changes"] if change[which]), "none")
    core.say(f"installing {len(words)} packages of the driver, {version}")
    core.run_long("driver: installing", *core.APT, *OFFLINE, *INSTALL, *words, env=QUIET)


def bring_up(exchange, request, gpus):
    """The installed driver runs and all GPUs answer; with a reboot where another module is loaded."""
    way, version = exchange["way"], request["version"]
    loaded = core.loaded_driver()
    if loaded != version and (loaded or core.NOUVEAU.exists()):
        if exchange["rebooted"].get(way, boot_id()) != boot_id():
            raise core.HostError(
                f"driver {version}: after the reboot {loaded or 'nouveau'} is loaded"
            )
        check_built(version)
        reboot(exchange, f"kernel module {loaded or 'nouveau'} is loaded")
    start(request, restart=way not in exchange["rebooted"])
    verify(request, gpus)


def boot_id():
    return BOOT.read_text().strip()


def check_built(version):
    """Without the headers of the kernel that will boot, a module's package installs and builds nothing."""
    if shutil.which("dkms") is None:
        return
    kernel = core.next_kernel()
    said = core.run("dkms", "status", "-k", kernel, check=False).stdout
    if not any(version in line and "installed" in line for line in said.splitlines()):
        raise core.HostError(
            f"driver {version}: its module was not built for kernel {kernel}, which a reboot would start: "
            f"dkms says {' '.join(said.split()) or 'nothing'}; see /var/lib/dkms/nvidia"
        )


def reboot(exchange, why):
    """Reboots the host; this job goes on after it."""
    if exchange["driver"]["reboot"] != "if-needed":
        raise core.HostError(f"{why}, which takes a reboot, and driver.reboot is 'never'")
    if not core.goes_on_at_boot():
        raise core.HostError(f"{why}, and no unit would go on after a reboot; roll out once more")
    exchange["rebooted"][exchange["way"]] = boot_id()
    remember(exchange)
    if shutil.which("update-initramfs") and core.NOUVEAU.exists():
        core.run_long("driver: nouveau is taken out of the initramfs", "update-initramfs", "-u")
    kernel = core.next_kernel()
    into = "" if kernel == core.platform.release() else f" into kernel {kernel}"
    core.say(f"rebooting this host{into}: {why}; this cut-over goes on by itself afterwards")
    os.sync()
    core.run("systemctl", "reboot")
    time.sleep(REBOOT_TIMEOUT_S)
    raise core.HostError(
        f"the host did not go down within {REBOOT_TIMEOUT_S} s of systemctl reboot"
    )


def check_fabric(request):
    """On machines with NVSwitches every GPU is registered with the fabric; CUDA fails with 802 before."""
    if not request["nvswitch"]:
        return
    deadline = time.monotonic() + FABRIC_TIMEOUT_S
    argv = ("nvidia-smi", "--query-gpu=fabric.state,fabric.status", "--format=csv,noheader")
    while True:
        said = core.run(*argv, check=False, timeout=SMI_TIMEOUT_S).stdout
        states = {" ".join(line.split()) for line in said.splitlines() if line.strip()}
        # GPUs that are managed otherwise have no such state, and older drivers not even the column.
        if NO_COLUMN in said or states <= {"Completed, Success", "N/A, N/A", "[N/A], [N/A]"}:
            return
        if time.monotonic() > deadline:
            raise core.HostError(
                f"driver {request['version']}: the NVLink fabric is {', '.join(sorted(states))}, "
                f"expected Completed, Success; {versions(request)}"
            )
        time.sleep(POLL_S)


NO_CUDA = "no CUDA torch"
CUDA_PROBE = f"""
try:
    import torch
    if torch.version.cuda is None:
        raise ImportError
except ImportError:
    print({NO_CUDA!r})
else:
    count = torch.cuda.device_count()
    for index in range(count):
        square = torch.ones(64, 64, device=f"cuda:{{index}}")
        assert float((square @ square).sum()) == 64.0 ** 3, f"cuda:{{index}} computes wrongly"
    print(count)
"""


def check_cuda(request):
    """Every GPU multiplies a matrix, by the torch of the release that will serve, where that has one."""
    if not os.access(request["python"], os.X_OK):
        core.say(f"driver {request['version']}: CUDA not tried, there is no release yet")
        return
    # It leaves nothing behind: neither compiled modules in the release, nor kernels in root's home.
    argv, env = (request["python"], "-B", "-c", CUDA_PROBE), {"CUDA_CACHE_DISABLE": "1"}
    done = core.run(*argv, check=False, timeout=PROBE_TIMEOUT_S, env=env)
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise core.HostError(f"driver {request['version']}: CUDA fails: {why}; {versions(request)}")
    if said == NO_CUDA:
        core.say(f"driver {request['version']}: CUDA not tried, the release has {NO_CUDA}")
    elif said != str(request["gpus"]):
        raise core.HostError(
            f"driver {request['version']}: CUDA sees {said}/{request['gpus']} GPUs; {versions(request)}"
        )
    else:
        core.say(f"driver {request['version']}: CUDA computes on {said} GPUs")
