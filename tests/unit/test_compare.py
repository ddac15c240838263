"""A host beside its plan: what differs is found, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fleet.compare import (
    driver_files_to_write,
    files_to_write,
    must_cut_over,
    packages_differ,
    proxy_is_stale,
    stale_services,
    system_differs,
)
from fleet.plan import DRIVER_PIN, NO_UPGRADES, PROXY_UNIT, USER
from tests.unit.state import SYSTEM, converged, plan_of, service

PLAN = plan_of(service(), service(name="other", port=8001, gpus=[4, 5, 6, 7]))
Change = Callable[[dict[str, Any]], Any]


def test_a_converged_host_differs_in_nothing() -> None:
    seen = converged(PLAN)

    assert files_to_write((*PLAN.system_files, *PLAN.staged_files), seen) == []
    assert not system_differs(PLAN, seen)
    assert not packages_differ(PLAN.packages("debian-12"), seen)
    assert stale_services(PLAN, seen) == {}
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


def test_what_the_host_says_is_due_puts_it_into_a_wave() -> None:
    seen = converged(PLAN)
    seen["due"]["services"] = {"other": "its unit is failed"}

    assert stale_services(PLAN, seen) == {"other": "its unit is failed"}
    assert must_cut_over(PLAN, seen)


def test_a_service_that_left_the_plan_is_named_after_those_of_the_plan() -> None:
    seen = converged(PLAN)
    seen["due"].update(services={"m25": "its unit is not enabled"}, gone=["gone"])

    assert list(stale_services(PLAN, seen)) == ["m25", "gone"]


def test_a_proxy_that_differs_puts_the_host_into_a_wave() -> None:
    seen = converged(PLAN)
    seen["due"]["proxy"] = "it has another configuration"

    assert stale_services(PLAN, seen) == {}
    assert proxy_is_stale(seen)
    assert must_cut_over(PLAN, seen)


def test_a_driver_to_exchange_puts_the_host_into_a_wave_with_all_its_services() -> None:
    seen = converged(PLAN)
    why = "kernel module 580.82.07, packages 580.82.07-1; 580.95.05 is declared"
    seen["due"]["driver"] = {"why": why, "reboot": True, "staged": False}
    seen["due"]["services"] = {"other": "its unit is failed"}

    assert must_cut_over(PLAN, seen)
    assert stale_services(PLAN, seen) == {
        "m25": f"the driver is exchanged: {why}",
        "other": "its unit is failed",
    }


def test_a_host_that_serves_nothing_gets_another_driver_in_a_wave_too() -> None:
    plan = plan_of()
    seen = converged(plan)
    seen["due"]["driver"] = {"why": "", "reboot": True, "staged": False}

    assert stale_services(plan, seen) == {}
    assert must_cut_over(plan, seen)


def test_the_pin_is_that_of_the_installed_driver_until_it_is_exchanged() -> None:
    seen = converged(PLAN)
    assert driver_files_to_write(PLAN, seen) == []
    for path in (DRIVER_PIN, NO_UPGRADES):
        seen["files"][path] = None
    assert {file.path for file in driver_files_to_write(PLAN, seen)} == {DRIVER_PIN, NO_UPGRADES}

    seen["due"]["driver"] = {"why": "", "reboot": True, "staged": False}

    assert {file.path for file in driver_files_to_write(PLAN, seen)} == {NO_UPGRADES}


def test_the_host_is_told_what_it_judges_itself_by() -> None:
    """Hashes of what systemd and nginx read, the process's arguments and the stamps: see `due`."""
    asked = PLAN.question()["cutover"]
    files = {file.path: file for file in PLAN.installed_files}

    for told, unit in zip(asked["services"], PLAN.services, strict=True):
        installed = files[f"/etc/systemd/system/{unit.unit}"]
        assert told["unit_sha256"] == installed.sha256
        assert told["argv"] == list(unit.argv)
        assert f"FLEET_STAMP={told['stamp']}\n" in installed.content
        assert installed.content.startswith("# Written by minimax-fleet for ")
    proxy, config = asked["proxy"], files["/etc/minimax/proxy/nginx.conf"]
    unit_file = files[f"/etc/systemd/system/{PROXY_UNIT}"]
    assert (proxy["sha256"], proxy["unit_sha256"]) == (config.sha256, unit_file.sha256)
    assert f'return 200 "{proxy["stamp"]}\\n"' in config.content
    assert f"FLEET_STAMP={proxy['unit_stamp']};" in unit_file.content


def test_what_a_cut_over_installs_is_staged_under_the_names_that_it_is_told() -> None:
    staged = {file.path: file.content for file in PLAN.staged_files}
    config, unit = PLAN.proxy_files
    asked = PLAN.cutover_request()["proxy"]

    assert staged[f"/etc/minimax/proxy/{asked['stamp']}.conf"] == config.content
    assert staged[f"/etc/minimax/proxy/{asked['unit_stamp']}.service"] == unit.content
    for planned in PLAN.services:
        assert staged[f"{planned.stage_dir}/unit.service"] == planned.unit_text
