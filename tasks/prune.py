"""Afterwards: releases, leftovers of killed builds and staged files that nothing needs are gone.

What runs, what a unit names, what the plan names, the way back and `keep_releases` of those that served
stay. With --dry it only says what would go.
"""

from pyinfra.api import deploy

from fleet import facts, ops, pruning
from fleet.compare import files_to_write


@deploy("prune")
def releases() -> None:
    """Remove the releases that this host does not need, and say what that freed."""
    facts.end_run_on_failure()
    plan, state = facts.plan(), facts.seen(outside=False).state
    spare = facts.spare()
    ops.tell(*pruning.lines(spare))
    needed = pruning.needed(spare)
    ops.files(
        name="The hosts' program is this checkout's",
        files=files_to_write(plan.program_files, state) if needed else [],
    )
    ops.job(
        name="What nothing needs is removed",
        verb="prune",
        request=plan.prune_request(),
        needed=needed,
    )
