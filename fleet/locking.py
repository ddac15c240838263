"""Fills in a lock: uv resolves wheels, the hub is asked for models, apt mirrors for the driver.

The network I/O of `fleet lock`, and all of it; what a lock is and says is in fleet/lock.py, which is pure.
Every failure is a LockingError, one line for a person.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from fleet import credentials
from fleet.catalog import catalog
from fleet.drivers import driver_packages, package_manager, supported_systems
from fleet.lock import (
    PLATFORM,
    PYTHON,
    SHORT_COMMIT,
    UNRESOLVED,
    Asks,
    Lock,
    LockedFile,
    LockedModel,
    LockedRelease,
    LockingError,
    asked,
    is_vllm,
    name_and_version,
    nearest,
    sort_key,
    title,
)
from fleet.plan import OS_PYTHON, HostPlan
from fleet.spec import AptRepository

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Say = Callable[[str], None]
Fetch = Callable[[str], requests.Response]

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 120
HEARTBEAT_S = 10
FETCHING_THREADS = 8
LARGEST_UNLISTED_BYTES = 1 << 30
"""A file of a model that is not in LFS, and so has no SHA-256 at the hub, is fetched to be hashed."""
KEPT_VARIABLES = ("UV_CACHE_DIR", "UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_SYSTEM_CERTS")
"""Of uv's own environment variables, those that do not change what it resolves."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a lock is to be made. `upgrade` are canonical names that need not stay as they are locked;
    `python` is the version of the hosts' own, where `needs_python` says that it must be known."""

    before: Lock | None = None
    upgrade: Collection[str] = ()
    python: str | None = None
    say: Say


def resolve(plans: Iterable[HostPlan], wanted: Wanted) -> Lock:
    """The lock of a site's plans. What is locked already stays, where it does what is asked.

    Raises LockingError.
    """
    plans = list(plans)
    return Lock(
        uv=catalog().tools.uv,
        releases=sorted(_releases(plans, wanted), key=sort_key),
        drivers=dict(_drivers(plans, wanted)),
        models=sorted(_models(plans, wanted), key=lambda one: (one.repository, one.revision)),
    )


# ------------------------------------------------------------------------------------------- releases


def _releases(plans: Iterable[HostPlan], wanted: Wanted) -> Iterator[LockedRelease]:
    needed: dict[str, tuple[Asks, HostPlan]] = {}
    for plan in plans:
        for release in plan.releases:
            asks = asked(release)
            needed.setdefault(asks.model_dump_json(), (asks, plan))
    pythons = _Pythons(wanted)
    for asks, plan in needed.values():
        if asks.origin.get("kind") in UNRESOLVED:
            yield LockedRelease(asks=asks)
        else:
            yield _release(asks, plan, pythons.version(asks), wanted)


def _release(asks: Asks, plan: HostPlan, python: str, wanted: Wanted) -> LockedRelease:
    what = f"{title(asks)} for Python {python}"
    before = nearest(wanted.before.releases, asks) if wanted.before else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fleet-lock-") as folder:
        output = Path(folder) / "pylock.toml"
        if before is not None:
            output.write_text(_preferences(before), encoding="utf-8")
        arguments = _compile_arguments(asks, plan, python, Path(folder), wanted)
        environment = _environment(plan, Path(folder))
        wanted.say(f"{what}: resolving")
        _run_uv(
            [*arguments, "--output-file", str(output)],
            environment,
            lambda seconds: wanted.say(f"{what}: resolving, {seconds:.0f} s"),
        )
        document = tomllib.loads(output.read_text(encoding="utf-8"))
    packages = dict(sorted(_packages(what, document)))
    if before is not None:
        packages = dict(_unchanged_files(what, before, packages, wanted.upgrade))
    if asks.origin:
        _check_wheel(what, asks, packages)
    seconds = time.monotonic() - began
    wanted.say(f"{what}: {len(packages)} package{'s'[: len(packages) != 1]}, {seconds:.0f} s")
    return LockedRelease(asks=asks, python=python, platform=PLATFORM, packages=packages)


