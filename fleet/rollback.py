"""What a host goes back to: its history, as the host tells it, and what a person asks for. Pure.

The history is that of files/fleet_host.py: what served here, newest first, each with what it lacks to
serve again. What a host goes back to by itself is the host's own judgement (`way_back` there); a release
that is asked for by name is looked up here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

Generation = Mapping[str, Any]
"""Services and proxy that passed the gate together: see `generation` of files/fleet_host.py."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a rollback does on one host: `said` is a line for a person where nothing is wrong."""

    generation: Generation | None = None
    problems: tuple[str, ...] = ()
    said: str = ""

    @property
    def needed(self) -> bool:
        """Is there anything to cut over?"""
        return self.generation is not None and bool(self.generation["differs"])

    @property
    def request(self) -> dict[str, Any]:
        """What the host is told."""
        return {"generation": self.generation["id"] if self.generation else None}


def choose(history: Mapping[str, Any], wanted: str | None) -> Choice:
    """What this host goes back to; `wanted` is a release or a version, None for what served before."""
    generations: Sequence[Generation] = history["generations"]
    if not generations:
        return Choice(said="nothing has served here yet, so there is nothing to go back from")
    if wanted is None:
        target = next((one for one in generations if one["id"] == history["way_back"]), None)
        if target is None:
            return Choice(problems=(_no_way_back(generations),))
    else:
        found = [one for one in generations if wanted in names(one)]
        releases = sorted({name for one in found for name in releases_of(one)})
        if not found or len(releases) > len(releases_of(found[0])):
            return Choice(problems=(_not_one(wanted, releases, generations),))
        target = found[0]
    what = ", ".join(releases_of(target))
    if not target["differs"]:
        return Choice(generation=target, said=f"serves {what} already{_since(history, target)}")
    if target["missing"]:
        return Choice(
            problems=(
                f"{what} cannot serve again: {', '.join(target['missing'])} is gone; change group data "
                "back and roll out (deploy.py), which brings it again",
            )
        )
    return Choice(generation=target, said=f"goes back to {what}, which passed {when(target)}")


def _no_way_back(generations: Sequence[Generation]) -> str:
    return (
        f"nothing served here before {', '.join(releases_of(generations[0]))}; leave this host out "
        "(--exclude), or roll out other group data"
    )


def _not_one(wanted: str, releases: Sequence[str], generations: Sequence[Generation]) -> str:
    if releases:
        return f"--data to={wanted}: that is {' and '.join(releases)}; give one in full"
    known = dict.fromkeys(name for one in generations for name in releases_of(one))
    return f"--data to={wanted}: no such release has served here; {', '.join(known)} did"


def _since(history: Mapping[str, Any], target: Generation) -> str:
    back = rolled_back(history)
    return f"; it was {back}" if back and target is history["generations"][0] else ""


def names(generation: Generation) -> set[str]:
    """By what a generation may be asked for: its id, its releases, and the version that they are of."""
    versions = {str(made["vllm"]) for made in generation["services"].values()}
    return {generation["id"], *releases_of(generation), *versions}


def releases_of(generation: Generation) -> list[str]:
    """Names of the releases that its services run from."""
    paths = (made["release"] for made in generation["services"].values())
    return sorted({PurePosixPath(path or "unknown").name for path in paths}) or ["no service"]


def rolled_back(history: Mapping[str, Any]) -> str | None:
    """`rolled back from …` where this host went back from what the last roll-out brought."""
    for one in history["generations"][1:]:
        if one["id"] == history["aim"] and "withdrawn_at" in one:
            return f"rolled back from {', '.join(releases_of(one))} at {_time(one['withdrawn_at'])}"
    return None


def rows(host: str, history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each generation of a host, newest first, as `fleet history` shows it."""
    return [
        {
            "host": host,
            "generation": one["id"],
            "release": ", ".join(releases_of(one)),
            "services": ", ".join(sorted(one["services"])),
            "revisions": ", ".join(
                sorted({str(s["revision"])[:12] for s in one["services"].values()})
            ),
            "passed": _time(one["passed_at"]) if one["passed_at"] else "",
            "state": _state(history, one),
            "missing": one["missing"],
        }
        for one in history["generations"]
    ]


def _state(history: Mapping[str, Any], one: Generation) -> str:
    said = []
    if not one["differs"]:
        said.append("serves")
    elif one["id"] == history["way_back"]:
        said.append("the way back")
    if "withdrawn_at" in one:
        said.append(f"gone back from at {_time(one['withdrawn_at'])}")
    if one["missing"]:
        said.append(f"cannot serve again: {', '.join(one['missing'])} is gone")
    return "; ".join(said)


def when(generation: Generation) -> str:
    """When it passed the gate, for a person."""
    at = generation["passed_at"]
    return f"at {_time(at)}" if at else "before there was a history"


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
