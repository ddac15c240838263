"""Afterwards: every host serves what its plan says, or the first that could not was put back.

A host is cut over as a whole: drained, stopped, switched, started, judged; with another driver and a
reboot in between where that is due. Hosts go canary first, then
in batches; a failure ends the run (FAIL_PERCENT = 0), so that no later wave is touched.
"""

from functools import partial

from pyinfra import host
from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import must_cut_over


@deploy("rollout")
def cut_over() -> None:
    """Cut over in waves the hosts whose running processes are not the plan's."""
    plan, state = facts.plan(), facts.seen().state
    every_wave = facts.site().waves(facts.site().plans)
    for number in host.loop(range(len(every_wave))):
        ops.job(
            name=f"Wave {number + 1} is drained, switched, started and judged",
            verb="cutover",
            request=plan.cutover_request(state["os"]),
            needed=must_cut_over(plan, state),
            _if=partial(facts.in_wave, number, must_cut_over),
        )
    ops.confirm(name="Nothing differs from the plan any more", needed=must_cut_over(plan, state))
