"""Afterwards: the units, secrets and proxy configuration of the plan lie beside those in use."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import files_to_write


@deploy("service")
def stage() -> None:
    """Stage every service's unit; nothing that runs reads them before the host's wave."""
    ops.files(
        name="Units, secrets and proxy configuration are staged",
        files=files_to_write(facts.plan().staged_files, facts.seen().state),
    )
