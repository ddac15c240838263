"""The lab's hosts: systemd containers with disks, addresses and power switches of their own.

Each host is a `systemd-nspawn` container that boots the shared base with its own disk over it, in
its own network namespace and cgroups. A supervisor per host boots it, and boots it again when it
reboots. This module is what the `lab` command and the tests use:

    up, down, status                  all hosts
    start, stop, crash, reboot, reset one host's power switch and disk
    ssh, write_file, read_file        inside a host
    hardware, set_hardware,           its simulated GPUs and how its model servers misbehave
    misbehave, behave
    requests, clear_requests          what the site host was asked

All take host names, and raise LabError, whose text is one line for a person.
The root user of a host is as good as root on this machine: the lab is for code that one trusts.
"""

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import LabError, base, cgroups, disk, hardware, keys, limits, network, topology
from lab.disk import Disk
from lab.hardware import Behaviour, Hardware, Rule
from lab.paths import (
    BASE,
    CACHE,
    CONTROL,
    HOSTS,
    REQUESTS,
    SITE_KEY,
    SITE_LOG,
    SITE_ROOT,
    SSH_CONFIG,
    STATE,
)
from lab.prerequisites import check_file_system, check_machine, ensure_prerequisites
from lab.process import Progress, attempt, detach, failure, run
from lab.topology import Host

# How long a host may take to boot when it has the machine for itself, and more for each other one.
BOOT_TIMEOUT_S = 60.0
BOOT_TIMEOUT_PER_HOST_S = 5.0
POWER_OFF_TIMEOUT_S = 20.0
# A host's services may take their time to stop: a model server drains its requests.
REBOOT_TIMEOUT_S = 300.0
LEADER_TIMEOUT_S = 5.0
POLL_S = 0.1

SSH_PORT = 22
TCP_LISTEN = "0A"  # as in /proc/net/tcp

# systemd's signal for "reboot", as if asked for inside.
REBOOT_SIGNAL = signal.SIGRTMIN + 5

# Beyond systemd-nspawn's own: what a server's services may have. Left out is what would reach
# beyond the host: loading modules, setting the clock, reading the kernel's log.
CAPABILITIES = ("CAP_BPF", "CAP_IPC_LOCK", "CAP_NET_ADMIN", "CAP_PERFMON")
SYSTEM_CALLS = ("@keyring", "bpf", "perf_event_open")

_SUPERVISOR = Path(__file__).resolve().parent / "supervisor.py"
_ENVIRONMENT = {
    # Nobody else boots these images, and a host whose power is cut would leave its lock.
    "SYSTEMD_NSPAWN_LOCK": "0",
    # Hosts see cgroup v2, as on today's servers, whatever this machine has.
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # A host sets its own network's parameters, and no others.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
    # /tmp is on the disk, as it is on a server.
    "SYSTEMD_NSPAWN_TMPFS_TMP": "0",
}


@dataclass(frozen=True)
class HostStatus:
    """A host and how it is.

    state: "up", "booting" (runs, no ssh yet), "off", "crashed" (left processes, no supervisor)
    uptime_s: seconds since it booted, None unless it runs
    hardware: its simulated GPUs
    behaves: False if its model servers were told to misbehave
    """

    host: Host
    state: str
    uptime_s: float | None
    hardware: Hardware
    behaves: bool


def silent(_line: str) -> None:
    """Progress that goes nowhere."""


# -- all hosts ---------------------------------------------------------------------------------


