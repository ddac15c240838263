"""The command: `python -m bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import BenchError, chart, machine, ours, report, results
from bench.ansible import VARIANTS, Ansible, Variant, check_same_state
from bench.labhosts import Fleet, borrowed_host, busy_share, gpu_hosts
from bench.measuring import Meter, Series
from bench.results import Part, Results
from fleet import inventory
from fleet.errors import SiteError
from lab import LabError, hosts
from lab.paths import REPOSITORY
from lab.process import Progress

FOLDER = REPOSITORY / ".bench"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
PICTURE = PAGE.with_name(report.PICTURE)

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    host_counts: Annotated[
        str, typer.Option("--hosts", metavar="N,N,…", help="Numbers of hosts to measure with.")
    ] = "1,4,20",
    quick: Annotated[
        bool,
        typer.Option(help="One host and few repetitions; prints, and leaves docs/ as it is."),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Measure with this host of a lab that is up, and touch no other; as --quick.",
        ),
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Only write docs/ again from these results."),
    ] = None,
) -> None:
    """Measure roll-outs on the lab against the floor and against Ansible, into docs/benchmarks.md.

    The lab's simulated hosts are made new for it, several times: what is on them is lost.
    """
    # The inventory, its group data and pyinfra's configuration are found from here.
    os.chdir(REPOSITORY)
    if again is not None:
        publish(results.load(again))
        return
    say = _progress()
    times = Times.quick() if quick or only else Times()
    counts = [1] if quick or only else _counts(host_counts)
    measured = run(counts, times, only, say)
    if quick or only:
        console.print(report.tables(measured), markup=False)
    else:
        publish(measured)
    if not only:
        hosts.down(progress=say)


class Times:
    """How often each thing is measured."""

    def __init__(self, floor: int = 5, no_op: int = 5, ansible_no_op: int = 3) -> None:
        self.floor = floor
        self.no_op = no_op
        self.ansible_no_op = ansible_no_op

    @classmethod
    def quick(cls) -> Times:
        return cls(floor=3, no_op=3, ansible_no_op=1)


def run(counts: list[int], times: Times, only: str | None, say: Progress) -> Results:
    """Everything, for each number of hosts; what there is is saved after each."""
    FOLDER.mkdir(exist_ok=True)
    # Nothing in it is anybody else's: neither git's nor the linters'.
    (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
    ansible = Ansible(FOLDER)
    ansible.install(say)
    now = datetime.now(timezone.utc)
    busy = busy_share(3.0)
    measured = Results(
        date=now.isoformat(timespec="seconds"),
        commit=machine.commit(),
        machine={**machine.machine(), "busy before": f"{busy:.0%}"},
        versions={**machine.versions(), **ansible.versions()},
    )
    file = FOLDER / f"results-{now:%Y-%m-%dT%H%M%SZ}.json"
    for count in counts:
        fleet = borrowed_host(only) if only else gpu_hosts(count)
        part = measure(fleet, times, ansible, say)
        measured = replace(measured, parts=(*measured.parts, part))
        measured.save(file)
        say(f"kept in {file.relative_to(REPOSITORY)}")
    return measured


def measure(fleet: Fleet, times: Times, ansible: Ansible, say: Progress) -> Part:
    """Ours on new hosts, the floor on the hosts that it leaves, then each Ansible on new ones."""
    folder = FOLDER / f"{len(fleet.names)}-hosts"
    prefix = f"{len(fleet.names)} hosts: " if len(fleet.names) > 1 else "1 host: "

    def tell(line: str) -> None:
        say(prefix + line)

    meter = Meter(folder, tell, fleet.cpu_s)
    fleet.make_new(tell)
    site = inventory.load(ours.INVENTORY, limit=fleet.names, cwd=REPOSITORY)
    first, no_op = {}, {}
    tell("minimax-fleet, first: begins")
    first[results.OURS] = ours.first(meter, fleet)
    tell(f"minimax-fleet, first: {first[results.OURS].wall_s:.1f} s")
    no_op[results.OURS] = ours.no_op(meter, fleet, times.no_op)
    floor = {
        results.SSH_TRUE: ours.ssh_true(meter, fleet, times.floor),
        results.PROBE: ours.probe(meter, fleet, site, times.floor, folder / "probe"),
        results.START_UP: ours.start_up(meter, times.floor, folder),
        results.EMPTY_DEPLOY: ours.empty_deploy(meter, fleet, site, times.floor, folder / "empty"),
    }
    ansible.describe(fleet, site)
    for variant in VARIANTS:
        name = f"{results.ANSIBLE}{variant.name}"
        fleet.make_new(tell)
        ansible.give_hosts_the_apt_binding(fleet, tell)
        tell(f"{name}, first: begins")
        first[name], no_op[name] = measure_ansible(
            variant, fleet, site, times, ansible, meter, tell
        )
    return Part(len(fleet.names), floor, first, no_op)


def measure_ansible(  # noqa: PLR0913, PLR0917 - what `measure` has at hand
    variant: Variant,
    fleet: Fleet,
    site: inventory.Site,
    times: Times,
    ansible: Ansible,
    meter: Meter,
    tell: Progress,
) -> tuple[Series, Series]:
    """First roll-out and no-op of one configuration; that one does not work is a result too."""
    name = f"{results.ANSIBLE}{variant.name}"
    try:
        first = ansible.first(meter, variant)
        tell(f"{name}, first: {first.wall_s:.1f} s")
        check_same_state(fleet, site)
    except BenchError as error:
        tell(f"{name} does not work: {error}")
        return Series(error=str(error)), Series(error="the first roll-out failed")
    try:
        return first, ansible.no_op(meter, fleet, variant, times.ansible_no_op)
    except BenchError as error:
        tell(f"{name} does not work: {error}")
        return first, Series(error=str(error))


def publish(measured: Results) -> None:
    """The tables and the picture into docs/."""
    report.write(PAGE, measured)
    PICTURE.write_text(chart.svg(measured), encoding="utf-8")
    for path in (PAGE, PICTURE):
        console.print(f"written: {path.relative_to(REPOSITORY)}", markup=False)


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise BenchError(f"--hosts {text}: write numbers of hosts, such as 1,4,20")
    return sorted(set(map(int, words)))


def _progress() -> Callable[[str], None]:
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.0f} s[/]  ", end="")
        console.print(line, markup=False)

    return say


def command() -> None:
    """Entry point: what went wrong is said without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (BenchError, LabError, SiteError) as error:
        errors.print(f"bench: {error}", style="red", markup=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    command()
