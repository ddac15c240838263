"""Afterwards: the host has our program, its mirrors, packages, service user, directories and limits."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import files_to_write, packages_differ, system_differs, there
from fleet.drivers import package_manager, system_name
from fleet.plan import NGINX_UNIT

APPLY = (
    ("systemd-sysusers", "/etc/sysusers.d/minimax.conf"),
    ("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/minimax.conf"),
    ("sysctl", "--quiet", "--load", "/etc/sysctl.d/60-minimax.conf"),
)


@deploy("system")
def install() -> None:
    """Bring the host to the state that every later step rests on."""
    plan, state = facts.plan(), facts.seen().state
    system = system_name(state["os"])
    manager = package_manager(system)
    packages = plan.base_packages(system) | plan.engine_packages(system, there(state))
    ops.files(
        name="Program, mirrors, user, directories and limits are in place",
        files=files_to_write((*plan.system_files, *plan.repository_files(manager)), state),
        then=APPLY,
        always=system_differs(plan, state),
    )
    # Whoever has an nginx already may serve with it; a fresh one would take port 80.
    fresh_nginx = not state["units"][NGINX_UNIT]["loaded"]
    ops.job(
        name="Distribution packages are installed",
        verb="packages",
        request={"packages": packages, "mask": [NGINX_UNIT] if fresh_nginx else []},
        needed=packages_differ(packages, state),
    )
