"""The lab's network: a bridge that no other network is reached from, one namespace per host.

The bridge is in a namespace of its own, joined to this machine by one interface. So neither this
machine's firewall nor anything else of its network settings comes between the hosts, and nothing
of them has to be changed. Hosts have no route to anywhere else: what they install comes from the
site host.
"""

import contextlib
import ipaddress
import json
from pathlib import Path

from lab import LabError
from lab.process import attempt, run
from lab.topology import CONTROL_ADDRESS, CONTROL_LINK, NETWORK, Host

SWITCH = "mmfleet"
BRIDGE = "bridge0"

_NAMESPACES = Path("/run/netns")


def namespace(host: str) -> str:
    """Name of a host's network namespace."""
    return f"{SWITCH}-{host}"


def namespace_path(host: str) -> Path:
    """File by which systemd-nspawn is given a host's network namespace."""
    return _NAMESPACES / namespace(host)


def ensure_switch() -> None:
    """Make the bridge and this machine's own interface to it, if they are not there.

    Raises LabError if this machine already uses the lab's addresses for something else.
    """
    if _exists(SWITCH) and _link_exists(CONTROL_LINK):
        return
    remove_switch()
    _check_addresses_free()
    run(["ip", "netns", "add", SWITCH])
    run(["ip", "-n", SWITCH, "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"])
    run(["ip", "-n", SWITCH, "link", "set", BRIDGE, "up"])
    run(["ip", "link", "add", CONTROL_LINK, *_veth_peer("control")])
    run(["ip", "-n", SWITCH, "link", "set", "control", "master", BRIDGE, "up"])
    run(["ip", "address", "add", str(CONTROL_ADDRESS), "dev", CONTROL_LINK])
    run(["ip", "link", "set", CONTROL_LINK, "up"])


def connect(host: Host) -> None:
    """Give a host a fresh network namespace with its address, joined to the bridge."""
    disconnect(host.name)
    own = namespace(host.name)
    run(["ip", "netns", "add", own])
    mac = _mac_address(host)
    run(["ip", "-n", own, "link", "add", "eth0", "address", mac, *_veth_peer(host.name)])
    run(["ip", "-n", SWITCH, "link", "set", host.name, "master", BRIDGE, "up"])
    run(["ip", "-n", own, "address", "add", f"{host.address}/{NETWORK.prefixlen}", "dev", "eth0"])
    run(["ip", "-n", own, "link", "set", "eth0", "up"])


def disconnect(host: str) -> None:
    """Remove a host's network namespace and its place at the bridge, as far as they exist."""
    if _exists(SWITCH):
        # The kernel would remove it with the namespace, but some time later.
        attempt(["ip", "-n", SWITCH, "link", "delete", host])
    _delete(namespace(host))


def remove_switch() -> None:
    """Remove the bridge and this machine's interface to it, as far as they exist."""
    if _link_exists(CONTROL_LINK):
        attempt(["ip", "link", "delete", CONTROL_LINK])
    _delete(SWITCH)
    if _NAMESPACES.is_dir() and not any(_NAMESPACES.iterdir()):
        # `ip netns` mounts this directory on itself, and does so again when it is needed.
        attempt(["umount", _NAMESPACES])


def hosts() -> set[str]:
    """Names of all hosts that have a network namespace."""
    return {path.name.removeprefix(f"{SWITCH}-") for path in _NAMESPACES.glob(f"{SWITCH}-*")}


def connected(host: str) -> bool:
    """Whether a host has its place at the bridge."""
    return _exists(SWITCH) and not attempt(["ip", "-n", SWITCH, "link", "show", host]).returncode


def leftovers() -> list[str]:
    """Namespaces and interfaces of the lab that are still there."""
    namespaces = [f"network namespace {path.name}" for path in _NAMESPACES.glob(f"{SWITCH}*")]
    return namespaces + ([f"interface {CONTROL_LINK}"] if _link_exists(CONTROL_LINK) else [])


def _veth_peer(name: str) -> list[str]:
    return ["type", "veth", "peer", "name", name, "netns", SWITCH]


def _mac_address(host: Host) -> str:
    """Always the same for a host, or others would look for its last one for half a minute."""
    locally_administered = bytes([0x02, 0x00]) + ipaddress.IPv4Address(host.address).packed
    return locally_administered.hex(":")


def _exists(name: str) -> bool:
    return (_NAMESPACES / name).exists()


def _link_exists(name: str) -> bool:
    return Path("/sys/class/net", name).exists()


def _delete(name: str) -> None:
    if _exists(name):
        run(["ip", "netns", "delete", name])
    # What a crash between making the file and mounting the namespace over it leaves behind.
    with contextlib.suppress(FileNotFoundError):
        (_NAMESPACES / name).unlink()


def _check_addresses_free() -> None:
    for route in json.loads(run(["ip", "-json", "-4", "route", "show"]) or "[]"):
        if route["dst"] == "default":
            continue
        if ipaddress.IPv4Network(route["dst"], strict=False).overlaps(NETWORK):
            raise LabError(
                f"the lab's network {NETWORK} overlaps this machine's {route['dst']} on "
                f"{route.get('dev', 'another interface')}; the lab cannot run beside it"
            )
