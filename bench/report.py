"""The tables of docs/benchmarks.md, from results; what is between its markers is written here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import BenchError
from bench.measuring import Series
from bench.results import OURS, Part, Results

BEGIN = "<!-- measured: written by `make bench` -->"
END = "<!-- end of what was measured -->"

PICTURE = "bench.svg"
"""As the page names it, beside which it lies."""

NONE = "–"


def write(page: Path, results: Results) -> None:
    """Put the tables between the markers of a page.

    Raises BenchError if it has none.
    """
    text = page.read_text(encoding="utf-8")
    page.write_text(replaced(text, tables(results)), encoding="utf-8")


def replaced(text: str, tables_text: str) -> str:
    """A page's text with other tables between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"docs/benchmarks.md: the markers are missing: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{tables_text}\n{END}{after}"


def tables(results: Results) -> str:
    """All tables, as Markdown."""
    return "\n".join(
        [
            *_conditions(results),
            f"![Wall seconds of runs that have nothing to do]({PICTURE})\n",
            "### Goals\n",
            *_goals(results),
            "### Nothing to do: the same command again\n",
            *_no_ops(results),
            "### First roll-out, to new hosts\n",
            *_firsts(results),
            "### The floor\n",
            *_floors(results),
            *_errors(results),
        ]
    )


def _conditions(results: Results) -> Iterator[str]:
    commit = f", commit {results.commit}" if results.commit else ""
    yield f"Measured on {results.date[:10]}{commit}.\n"
    rows = {**results.machine, **results.versions}
    yield from _table(("", ""), list(rows.items()))


def _goals(results: Results) -> Iterator[str]:
    rows = [
        (
            str(goal.hosts),
            goal.what,
            NONE if goal.ratio is None else f"{goal.ratio:.2f}",
            f"≤ {goal.limit:g}",
            {True: "met", False: "**not met**", None: "not measured"}[goal.met],
        )
        for goal in results.goals()
    ]
    yield from _table(("hosts", "ratio of medians", "measured", "goal", ""), rows)


def _no_ops(results: Results) -> Iterator[str]:
    rows = []
    for part in results.parts:
        best = part.best_of_ansible(part.no_op)
        for name, series in part.no_op.items():
            if series.samples:
                rows.append(
                    (
                        str(part.hosts),
                        _emphasised(name),
                        *_wall(series),
                        f"{series.wall_s / part.least_s:.1f}",
                        f"{series.wall_s / best[1]:.2f}" if best else NONE,
                        *_cost(series),
                        NONE if series.sessions is None else f"{series.sessions:.3g}",
                    )
                )
    headers = ("÷ floor", "÷ Ansible's best", *COST, "ssh sessions per host")
    yield from _table(("hosts", "", *WALL, *headers), rows)


def _firsts(results: Results) -> Iterator[str]:
    rows = []
    for part in results.parts:
        best = part.best_of_ansible(part.first)
        for name, series in part.first.items():
            if series.samples:
                rows.append(
                    (
                        str(part.hosts),
                        _emphasised(name),
                        f"{series.wall_s:.1f}",
                        f"{series.wall_s / best[1]:.2f}" if best else NONE,
                        *_cost(series),
                    )
                )
    yield from _table(("hosts", "", "wall s", "÷ Ansible's best", *COST), rows)


def _floors(results: Results) -> Iterator[str]:
    rows = [
        (str(part.hosts), name, *_wall(series), *_cost(series))
        for part in results.parts
        for name, series in part.floor.items()
    ]
    yield from _table(("hosts", "", *WALL, *COST), rows)


def _errors(results: Results) -> Iterator[str]:
    """What could not be measured, and why."""
    failed = [
        f"- {part.hosts} hosts, {name}, {phase}: {(series.error or '').splitlines()[0]}"
        for part in results.parts
        for phase, by_name in _phases(part).items()
        for name, series in by_name.items()
        if series.error
    ]
    if failed:
        yield from ("### Not measured\n", *failed, "")


def _phases(part: Part) -> dict[str, Mapping[str, Series]]:
    return {"first roll-out": part.first, "no-op": part.no_op}


WALL = ("wall s, median", "least–most", "runs")
COST = ("CPU s, control", "CPU s, hosts", "MiB, control")


def _wall(series: Series) -> tuple[str, str, str]:
    return (
        f"{series.wall_s:.2f}",
        f"{series.fastest_s:.2f}–{series.slowest_s:.2f}",
        str(len(series.samples)),
    )


def _cost(series: Series) -> tuple[str, str, str]:
    hosts = series.hosts_cpu_s
    return (
        f"{series.cpu_s:.2f}",
        NONE if hosts is None else f"{hosts:.2f}",
        f"{series.peak_mib:.0f}",
    )


def _emphasised(name: str) -> str:
    return f"**{name}**" if name == OURS else name


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headers)} |"
    yield f"|{'---|' * len(headers)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
