"""The one fact: a host's whole state, asked for once in a run; and the gate, which is asked when needed.

The program goes to the host with the question (on standard input, compressed), so a host that has
never been touched can be judged before anything is written to it.
"""

from __future__ import annotations

import base64
import json
import socket
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pyinfra import host as current_host
from pyinfra import state as current_state
from pyinfra.api import FactBase
from pyinfra.api.exceptions import FactProcessError, PyinfraError
from pyinfra.api.host import Host
from typing_extensions import override

from fleet.inventory import Site
from fleet.plan import HostPlan
from fleet.render import repository_file

BOOTSTRAP = (
    "import base64,sys,zlib;"
    "exec(compile(zlib.decompress(base64.b64decode(sys.stdin.readline())),'fleet_host','exec'))"
)


class HostState(FactBase[dict[str, Any]]):
    """State of a host as `fleet_host.py probe` answers it."""

    @override
    def command(self) -> str:
        return f'python3 -c "{BOOTSTRAP}" probe'

    @override
    def process(self, output: list[str]) -> dict[str, Any]:
        return dict(_answer(output))


class GateResults(FactBase[Any]):
    """What the gate says of services, as `fleet_host.py gate` answers it."""

    @override
    def command(self) -> str:
        return f'python3 -c "{BOOTSTRAP}" gate'

    @override
    def process(self, output: list[str]) -> Any:
        return _answer(output)


def _answer(output: list[str]) -> Any:
    try:
        return json.loads("".join(output))
    except ValueError as error:
        raise FactProcessError(f"no JSON from the host: {output[-1][:200]}") from error


class Input(list[str]):
    """Lines for a fact's standard input, which pyinfra's -v would print: the program and its question."""

    @override
    def __str__(self) -> str:
        return "…"


@dataclass(frozen=True)
class Seen:
    """A host's state and when it was taken, with the host's clock minus ours in seconds."""

    state: dict[str, Any]
    clock_offset_s: float


_site: Site | None = None
_seen: dict[str, Seen] = {}


def use(site: Site) -> None:
    """From now on, plans are this site's; what was seen of hosts before is forgotten."""
    global _site  # noqa: PLW0603 - pyinfra runs one inventory in a process
    _site = site
    _seen.clear()


def site() -> Site:
    """The planned site of this run. config.py plans it before pyinfra loads the inventory."""
    if _site is None:
        raise PyinfraError("no plan: run pyinfra from the repository's root, where config.py is")
    return _site


def plan() -> HostPlan:
    """The current host's plan."""
    return site().plans[current_host.name]


def seen() -> Seen:
    """The current host's state; asked for on first use."""
    host = current_host
    if host.name not in _seen:
        send_at_once(host)
        began = time.time()
        state = look()
        offset = state["time"] - (began + time.time()) / 2
        _seen[host.name] = Seen(state=state, clock_offset_s=offset)
    return _seen[host.name]


def look() -> dict[str, Any]:
    """The current host's state as it is now."""
    state = ask(HostState, plan().question())
    if not state:
        raise PyinfraError(f"{current_host.name}: the host could not be looked at; see above")
    return dict(state)


def ask(fact: type[FactBase[Any]], request: Mapping[str, Any]) -> Any:
    """A fact of ours about the current host, which is brought the program with the request."""
    return current_host.get_fact(fact, _stdin=Input([packed_program(), json.dumps(request)]))


def end_run_on_failure() -> None:
    """Without -y pyinfra asks whether to go on after a failure; a later wave must never be the answer."""
    current_state.should_raise_failed_hosts = lambda _state: True


def stale_hosts(is_stale: Any) -> tuple[str, ...]:
    """Hosts of this run for which `is_stale(plan, state)` holds, in inventory order."""
    return tuple(
        name
        for name, host_plan in site().plans.items()
        if name in _seen and is_stale(host_plan, _seen[name].state)
    )


@cache
def packed_program() -> str:
    """files/fleet_host.py, compressed, as one line."""
    return base64.b64encode(
        zlib.compress(repository_file("files/fleet_host.py").encode(), 9)
    ).decode()


def send_at_once(host: Host) -> None:
    """Turns Nagle's algorithm off: paramiko leaves it on, and each command then costs about 40 ms more."""
    client = getattr(host.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    connection = getattr(transport, "sock", None)
    if isinstance(connection, socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
