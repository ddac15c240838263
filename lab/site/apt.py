"""The site's apt repositories: Debian packages with all that they need, and stand-ins of NVIDIA's.

`ensure` makes under the site's root

    keys/lab.asc, keys/lab.gpg   the public key that signs both, ASCII-armoured and binary
    apt/debian/                  the packages in PACKAGES that the hosts' base lacks, with every
                                 dependency that it lacks, fetched from the machine's own mirrors
    apt/nvidia/                  packages built from lab/standins/nvidia (see packages.yaml there)

Both are flat repositories (`URIs: …/apt/debian/`, `Suites: /`), as NVIDIA's own is. A host uses
them with `Signed-By:` the key. The machine itself is not changed: apt runs with a state of its own,
and the secret key, made once and worth nothing elsewhere, stays in the cache.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import LabError, paths
from lab.process import Progress, run

# What the project's tasks install on hosts, and what runs there needs.
PACKAGES = (
    "aria2",
    "ca-certificates",
    "docker.io",
    "git",
    "git-lfs",
    "libgomp1",
    "libnuma1",
    "libtcmalloc-minimal4",
    "nginx-light",
    "numactl",
    "python3-pip",
    "python3-venv",
)

STANDINS = Path(__file__).resolve().parent.parent / "standins" / "nvidia"
MAINTAINER = "minimax-fleet lab <lab@minimax-fleet.invalid>"
# Of NVIDIA's packages for Debian, whatever the driver's version.
NVIDIA_REVISION = "1"
SECRET_KEYS = paths.CACHE / "gnupg"
STAMP = ".inputs"


@dataclass(frozen=True)
class StandIn:
    """One package to be built: what packages.yaml says of it, for one version.

    files: path of a template in lab/standins/nvidia -> (path on the host, octal mode)
    scripts: maintainer script -> path of its template
    """

    name: str
    version: str
    package_version: str
    """The Debian version: the version and the packaging's."""
    description: str
    relations: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    scripts: dict[str, str] = field(default_factory=dict)


def ensure(site_root: Path, base: Path, progress: Progress) -> None:
    """Make the key and both repositories, or leave what is up to date as it is.

    site_root: the directory that the site host serves
    base: root of the hosts' base system, to know what its hosts have already
    progress: told, in a line for a person, what is being done where it takes a while

    Raises LabError.
    """
    fingerprint = _ensure_key(site_root / "keys", progress)
    _ensure_repository(
        site_root / "apt" / "nvidia",
        "lab: NVIDIA's driver (stand-ins)",
        _digest(fingerprint, *(path.read_bytes() for path in _standin_files()), _own_source()),
        fingerprint,
        lambda directory: _build_nvidia(directory, progress),
    )
    status = base / "var/lib/dpkg/status"
    if not status.is_file():
        raise LabError(f"{base}: no Debian system: {status} is missing; build the base first")
    _ensure_repository(
        site_root / "apt" / "debian",
        "lab: Debian packages",
        _digest(
            fingerprint, status.read_bytes(), " ".join(PACKAGES), os.uname().release, _own_source()
        ),
        fingerprint,
        lambda directory: _build_debian(directory, status, progress),
    )


def standins(catalogue: dict[str, Any]) -> Iterator[StandIn]:
    """Every package of packages.yaml in every version that its branch has, or in its own.

    Raises KeyError if an entry lacks a name or a description.
    """
    for version in catalogue["versions"]:
        branch = int(version.partition(".")[0])
        words = {
            "version": version,
            "branch": str(branch),
            "package_version": f"{version}-{NVIDIA_REVISION}",
        }
        for entry in catalogue["packages"]:
            if entry.get("since_branch", 0) <= branch <= entry.get("until_branch", branch):
                yield _standin(entry, words)
    for entry in catalogue["others"]:
        yield _standin(entry, {key: entry[key] for key in ("version", "package_version")})


def _standin(entry: dict[str, Any], words: dict[str, str]) -> StandIn:
    """An entry of packages.yaml; `words` fill its name and its relations."""
    script_name = entry.get("scripts_of", entry["name"])
    return StandIn(
        name=entry["name"].format(**words),
        version=words["version"],
        package_version=words["package_version"],
        description=entry["description"],
        relations={
            relation.capitalize(): ", ".join(entry[relation]).format(**words)
            for relation in ("depends", "provides", "conflicts", "replaces")
            if relation in entry
        },
        files={
            file["from"]: (file["to"], file.get("mode", "644")) for file in entry.get("files", [])
        },
        scripts={script: f"{script_name}.{script}" for script in entry.get("scripts", [])},
    )


