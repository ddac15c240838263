"""Afterwards: the units, secrets and proxy configuration of the plan lie beside those in use, and each
unit's arguments are known to mean something to its release."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import arguments_unknown, files_to_write


@deploy("service")
def stage() -> None:
    """Stage every service's unit; nothing that runs reads them before the host's wave."""
    plan, state = facts.plan(), facts.seen().state
    ops.files(
        name="Units, secrets and proxy configuration are staged",
        files=files_to_write(plan.staged_files, state),
    )
    ops.job(
        name="Every unit's arguments are understood by its release",
        verb="image_arguments" if plan.release.image else "arguments",
        request=plan.arguments_request(),
        needed=arguments_unknown(plan, state),
    )