def up(count: int | None = None, *, fresh: bool = False, progress: Progress = silent) -> None:
    """Have the topology's hosts and the site host run, and no others; wait until ssh answers.

    Hosts that run already keep running. What a lab that crashed left behind is removed first.

    count: number of GPU hosts, from now on in this process; LAB_HOSTS decides if None
    fresh: throw away what the hosts have written, all of them
    """
    if count is not None:
        os.environ["LAB_HOSTS"] = str(count)
    wanted = (topology.site(), *_topology_hosts())
    ensure_prerequisites(progress)
    with _exclusive(progress):
        check_file_system(STATE, "LAB_STATE")
        lower = base.ensure(progress)
        importlib.import_module("lab.site.build").ensure(progress)
        limits.raise_limits(progress)
        _clean_up({host.name for host in wanted}, progress)
        if fresh:
            _each([host.name for host in wanted], _make_new)
        network.ensure_switch()
        keys.control_public_key()
        begun = time.monotonic()
        to_boot = [host for host in wanted if not _keep_running(host, lower, progress)]
        if to_boot:
            progress(f"booting {', '.join(host.name for host in to_boot)}")
            _each(to_boot, lambda host: _boot(host, lower, progress))
        _write_client_configuration()
        _each(to_boot, lambda host: _wait_until_ready(host, len(to_boot)))
        _each([host for host in wanted if host not in to_boot], lambda h: _wait_until_ready(h, 0))
        if to_boot:
            progress(f"{len(to_boot)} hosts booted in {time.monotonic() - begun:.1f} s")
        _remove_old_bases(lower)


def down(*, purge: bool = False, cache: bool = False, progress: Progress = silent) -> None:
    """Power off all hosts and remove the lab from this machine; verify that nothing is left.

    The hosts' disks are kept and boot again with the next `up`, unless purged.

    purge: also remove the disks and all keys
    cache: also remove what takes minutes to make again: the base system, the site's repositories
    """
    check_machine()
    with _exclusive(progress):
        names = _traces()
        if names:
            progress(f"powering off {', '.join(sorted(names))}")
        _each(names, _switch_off)
        network.remove_switch()
        limits.restore_limits()
        if left := leftovers():
            raise LabError(f"the lab is not all gone, remove by hand: {'; '.join(left)}")
        if purge:
            shutil.rmtree(STATE, ignore_errors=True)
            shutil.rmtree(CONTROL, ignore_errors=True)
        if cache:
            shutil.rmtree(CACHE, ignore_errors=True)
    kept = [str(path) for path in (STATE, CACHE) if path.exists()]
    progress(
        "the lab is down: no process, mount, cgroup, network namespace or interface of it is left"
        + (f"; kept: {', '.join(kept)}" if kept else "")
    )


def status() -> list[HostStatus]:
    """The topology's hosts and the site host, and any former ones that are not off."""
    running = supervisors()
    current = (topology.site(), *_topology_hosts())
    found = [_status(host, running.get(host.name)) for host in _all_hosts()]
    return [entry for entry in found if entry.host in current or entry.state != "off"]


def leftovers() -> list[str]:
    """What is on this machine of a lab that is down: nothing, unless something went wrong."""
    mounts = [
        f"mount {line.split()[4]}"
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        if line.split()[4].startswith(f"{STATE}/") and line.split()[4] != str(STATE)
    ]
    processes = [f"process {pid} ({name})" for name, pid in supervisors().items()]
    groups = [f"cgroup {path}" for path in cgroups.leftovers()]
    return [*processes, *groups, *mounts, *network.leftovers()]


# -- one host's power switch and disk ----------------------------------------------------------


def start(name: str, *, progress: Progress = silent) -> None:
    """Switch a host on and wait until ssh answers; nothing happens if it runs."""
    host = _host(name)
    with _exclusive(progress):
        if name not in supervisors():
            _start(host, progress)


def stop(name: str, *, progress: Progress = silent) -> None:
    """Power a host off as `poweroff` does; its disk stays. Nothing happens if it is off."""
    _host(name)
    with _exclusive(progress):
        _switch_off(name)


def crash(name: str, *, progress: Progress = silent) -> None:
    """Cut a host's power: all its processes die at once, nothing is told, its disk stays."""
    _host(name)
    with _exclusive(progress):
        _cut_power(name)


