"""The command: `python -m bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import BenchError, chart, report, results
from bench.labhosts import borrowed_host, gpu_hosts
from bench.results import Results
from bench.running import QUICK, THOROUGH, Benchmark
from fleet.errors import SiteError
from lab import LabError, hosts
from lab.paths import REPOSITORY

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
    minutes: Annotated[
        int,
        typer.Option(help="Leave out what would not have ended so long after the start."),
    ] = 45,
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
    times = QUICK if quick or only else THOROUGH
    counts = [1] if quick or only else _counts(host_counts)
    fleets = [borrowed_host(only)] if only else map(gpu_hosts, counts)
    measured = Benchmark(times, minutes * 60.0, say).run(fleets)
    if quick or only:
        console.print(report.tables(measured), markup=False)
    else:
        publish(measured)
    if not only:
        hosts.down(progress=say)


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
