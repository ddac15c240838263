"""One golden file for each shipped host group: a changed flag is a diff that somebody reviews.

`make golden` writes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleet.inventory import load
from fleet.plan import PROGRAMS, HostPlan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"


def rendered(plan: HostPlan) -> str:
    """Every file that the plan puts on a host but our own program, one after another."""
    files = [
        file
        for file in (*plan.system_files, *plan.repository_files("apt"), *plan.staged_files)
        if not file.path.startswith(PROGRAMS)
    ]
    return "\n".join(f"==> {file.path} ({file.mode})\n{file.content}" for file in files)


@pytest.mark.parametrize("group", ["h20", "h200", "h800"])
def test_a_shipped_group_is_rendered_as_reviewed(group: str) -> None:
    site = load(ROOT / "inventories" / f"{group}.py", cwd=ROOT)
    text = rendered(next(iter(site.plans.values())))
    golden = GOLDEN / f"{group}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)

    assert text == golden.read_text()


@pytest.mark.parametrize("group", ["h20", "h200", "h800"])
def test_shipped_inventories_use_documentation_addresses(group: str) -> None:
    site = load(ROOT / "inventories" / f"{group}.py", cwd=ROOT)

    for address in site.addresses.values():
        assert address.startswith(("192.0.2.", "198.51.100.", "203.0.113."))
