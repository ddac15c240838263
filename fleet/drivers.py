"""Which distribution packages make up an NVIDIA driver of a version: fleet/drivers.yaml, read."""

from __future__ import annotations

from functools import cache

from fleet.spec import Driver


@cache
def supported_systems() -> tuple[str, ...]:
    """Distributions that hosts may run: `debian-12` and the like."""
    return ("debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04")


def driver_packages(driver: Driver | None, system: str, *, nvswitch: bool) -> dict[str, str | None]:
    return {}


def driver_units(*, nvswitch: bool) -> tuple[str, ...]:
    return ()
