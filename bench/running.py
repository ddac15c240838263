"""One run of the benchmark: what is measured, in which order, how often, and what is left out."""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from bench import BenchError, machine, ours, results
from bench.ansible import VARIANTS, Ansible, Variant, check_same_state
from bench.labhosts import Fleet, busy_share
from bench.measuring import Meter, Series
from bench.results import OURS, Part, Results
from fleet import inventory
from lab.paths import REPOSITORY
from lab.process import Progress, attempt

LEFT_OUT = "left out, to end in time (--minutes)"

FOLDER = REPOSITORY / ".bench"
"""Ansible's environment, the output of each run, results; ignored by git."""


@dataclass(frozen=True)
class Times:
    """How often each thing is measured."""

    floor: int
    no_op: int
    ansible_no_op: int


THOROUGH = Times(floor=5, no_op=5, ansible_no_op=3)
QUICK = Times(floor=3, no_op=3, ansible_no_op=1)


class Benchmark:
    """A run of the benchmark.

    times: how often each thing is measured
    budget_s: seconds from now within which it is to end: of Ansible's configurations, what would take
        longer with many hosts, by what it took with fewer, is left out
    """

    def __init__(self, times: Times, budget_s: float, progress: Progress) -> None:
        self._times = times
        self._ends = time.monotonic() + budget_s
        self._progress = progress
        self._ansible = Ansible(FOLDER)
        FOLDER.mkdir(exist_ok=True)
        # Nothing in it is anybody else's: neither git's nor the linters'.
        (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")

    def run(self, fleets: Iterable[Fleet]) -> Results:
        """Everything, with few hosts first; what there is is kept in a file after each."""
        self._ansible.install(self._progress)
        compile_packages(self._progress)
        now = datetime.now(timezone.utc)
        measured = Results(
            date=now.isoformat(timespec="seconds"),
            commit=machine.commit(),
            machine={**machine.machine(), "busy before": f"{busy_share(3.0):.0%}"},
            versions={**machine.versions(), **self._ansible.versions()},
        )
        file = FOLDER / f"results-{now:%Y-%m-%dT%H%M%SZ}.json"
        for fleet in fleets:
            part = self._measure(fleet, measured)
            measured = replace(measured, parts=(*measured.parts, part))
            measured.save(file)
            self._progress(f"kept in {file.relative_to(REPOSITORY)}")
        return measured

    def _measure(self, fleet: Fleet, before: Results) -> Part:
        """Ours on new hosts, the floor on the hosts that it leaves, then each Ansible on new ones."""
        count = len(fleet.names)
        folder = FOLDER / f"{count}-hosts"
        folder.mkdir(exist_ok=True)

        def tell(line: str) -> None:
            self._progress(f"{count} host{'s' * (count > 1)}: {line}")

        meter = Meter(folder, tell, fleet.cpu_s)
        fleet.make_new(tell)
        site = inventory.load(ours.INVENTORY, limit=fleet.names)
        first = {OURS: ours.first(meter, fleet)}
        no_op = {OURS: ours.no_op(meter, fleet, self._times.no_op)}
        floor = self._floor(fleet, site, meter, folder)
        self._ansible.describe(fleet, site)
        rolled_out = False
        for variant in VARIANTS:
            title = variant.title
            first_s = before.predicted_s("first", title, count)
            no_op_s = before.predicted_s("no_op", title, count)
            if self._in_time(first_s + no_op_s):
                first[title] = self._first(variant, fleet, site, meter, tell)
                rolled_out = first[title].error is None
            else:
                first[title] = Series(error=LEFT_OUT)
            # Where there is no time for its own, the hosts that another configuration has left will do.
            if not rolled_out:
                no_op[title] = Series(error="not without a first roll-out")
            elif self._in_time(no_op_s):
                no_op[title] = self._no_op(variant, fleet, meter, tell)
            else:
                no_op[title] = Series(error=LEFT_OUT)
        return Part(count, floor, first, no_op)

    def _in_time(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._ends

    def _floor(
        self, fleet: Fleet, site: inventory.Site, meter: Meter, folder: Path
    ) -> dict[str, Series]:
        times = self._times.floor
        return {
            results.SSH_TRUE: ours.ssh_true(meter, fleet, times),
            results.PROBE: ours.probe(meter, fleet, site, times, folder / "probe"),
            results.START_UP: ours.start_up(meter, times, folder),
            results.ANSWERS: ours.answers(meter, fleet, site, times, folder),
            results.EMPTY_DEPLOY: ours.empty_deploy(meter, fleet, site, times, folder / "empty"),
        }

    def _first(
        self, variant: Variant, fleet: Fleet, site: inventory.Site, meter: Meter, tell: Progress
    ) -> Series:
        """A first roll-out by Ansible; that it does not work is a result too."""
        try:
            fleet.make_new(tell)
            self._ansible.give_hosts_the_apt_binding(fleet, tell)
            first = self._ansible.first(meter, variant)
            check_same_state(fleet, site)
        except BenchError as error:
            tell(f"{variant.title} does not work: {error}")
            return Series(error=str(error))
        return first

    def _no_op(self, variant: Variant, fleet: Fleet, meter: Meter, tell: Progress) -> Series:
        try:
            return self._ansible.no_op(meter, fleet, variant, self._times.ansible_no_op)
        except BenchError as error:
            tell(f"{variant.title} does not work: {error}")
            return Series(error=str(error))


def compile_packages(progress: Progress) -> None:
    """Compile this environment's packages, as pip does and other installers do not.

    Otherwise whatever runs first, or every run where Python is told not to keep what it compiles, pays
    for that.
    """
    progress("compiling the Python packages of this environment")
    # Some have files that are no Python of this version and are never imported: not an error.
    attempt([sys.executable, "-m", "compileall", "-q", "-j", "0", sysconfig.get_path("purelib")])
