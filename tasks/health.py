"""Afterwards: each service was asked the guides' question, on its host and at its public port."""

from pyinfra.api import deploy

from fleet import ops


@deploy("health")
def check() -> None:
    """The gate as a task of its own; changes nothing, and fails a host whose service does not serve."""
    ops.judge(name="Every service answers, on its host and at its public port")