def _compile_arguments(
    asks: Asks, plan: HostPlan, python: str, folder: Path, wanted: Wanted
) -> list[str]:
    """`uv pip compile` and its input, for the hosts' Python and platform and not for this machine's."""
    addresses = plan.addresses
    requirements, indexes = list(asks.requirements), list(addresses["extra_index"])
    if asks.origin.get("kind") == "nightly":
        parts = (addresses["nightly"], asks.origin["commit"], asks.origin.get("variant", ""))
        indexes.insert(0, "/".join(filter(None, parts)))
        requirements.insert(0, "vllm")
    elif asks.origin.get("kind") == "wheel":
        if addresses["wheel"].startswith("file:"):
            what = "lies on the hosts, where this machine cannot read what it requires"
            raise LockingError(f"{addresses['wheel']}: {what}; put it on a mirror to lock it")
        requirements.insert(0, f"vllm @ {addresses['wheel']}")
    (folder / "asks.txt").write_text("".join(f"{one}\n" for one in requirements), encoding="utf-8")
    (folder / "overrides.txt").write_text(
        "".join(f"{one}\n" for one in asks.overrides), encoding="utf-8"
    )
    from_git = [name_and_version(one)[0] for one in requirements if " @ git+" in one]
    moving = sorted(name for name in wanted.upgrade if "/" not in name and name != PYTHON)
    backend = asks.torch_backend if asks.torch_backend != "auto" else None
    return [
        *("pip", "compile", "--quiet", "--no-header", "--no-config", "--format", "pylock.toml"),
        # A build would run the package's own code here, and its result has no hash that anybody knows.
        *("--only-binary", ":all:", "--refresh"),
        *(word for name in from_git for word in ("--no-binary", name)),
        *("--python", sys.executable, "--python-version", python, "--no-python-downloads"),
        *("--python-platform", PLATFORM),
        *(("--torch-backend", backend) if backend else ()),
        *(word for index in indexes for word in ("--index", index)),
        *(word for name in moving for word in ("--upgrade-package", name)),
        *(("--overrides", str(folder / "overrides.txt")) if asks.overrides else ()),
        str(folder / "asks.txt"),
    ]


def _preferences(before: LockedRelease) -> str:
    """What is locked as uv reads it: versions to keep. Files' hashes come from the index each time."""
    lines = ['lock-version = "1.0"', 'created-by = "fleet"']
    for name, version in before.versions.items():
        if not re.search(r"[:/\s]", version):
            lines += ["", "[[packages]]", f"name = {json.dumps(name)}"]
            lines.append(f"version = {json.dumps(version)}")
    return "\n".join(lines) + "\n"


