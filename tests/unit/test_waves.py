"""The order of a cut-over."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.inventory import Site
from fleet.plan import HostPlan
from fleet.waves import batch_size, waves
from tests.unit.state import plan_of, service


@pytest.mark.parametrize(
    ("batch", "hosts", "size"),
    [(3, 10, 3), ("10%", 20, 2), ("10%", 21, 3), ("10%", 1, 1), ("100%", 7, 7)],
)
def test_batch_size(batch: int | str, hosts: int, size: int) -> None:
    assert batch_size(batch, hosts) == size


def test_the_first_host_is_the_canary() -> None:
    hosts = [(name, "h20") for name in "abcde"]

    assert waves(hosts, 2) == (("a",), ("b", "c"), ("d", "e"))


def test_every_group_has_a_canary_of_its_own() -> None:
    hosts = [("a", "h20"), ("b", "h20"), ("c", "h800"), ("d", "h800")]

    assert waves(hosts, 10) == (("a",), ("c",), ("b", "d"))


def test_no_host_no_wave() -> None:
    assert waves([], 1) == ()


@cache
def plan_with(batch: int | str) -> HostPlan:
    return plan_of(service(), rollout={"batch": batch})


def two_groups(first: int | str, second: int | str) -> Site:
    """Ten hosts in each of two groups that say different batch sizes."""
    plans = {
        f"{group}{number}": replace(plan_with(batch), name=f"{group}{number}", group=group)
        for group, batch in (("a", first), ("b", second))
        for number in range(10)
    }
    return Site(inventory=Path("site.py"), plans=plans, addresses=dict.fromkeys(plans, ""))


BATCHES = st.sampled_from([1, 3, 20, "10%", "55%", "100%"])


@given(first=BATCHES, second=BATCHES, stale=st.sets(st.integers(0, 19)))
def test_some_hosts_never_make_more_waves_than_all(
    first: int | str, second: int | str, stale: set[int]
) -> None:
    site = two_groups(first, second)
    chosen = [list(site.plans)[number] for number in sorted(stale)]

    order = site.waves(chosen)

    assert len(order) <= len(site.waves(site.plans))
    assert sorted(host for wave in order for host in wave) == sorted(chosen)


def test_the_smallest_batch_of_the_run_counts_whoever_is_cut_over() -> None:
    site = two_groups("100%", 1)

    assert site.waves(["a0", "a1", "a2"]) == (("a0",), ("a1",), ("a2",))
    assert site.waves(["b0", "b1", "b2"]) == (("b0",), ("b1",), ("b2",))
