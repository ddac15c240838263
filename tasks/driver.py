"""Afterwards: the declared NVIDIA driver runs, with its fabric manager where there are NVSwitches.

Where another one is loaded it is staged only: the host's wave exchanges it (see rollout.py).
"""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import driver_files_to_write
from fleet.preflight import driver_incomplete, driver_runs


@deploy("driver")
def install() -> None:
    """Install driver, fabric manager and persistence daemon at one version, and hold them there."""
    plan, state = facts.plan(), facts.seen().state
    exchange = state["due"]["driver"]
    ops.files(
        name="Driver packages are pinned, and nvidia-uvm is loaded at boot",
        files=driver_files_to_write(plan, state),
    )
    ops.job(
        name="The NVIDIA driver is installed, held and running",
        verb="driver",
        request=plan.driver_request(state["os"]),
        needed=not exchange and (driver_incomplete(plan, state) or not driver_runs(plan, state)),
    )
    ops.job(
        name="The NVIDIA driver to come is fetched, and the present one is kept",
        verb="stage_driver",
        request=plan.driver_request(state["os"]),
        needed=bool(exchange) and not exchange["staged"],
    )
