"""Runs commands at once and says what they took: a process of its own, for an account of its own.

    python -I meter.py < specification.json > account.json

Everything that a command starts is counted, also what leaves its process group and lives on (such as
ssh's master for shared connections): this process is the subreaper of all of it, and ends what is
left. So the next measurement starts without warm connections. Standard library only.

specification: {"commands": [{"argv": [...], "stdin": path, "log": path}, ...], "limit_s": seconds}
account: {"wall_s", "cpu_s", "peak_mib", "exit_codes": [...], "timed_out": true or false}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0
# The sampler may take this share of one core, so that large process trees are not slowed by it.
SAMPLER_SHARE = 0.02
SAMPLE_EVERY_S = 0.1
INTERRUPTED = 130


class LimitError(Exception):
    """The commands took longer than they may."""


class Account:
    """What was used by the processes that have ended."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.exit_codes: dict[int, int] = {}

    def reap(self, options: int = 0) -> int:
        """Wait for one child; its pid, 0 where none has ended yet."""
        pid, status, usage = os.wait4(-1, options)
        if pid:
            # Of the child and of all that it has waited for itself.
            self.cpu_s += usage.ru_utime + usage.ru_stime
            self.exit_codes[pid] = os.waitstatus_to_exitcode(status)
        return pid


class MemorySampler(threading.Thread):
    """The most memory that all descendants had at one time, each shared page counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_kib = 0
        self._ended = threading.Event()

    def run(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            began = time.thread_time()
            self.peak_kib = max(self.peak_kib, sum(map(proportional_kib, descendants(os.getpid()))))
            pause = max(SAMPLE_EVERY_S, (time.thread_time() - began) / SAMPLER_SHARE)

    def end(self) -> None:
        self._ended.set()
        self.join()


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """Run the commands to their ends, or to the limit; then end what they have left."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    account, sampler = Account(), MemorySampler()
    signal.signal(signal.SIGALRM, _limit_reached)
    signal.alarm(int(specification["limit_s"]))
    timed_out = False
    sampler.start()
    began = time.monotonic()
    try:
        pids = [start(command) for command in specification["commands"]]
        while any(pid not in account.exit_codes for pid in pids):
            account.reap()
    except LimitError:
        timed_out = True
    finally:
        wall_s = time.monotonic() - began
        signal.alarm(0)
        sampler.end()
        end_the_rest(account)
    return {
        "wall_s": wall_s,
        "cpu_s": account.cpu_s,
        "peak_mib": sampler.peak_kib / 1024,
        "exit_codes": [] if timed_out else [account.exit_codes[pid] for pid in pids],
        "timed_out": timed_out,
    }


def start(command: dict[str, Any]) -> int:
    """The pid of a command, started with its input from a file and its output to one."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        command["argv"][0],
        command["argv"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, command["stdin"] or os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, command["log"], append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )


def end_the_rest(account: Account) -> None:
    """End every descendant that still runs, in good order if it can, and count what it used."""
    deadline = time.monotonic() + GRACE_S
    asked: set[int] = set()
    while True:
        # Whatever ends hands its children over to this process, so there may be new ones each time.
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    asked.add(pid)
                    os.kill(pid, signal.SIGTERM)
        try:
            if not account.reap(os.WNOHANG):
                time.sleep(0.01)
        except ChildProcessError:
            return


def descendants(pid: int) -> list[int]:
    """Pids of all processes below one, without it."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, thread.read_text().split()):
                found += [child, *descendants(child)]
    return found


def proportional_kib(pid: int) -> int:
    """A process's memory, shared pages in proportion (PSS), in KiB; 0 for one that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def _limit_reached(_signal: int, _frame: object) -> None:
    raise LimitError


if __name__ == "__main__":
    try:
        json.dump(measure(json.load(sys.stdin)), sys.stdout)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
