"""F19: a key reaches the server and nobody else."""

from __future__ import annotations

import pytest
import requests

from fleet.facts import packed_program
from fleet.plan import QUESTION
from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site

HOST = H20[0]
UNIT = "minimax-m25-a.service"
KEY = "lab-key-4f1c$%\"'x"
MODEL = "MiniMaxAI/MiniMax-M2.5"


def asked(site: Site, **headers: str) -> int:
    """HTTP status of the guides' question at the public port."""
    url = f"http://{site.plans().addresses[HOST]}:8000/v1/chat/completions"
    body = {"model": MODEL, "max_tokens": 60, **QUESTION}
    return requests.post(url, json=body, headers=headers, timeout=60).status_code


def test_f19_a_key_is_asked_for_and_shows_nowhere(
    gpu_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_KEY", KEY)
    gpu_site.set_in_services("h20", '"api_key": {"env": "LAB_KEY"}')

    run = gpu_site.pyinfra(
        *("-y", "-vvv", "--diff", "inventories/lab.py", "deploy.py", "--limit", HOST)
    )

    assert run.exit_code == 0, run.output
    assert asked(gpu_site) == 401
    assert asked(gpu_site, Authorization="Bearer another") == 401
    assert asked(gpu_site, Authorization=f"Bearer {KEY}") == 200
    stamp = gpu_site.plans().plans[HOST].services[0].stamp
    secrets = f"/etc/minimax/services/m25-a/{stamp}/secrets.env"
    assert lab.ssh(HOST, f"stat -c '%a %U' {secrets}").stdout.strip() == "600 root"
    assert packed_program()[:100] not in run.output
    places = {
        "what the run printed": run.output,
        "the process list": lab.ssh(HOST, "ps -efww", check=True).stdout,
        "the unit": lab.ssh(HOST, f"systemctl show {UNIT}; systemctl cat {UNIT}").stdout,
        "the journal": lab.ssh(HOST, "journalctl -b --no-pager -o cat", check=True).stdout,
        "the jobs": lab.ssh(HOST, "cat /run/minimax-fleet/jobs/*").stdout,
    }
    assert [place for place, text in places.items() if KEY in text or "4f1c" in text] == []
    assert gpu_site.roll_out_well("--limit", HOST).changed == 0
