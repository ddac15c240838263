"""One row for each service: what it serves, and what of it is not as planned."""

from __future__ import annotations

from fleet.status import describe, ranges
from tests.unit.state import converged, plan_of, service

PLAN = plan_of(service(), service(name="other", port=8001, gpus=[4, 5, 6, 7]))
TIMINGS = {"ready_s": 61.0, "first_answer_s": 0.5}


def seen_with(**due: object) -> dict[str, object]:
    seen = converged(PLAN)
    for record in seen["records"].values():
        record.update(TIMINGS)
    seen["due"].update(due)
    return seen


def test_a_host_that_is_as_planned_is_all_good() -> None:
    rows = describe(PLAN, seen_with())

    assert [(row["gate"], row["ok"]) for row in rows] == [("passed", True)] * 2
    assert rows[0]["start"] == "61.0 s"


def test_a_service_that_differs_says_why_and_no_other() -> None:
    rows = describe(PLAN, seen_with(services={"other": "its unit is not enabled"}))

    assert [row["ok"] for row in rows] == [True, False]
    assert rows[1]["gate"] == "differs: its unit is not enabled"


def test_behind_a_proxy_that_differs_no_service_is_as_planned() -> None:
    rows = describe(PLAN, seen_with(proxy="it has another configuration"))

    assert {row["gate"] for row in rows} == {"differs: the proxy: it has another configuration"}
    assert not any(row["ok"] for row in rows)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 3, 6]) == "0-3,6"