def reboot(name: str, *, progress: Progress = silent) -> None:
    """Reboot a running host as `reboot` does inside, and wait until ssh answers again."""
    host = _host(name)
    before = _leader(name)
    if before is None:
        raise LabError(f"{name}: is off; `lab start {name}`")
    progress(f"rebooting {name}")
    os.kill(before, REBOOT_SIGNAL)
    _wait(lambda: _leader(name) not in {None, before}, REBOOT_TIMEOUT_S, f"{name}: did not reboot")
    _wait_until_ready(host, 1)


def reset(name: str, *, progress: Progress = silent) -> None:
    """Make a host new: empty disk, default hardware, good behaviour, the same keys; and boot it."""
    host = _host(name)
    with _exclusive(progress):
        _make_new(name)
        _start(host, progress)


# -- inside a host -----------------------------------------------------------------------------


def ssh(
    name: str,
    command: str,
    *,
    check: bool = False,
    stdin: str = "",
    timeout_s: float | None = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Run a shell command as root on a host; the result has its exit status and output.

    check: raise LabError if the command fails
    stdin: text for its standard input
    timeout_s: seconds that it may take, with the connection; any if None
    """
    _host(name)
    done = attempt(ssh_argv(name, command), stdin=stdin, timeout_s=timeout_s)
    if check and done.returncode:
        raise failure([f"{name}:", command], done.returncode, done.stderr or done.stdout)
    return done


def ssh_argv(name: str, *command: str) -> list[str]:
    """The ssh command line that reaches a host, with the lab's keys."""
    return ["ssh", "-F", str(SSH_CONFIG), name, *command]


def write_file(name: str, path: str, text: str, *, mode: int = 0o644) -> None:
    """Write a file on a running host, with its directories."""
    ssh(name, f"install -D -m {mode:o} /dev/stdin '{path}'", check=True, stdin=text)


def read_file(name: str, path: str) -> str:
    """Contents of a file on a running host."""
    return ssh(name, f"cat '{path}'", check=True).stdout


# -- simulated hardware, misbehaviour, the site's log --------------------------------------------


def get_hardware(name: str) -> Hardware:
    """A host's simulated GPUs."""
    host = _host(name)
    return _hardware(host)


def set_hardware(name: str, /, **changes: Any) -> Hardware:
    """Change a host's simulated GPUs, at once; keyword arguments are fields of Hardware."""
    _host(name)
    with _plain_file_modes():
        return hardware.change(Disk(name).lab, **changes)


def misbehave(name: str, *rules: Rule, load_seconds: float | None = None) -> None:
    """Have a host's stand-in model servers misbehave so, in place of how they did before."""
    _host(name)
    with _plain_file_modes():
        hardware.misbehave(Disk(name).lab, Behaviour(load_seconds, rules))


def behave(name: str) -> None:
    """Have a host's stand-in model servers behave."""
    _host(name)
    hardware.behave(Disk(name).lab)


def requests() -> list[dict[str, Any]]:
    """What the site host was asked since its log was last cleared, oldest first.

    Each has time, client, method, path, status, bytes_sent, range and more, as lab/site/server.py
    writes them.
    """
    if not REQUESTS.exists():
        return []
    # What follows the last line's end is being written.
    lines = REQUESTS.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def clear_requests() -> None:
    """Forget what the site host was asked; it goes on writing to the same file."""
    if REQUESTS.exists():
        os.truncate(REQUESTS, 0)


# -- booting and powering off --------------------------------------------------------------------


def _start(host: Host, progress: Progress) -> None:
    network.ensure_switch()
    keys.control_public_key()
    progress(f"booting {host.name}")
    _boot(host, base.ensure(progress), progress)
    _write_client_configuration()
    _wait_until_ready(host, 1)


def _boot(host: Host, lower: Path, progress: Progress) -> None:
    """Start a host that is off, whatever it left when it last ran."""
    _remove_traces(host.name)
    own = Disk(host.name)
    if own.base() != lower.name:
        if own.base() is not None:
            progress(f"{host.name}: its disk belongs to an older base system and is made new")
        own.discard()
    files = disk.lab_files(host)
    own.prepare(lower, files)
    own.remember(host, lower, files)
    if not (own.lab / "hardware.json").exists():
        hardware.write(own.lab, hardware.default(host.group))
    network.connect(host)
    specification = {
        "overlay": {
            "lower": str(lower),
            "upper": str(own.upper),
            "work": str(own.work),
            "merged": str(own.merged),
        },
        "cgroups": [str(group) for group in cgroups.create(host.name)],
        "argv": _nspawn_argv(host),
        "environment": _ENVIRONMENT,
        "nspawn_pid": str(own.nspawn_pid),
    }
    own.boot_specification.write_text(json.dumps(specification, indent=1) + "\n", encoding="utf-8")
    own.console.unlink(missing_ok=True)
    # The mount namespace follows what is unmounted outside, and shows nothing to the outside.
    in_own_namespace = ["unshare", "--mount", "--propagation=slave", "--"]
    # Isolated from the lab's own Python environment, for a small process that starts at once.
    supervisor = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(own.boot_specification)]
    detach([*in_own_namespace, *supervisor], own.console)


