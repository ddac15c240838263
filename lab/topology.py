"""Which hosts the lab has and where: names, groups, addresses. Pure but for the environment.

`LAB_HOSTS` is the number of simulated 8-GPU hosts (default 3), `LAB_CPU=0` leaves out the host with
the real vLLM. `inventories/lab.py` reads the same functions, so the lab and the inventory agree
whenever both see the same environment.
"""

import os
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network

NETWORK = IPv4Network("10.86.0.0/16")

# The machine's own end of the lab's network: an interface and its address.
CONTROL_LINK = "mmfleet0"
CONTROL_ADDRESS = IPv4Interface("10.86.0.1/16")

DEFAULT_GPU_HOSTS = 3
# The last octet of a GPU host's address is its number.
MAX_GPU_HOSTS = 254


@dataclass(frozen=True)
class Host:
    """One host of the lab.

    name: host name, also the name to reach it by within the lab
    group: inventory group, None for the site host, which no inventory has
    address: IPv4 address on the lab's network
    """

    name: str
    group: str | None
    address: str


def site() -> Host:
    """The host that plays the outside world: apt repositories, package index, model hub."""
    return Host("site", None, "10.86.0.2")


def hosts() -> tuple[Host, ...]:
    """All hosts of the inventory, GPU hosts first.

    Raises ValueError, with a line for a person, if LAB_HOSTS or LAB_CPU is not understood.
    """
    gpu_hosts = tuple(
        Host(f"h20-{number:02d}", "h20", f"10.86.1.{number}")
        for number in range(1, _gpu_host_count() + 1)
    )
    return (*gpu_hosts, Host("cpu-01", "cpu", "10.86.2.1")) if _with_cpu_host() else gpu_hosts


def _gpu_host_count() -> int:
    text = os.environ.get("LAB_HOSTS") or str(DEFAULT_GPU_HOSTS)
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_GPU_HOSTS):
        raise ValueError(f"LAB_HOSTS: {text!r} is not a number of hosts; use 0 to {MAX_GPU_HOSTS}")
    return int(text)


def _with_cpu_host() -> bool:
    text = os.environ.get("LAB_CPU") or "1"
    if text not in {"0", "1"}:
        raise ValueError(f"LAB_CPU: {text!r} is neither 0 nor 1; use 0 to leave cpu-01 out")
    return text == "1"
