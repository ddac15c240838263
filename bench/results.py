"""What was measured, on what, and what follows from it. Kept as JSON, so that a report can be remade."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.measuring import Sample, Series

SSH_TRUE = "`ssh HOST true`"
PROBE = "probe alone"
START_UP = "`pyinfra --version`"
EMPTY_DEPLOY = "pyinfra, empty deploy"
ANSWERS = "chat completion of every service"
OURS = "minimax-fleet"
ANSIBLE = "Ansible, "

FLOOR_GOAL = 2.0
ANSIBLE_GOAL = 0.1


@dataclass(frozen=True)
class Part:
    """All that was measured with one number of hosts, by who was measured."""

    hosts: int
    floor: Mapping[str, Series]
    first: Mapping[str, Series]
    no_op: Mapping[str, Series]

    @property
    def least_s(self) -> float:
        """What a run of pyinfra that looks at each host once takes at least: start-up, then probe."""
        return self.floor[START_UP].wall_s + self.floor[PROBE].wall_s

    def best_of_ansible(self, phase: Mapping[str, Series]) -> tuple[str, float] | None:
        """Ansible's quickest configuration of a phase, and its seconds; None where none worked."""
        times = {
            name: series.wall_s
            for name, series in phase.items()
            if name.startswith(ANSIBLE) and series.samples
        }
        return min(times.items(), key=lambda item: item[1]) if times else None


@dataclass(frozen=True)
class Goal:
    """A goal, what came of it, and the most that it may be. `ratio` is None if it was not measured."""

    hosts: int
    what: str
    limit: float
    ratio: float | None

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.limit


@dataclass(frozen=True)
class Results:
    """One run of the benchmark.

    date: ISO 8601, UTC
    commit: of this repository, with a plus sign where files differ from it; None outside git
    machine, versions: name to value, for a person
    """

    date: str
    commit: str | None
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    parts: tuple[Part, ...] = field(default=())

    def goals(self) -> Iterator[Goal]:
        """The goals for each number of hosts."""
        for part in self.parts:
            if OURS not in part.no_op:
                continue
            no_op_s = part.no_op[OURS].wall_s
            what = f"no-op ÷ ({PROBE} + {START_UP})"
            yield Goal(part.hosts, what, FLOOR_GOAL, no_op_s / part.least_s)
            best = part.best_of_ansible(part.no_op)
            what = "no-op ÷ Ansible's best no-op"
            yield Goal(part.hosts, what, ANSIBLE_GOAL, no_op_s / best[1] if best else None)

    def predicted_s(self, phase: str, name: str, hosts: int) -> float:
        """Wall seconds that a series will take with more hosts, if it takes as long for each of them.

        phase: `first` or `no_op`

        0 where it has not been measured yet.
        """
        for part in reversed(self.parts):
            series: Series | None = getattr(part, phase).get(name)
            if series is not None and series.samples:
                return series.wall_s * hosts / part.hosts
        return 0.0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Results:
    """Results as they were saved."""
    document = json.loads(path.read_text(encoding="utf-8"))
    parts = tuple(
        Part(part["hosts"], *(_phase(part[name]) for name in ("floor", "first", "no_op")))
        for part in document.pop("parts")
    )
    return Results(**document, parts=parts)


def _phase(document: Mapping[str, Any]) -> dict[str, Series]:
    return {
        name: Series(
            tuple(Sample(**sample) for sample in series["samples"]),
            series["sessions"],
            series["error"],
        )
        for name, series in document.items()
    }
