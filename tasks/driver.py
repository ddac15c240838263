"""Afterwards: the declared NVIDIA driver runs, with its fabric manager where there are NVSwitches."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import files_to_write
from fleet.preflight import driver_incomplete, driver_runs


@deploy("driver")
def install() -> None:
    """Install driver, fabric manager and persistence daemon at one version, and hold them there."""
    plan, state = facts.plan(), facts.seen().state
    ops.files(
        name="Driver packages are pinned, and nvidia-uvm is loaded at boot",
        files=files_to_write(plan.driver_files(state["os"]), state),
    )
    ops.job(
        name="The NVIDIA driver is installed, held and running",
        verb="driver",
        request=plan.driver_request(state["os"]),
        needed=driver_incomplete(plan, state) or not driver_runs(plan, state),
    )