def _packages(what: str, document: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """`name==version` of each package of a pylock.toml (PEP 751) to the hashes of the files that fit."""
    for package in document["packages"]:
        name, version, archive = package["name"], package.get("version"), package.get("archive")
        if archive is not None and "url" in archive:
            yield f"{name} @ {archive['url']}", [_hash_of(what, archive)]
        elif "vcs" in package:
            vcs = package["vcs"]
            folder = f"#subdirectory={vcs['subdirectory']}" if vcs.get("subdirectory") else ""
            yield f"{name} @ git+{vcs['url']}@{vcs['commit-id']}{folder}", []
        elif package.get("wheels"):
            yield (
                f"{name}=={version}",
                sorted(_hash_of(what, wheel) for wheel in package["wheels"]),
            )
        else:
            cure = "give a version that has one, or a wheel's address"
            raise LockingError(f"{what}: {name} has no wheel that a hash could name; {cure}")


def _hash_of(what: str, file: Mapping[str, Any]) -> str:
    """A file's hash; uv makes it itself where an index has none."""
    digest = file.get("hashes", {}).get("sha256")
    if digest is None:
        raise LockingError(
            f"{what}: no SHA-256 is known of {file['url']}; use an index that has them"
        )
    return f"sha256:{digest}"


def _unchanged_files(
    what: str,
    before: LockedRelease,
    packages: Mapping[str, list[str]],
    upgrade: Collection[str],
) -> Iterator[tuple[str, list[str]]]:
    """The packages, with the files that are locked of those that stay. Raises LockingError where the
    index has other files under the same version now."""
    for package, hashes in packages.items():
        locked = before.packages.get(package)
        name, version = name_and_version(package)
        if locked is None or name in upgrade or before.platform != PLATFORM:
            yield package, hashes
        elif set(locked) <= set(hashes):
            yield package, locked
        else:
            gone = next(one for one in locked if one not in hashes)
            raise LockingError(
                f"{what}: the index has other files of {name} {version} than are locked ({gone[:19]}… "
                f"is gone); find out why; `--upgrade {name}` takes them"
            )


def _check_wheel(what: str, asks: Asks, packages: Mapping[str, list[str]]) -> None:
    """Of what does not come from the index there must be one file, and the one that group data names."""
    own = [hash_ for name, hashes in packages.items() if is_vllm(name) for hash_ in hashes]
    if len(own) != 1:
        raise LockingError(f"{what}: {len(own)} wheels of vLLM fit, and it must be one")
    declared = asks.origin.get("sha256")
    if declared and own[0] != f"sha256:{declared}":
        found = own[0].removeprefix("sha256:")
        raise LockingError(f"{what}: its SHA-256 is {found} and group data says {declared}")


# -------------------------------------------------------------------------------------------- Pythons


class _Pythons:
    """Versions of the interpreters that releases are built on."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._known: dict[str, str] = {}

    def version(self, asks: Asks) -> str:
        """`3.11` for an interpreter on the hosts, `3.12.16` for one that uv fetches."""
        if asks.python not in self._known:
            self._known[asks.python] = self._version(asks.python)
        return self._known[asks.python]

    def _version(self, python: str) -> str:
        if re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", python):
            return python
        locked = None
        if self._wanted.before and PYTHON not in self._wanted.upgrade:
            releases = self._wanted.before.releases
            locked = next((one.python for one in releases if one.asks.python == python), None)
        if re.fullmatch(r"[0-9]+\.[0-9]+", python):
            return locked or self._fetched(python)
        named = re.search(r"python([0-9]+\.[0-9]+)$", python)
        if named:
            return named[1]
        if python != OS_PYTHON:
            raise LockingError(
                f"vllm.python: {python} does not say its version; name it …/python3.12, or write a "
                "version, which uv fetches"
            )
        version = self._wanted.python or locked
        if version is None:
            raise LockingError(f"the version of {OS_PYTHON} is not known; name it: --python 3.11")
        return version

    def _fetched(self, minor: str) -> str:
        """The newest of a minor version that uv knows where to fetch, for the hosts' platform."""
        listed = ["python", "list", minor, "--only-downloads", "--all-platforms", "--all-arches"]
        text = _run_uv([*listed, "--no-config", "--output-format", "json"], {})
        versions = [
            tuple(one["version_parts"][part] for part in ("major", "minor", "patch"))
            for one in json.loads(text)
            if (one["implementation"], one["variant"]) == ("cpython", "default")
            and (one["os"], one["arch"], one["libc"]) == ("linux", "x86_64", "gnu")
        ]
        if not versions:
            raise LockingError(f"vllm.python: uv knows no Python {minor} to fetch; write another")
        return ".".join(map(str, max(versions)))


# ------------------------------------------------------------------------------------------------- uv


def _environment(plan: HostPlan, folder: Path) -> dict[str, str]:
    """How uv reaches the site's mirrors; credentials lie in `folder`, which nobody else can read."""
    index = plan.spec.mirrors.index
    environment = {}
    if plan.credentials:
        netrc = folder / "netrc"
        netrc.touch(mode=0o600)
        netrc.write_text(plan.credentials, encoding="utf-8")
        environment["NETRC"] = str(netrc)
    if index:
        environment["UV_DEFAULT_INDEX"] = index
    insecure = [
        urlsplit(one).netloc
        for one in (index, *plan.addresses["extra_index"])
        if one and one.startswith("http:")
    ]
    if insecure:
        environment["UV_INSECURE_HOST"] = " ".join(insecure)
    environment["GIT_TERMINAL_PROMPT"] = "0"
    environment["GIT_CONFIG_COUNT"] = str(len(plan.spec.mirrors.git))
    for number, (prefix, mirror) in enumerate(plan.spec.mirrors.git.items()):
        environment[f"GIT_CONFIG_KEY_{number}"] = f"url.{mirror.rstrip('/')}/.insteadOf"
        environment[f"GIT_CONFIG_VALUE_{number}"] = prefix
    return environment


def _run_uv(
    arguments: list[str],
    environment: Mapping[str, str],
    heartbeat: Callable[[float], None] = lambda _seconds: None,
) -> str:
    """What uv prints. Raises LockingError with what it says went wrong."""
    from uv import find_uv_bin

    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("UV_") or name in KEPT_VARIABLES
    }
    try:
        process = subprocess.Popen(
            [find_uv_bin(), *arguments],
            env={**kept, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    except OSError as error:
        raise LockingError(f"uv cannot be run: {error}; it comes with `make setup`") from error
    began = time.monotonic()
    with process:
        while True:
            try:
                out, err = process.communicate(timeout=HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                heartbeat(time.monotonic() - began)
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        raise LockingError(explain(err))
    return out


LONGEST_REASON = 400
UNSATISFIABLE = "No solution found when resolving dependencies"


def explain(stderr: str) -> str:
    """What uv says of a failure, in one line: the error, its causes and the first reason it gives."""
    text = "\n".join(line for line in stderr.splitlines() if not line.startswith("warning:"))
    blocks = re.split(r"\n\s*(?=(?:error|hint):|  cause:)", f"\n{text.strip()}")
    said = []
    for block in blocks:
        line = " ".join(block.split())
        line = re.sub(r"^(?:error|cause):\s*", "", line)
        if line.startswith("Because"):
            # Further sentences go on from this one, up to what was asked for.
            line = line.split(". And because ")[0].split(" And because ")[0]
        if line and line != UNSATISFIABLE:
            said.append(line.rstrip("."))
    reason = ": ".join(said) or "uv failed without a word"
    if UNSATISFIABLE in stderr:
        reason += "; change vllm.packages, or settle it by vllm.overrides"
        return f"cannot be resolved: {reason}" if len(reason) < LONGEST_REASON else reason
    return reason


# --------------------------------------------------------------------------------------------- models


def _models(plans: Iterable[HostPlan], wanted: Wanted) -> Iterator[LockedModel]:
    needed: dict[tuple[str, str], HostPlan] = {}
    for plan in plans:
        for weights in plan.weights:
            needed.setdefault((weights.repository, weights.revision), plan)
    for (repository, revision), plan in needed.items():
        known = wanted.before.model(repository, revision) if wanted.before else None
        # A commit never changes, so what is locked of it holds.
        if known is None or repository.lower() in wanted.upgrade:
            fetch = partial(_get, logins=credentials.read(plan.credentials))
            known = model(plan.mirrors["hub"], repository, revision, fetch, wanted.say)
        yield known


def model(hub: str, repository: str, revision: str, fetch: Fetch, say: Say) -> LockedModel:
    """The files of a model at a revision. The hub has a SHA-256 only of those in LFS: others are fetched."""
    what = f"{repository} at {revision[:SHORT_COMMIT]}"
    say(f"{what}: asking the hub for its files")
    url = f"{hub}/api/models/{repository}/revision/{revision}?blobs=true"
    try:
        answer = fetch(url).json()
        siblings = {file["rfilename"]: file for file in answer["siblings"]}
        if answer["sha"] != revision:
            raise LockingError(f"{url}: answers for {answer['sha']}, another revision")
        found = {
            name: LockedFile(size=file["size"], sha256=file["lfs"]["sha256"])
            for name, file in siblings.items()
            if file.get("lfs")
        }
        small = {name: file for name, file in siblings.items() if name not in found}
        with ThreadPoolExecutor(FETCHING_THREADS) as pool:
            fetched = {
                name: pool.submit(
                    _small_file,
                    fetch,
                    f"{hub}/{repository}/resolve/{revision}/{quote(name)}",
                    file["size"],
                    file["blobId"],
                )
                for name, file in small.items()
            }
            found |= {name: file.result() for name, file in fetched.items()}
        locked = LockedModel(repository=repository, revision=revision, files=found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LockingError(f"{url}: not what a hub answers ({type(error).__name__})") from error
    total = sum(file.size for file in found.values())
    say(f"{what}: {len(found)} files, {total / 1e9:.2f} GB; {len(small)} fetched to be hashed")
    return locked


def _small_file(fetch: Fetch, url: str, size: int, blob: str) -> LockedFile:
    """Size and SHA-256 of a file that git has, which names it by another hash."""
    if size > LARGEST_UNLISTED_BYTES:
        raise LockingError(
            f"{url}: {size / 1e9:.1f} GB outside LFS are too much to fetch for a hash"
        )
    content = fetch(url).content
    named = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if (len(content), named) != (size, blob):
        raise LockingError(f"{url}: is not the file that the hub names (git blob {blob})")
    return LockedFile(size=size, sha256=hashlib.sha256(content).hexdigest())


def _get(url: str, *, logins: Sequence[credentials.Login]) -> requests.Response:
    """What is at an address, with the site's credentials for it, else with this machine's own (netrc)."""
    login = credentials.login_for(logins, url)
    auth = (login.login, login.password) if login else None
    try:
        response = requests.get(url, auth=auth, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    except requests.RequestException as error:
        raise LockingError(f"{url}: {_reason(error)}") from error
    if not response.ok:
        raise LockingError(f"{url}: HTTP {response.status_code} {response.reason}")
    return response


def _reason(error: requests.RequestException) -> str:
    """The innermost of an error's words: those around it repeat the address."""
    inner: BaseException = error
    while (
        deeper := getattr(inner, "reason", None) or (inner.args[0] if inner.args else None)
    ) and (isinstance(deeper, BaseException)):
        inner = deeper
    return str(inner).rpartition(": ")[2] or type(error).__name__


# -------------------------------------------------------------------------------------------- drivers


def _drivers(
    plans: Iterable[HostPlan], wanted: Wanted
) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """Driver packages of each declared version, by distribution: exact, as the apt mirrors have them."""
    drivers = {plan.spec.driver.version: plan.spec.driver for plan in plans if plan.spec.driver}
    listed: Mapping[str, Collection[str]] | None = None
    for version, driver in drivers.items():
        locked = wanted.before.drivers.get(version, {}) if wanted.before else {}
        systems = {}
        for system in supported_systems():
            packages = driver_packages(driver, system, nvswitch=True)
            patterns = {name: pattern for name, pattern in packages.items() if pattern}
            exact = locked.get(system, {})
            if not _answers(exact, patterns) and package_manager(system) == "apt":
                if listed is None and any("*" in pattern for pattern in patterns.values()):
                    listed = _listed(plans, wanted.say)
                exact = dict(_revisions(patterns, listed or {}))
            # A revision of some packages and not of others would be no pin.
            if patterns and _answers(exact, patterns):
                systems[system] = exact
        yield version, systems


def _answers(exact: Mapping[str, str], patterns: Mapping[str, str]) -> bool:
    """Is there one version for each pattern, and no other?"""
    return exact.keys() == patterns.keys() and all(
        fnmatchcase(exact[name], pattern) for name, pattern in patterns.items()
    )


def _listed(plans: Iterable[HostPlan], say: Say) -> Mapping[str, Collection[str]]:
    """What the site's apt mirrors have; nothing where they cannot be read, for hosts may."""
    repositories: dict[str, tuple[AptRepository, Fetch]] = {}
    for plan in plans:
        fetch = partial(_get, logins=credentials.read(plan.credentials))
        repositories |= {one.url: (one, fetch) for one in plan.spec.mirrors.apt.values()}
    try:
        return apt_versions(repositories.values(), say)
    except LockingError as error:
        say(f"{error}; so a driver's version is locked only where it tells the package's, too")
        return {}


def _revisions(
    patterns: Mapping[str, str], listed: Mapping[str, Collection[str]]
) -> Iterator[tuple[str, str]]:
    """The newest that is there for each pattern; what is not there is left out. What is none is exact."""
    for name, pattern in patterns.items():
        newest = _newest(pattern, listed.get(name, ())) if "*" in pattern else pattern
        if newest is not None:
            yield name, newest


def _newest(pattern: str, versions: Iterable[str]) -> str | None:
    return max(
        (one for one in versions if fnmatchcase(one, pattern)), key=_debian_key, default=None
    )


def _debian_key(version: str) -> list[tuple[list[int], int]]:
    """Debian's order of versions without an epoch: letters before other characters, `~` before all."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", version)
    return [
        (
            [-1 if one == "~" else ord(one) + (0 if one.isalpha() else 256) for one in text] + [0],
            int(number or 0),
        )
        for text, number in parts
    ]


def apt_versions(
    repositories: Iterable[tuple[AptRepository, Fetch]], say: Say
) -> dict[str, set[str]]:
    """Package name to the versions that these apt repositories list for x86_64. Raises LockingError."""
    found: dict[str, set[str]] = {}
    for repository, fetch in repositories:
        say(f"{repository.url}: reading its packages")
        for folder in _apt_folders(repository):
            for name, version in _stanzas(_apt_index(folder, fetch)):
                found.setdefault(name, set()).add(version)
    return found


def _apt_folders(repository: AptRepository) -> Iterator[str]:
    url = repository.url.rstrip("/")
    for suite in repository.suites.split():
        if suite.endswith("/"):
            yield f"{url}/{suite.strip('/')}".rstrip("/")
        for component in repository.components.split():
            yield f"{url}/dists/{suite}/{component}/binary-amd64"


def _apt_index(folder: str, fetch: Fetch) -> str:
    """The text of a repository's Packages, in whichever form it is there."""
    readers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.decompress,
        ".xz": lzma.decompress,
        "": bytes,
    }
    last: LockingError | None = None
    for suffix, reader in readers.items():
        url = f"{folder}/Packages{suffix}"
        try:
            return reader(fetch(url).content).decode("utf-8", "replace")
        except LockingError as error:
            last = last or error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise LockingError(f"{url}: cannot be unpacked: {error}") from error
    assert last is not None
    raise last


def _stanzas(text: str) -> Iterator[tuple[str, str]]:
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version): *(\S+)", stanza, re.MULTILINE))
        if len(fields) == 2:  # noqa: PLR2004 - both of them
            yield fields["Package"], fields["Version"]
