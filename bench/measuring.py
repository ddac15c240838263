"""Measurements as the rest of the benchmark takes them: a sample, and a series of samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import BenchError
from lab.process import Progress

METER = Path(__file__).with_name("meter.py")
# Development machines may set it; Python then compiles all that it imports at every start.
UNWANTED = "PYTHONDONTWRITEBYTECODE"
LIMIT_S = 1800.0
SAY_EVERY_S = 20.0
LAST_WORDS = 12


@dataclass(frozen=True)
class Command:
    """A program with its arguments, a file for its standard input, and one for its output if it is
    not to go where that of the whole run goes."""

    argv: Sequence[str | Path]
    stdin: Path | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Sample:
    """What one run took.

    wall_s: from the start of the first command to the end of the last
    cpu_s: of the control machine's processes, all that the commands started
    peak_mib: most memory of these processes at one time, shared pages counted once
    hosts_cpu_s: of everything in the lab's hosts meanwhile; None where that cannot be told apart
    """

    wall_s: float
    cpu_s: float
    peak_mib: float
    hosts_cpu_s: float | None


@dataclass(frozen=True)
class Series:
    """Repetitions of one run. `sessions` is ssh sessions per host and run, where they were counted."""

    samples: tuple[Sample, ...] = field(default=())
    sessions: float | None = None
    error: str | None = None

    @property
    def wall_s(self) -> float:
        """Median of the wall seconds."""
        return median(sample.wall_s for sample in self.samples)

    @property
    def fastest_s(self) -> float:
        return min(sample.wall_s for sample in self.samples)

    @property
    def slowest_s(self) -> float:
        return max(sample.wall_s for sample in self.samples)

    @property
    def cpu_s(self) -> float:
        """Median of the control machine's CPU seconds."""
        return median(sample.cpu_s for sample in self.samples)

    @property
    def peak_mib(self) -> float:
        return max(sample.peak_mib for sample in self.samples)

    @property
    def hosts_cpu_s(self) -> float | None:
        """Median of the hosts' CPU seconds."""
        used = [sample.hosts_cpu_s for sample in self.samples if sample.hosts_cpu_s is not None]
        return median(used) if used else None


def shown(path: Path) -> str:
    """A path as a person at this place would write it."""
    return os.path.relpath(path)


class Meter:
    """Runs commands, accounts for them, and says that it is at work while that takes long.

    folder: where the output of each run is kept
    hosts_cpu_s: CPU seconds that the hosts have used up to now, None where that is not known
    """

    def __init__(
        self, folder: Path, progress: Progress, hosts_cpu_s: Callable[[], float | None]
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._hosts_cpu_s = hosts_cpu_s

    def log(self, name: str) -> Path:
        """Where the output of a run of this name goes."""
        return self._folder / f"{name}.log"

    def run(
        self,
        name: str,
        commands: Sequence[Command],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        limit_s: float = LIMIT_S,
    ) -> Sample:
        """Commands run at once, to the end of the last.

        Raises BenchError, with the last lines of their output, if one fails or takes too long.
        """
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        specification = {
            "commands": [
                {
                    "argv": [str(word) for word in command.argv],
                    "stdin": str(command.stdin) if command.stdin else None,
                    "log": str(command.output or log),
                }
                for command in commands
            ],
            "limit_s": limit_s,
        }
        hosts_before = self._hosts_cpu_s()
        environment = {**os.environ, **(env or {})}
        environment.pop(UNWANTED, None)
        account = self._account(name, specification, cwd, environment)
        hosts_after = self._hosts_cpu_s()
        if account["timed_out"] or any(account["exit_codes"]):
            how = f"not done after {limit_s:g} s" if account["timed_out"] else "failed"
            said = log.read_text(errors="replace").splitlines() if log.exists() else []
            raise BenchError("\n".join([f"{name}: {how}; see {shown(log)}", *said[-LAST_WORDS:]]))
        self._progress(f"{name}: {account['wall_s']:.2f} s")
        return Sample(
            wall_s=account["wall_s"],
            cpu_s=account["cpu_s"],
            peak_mib=account["peak_mib"],
            hosts_cpu_s=(
                hosts_after - hosts_before
                if hosts_before is not None and hosts_after is not None
                else None
            ),
        )

    def _account(
        self, name: str, specification: dict[str, object], cwd: Path, env: Mapping[str, str]
    ) -> dict[str, Any]:
        with subprocess.Popen(
            [sys.executable, "-I", METER],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as meter:
            began = time.monotonic()
            text: str | None = json.dumps(specification)
            while True:
                try:
                    output, _ = meter.communicate(text, timeout=SAY_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    text = None
                    self._progress(f"{name}: {time.monotonic() - began:.0f} s and going on")
        if meter.returncode:
            raise BenchError(f"{name}: the meter itself failed; see above")
        account: dict[str, Any] = json.loads(output)
        return account

    def series(  # noqa: PLR0913 - each says one thing of the series
        self,
        name: str,
        times: int,
        commands: Sequence[Command],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        at_most_s: float = LIMIT_S,
        after_each: Callable[[], None] = lambda: None,
    ) -> tuple[Sample, ...]:
        """The same run several times; fewer, but at least once, where they would take too long.

        after_each: looks at the run's output, and raises BenchError where it is not as it must be
        """
        samples: list[Sample] = []
        while len(samples) < times:
            spent_s = sum(sample.wall_s for sample in samples)
            if samples and spent_s + samples[-1].wall_s > at_most_s:
                self._progress(f"{name}: {len(samples)} of {times} runs are enough, they are long")
                break
            samples.append(self.run(name, commands, cwd=cwd, env=env))
            after_each()
        return tuple(samples)
