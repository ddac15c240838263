"""The unit of a service in a container, as it was reviewed. `make golden` writes it anew."""

from __future__ import annotations

import os
from pathlib import Path

from tests.unit.state import plan_of, service

GOLDEN = Path(__file__).parent / "golden" / "container.service"
VLLM = {
    "channel": "docker",
    "version": "0.33.0",
    "image": f"vllm/vllm-openai@sha256:{'0' * 64}",
}


def test_a_container_is_rendered_as_reviewed() -> None:
    text = plan_of(service(), vllm=VLLM).services[0].unit_text
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(text)

    assert text == GOLDEN.read_text()


def test_what_is_equal_in_both_kinds_of_unit_is_said_once() -> None:
    """Restarts, limits of starts and how long a stop may take do not depend on how vLLM is installed."""
    units = [plan_of(service()), plan_of(service(), vllm=VLLM)]
    texts = [plan.services[0].unit_text for plan in units]

    for key in (
        "StartLimitIntervalSec",
        "StartLimitBurst",
        "Restart",
        "RestartSec",
        "TimeoutStopSec",
    ):
        lines = [
            [line for line in text.splitlines() if line.startswith(f"{key}=")] for text in texts
        ]
        assert lines[0] == lines[1] != []
