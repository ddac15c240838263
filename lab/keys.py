"""SSH keys: the control machine's own, one per host, and what lets each check the other."""

from collections.abc import Iterable
from pathlib import Path

from lab.paths import CONTROL, CONTROL_KEY, HOSTS, KNOWN_HOSTS, SSH_CONFIG
from lab.process import run
from lab.topology import NETWORK, Host

HOST_KEY = "ssh_host_ed25519_key"


def control_public_key() -> str:
    """The public key by which root's account on every host is reached.

    Made if there is none, which must not happen in several threads at once.
    """
    CONTROL.mkdir(exist_ok=True)
    return _public_key(CONTROL_KEY, "lab control")


def host_key(host: str) -> tuple[str, str]:
    """A host's private and public key, made once and kept until the lab is purged."""
    path = HOSTS / host / "keys" / HOST_KEY
    path.parent.mkdir(parents=True, exist_ok=True)
    public = _public_key(path, host)
    return path.read_text(encoding="utf-8"), public


def write_client_configuration(hosts: Iterable[Host]) -> None:
    """Write .lab/known_hosts and .lab/ssh_config for these hosts."""
    known, config = [], [_common_configuration()]
    for host in hosts:
        kind, key, *_ = host_key(host.name)[1].split()
        known.append(f"{host.name},{host.address} {kind} {key}\n")
        config.append(f"Host {host.name}\n    HostName {host.address}\n")
    _replace(KNOWN_HOSTS, "".join(known))
    _replace(SSH_CONFIG, "\n".join(config))


def _common_configuration() -> str:
    addresses = f"{NETWORK.network_address.packed[0]}.{NETWORK.network_address.packed[1]}.*"
    return f"""\
# Written by `lab up`; use it as: ssh -F {SSH_CONFIG} h20-01
Host site h20-* cpu-* {addresses}
    User root
    IdentityFile {CONTROL_KEY}
    IdentitiesOnly yes
    UserKnownHostsFile {KNOWN_HOSTS}
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 10
"""


def _public_key(path: Path, comment: str) -> str:
    public = path.with_name(f"{path.name}.pub")
    if not public.exists():
        path.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path])
    return public.read_text(encoding="utf-8")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
