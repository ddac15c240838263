"""What would restart, and why: a service as it was applied beside the one that is planned."""

from __future__ import annotations

from typing import Any

import pytest

from fleet.documents import changes
from fleet.status import difference
from tests.unit.state import converged, plan_of, service


def applied(**changed: Any) -> dict[str, Any]:
    return plan_of(service(**changed)).services[0].document()


def test_what_is_the_same_has_no_reason() -> None:
    assert list(changes(applied(), applied())) == []


def test_what_is_not_there_is_new() -> None:
    assert list(changes(None, applied())) == ["new"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"max_model_len": 65536}, "--max-model-len: added 65536"),
        ({"port": 8001}, "port: 8000 → 8001"),
        ({"gpus": [4, 5, 6, 7]}, "GPUs: 0, 1, 2, 3 → 4, 5, 6, 7"),
        (
            {"args": {"reasoning-parser": "minimax_m2"}},
            "--reasoning-parser: minimax_m2_append_think → minimax_m2",
        ),
        ({"args": {"enable-auto-tool-choice": None}}, "--enable-auto-tool-choice: removed"),
        ({"env": {"NCCL_DEBUG": "INFO"}}, "env NCCL_DEBUG: added INFO"),
    ],
)
def test_a_change_is_named(changed: dict[str, Any], reason: str) -> None:
    assert reason in list(changes(applied(), applied(**changed)))


def test_another_vllm_is_named() -> None:
    older = plan_of(service(), vllm={"version": "0.32.0"}).services[0].document()

    reasons = list(changes(older, applied()))

    assert "vllm: 0.32.0 → 0.33.0" in reasons
    assert any(reason.startswith("program: ") for reason in reasons)


def test_a_changed_secret_is_told_without_its_value() -> None:
    before, after = applied(), applied() | {"stamp": "other"}

    assert list(changes(before, after)) == ["its secret, or the unit's own text"]


def seen_with(planned: Any, **changed: Any) -> dict[str, Any]:
    """A converged host, with what was applied to it."""
    documents = {one.name: one.document() for one in planned.services}
    return converged(planned) | {"applied": documents} | changed


def test_a_converged_host_has_no_change() -> None:
    planned = plan_of(service())

    row = difference(planned, seen_with(planned))

    assert row["services"] == {}
    assert row["summary"] == "no change to what it serves"


def test_a_stale_host_says_what_would_be_cut_over_and_why() -> None:
    before, after = plan_of(service()), plan_of(service(max_model_len=65536))
    seen = seen_with(before)
    seen["due"]["services"] = {"m25": "its process is not the plan's"}

    row = difference(after, seen)

    assert row["services"] == {"m25": ["--max-model-len: added 65536"]}
    assert row["summary"] == "m25 would be cut over"


def test_a_service_that_is_no_longer_planned_is_named() -> None:
    before = plan_of(service(), service(name="old", gpus=[4, 5, 6, 7], port=8001))
    after = plan_of(service())
    seen = seen_with(before)
    seen["due"]["gone"] = ["old"]

    row = difference(after, seen)

    assert row["services"]["old"] == ["not in the plan: stopped and removed"]


def test_what_the_host_says_is_told_where_the_plan_is_the_applied_one() -> None:
    planned = plan_of(service())
    seen = seen_with(planned)
    seen["due"]["services"] = {"m25": "its unit is failed"}

    row = difference(planned, seen)

    assert row["services"] == {"m25": ["its unit is failed"]}


def test_another_driver_is_told_with_what_changes_besides() -> None:
    before, after = plan_of(service()), plan_of(service(max_model_len=65536))
    why = "kernel module 580.82.07, packages 580.82.07-1; 580.95.05 is declared"
    seen = seen_with(before)
    seen["due"]["driver"] = {"why": why, "reboot": True, "staged": False}

    assert difference(before, seen)["services"] == {"m25": [f"the driver is exchanged: {why}"]}
    assert difference(after, seen)["services"] == {
        "m25": ["--max-model-len: added 65536", f"the driver is exchanged: {why}"]
    }


def test_a_host_that_cannot_be_asked_is_an_error() -> None:
    row = difference(plan_of(service()), None)

    assert row["error"]
    assert row["summary"] == "cannot be reached"
