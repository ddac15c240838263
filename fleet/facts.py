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


class Spare(FactBase[dict[str, Any]]):
    """What nothing on a host needs any more, as `fleet_host.py spare` answers it."""

    @override
    def command(self) -> str:
        return f'python3 -c "{BOOTSTRAP}" spare'

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
_given: dict[str, str] = {}
_seen: dict[str, Seen] = {}


def use(site: Site, given: Mapping[str, str] | None = None) -> None:
    """From now on, plans are this site's; what was seen of hosts before is forgotten. `given` is what
    the command line says to a task."""
    global _site  # noqa: PLW0603 - pyinfra runs one inventory in a process
    _site = site
    _seen.clear()
    _given.clear()
    _given.update(given or {})


def given(name: str) -> str | None:
    """What `--data NAME=…` says to a task; None where it says nothing."""
    return _given.get(name)


def site() -> Site:
    """The planned site of this run. config.py plans it before pyinfra loads the inventory."""
    if _site is None:
        raise PyinfraError("no plan: run pyinfra from the repository's root, where config.py is")
    return _site


def plan() -> HostPlan:
    """The current host's plan."""
    return site().plans[current_host.name]


def seen(*, outside: bool = True) -> Seen:
    """The current host's state; asked for on first use. `outside`: see HostPlan.question."""
    host = current_host
    if host.name not in _seen:
        send_at_once(host)
        began = time.time()
        state = look(outside=outside)
        offset = state["time"] - (began + time.time()) / 2
        _seen[host.name] = Seen(state=state, clock_offset_s=offset)
    return _seen[host.name]


def look(*, outside: bool = True) -> dict[str, Any]:
    """The current host's state as it is now."""
    state = ask(HostState, plan().question(outside=outside))
    if not state:
        raise PyinfraError(f"{current_host.name}: the host could not be looked at; see above")
    return dict(state)


def spare() -> dict[str, Any]:
    """What nothing on the current host needs any more."""
    found = ask(Spare, plan().prune_request())
    if not found:
        raise PyinfraError(f"{current_host.name}: the host could not be looked at; see above")
    return dict(found)


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


def in_wave(number: int, is_stale: Any) -> bool:
    """Is the current host in this wave of the hosts for which `is_stale(plan, state)` holds?"""
    # Known only once every host has been looked at, which is why operations ask as they run.
    waves = site().waves(stale_hosts(is_stale))
    return number < len(waves) and current_host.name in waves[number]


@cache
def packed_program() -> str:
    """files/fleet_host.py, compressed, as one line."""
    return base64.b64encode(
        zlib.compress(repository_file("files/fleet_host.py").encode(), 9)
    ).decode()


ALIVE = {
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 35_000,
}
"""When a silent connection is asked, how often, and when it is given up: seconds, the last in ms."""


def send_at_once(host: Host) -> None:
    """Turns Nagle's algorithm off: paramiko leaves it on, and each command then costs about 40 ms more.

    And has the kernel ask whether the other side is still there: a host that lost its power says nothing,
    and who only listens would wait for ever.
    """
    client = getattr(host.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    connection = getattr(transport, "sock", None)
    if isinstance(connection, socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Other systems than Linux call some of them otherwise, or have only some.
        for name, value in ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