def _own_source() -> bytes:
    return Path(__file__).read_bytes()


def _standin_files() -> list[Path]:
    return sorted(path for path in STANDINS.iterdir() if path.is_file())


def _digest(*inputs: str | bytes) -> str:
    digest = hashlib.sha256()
    for value in inputs:
        data = value.encode() if isinstance(value, str) else value
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


@contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    """A new directory that takes the place of another once the block has ended well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}."
    for left_over in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over)
    new = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    # The site's server, and apt's own user, are not root.
    new.chmod(0o755)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    if directory.exists():
        directory.rename(directory.with_name(f"{prefix}old"))
    new.rename(directory)
    shutil.rmtree(directory.with_name(f"{prefix}old"), ignore_errors=True)


def _ensure_repository(
    directory: Path,
    label: str,
    digest: str,
    fingerprint: str,
    build: Callable[[Path], None],
) -> None:
    stamp = directory / STAMP
    if stamp.is_file() and stamp.read_text().strip() == digest:
        return
    with _replaced(directory) as new:
        build(new)
        _index(new, label, fingerprint)
        (new / STAMP).write_text(f"{digest}\n")


def _index(directory: Path, label: str, fingerprint: str) -> None:
    """Write and sign a flat repository's index files."""
    # Names in the index are relative to where the tool runs.
    archive = ["env", f"--chdir={directory}", "apt-ftparchive"]
    (directory / "Packages").write_text(run([*archive, "packages", "."]))
    run(["gzip", "--keep", "--no-name", directory / "Packages"])
    release = {"Origin": "minimax-fleet", "Label": label, "Architectures": "amd64"}
    options = [f"-oAPT::FTPArchive::Release::{key}={value}" for key, value in release.items()]
    (directory / "Release").write_text(run([*archive, *options, "release", "."]))
    sign = [*_gpg(), "--local-user", fingerprint]
    run([*sign, "--clearsign", "--output", directory / "InRelease", directory / "Release"])
    detach = ["--armor", "--detach-sign", "--output", str(directory / "Release.gpg")]
    run([*sign, *detach, directory / "Release"])
    _stop_agent()


def _gpg() -> list[str | Path]:
    return ["gpg", "--homedir", SECRET_KEYS, "--batch", "--yes", "--quiet", "--no-tty"]


def _stop_agent() -> None:
    """End the agent that gpg leaves running for its home directory."""
    run(["gpgconf", "--homedir", SECRET_KEYS, "--kill", "all"])


def _ensure_key(directory: Path, progress: Progress) -> str:
    """Make the signing key once, export its public half, and return its fingerprint."""
    fingerprint = _fingerprint()
    if fingerprint is None:
        progress("making the key that signs the lab's apt repositories")
        SECRET_KEYS.mkdir(parents=True, exist_ok=True, mode=0o700)
        SECRET_KEYS.chmod(0o700)
        key = ["--quick-generate-key", MAINTAINER, "ed25519", "sign", "never"]
        run([*_gpg(), "--passphrase", "", *key])
        fingerprint = _fingerprint()
        if fingerprint is None:
            raise LabError(f"{SECRET_KEYS}: gpg made no key; remove this directory and try again")
    stamp = directory / STAMP
    if not stamp.is_file() or stamp.read_text().strip() != fingerprint:
        with _replaced(directory) as new:
            run([*_gpg(), "--export", "--output", new / "lab.gpg", fingerprint])
            run([*_gpg(), "--armor", "--export", "--output", new / "lab.asc", fingerprint])
            (new / STAMP).write_text(f"{fingerprint}\n")
    _stop_agent()
    return fingerprint


def _fingerprint() -> str | None:
    """The fingerprint of the lab's key, None if there is none yet."""
    if not SECRET_KEYS.is_dir():
        return None
    for line in run([*_gpg(), "--with-colons", "--list-secret-keys"]).splitlines():
        columns = line.split(":")
        if columns[0] == "fpr":
            return columns[9]
    return None


