"""How long a plan takes: `python -m bench.planning` writes its table into docs/benchmarks.md.

No lab is needed. `fleet plan --json` plans sites of 10 to 10,000 hosts with two services each: once
all alike, as most fleets are, and once with data of its own on each host.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.__main__ import PAGE

BEGIN = "<!-- planning: written by `python -m bench.planning` -->"
END = "<!-- end of planning -->"
SIZES = (10, 100, 1_000, 10_000)
RUNS = 3
KIB = 1 << 10

GROUP = """
gpu = "h20-141"
gpu_count = 8
driver = {"version": "580.95.05"}
vllm = {"version": "0.33.0"}
"""


@dataclass(frozen=True)
class Planned:
    """One size of site: seconds and MiB of `fleet plan --json`, the median of some runs."""

    hosts: int
    alike: bool
    wall_s: float
    cpu_s: float
    memory_mib: float


def main() -> None:
    rows = list(measured())
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(table(rows))
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    print(body)


def measured() -> Iterator[Planned]:
    for hosts in SIZES:
        for alike in (True, False):
            print(f"planning {hosts} hosts", file=sys.stderr)
            yield plan_site(hosts, alike=alike)


def plan_site(hosts: int, *, alike: bool) -> Planned:
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        write(site, hosts, alike=alike)
        runs = [_once(site) for _ in range(RUNS)]
    return Planned(hosts, alike, *(median(values) for values in zip(*runs, strict=True)))


def write(site: Path, hosts: int, *, alike: bool) -> None:
    """A site of so many hosts; each has services of its own, unless they are alike."""
    for name in ("inventories", "group_data"):
        (site / name).mkdir()
    (site / "group_data" / "h20.py").write_text(f"{GROUP}services = {services()!r}\n")
    entries = []
    for index in range(hosts):
        own = {"ssh_hostname": f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"}
        # Services of its own, so that nothing of one host's plan is of use to another.
        extra = {} if alike else {"services": services(index)}
        entries.append((f"h20-{index:05}", own | extra))
    (site / "inventories" / "h20.py").write_text(f"h20 = {entries!r}\n")


def services(index: int = 0) -> list[dict[str, Any]]:
    """Two services, each on half of the GPUs; `index` makes them others."""
    return [
        {
            "name": name,
            "model": "MiniMaxAI/MiniMax-M2.5",
            "revision": "f710177d938eff80b684d42c5aa84b382612f21f",
            "recipe": "tp4",
            "gpus": gpus,
            "port": port,
            "max_model_len": 65536 + index,
        }
        for name, gpus, port in (("a", [0, 1, 2, 3], 8000), ("b", [4, 5, 6, 7], 8001))
    ]


def _once(site: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak MiB of one plan, interpreter and imports included."""
    command = [sys.executable, "-m", "fleet.cli", "plan", "inventories/h20.py", "--json"]
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        child = subprocess.Popen(command, cwd=site, stdout=output, env=_environment())
        _, status, used = os.wait4(child.pid, 0)
        wall_s = time.monotonic() - began
    if status:
        raise SystemExit(f"fleet plan failed with {status}")
    return wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / KIB


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PAGE.parents[1])}


def table(rows: list[Planned]) -> Iterator[str]:
    yield "| hosts | services | data | wall s | CPU s | peak MiB | ms a host |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        data = "alike" if row.alike else "its own on each host"
        each = row.wall_s * 1000 / row.hosts
        yield (
            f"| {row.hosts:,} | {2 * row.hosts:,} | {data} | {row.wall_s:.2f} | {row.cpu_s:.2f} "
            f"| {row.memory_mib:.0f} | {each:.2f} |"
        )


if __name__ == "__main__":
    main()
