"""Afterwards: every model of the plan lies on the host at its revision, each file's hash verified."""

from pyinfra import host
from pyinfra.api import deploy

from fleet import facts, ops


@deploy("weights")
def fetch() -> None:
    """Fetch what is missing; an interrupted download goes on where it stopped."""
    plan, state = facts.plan(), facts.seen().state
    for weights in host.loop(plan.weights):
        ops.job(
            name=f"Weights of {weights.repository} at {weights.revision[:12]}",
            verb="weights",
            request=plan.weights_request(weights),
            needed=not state["weights"][weights.path],
        )