def _build_nvidia(directory: Path, progress: Progress) -> None:
    progress("building the stand-ins of NVIDIA's driver packages")
    catalogue = yaml.safe_load((STANDINS / "packages.yaml").read_text())
    for package in standins(catalogue):
        _build_package(directory, package)


def _build_package(directory: Path, package: StandIn) -> None:
    """Build one .deb of a stand-in into a directory."""

    def fill(template: str) -> str:
        return (STANDINS / template).read_text().replace("@VERSION@", package.version)

    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch) / package.name
        control = root / "DEBIAN"
        control.mkdir(parents=True)
        fields = {
            "Package": package.name,
            "Version": package.package_version,
            "Architecture": "amd64",
            "Maintainer": MAINTAINER,
            "Section": "contrib/libs",
            "Priority": "optional",
            **package.relations,
            "Description": f"{package.description} (lab stand-in)",
        }
        (control / "control").write_text(
            "".join(f"{name}: {value}\n" for name, value in fields.items())
        )
        for script, template in package.scripts.items():
            (control / script).write_text(fill(template))
            (control / script).chmod(0o755)
        for template, (target, mode) in package.files.items():
            path = root / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fill(template))
            path.chmod(int(mode, 8))
        # As in a pool, the file's name has no epoch.
        version = package.package_version.rpartition(":")[2]
        _deb(root, directory / f"{package.name}_{version}_amd64.deb")


def _deb(root: Path, target: Path) -> None:
    run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", root, target])


def _build_debian(directory: Path, status: Path, progress: Progress) -> None:
    """Fetch PACKAGES and all that they need beyond a system with this dpkg status file.

    apt itself decides what that is, with the machine's own sources, but with a state and a cache
    of its own.
    """
    progress(f"fetching {len(PACKAGES)} Debian packages and what they need")
    with tempfile.TemporaryDirectory(prefix="minimax-fleet-apt-") as scratch:
        state = Path(scratch)
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True)
        options = [
            f"-oDir::State::lists={state}/lists",
            f"-oDir::State::status={status}",
            f"-oDir::State::extended_states={state}/extended_states",
            f"-oDir::Cache={state}/cache",
            # The machine may clear its cache after each run, or tell its desktop of the update.
            "-oAPT::Keep-Downloaded-Packages=true",
            "-o#clear=DPkg::Post-Invoke",
            "-o#clear=APT::Update::Post-Invoke",
            "-o#clear=APT::Update::Post-Invoke-Success",
            # Fetching as another user fails in a directory that only root can enter.
            "-oAPT::Sandbox::User=root",
        ]
        run(["apt-get", *options, "update"])
        install = ["--yes", "--no-install-recommends", "--download-only", "install"]
        run(["apt-get", *options, *install, *PACKAGES])
        for package in sorted((state / "cache/archives").glob("*.deb")):
            # As in Debian's own pool, the file's name has no epoch.
            shutil.move(package, directory / re.sub(r"_\d+%3a", "_", package.name))
    _build_kernel_headers(directory)


def _build_kernel_headers(directory: Path) -> None:
    """Build an empty package with the running kernel's name for its headers.

    A driver's module is built for the kernel that runs, so a host has to install these; for this
    machine's kernel no repository has them.
    """
    release = os.uname().release
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch) / "headers"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: linux-headers-{release}\n"
            "Version: 1\n"
            "Architecture: amd64\n"
            f"Maintainer: {MAINTAINER}\n"
            "Section: kernel\n"
            "Priority: optional\n"
            f"Description: Header files for Linux {release} (lab stand-in)\n"
        )
        headers = root / f"usr/src/linux-headers-{release}"
        headers.mkdir(parents=True)
        (headers / "README").write_text("Stands in for the kernel's headers in a lab host.\n")
        modules = root / "lib/modules" / release
        modules.mkdir(parents=True)
        (modules / "build").symlink_to(f"/usr/src/linux-headers-{release}")
        # A driver that was there first gets its module now, by dkms' hook.
        postinst = root / "DEBIAN/postinst"
        postinst.write_text(
            "#!/bin/sh\n"
            "set -e\n"
            'if [ "$1" = configure ] && [ -x /usr/lib/nvidia/lab-module ]; then\n'
            "    /usr/lib/nvidia/lab-module build\n"
            "    /usr/lib/nvidia/lab-module load\n"
            "fi\n"
        )
        postinst.chmod(0o755)
        _deb(root, directory / f"linux-headers-{release}_1_amd64.deb")