def _nspawn_argv(host: Host) -> list[str]:
    own = Disk(host.name)
    binds = [f"--bind-ro={own.lab}:/etc/lab"]
    if host == topology.site():
        SITE_LOG.mkdir(parents=True, exist_ok=True)
        SITE_ROOT.mkdir(parents=True, exist_ok=True)
        binds += [
            f"--bind-ro={SITE_ROOT}:{disk.SITE_ROOT_INSIDE}",
            f"--bind={SITE_LOG}:{disk.SITE_LOG_INSIDE}",
        ]
    return [
        "systemd-nspawn",
        "--boot",
        "--quiet",
        f"--directory={own.merged}",
        f"--machine={_machine(host.name)}",
        f"--hostname={host.name}",
        f"--network-namespace-path={network.namespace_path(host.name)}",
        # Neither machined nor a systemd of this machine is needed.
        "--register=no",
        "--keep-unit",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--console=pipe",
        f"--capability={','.join(CAPABILITIES)}",
        f"--system-call-filter={' '.join(SYSTEM_CALLS)}",
        *binds,
    ]


def _make_new(name: str) -> None:
    """Switch a host off at once and throw away its disk, hardware and misbehaviour."""
    _cut_power(name)
    own = Disk(name)
    own.discard()
    shutil.rmtree(own.lab, ignore_errors=True)


def _machine(name: str) -> str:
    return f"{network.SWITCH}-{name}"


def _switch_off(name: str) -> None:
    """Power a host off, in good order if it still can, and remove what it had on this machine."""
    supervisor = supervisors().get(name)
    if supervisor is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGTERM)
        with contextlib.suppress(LabError):
            _wait(lambda: not cgroups.supervised(name), POWER_OFF_TIMEOUT_S, "")
    _cut_power(name)


def _cut_power(name: str) -> None:
    supervisor = supervisors().get(name)
    if supervisor is not None:
        # First, so that it does not boot the host again; it may not be in the cgroup yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGKILL)
        _wait(lambda: name not in supervisors(), POWER_OFF_TIMEOUT_S, f"{name}: does not die")
    _remove_traces(name)


def _remove_traces(name: str) -> None:
    """Remove what a host without supervisor has left on this machine, all but its disk."""
    cgroups.kill(name)
    network.disconnect(name)
    cgroups.remove(name)
    # systemd-nspawn's own, left if it was killed.
    with contextlib.suppress(OSError):
        Path("/run/systemd/nspawn/propagate", _machine(name)).rmdir()


def _clean_up(wanted: Collection[str], progress: Progress) -> None:
    """Remove hosts that are not to run, and what is left of hosts that no longer do."""
    surplus = supervisors().keys() - set(wanted)
    if surplus:
        progress(f"powering off {', '.join(sorted(surplus))}, which the topology no longer has")
        _each(surplus, _switch_off)
    stray = _traces() - supervisors().keys()
    if stray:
        progress(f"removing what a lab that crashed left of {', '.join(sorted(stray))}")
        _each(stray, _remove_traces)


