"""Afterwards: the releases that the plan names are complete, beside those that run."""

from pyinfra.api import deploy

from fleet import facts, ops


@deploy("runtime")
def install() -> None:
    """Build each release that is missing: uv, Python, vLLM from where its channel has it; or its image."""
    plan, state = facts.plan(), facts.seen().state
    for role, release in (("huggingface_hub", plan.hub_tool), ("vLLM", plan.release)):
        ops.job(
            name=f"Release of {role} is complete",
            verb="image" if release.image else "release",
            request=(plan.image_request if release.image else plan.release_request)(release),
            needed=not state["releases"][release.path],
        )
