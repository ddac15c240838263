"""The lab's hosts as the benchmark needs them: made new, idle, with what they did counted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import BenchError
from lab import cgroups, hosts, topology
from lab.process import Progress

# sshd says at this level, and at no lower one, which sessions it starts.
VERBOSE = "/etc/ssh/sshd_config.d/99-count.conf"
SESSION = re.compile(r"Starting session: (?:command|subsystem|shell)")
IDLE_SHARE = 0.15
SETTLE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Fleet:
    """The simulated 8-GPU hosts of one part of the benchmark.

    names: in the inventory's order
    borrowed: others use this lab too: only these hosts are made new, and no others come or go
    """

    names: tuple[str, ...]
    borrowed: bool = False

    @property
    def limit(self) -> tuple[str, ...]:
        """Arguments by which pyinfra takes these hosts of the inventory."""
        if not self.borrowed:
            return ()
        return tuple(word for name in self.names for word in ("--limit", name))

    def make_new(self, progress: Progress) -> None:
        """Hosts as they are before anything was ever installed, booted, and come to rest."""
        if self.borrowed:
            for name in self.names:
                hosts.reset(name, progress=progress)
        else:
            hosts.up(len(self.names), fresh=True, progress=progress)
        settle(progress)

    def cpu_s(self) -> float | None:
        """CPU seconds that these hosts have used since they were switched on."""
        used = [_cpu_s(name) for name in self.names]
        return None if None in used else sum(seconds for seconds in used if seconds is not None)

    @contextmanager
    def counting_sessions(self) -> Iterator[list[int]]:
        """Counts the ssh sessions that the first host sees in the block, into the list."""
        host = self.names[0]
        hosts.write_file(host, VERBOSE, "LogLevel VERBOSE\n")
        hosts.ssh(host, "systemctl reload ssh", check=True)
        time.sleep(1)  # for sshd to have read it
        since = hosts.ssh(host, "date +%s.%N", check=True).stdout.strip()
        count: list[int] = []
        yield count
        journal = f"journalctl -u ssh -o cat --since @{since}"
        log = hosts.ssh(host, journal, check=True).stdout
        hosts.ssh(host, f"rm {VERBOSE} && systemctl reload ssh", check=True)
        count.append(count_sessions(log) - 1)  # reading the journal is one


def gpu_hosts(count: int) -> Fleet:
    """The lab's first hosts; from now on in this process and its children it has no others."""
    os.environ["LAB_HOSTS"] = str(count)
    os.environ["LAB_CPU"] = "0"
    return Fleet(tuple(host.name for host in topology.hosts()))


def borrowed_host(name: str) -> Fleet:
    """One host of a lab that is up and that others use.

    Raises BenchError if the lab has no such host.
    """
    known = [host.name for host in topology.hosts() if host.group == "h20"]
    if name not in known:
        raise BenchError(f"--only {name}: no such simulated GPU host; there are {', '.join(known)}")
    return Fleet((name,), borrowed=True)


def on_each(names: Sequence[str], command: str, *, stdin: str = "") -> None:
    """A shell command on several hosts at once, none of which may fail."""
    with ThreadPoolExecutor(len(names)) as pool:
        done = [pool.submit(hosts.ssh, name, command, check=True, stdin=stdin) for name in names]
    for one in done:
        one.result()


def count_sessions(log: str) -> int:
    """Sessions that a log of sshd at level VERBOSE tells of."""
    return len(SESSION.findall(log))


def settle(progress: Progress) -> None:
    """Wait until this machine is nearly idle, or for half a minute."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while (busy := busy_share(1.0)) > IDLE_SHARE:
        if time.monotonic() > deadline:
            progress(f"this machine is still {busy:.0%} busy; measuring all the same")
            return


def busy_share(seconds: float) -> float:
    """The share of this machine's processors that was busy for some seconds from now."""

    def ticks() -> tuple[int, int]:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
        user, nice, system, idle, iowait, *rest = map(int, first.split()[1:9])
        return user + nice + system + sum(rest), idle + iowait

    before = ticks()
    time.sleep(seconds)
    busy, idle = (after - start for after, start in zip(ticks(), before, strict=True))
    return busy / max(1, busy + idle)


def _cpu_s(host: str) -> float | None:
    """CPU seconds of everything in a host's cgroup, whichever version of cgroups counts them."""
    for mount_point in cgroups.hierarchies():
        group = mount_point / cgroups.ROOT_NAME / host
        if (group / "cpuacct.usage").is_file():
            return int((group / "cpuacct.usage").read_text(encoding="utf-8")) / 1e9
    for mount_point in cgroups.hierarchies():
        statistics = mount_point / cgroups.ROOT_NAME / host / "cpu.stat"
        if statistics.is_file():
            words = dict(map(str.split, statistics.read_text(encoding="utf-8").splitlines()))
            if "usage_usec" in words:
                return int(words["usage_usec"]) / 1e6
    return None
