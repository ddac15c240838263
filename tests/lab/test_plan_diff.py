"""`fleet plan --diff`: what a roll-out would restart on real hosts, and why, before it is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab.conftest import CPU, H20
from tests.lab.site import Site, main_pids

FLEET = str(Path(sys.executable).with_name("fleet"))


def differences(site: Site) -> dict[str, dict[str, Any]]:
    command = [FLEET, "plan", "inventories/lab.py", "--diff", "--json"]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["host"]: row for row in json.loads(done.stdout)}


def test_what_would_restart_is_named_with_its_reason_and_nothing_is_touched(site: Site) -> None:
    before = {host: main_pids(host) for host in (*H20, CPU)}
    assert all(row["services"] == {} for row in differences(site).values())

    site.set_in_services("h20", '"max_model_len": 131072')
    found = differences(site)

    for host in H20:
        assert found[host]["services"] == {
            "m25-a": ["--max-model-len: added 131072"],
            "m25-b": ["--max-model-len: added 131072"],
        }
    assert found[CPU]["services"] == {}
    assert {host: main_pids(host) for host in (*H20, CPU)} == before
