"""The real vLLM, its CPU build: upgraded from one release to another and back, through the gate."""

from __future__ import annotations

import pytest

from lab import hosts as lab
from tests.lab.conftest import CPU
from tests.lab.site import Site

OTHER = "0.31.0"


def version(host: str) -> str:
    return lab.ssh(host, "curl -sf http://127.0.0.1:18000/version", check=True).stdout


@pytest.mark.thorough
def test_the_real_vllm_is_exchanged_and_put_back(site: Site) -> None:
    assert "0.32.0" in version(CPU)

    site.edit("cpu", r'"version": "0.32.0"', f'"version": "{OTHER}"')
    upgrade = site.roll_out_well("--limit", CPU)

    assert any("Wave" in name for name in upgrade.changed_operations())
    assert OTHER in version(CPU)
    assert site.roll_out_well("--limit", CPU).changed == 0

    site.edit("cpu", rf'"version": "{OTHER}"', '"version": "0.32.0"')
    lab.clear_requests()
    back = site.roll_out_well("--limit", CPU)

    assert "0.32.0" in version(CPU)
    # The way back builds and fetches nothing: the release is still there.
    assert not any("Release" in name for name in back.changed_operations())
    assert lab.requests() == []


def test_a_real_vllm_that_cannot_start_is_put_back(site: Site) -> None:
    site.set_in_services("cpu", '"max_model_len": 1000000')
    site.edit("cpu", r'"max_model_len": 1024,', "")

    run = site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", CPU)

    assert run.exit_code == 1
    assert "gate, process: expected minimax-tiny.service running" in run.output
    assert "max_model_len" in run.output
    assert "tiny was put back and serves" in run.output
