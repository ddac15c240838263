"""A host beside its plan: what differs is found, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fleet.compare import (
    files_to_write,
    must_cut_over,
    packages_differ,
    proxy_is_stale,
    stale_services,
    system_differs,
)
from fleet.plan import PROXY_UNIT, USER
from tests.unit.state import SYSTEM, converged, plan_of, service

PLAN = plan_of(service(), service(name="other", port=8001, gpus=[4, 5, 6, 7]))
UNIT = PLAN.services[0].unit
Change = Callable[[dict[str, Any]], Any]


def test_a_converged_host_differs_in_nothing() -> None:
    seen = converged(PLAN)

    assert files_to_write((*PLAN.system_files, *PLAN.staged_files), seen) == []
    assert not system_differs(PLAN, seen)
    assert not packages_differ(PLAN.packages("debian-12"), seen)
    assert stale_services(PLAN, seen) == []
    assert not must_cut_over(PLAN, seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(sha256="0" * 64),
        lambda state: state.update(mode="666"),
        lambda state: state.update(uid=1000),
    ],
    ids=["content", "mode", "owner"],
)
def test_a_file_that_differs_is_written(change: Change) -> None:
    seen, file = converged(PLAN), PLAN.system_files[0]
    change(seen["files"][file.path])

    assert files_to_write(PLAN.system_files, seen) == [file]


@pytest.mark.parametrize(
    "change",
    [
        lambda seen: seen["users"].update({USER: False}),
        lambda seen: seen["directories"].update({PLAN.spec.paths.models: None}),
        lambda seen: seen["sysctl"].update({"net.core.somaxconn": "128"}),
    ],
    ids=["user", "directory", "sysctl"],
)
def test_a_system_that_drifted_is_applied_again(change: Change) -> None:
    seen = converged(PLAN)
    change(seen)

    assert system_differs(PLAN, seen)


@pytest.mark.parametrize(
    "state",
    [None, {"version": "570.172.08-1", "held": True}, {"version": "580.95.05-1", "held": False}],
    ids=["absent", "another version", "not held"],
)
def test_a_driver_package_that_differs(state: dict[str, Any] | None) -> None:
    seen = converged(PLAN)
    seen["packages"]["nvidia-driver-cuda"] = state

    assert packages_differ(PLAN.driver_request(SYSTEM)["packages"], seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda seen: seen["units"][UNIT].update(stamp="of-another-plan"),
        lambda seen: seen["units"][UNIT].update(active="failed", stamp=None, pid=0),
        lambda seen: seen["units"][UNIT].update(active="activating"),
        lambda seen: seen["units"][UNIT].update(enabled=False),
        lambda seen: seen["draining"].append("m25"),
        lambda seen: seen["records"].pop("m25"),
        lambda seen: seen["records"]["m25"].update(stamp="of-another-plan"),
    ],
    ids=[
        "other process",
        "failed",
        "starting",
        "not enabled",
        "out of service",
        "never passed",
        "passed as another",
    ],
)
def test_what_runs_counts_and_not_what_is_written(change: Change) -> None:
    seen = converged(PLAN)
    change(seen)

    assert stale_services(PLAN, seen) == ["m25"]
    assert must_cut_over(PLAN, seen)


def test_a_service_that_left_the_plan_is_retired() -> None:
    seen = converged(PLAN)
    seen["records"]["gone"] = {"stamp": "x"}

    assert stale_services(PLAN, seen) == ["gone"]


@pytest.mark.parametrize(
    "change",
    [
        lambda seen: seen.update(proxy=None),
        lambda seen: seen.update(proxy={"stamp": "older"}),
        lambda seen: seen["units"][PROXY_UNIT].update(active="inactive"),
    ],
    ids=["never loaded", "another configuration", "stopped"],
)
def test_a_proxy_that_differs_puts_the_host_into_a_wave(change: Change) -> None:
    seen = converged(PLAN)
    change(seen)

    assert proxy_is_stale(PLAN, seen)
    assert must_cut_over(PLAN, seen)
