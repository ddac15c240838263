"""The system that all hosts of the lab start from: a small Debian or Ubuntu with systemd and sshd.

It is the machine's own release, from the machine's own apt sources, so that it can be built
wherever apt works; nothing of the machine's configuration stays in it. Once built it is never
written again: every host lays its own disk over it.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import LabError
from lab.paths import BASE
from lab.prerequisites import check_file_system, os_release
from lab.process import Progress, follow, run

# What a server installation has and the roll-out may expect; everything else it must install.
# A compiler and Python's headers are not for the hosts' own sake: the fleet installs them, and on
# twenty hosts that share two cores that is the one installation that would be felt.
PACKAGES = (
    "ca-certificates",
    "curl",
    "dbus",
    "g++",
    "gcc",
    "iproute2",
    "kmod",
    "openssh-server",
    "procps",
    "python3",
    "python3-dev",
    "sudo",
    "systemd",
    "systemd-sysv",
)

# Kept out of the base and of what hosts install later; copyright files stay.
DPKG_OPTIONS = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
    # A lab host may be lost at any time; waiting for the disk only makes it slow.
    "force-unsafe-io",
)

# Needless or wrong in a host whose network, clock and devices come from outside.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-hugepages.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "modprobe@.service",
    "motd-news.timer",
    "ssh.socket",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-firstboot.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-udevd.service",
)

ENABLED_UNITS = ("ssh.service", "sys-bus-pci-devices.mount")

CONFIGURATION = {
    "etc/apt/apt.conf.d/lab": 'Acquire::Languages "none";\n',
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/fstab": "",
    "etc/hostname": "",
    # Each host has its own from the start; systemd must not find another's.
    "etc/machine-id": "",
    "etc/resolv.conf": "# The lab has no name server: /etc/hosts has all its names.\n",
    "etc/ssh/sshd_config.d/lab.conf": """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
MaxStartups 200
MaxSessions 200
""",
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\n",
    # systemd-nspawn mounts its view of sysfs over anything that it is asked to mount there.
    "etc/systemd/system/sys-bus-pci-devices.mount": """\
[Unit]
Description=Simulated PCI devices
DefaultDependencies=no
Before=sysinit.target
ConditionPathIsDirectory=/etc/lab/pci

[Mount]
What=/etc/lab/pci
Where=/sys/bus/pci/devices
Type=none
Options=bind,ro

[Install]
WantedBy=sysinit.target
""",
}

# Left by apt, dpkg, sshd's installation and mmdebstrap itself; not part of a fresh host.
EMPTIED_DIRECTORIES = ("etc/update-motd.d", "var/cache/apt", "var/lib/apt/lists", "var/log")
REMOVED_FILES = (
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/apt/sources.list",
    "etc/apt/sources.list.d/*",
    "etc/ssh/ssh_host_*",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/*-old",
)


@dataclass(frozen=True, order=True)
class AptSource:
    """One repository of the machine's own distribution, as apt on this machine sees it."""

    uri: str
    suite: str
    component: str


def ensure(progress: Progress) -> Path:
    """The directory of the base system, built if it is not there.

    Raises LabError if it cannot be built.
    """
    release = os_release()
    architecture = run(["dpkg", "--print-architecture"]).strip()
    target = BASE / digest(release["ID"], release["VERSION_CODENAME"], architecture)
    if target.is_dir():
        return target
    check_file_system(BASE, "LAB_CACHE")
    sources = apt_sources(release["ID"], release["VERSION_CODENAME"], progress)
    progress(f"building the hosts' base system, {release['PRETTY_NAME']}; about a minute, once")
    BASE.mkdir(parents=True, exist_ok=True)
    for unfinished in BASE.glob("*.unfinished"):
        shutil.rmtree(unfinished)
    tree = target.with_suffix(".unfinished")
    _bootstrap(tree, sources, progress)
    _configure(tree)
    tree.rename(target)
    progress(f"the base system is ready: {target}")
    return target


def digest(distribution: str, codename: str, architecture: str) -> str:
    """The name of a base system: a digest of everything that decides what is in it."""
    recipe = [
        [distribution, codename, architecture],
        PACKAGES,
        DPKG_OPTIONS,
        MASKED_UNITS,
        ENABLED_UNITS,
        CONFIGURATION,
        EMPTIED_DIRECTORIES,
        REMOVED_FILES,
    ]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def apt_sources(distribution: str, codename: str, progress: Progress) -> list[AptSource]:
    """The machine's apt sources for its own release; what other vendors offer is left out.

    apt itself is asked, so both of its source formats and mirrors of any name are understood:
    a repository's origin is what its signed Release file says.

    Raises LabError if there are none.
    """
    found = _apt_sources(distribution, codename)
    if not found:
        progress("asking this machine's apt sources what they have (apt-get update)")
        run(["apt-get", "update", "-q"])
        found = _apt_sources(distribution, codename)
    if not found:
        raise LabError(
            f"/etc/apt: no source for {distribution} {codename} that `apt-get update` can read; "
            f"add one, the lab's hosts are made from it"
        )
    return found


def _apt_sources(distribution: str, codename: str) -> list[AptSource]:
    columns = "$(ORIGIN)\t$(RELEASE)\t$(REPO_URI)\t$(COMPONENT)"
    listed = run(["apt-get", "indextargets", f"--format={columns}", "Created-By: Packages"])
    suites = {codename, f"{codename}-updates", f"{codename}-security"}
    rows = [line.split("\t") for line in listed.splitlines()]
    return sorted(
        {
            AptSource(uri, suite, component)
            for origin, suite, uri, component in rows
            if origin.casefold() == distribution and suite in suites
        }
    )


def _bootstrap(tree: Path, sources: list[AptSource], progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="lab-base-") as scratch:
        source_list = Path(scratch, "sources.list")
        source_list.write_text(
            "".join(f"deb {s.uri} {s.suite} {s.component}\n" for s in sources), encoding="utf-8"
        )
        apt_options = Path(scratch, "apt.conf")
        apt_options.write_text(_apt_transport_options(), encoding="utf-8")
        argv = [
            "mmdebstrap",
            # As root this means: in a mount namespace of its own, so that a build that is
            # interrupted leaves no mounts.
            "--mode=unshare",
            "--format=directory",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            f"--aptopt={apt_options}",
            *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
            "",
            str(tree),
            str(source_list),
        ]

        def step(line: str) -> None:
            if line.startswith("I: "):
                progress(f"  {line[3:]}")

        follow(argv, step)


def _apt_transport_options() -> str:
    """How apt on this machine reaches its sources: proxies, credentials, certificates, dates."""
    wanted = ("Acquire::http", "Acquire::Check-", "Acquire::Force", "Acquire::Retries")
    options = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith(wanted)]
    options += [
        'Dir::Etc::netrc "/etc/apt/auth.conf";',
        'Dir::Etc::netrcparts "/etc/apt/auth.conf.d";',
    ]
    return "\n".join([*options, ""])


def _configure(tree: Path) -> None:
    for directory in EMPTIED_DIRECTORIES:
        for entry in (tree / directory).rglob("*"):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
    for pattern in REMOVED_FILES:
        for entry in tree.glob(pattern):
            entry.unlink()
    for name, text in CONFIGURATION.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
    run(["systemctl", f"--root={tree}", "--quiet", "mask", *MASKED_UNITS])
    run(["systemctl", f"--root={tree}", "--quiet", "enable", *ENABLED_UNITS])
    run(["systemctl", f"--root={tree}", "--quiet", "set-default", "multi-user.target"])
