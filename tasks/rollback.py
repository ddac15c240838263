"""Afterwards: every host serves what it served before the last roll-out, or what `--data to=` names.

The way is that of a roll-out: canary first, drained, switched, started, judged; what served comes back
where the old one does not pass, and the run ends there. Nothing is built and no mirror is asked: what is
needed must be on the hosts, and is looked for on all of them before the first one is touched.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from pyinfra import host
from pyinfra.api import deploy

from fleet import facts, ops, rollback
from fleet.compare import files_to_write
from fleet.plan import HostPlan


def chosen(state: Mapping[str, Any]) -> rollback.Choice:
    """What a host in this state goes back to."""
    return rollback.choose(state["history"], facts.given("to"))


def goes_back(_plan: HostPlan, state: Mapping[str, Any]) -> bool:
    """Does this host belong to a wave?"""
    return chosen(state).needed


@deploy("rollback")
def apply() -> None:
    """Put back, in waves, the services, units, releases and revisions that served before."""
    facts.end_run_on_failure()
    plan, state = facts.plan(), facts.seen(outside=False).state
    choice = chosen(state)
    ops.refuse(name="What served before can serve again", problems=choice.problems)
    ops.tell(choice.said)
    ops.files(
        name="The hosts' program is this checkout's",
        files=files_to_write(plan.program_files, state) if choice.needed else [],
    )
    for number in host.loop(range(len(facts.site().waves(facts.site().plans)))):
        ops.job(
            name=f"Wave {number + 1} goes back: drained, switched, started and judged",
            verb="rollback",
            request=choice.request,
            needed=choice.needed,
            _if=partial(facts.in_wave, number, goes_back),
        )
