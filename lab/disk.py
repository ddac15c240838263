"""A host's own disk: an overlay over the shared base, and the files by which it is this host.

Throwing the overlay's upper layer away makes the host new again. The lab's own files are the same
whether written to a disk that lies still or into a running host.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import keys
from lab.paths import HOSTS, REQUESTS
from lab.topology import CONTROL_ADDRESS, Host, hosts, site

SITE_SERVER = Path(__file__).resolve().parent / "site" / "server.py"

SITE_UNIT = "etc/systemd/system/lab-site.service"
SITE_PORT = 80

# Where the site host sees what it serves and what it was asked; directories of this machine.
SITE_ROOT_INSIDE = "/srv/site"
SITE_LOG_INSIDE = "/var/log/site"

_SITE_SERVER_INSIDE = "usr/local/lib/lab-site/server.py"
# The site's server has to be started again when one of these changes.
SITE_FILES = frozenset({SITE_UNIT, _SITE_SERVER_INSIDE})

_SITE_UNIT_TEXT = f"""\
[Unit]
Description=The lab's apt repositories, package index and model hub

[Service]
ExecStart=/usr/bin/python3 /{_SITE_SERVER_INSIDE} \\
    --root {SITE_ROOT_INSIDE} \\
    --port {SITE_PORT} \\
    --log {SITE_LOG_INSIDE}/{REQUESTS.name}
Restart=always
RestartSec=1
"""

# As a dependency in a file, because links are not among the files that a host is given.
_SITE_TARGET = """\
[Unit]
Wants=lab-site.service
"""


@dataclass(frozen=True)
class File:
    """Contents and mode of a file of the lab's in a host."""

    text: str
    mode: int = 0o644


@dataclass(frozen=True)
class Disk:
    """The directories of one host on this machine."""

    host: str

    @property
    def directory(self) -> Path:
        """All that belongs to the host."""
        return HOSTS / self.host

    @property
    def upper(self) -> Path:
        """What the host has written, over the base."""
        return self.directory / "upper"

    @property
    def work(self) -> Path:
        """The overlay's own; on the same file system as `upper`."""
        return self.directory / "work"

    @property
    def merged(self) -> Path:
        """Where the disk is mounted, in the supervisor's mount namespace only."""
        return self.directory / "merged"

    @property
    def lab(self) -> Path:
        """The host's /etc/lab."""
        return self.directory / "lab"

    @property
    def console(self) -> Path:
        """What systemd-nspawn and the host's console said since the host was last started."""
        return self.directory / "console.log"

    @property
    def boot_specification(self) -> Path:
        """The supervisor's JSON file."""
        return self.directory / "boot.json"

    @property
    def nspawn_pid(self) -> Path:
        """Names the process of the running systemd-nspawn."""
        return self.directory / "nspawn.pid"

    @property
    def record(self) -> Path:
        """What was made: the host's group and address, its base, a digest of the lab's files."""
        return self.directory / "host.json"

    def base(self) -> str | None:
        """Name of the base that the disk lies over, None if the host was never started."""
        return self._recorded("base")

    def files_digest(self) -> str | None:
        """Digest of the lab's files that the disk has, None if the host was never started."""
        return self._recorded("files")

    def _recorded(self, key: str) -> str | None:
        if not self.record.exists():
            return None
        value: str = json.loads(self.record.read_text(encoding="utf-8"))[key]
        return value

    def discard(self) -> None:
        """Throw away everything that the host has written; it must not be running."""
        # Without its record, what a crash in between leaves is thrown away at the next boot.
        self.record.unlink(missing_ok=True)
        for layer in (self.upper, self.work):
            if layer.exists():
                shutil.rmtree(layer)

    def prepare(self, base: Path, files: dict[str, File]) -> None:
        """Make the directories and write the lab's files; the host must not be running."""
        for directory in (self.upper, self.work, self.merged):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o755)
        for name, file in files.items():
            self._write(base, name, file)

    def remember(self, host: Host, base: Path, files: dict[str, File]) -> None:
        """Record what the disk is made of."""
        document = {
            "group": host.group,
            "address": host.address,
            "base": base.name,
            "files": digest(files),
        }
        self.record.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def recorded_host(self) -> Host | None:
        """The host as it was when it was last started, None if it never was."""
        if not self.record.exists():
            return None
        document = json.loads(self.record.read_text(encoding="utf-8"))
        return Host(self.host, document["group"], document["address"])

    def _write(self, base: Path, name: str, file: File) -> None:
        path = self.upper / name
        # A directory of the upper layer hides the mode of the base's directory of that name.
        for parent in [*reversed(path.relative_to(self.upper).parents)][1:]:
            directory = self.upper / parent
            if not directory.exists():
                directory.mkdir()
                same = base / parent
                directory.chmod(same.stat().st_mode & 0o7777 if same.is_dir() else 0o755)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(file.text, encoding="utf-8")
        path.chmod(file.mode)


def known() -> list[str]:
    """Names of all hosts that have a directory."""
    return sorted(path.name for path in HOSTS.glob("*") if path.is_dir())


def lab_files(host: Host) -> dict[str, File]:
    """The files, by path below the root, that make a host this host of this lab."""
    private, public = keys.host_key(host.name)
    files = {
        "etc/hostname": File(f"{host.name}\n"),
        "etc/hosts": File(_hosts_file(host)),
        "etc/machine-id": File(f"{hashlib.sha256(host.name.encode()).hexdigest()[:32]}\n", 0o444),
        f"etc/ssh/{keys.HOST_KEY}": File(private, 0o600),
        f"etc/ssh/{keys.HOST_KEY}.pub": File(public),
        "root/.ssh/authorized_keys": File(keys.control_public_key(), 0o600),
    }
    # No source of packages: where hosts install from is what group_data/lab.py says.
    return files | _site_files() if host == site() else files


def digest(files: dict[str, File]) -> str:
    """A digest of the files' names, contents and modes."""
    document = {name: [file.text, file.mode] for name, file in files.items()}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _hosts_file(host: Host) -> str:
    lines = ["127.0.0.1 localhost", f"{CONTROL_ADDRESS.ip} control"]
    lines += [f"{other.address} {other.name}" for other in (site(), *hosts())]
    if host not in (site(), *hosts()):
        lines.append(f"{host.address} {host.name}")
    return "\n".join([*lines, "::1 localhost ip6-localhost ip6-loopback", ""])


def _site_files() -> dict[str, File]:
    return {
        _SITE_SERVER_INSIDE: File(SITE_SERVER.read_text(encoding="utf-8")),
        SITE_UNIT: File(_SITE_UNIT_TEXT),
        "etc/systemd/system/multi-user.target.d/lab.conf": File(_SITE_TARGET),
    }