def _keep_running(host: Host, lower: Path, progress: Progress) -> bool:
    """Whether a host runs and can stay so; gives it the lab's current files if it does."""
    if host.name not in supervisors():
        return False
    # It may be just between two boots.
    with contextlib.suppress(LabError):
        _wait(lambda: _leader(host.name) is not None, LEADER_TIMEOUT_S, "")
    leader = _leader(host.name)
    if leader is None:
        _cut_power(host.name)
        return False
    if not network.connected(host.name):
        progress(f"{host.name}: has lost its network and is booted again")
        _switch_off(host.name)
        return False
    own = Disk(host.name)
    files = disk.lab_files(host)
    if own.files_digest() != disk.digest(files):
        _renew_files(leader, files)
        own.remember(host, BASE / (own.base() or lower.name), files)
    if own.base() != lower.name:
        progress(f"{host.name}: runs on an older base system; `lab reset {host.name}` renews it")
    return True


def _renew_files(leader: int, files: dict[str, disk.File]) -> None:
    """Give a running host those of the lab's files that it has not, not by ssh but from outside.

    It may well be the key by which ssh would let us in that has changed.
    """
    inside = ["nsenter", f"--target={leader}", "--all", "--"]
    changed = set()
    for path, file in files.items():
        if attempt([*inside, "cmp", "--quiet", "-", f"/{path}"], stdin=file.text).returncode:
            install = ["install", "-D", f"--mode={file.mode:o}", "/dev/stdin", f"/{path}"]
            run([*inside, *install], stdin=file.text)
            changed.add(path)
    if changed & disk.SITE_FILES:
        run([*inside, "systemctl", "daemon-reload"])
        run([*inside, "systemctl", "restart", Path(disk.SITE_UNIT).name])


def _wait_until_ready(host: Host, booting: int) -> None:
    """Wait until a host lets the control machine in and has done what it does at boot.

    booting: how many hosts boot at the same time as this one, 0 if it runs already
    """
    timeout_s = BOOT_TIMEOUT_S + BOOT_TIMEOUT_PER_HOST_S * booting
    own = Disk(host.name)

    next_look = time.monotonic()

    def answers() -> bool:
        nonlocal next_look
        if _listens(host.name):
            return True
        # Looking through all processes is not for every poll of many hosts.
        if time.monotonic() > next_look and host.name not in supervisors():
            said = own.console.read_text(encoding="utf-8", errors="replace").splitlines()
            last_words = said[-1] if said else "nothing"
            raise LabError(f"{host.name}: ended while booting, saying {last_words!r}")
        next_look = max(next_look, time.monotonic() + 1.0)
        return False

    _wait(answers, timeout_s, f"{host.name}: no ssh after {timeout_s:g} s; see {own.console}")
    if host == topology.site():
        serves = f"{host.name}: serves nothing; see `lab ssh {host.name} journalctl -u lab-site`"
        _wait(lambda: _listens(host.name, disk.SITE_PORT), timeout_s, serves)
    # A unit that takes minutes, such as a model server, is not waited for.
    settled = "timeout 15 systemctl is-system-running --wait || true"
    ssh(host.name, settled if booting else "true", check=True, timeout_s=timeout_s)


def _listens(name: str, port: int = SSH_PORT) -> bool:
    """Whether a host's sshd, or another server, takes connections.

    Seen from outside: a connection that only looks leaves an error in sshd's journal.
    """
    leader = _leader(name)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{leader}/net/tcp").read_text(encoding="utf-8").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if local.endswith(f":{port:04X}") and state == TCP_LISTEN:
                return True
    return False


def _remove_old_bases(lower: Path) -> None:
    used = {Disk(name).base() for name in disk.known()} | {lower.name}
    for directory in BASE.iterdir():
        if directory.name not in used:
            shutil.rmtree(directory)


