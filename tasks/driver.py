"""Afterwards: the declared NVIDIA driver runs, with its fabric manager where there are NVSwitches."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import packages_differ
from fleet.drivers import driver_packages, driver_units


@deploy("driver")
def install() -> None:
    """Install driver, fabric manager and persistence daemon at one version, and hold them there."""
    plan, state = facts.plan(), facts.seen().state
    system = f"{state['os']['id']}-{state['os']['version_id']}"
    nvswitch = bool(plan.gpu and plan.gpu.nvswitch)
    packages = driver_packages(plan.spec.driver, system, nvswitch=nvswitch)
    ops.job(
        name=f"NVIDIA driver {plan.spec.driver.version if plan.spec.driver else '(none declared)'}",
        verb="packages",
        request={
            "packages": packages,
            "mask": [],
            "start": list(driver_units(nvswitch=nvswitch)),
            "gpus": plan.spec.gpu_count,
        },
        needed=packages_differ(packages, state),
    )
