"""Afterwards: the host has our program, its mirrors, packages, service user, directories and limits."""

from pyinfra.api import deploy

from fleet import facts, ops
from fleet.compare import files_to_write, packages_differ, system_differs

APPLY = (
    ("systemd-sysusers", "/etc/sysusers.d/minimax.conf"),
    ("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/minimax.conf"),
    ("sysctl", "--quiet", "--load", "/etc/sysctl.d/60-minimax.conf"),
)
# Debian starts a freshly installed nginx on port 80; ours is a unit of its own.
NGINX = "nginx.service"


@deploy("system")
def install() -> None:
    """Bring the host to the state that every later step rests on."""
    plan, state = facts.plan(), facts.seen().state
    ops.files(
        name="Program, mirrors, user, directories and limits are in place",
        files=files_to_write(plan.system_files, state),
        then=APPLY,
        always=system_differs(plan, state),
    )
    fresh_nginx = state["packages"].get("nginx-light") is None
    ops.job(
        name="Distribution packages are installed",
        verb="packages",
        request={"packages": plan.base_packages, "mask": [NGINX] if fresh_nginx else []},
        needed=packages_differ(plan.base_packages, state),
    )
