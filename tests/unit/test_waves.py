"""The order of a cut-over."""

from __future__ import annotations

import pytest

from fleet.waves import batch_size, waves


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
