"""pyinfra's connections for our own commands, where no deploy is run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
from gevent import monkey

from fleet import facts
from fleet.inventory import Site


def states(site: Site, inventory_file: Path) -> dict[str, dict[str, Any] | None]:
    """Host name to its probed state, None for a host that cannot be reached; all in parallel."""
    # As pyinfra's own command line does: its connections are greenlets.
    monkey.patch_all()
    from pyinfra.api import Config, State
    from pyinfra.api.connect import connect_all, disconnect_all
    from pyinfra.api.exceptions import PyinfraError
    from pyinfra.api.state import StateStage
    from pyinfra.context import ctx_host, ctx_state
    from pyinfra_cli.inventory import make_inventory

    state = State()
    state.cwd = str(Path.cwd())
    facts.use(site)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(site.plans)
    with ctx_state.use(state):
        everyone = make_inventory(str(inventory_file), cwd=state.cwd)
        chosen = [host for host in everyone if host.name in site.plans]
        state.init(everyone, Config(FAIL_PERCENT=100), initial_limit=chosen)
        state.set_stage(StateStage.Connect)
        # Raises once nobody can be reached; that is then what the answer says.
        with suppress(PyinfraError):
            connect_all(state)
        state.set_stage(StateStage.Prepare)

        def look(host: Any) -> None:
            with ctx_host.use(host), suppress(PyinfraError):
                found[host.name] = facts.seen(outside=False).state

        gevent.joinall([state.pool.spawn(look, host) for host in state.activated_hosts])
        disconnect_all(state)
    return found
