"""Afterwards: GPU metrics are exported for Prometheus where the site asks for it, and not by us elsewhere."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import exporter_differs


@deploy("monitoring")
def install() -> None:
    """Install and run NVIDIA's DCGM exporter, or end the one that an earlier run has set up."""
    plan, state = facts.plan(), facts.seen().state
    ops.job(
        name="The exporter of GPU metrics is as planned",
        verb="exporter",
        request=plan.exporter_request(),
        needed=exporter_differs(plan, state),
    )