def _write_client_configuration() -> None:
    """What the control machine needs: ssh's own files, and the public key of the site's packages."""
    keys.write_client_configuration(_all_hosts())
    if SITE_KEY.exists():
        shutil.copyfile(SITE_KEY, CONTROL / SITE_KEY.name)


# -- what there is -------------------------------------------------------------------------------


def _topology_hosts() -> tuple[Host, ...]:
    try:
        return topology.hosts()
    except ValueError as error:
        raise LabError(str(error)) from error


def _all_hosts() -> list[Host]:
    """The topology's hosts and those that were there before it changed."""
    current = {host.name: host for host in (topology.site(), *_topology_hosts())}
    former = [Disk(name).recorded_host() for name in disk.known() if name not in current]
    return [*current.values(), *(host for host in former if host is not None)]


def _host(name: str) -> Host:
    hosts = {host.name: host for host in _all_hosts()}
    if name not in hosts:
        raise LabError(f"{name}: no such host in the lab; it has {', '.join(hosts)}")
    return hosts[name]


def _traces() -> set[str]:
    """Names of all hosts that have anything on this machine beside their disks."""
    return {*supervisors(), *cgroups.hosts(), *network.hosts()}


def supervisors() -> dict[str, int]:
    """Process ids of the supervisors that run, by host."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")[:-1]
            if argv[-2:-1] == [str(_SUPERVISOR)] and argv[-1].startswith(f"{HOSTS}/"):
                found[Path(argv[-1]).parent.name] = int(entry.name)
    return found


def _leader(name: str) -> int | None:
    """Process id, on this machine, of a running host's PID 1."""
    with contextlib.suppress(OSError, ValueError):
        nspawn = int(Disk(name).nspawn_pid.read_text(encoding="utf-8"))
        argv = Path(f"/proc/{nspawn}/cmdline").read_text(encoding="utf-8").split("\0")
        # The number may have become another process's since.
        if f"--machine={_machine(name)}" in argv:
            return next((pid for pid in _children(nspawn) if _inner_pid(pid) == 1), None)
    return None


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _inner_pid(pid: int) -> int:
    """A process's id in the innermost PID namespace that it is in."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid


def _status(host: Host, supervisor: int | None) -> HostStatus:
    leader = _leader(host.name)
    if supervisor:
        state = "up" if _listens(host.name) else "booting"
    else:
        state = "crashed" if cgroups.processes(host.name) else "off"
    behaves = not (Disk(host.name).lab / "vllm.json").exists()
    return HostStatus(host, state, _uptime_s(leader) if leader else None, _hardware(host), behaves)


def _hardware(host: Host) -> Hardware:
    directory = Disk(host.name).lab
    if not (directory / "hardware.json").exists():
        return hardware.default(host.group)
    return hardware.read(directory)


def _uptime_s(pid: int) -> float | None:
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        started_ticks = int(after_name.split()[19])
        machine_s = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        return max(0.0, machine_s - started_ticks / os.sysconf("SC_CLK_TCK"))
    return None


# -- helpers -------------------------------------------------------------------------------------


def _each(items: Collection[Any], action: Callable[[Any], None]) -> None:
    """Do something with all items at once; all are tried, then the first error is raised."""
    if not items:
        return
    with ThreadPoolExecutor(max_workers=len(items)) as pool:
        outcomes = [pool.submit(action, item) for item in items]
    for outcome in outcomes:
        outcome.result()


def _wait(condition: Callable[[], bool], timeout_s: float, message: str) -> None:
    """Wait until a condition holds. Raises LabError with the message if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(message)
        time.sleep(POLL_S)


@contextlib.contextmanager
def _exclusive(progress: Progress) -> Iterator[None]:
    """Let one command at a time change the lab; others wait."""
    check_machine()
    with _plain_file_modes():
        STATE.mkdir(parents=True, exist_ok=True)
        with (STATE / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("another lab command is at work; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def _plain_file_modes() -> Iterator[None]:
    """Files that hosts read are readable to their users, whatever this user's umask."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
