"""Afterwards: every host of the run can become what its plan says, or nothing was changed anywhere."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.preflight import problems


@deploy("preflight")
def check() -> None:
    """Report all that is wrong with each host, before anything is changed on any."""
    facts.end_run_on_failure()
    seen = facts.seen()
    ops.refuse(
        name="The host can become what its plan says",
        problems=problems(facts.plan(), seen.state, seen.clock_offset_s),
    )
