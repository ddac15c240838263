"""What the machine that carries the lab must be and have."""

import os
import platform
import re
from pathlib import Path

from lab import LabError
from lab.process import Progress, attempt, run

PACKAGES = (
    "apt-utils",  # apt-ftparchive: indexes of the site's apt repositories
    "ca-certificates",
    "createrepo-c",  # what the tests of Enterprise Linux' side install from
    "dnf",
    "dnf-plugins-core",
    "dpkg-dev",  # dpkg-deb and friends: the stand-in packages
    "gcc",  # the library of the stand-in vLLM's nightly builds
    "git",  # its sources
    "gnupg",  # signs the site's apt repositories
    "iproute2",  # namespaces, bridge, addresses
    "mmdebstrap",  # the hosts' base system
    "openssh-client",
    "python3-dev",
    "rpm",
    "systemd-container",  # systemd-nspawn: the hosts
)

DISTRIBUTIONS = ("debian", "ubuntu")


def os_release() -> dict[str, str]:
    """The machine's /etc/os-release, keys as they are there."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def check_machine() -> None:
    """Raise LabError if this machine or this user cannot carry a lab."""
    if platform.system() != "Linux":
        raise LabError(f"the lab needs Linux, this is {platform.system()}; use a Debian or Ubuntu")
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces, mounts and cgroups and so needs root; use sudo")
    release = os_release()
    if release.get("ID") not in DISTRIBUTIONS:
        raise LabError(
            f"the lab's hosts are made from the machine's own packages, and this machine is "
            f"{release.get('PRETTY_NAME', 'unknown')}; use Debian or Ubuntu"
        )


def ensure_prerequisites(progress: Progress) -> None:
    """Install by apt what the lab needs and this machine lacks.

    Raises LabError if this machine cannot carry a lab or apt fails.
    """
    check_machine()
    missing = missing_packages()
    if not missing:
        return
    progress(f"installing on this machine, by apt: {' '.join(missing)}")
    run(["apt-get", "update", "-q"])
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    run([*environment, "apt-get", "install", "-q", "-y", "--no-install-recommends", *missing])


def missing_packages() -> list[str]:
    """Those of PACKAGES that are not installed on this machine."""
    # dpkg-query exits 1 as soon as one of them is unknown, and still lists the others.
    listed = attempt(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\\n", *PACKAGES]
    ).stdout
    installed = {line.split()[0] for line in listed.splitlines() if line.endswith(" installed")}
    return [package for package in PACKAGES if package not in installed]


def file_system_type(path: Path) -> str:
    """The type of the file system that `path`, or its closest existing parent, is on."""
    while not path.exists():
        path = path.parent
    return run(["findmnt", "--noheadings", "--output=FSTYPE", f"--target={path}"]).strip()


def check_file_system(path: Path, variable: str) -> None:
    """Raise LabError if hosts' disks cannot be kept under `path`, which `variable` moves."""
    if set(str(path)) & set(",:\\"):
        raise LabError(f"{path}: has a comma, colon or backslash, which overlays do not take")
    kind = file_system_type(path)
    if re.fullmatch(r"overlay|nfs\d?|9p|fuse.*|vfat|exfat", kind):
        raise LabError(
            f"{path} is on {kind}, on which no overlay can be made; "
            f"set {variable} to a directory on ext4, xfs, btrfs or tmpfs"
        )
