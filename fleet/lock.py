"""What a site installs, exactly: `locks/SITE.lock`, read, held beside what plans ask for, and written. Pure.

`fleet lock` fills it in (fleet/locking.py); a roll-out installs what it says, and is refused where it
does not answer what group data asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pydantic import AfterValidator, Field, ValidationError, model_validator

from fleet.catalog import PinnedUv
from fleet.errors import EXPECTED_TYPES, Problem, SiteError
from fleet.plan import OS_PYTHON, HostPlan, Release, Weights, digest
from fleet.spec import COMMIT, PACKAGE, Model, Repository

FOLDER = "locks"
FORMAT = 1
PLATFORM = "x86_64-manylinux_2_34"
"""What wheels are for: 2.34 is the oldest glibc of the distributions that hosts may run."""
LONGEST = 10_000_000
"""Characters of a lock; a real one has some tens of thousands."""
SHORT_COMMIT = 12
PYTHON = "python"
"""What `--upgrade` calls the version of Python."""
UNRESOLVED = ("source", "docker")
"""Kinds of releases that a commit or a digest alone names: what they require, the build decides."""


class LockingError(Exception):
    """One line for a person: what could not be locked, and why."""


GIT = re.compile(r"[^\s@]+ @ git\+\S+@[0-9a-f]{40}(?:#subdirectory=\S+)?")
EXACT = re.compile(rf"[^\s=<>!~@]+==[^\s*,;]+|[^\s@]+ @ https?://\S+|{GIT.pattern}")
"""How a package is named in a lock: by version, by address, by commit."""


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is no SHA-256 of 64 hex digits")
    return value


def _wheel_hash(value: str) -> str:
    if not value.startswith("sha256:"):
        raise ValueError(f"{value!r} is no hash; one is written sha256:…")
    _sha256(value.removeprefix("sha256:"))
    return value


def _package(value: str) -> str:
    try:
        Requirement(value)
    except InvalidRequirement:
        exact = False
    else:
        exact = EXACT.fullmatch(value) is not None
    if not exact:
        raise ValueError(f"{value!r} is no exact package; one is written name==version")
    return value


def _requirement(value: str) -> str:
    try:
        Requirement(value)
    except InvalidRequirement:
        raise ValueError(f"{value!r} is no requirement") from None
    return value


def _package_name(value: str) -> str:
    if not re.fullmatch(PACKAGE, value):
        raise ValueError(f"{value!r} is no name of a distribution package")
    return value


def _package_version(value: str) -> str:
    if not re.fullmatch(r"[0-9][A-Za-z0-9.+~:-]*", value):
        raise ValueError(f"{value!r} is no exact version of a distribution package")
    return value


def _file_name(value: str) -> str:
    parts = value.split("/")
    if not value.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{value!r} is no file of a model")
    return value


def _commit(value: str) -> str:
    if not COMMIT.fullmatch(value):
        raise ValueError(f"{value!r} is no commit of 40 hex digits")
    return value


def _python(value: str) -> str:
    if not re.fullmatch(r"[0-9]+\.[0-9]+(?:\.[0-9]+)?", value):
        raise ValueError(f"{value!r} is no version of Python")
    return value


Sha256 = Annotated[str, AfterValidator(_sha256)]
WheelHash = Annotated[str, AfterValidator(_wheel_hash)]
Package = Annotated[str, AfterValidator(_package)]
FileName = Annotated[str, AfterValidator(_file_name)]
DebianName = Annotated[str, AfterValidator(_package_name)]
DebianVersion = Annotated[str, AfterValidator(_package_version)]


OriginKey = Literal["kind", "commit", "variant", "name", "sha256"]
ORIGIN_KEYS: tuple[OriginKey, ...] = ("kind", "commit", "variant", "name", "sha256")
"""Of a release's origin, what decides which packages there are."""


class Asks(Model):
    """What a release is resolved from: group data's part of it."""

    requirements: list[Annotated[str, AfterValidator(_requirement)]]
    overrides: list[Annotated[str, AfterValidator(_requirement)]] = []
    python: str
    torch_backend: str | None = None
    origin: dict[OriginKey, str] = {}
    """Where vLLM comes from if not from the index: channel, commit, variant, wheel or image."""

    @model_validator(mode="after")
    def _something(self) -> Asks:
        if self.origin and "kind" not in self.origin:
            raise ValueError("has an origin of no kind")
        if not self.origin and not self.requirements:
            raise ValueError("asks for nothing")
        return self


class LockedRelease(Model):
    """What a release is made of. `python`: the version that its wheels are for, in full where uv fetches it.

    Of `packages`, by `name==version`, each file that fits Python and platform has its hash; what comes
    from git has none but its commit. UNRESOLVED kinds have none of these.
    """

    asks: Asks
    python: Annotated[str, AfterValidator(_python)] | None = None
    platform: str | None = None
    packages: dict[Package, list[WheelHash]] = {}

    @model_validator(mode="after")
    def _resolved(self) -> LockedRelease:
        if self.asks.origin.get("kind") not in UNRESOLVED and not (self.python and self.packages):
            raise ValueError("has no Python version, or no packages")
        names: dict[str, str] = {}
        for package, hashes in self.packages.items():
            other = names.setdefault(name_and_version(package)[0], package)
            if other != package:
                raise ValueError(f"packages: {other} and {package} exclude each other")
            if not hashes and not GIT.fullmatch(package):
                raise ValueError(f"packages: {package} has no hash")
        return self

    @property
    def requirements(self) -> str:
        """What comes from indexes, as a requirements file for `--require-hashes`."""
        apart = self.asks.origin and "vllm"
        return "".join(
            " ".join([package, *(f"--hash={one}" for one in hashes)]) + "\n"
            for package, hashes in self.packages.items()
            if hashes and name_and_version(package)[0] != apart
        )

    @property
    def wheel(self) -> str | None:
        """SHA-256 of vLLM's own wheel, where that does not come from the index."""
        if not self.asks.origin:
            return None
        own = (hashes for package, hashes in self.packages.items() if is_vllm(package))
        return next((hashes[0].removeprefix("sha256:") for hashes in own if hashes), None)

    @property
    def versions(self) -> dict[str, str]:
        """Version, or address, of each package by its name."""
        return dict(map(name_and_version, self.packages))


class LockedFile(Model):
    """A file of a model; `size` in bytes."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class LockedModel(Model):
    repository: Repository
    revision: Annotated[str, AfterValidator(_commit)]
    files: Annotated[dict[FileName, LockedFile], Field(min_length=1)]


class Lock(Model):
    """All that is pinned for a site. `drivers`: packages of a driver's version, by distribution."""

    format: Literal[1] = 1
    uv: PinnedUv
    releases: list[LockedRelease] = []
    drivers: dict[str, dict[str, dict[DebianName, DebianVersion]]] = {}
    models: list[LockedModel] = []

    def release(self, asks: Asks) -> LockedRelease | None:
        return next((one for one in self.releases if one.asks == asks), None)

    def model(self, repository: str, revision: str) -> LockedModel | None:
        return next(
            (
                one
                for one in self.models
                if (one.repository, one.revision) == (repository, revision)
            ),
            None,
        )


# ------------------------------------------------------------------------------------- what is asked


def asked(release: Release) -> Asks:
    """What a release asks for, whether or not it is locked."""
    origin = {
        key: str(release.origin[key])
        for key in ORIGIN_KEYS
        if release.origin.get(key) and release.origin["kind"] != "index"
    }
    return Asks(
        requirements=[*release.requirements[:1], *sorted(release.requirements[1:])],
        overrides=sorted(release.overrides),
        python=release.python,
        torch_backend=release.torch_backend,
        origin=origin,
    )


def name_and_version(package: str) -> tuple[str, str]:
    """`("aiohttp", "3.14.5")`; an address or a range where there is no one version."""
    requirement = Requirement(package)
    version = requirement.url or str(requirement.specifier).removeprefix("==")
    return canonicalize_name(requirement.name), version or "(any)"


def is_vllm(package: str) -> bool:
    """Is a package of a lock vLLM itself?"""
    return name_and_version(package)[0] == "vllm"


def title(asks: Asks) -> str:
    """What a release is to a person: `vllm 0.33.0`."""
    if asks.origin:
        what = asks.origin.get("commit", "")[:SHORT_COMMIT] or asks.origin.get("name", "")
        return f"vllm {asks.origin['kind']} {what}".strip()
    name, version = name_and_version(asks.requirements[0])
    return f"{name} {version}"


# ----------------------------------------------------------------------------- the lock beside plans


@dataclass(frozen=True)
class LockFile:
    """A lock, where it lies, and the inventory that it is for."""

    path: str
    inventory: str
    content: Lock

    @property
    def command(self) -> str:
        return f"`fleet lock {self.inventory}`"

    def pin(self, release: Release) -> Release | list[Problem]:
        """The release with its packages pinned; where they are not locked, why not."""
        asks = asked(release)
        locked = self.content.release(asks)
        if locked is None:
            return [self._problem(line) for line in self._differences(asks)]
        return pinned(release, locked)

    def files(self, weights: Weights) -> Mapping[str, LockedFile] | Problem:
        """A model's files; where its revision is not locked, what is."""
        found = self.content.model(weights.repository, weights.revision)
        if found is not None:
            return found.files
        revisions = [
            one.revision for one in self.content.models if one.repository == weights.repository
        ]
        says = f"group data says {weights.revision}"
        if revisions:
            return self._problem(f"{weights.repository} is locked at {revisions[0]} and {says}")
        return self._problem(f"{weights.repository} is not locked and {says}")

    def driver(self, version: str) -> Mapping[str, Mapping[str, str]] | Problem:
        """Exact versions of a driver's packages, by distribution."""
        found = self.content.drivers.get(version)
        if found is not None:
            return found
        others = ", ".join(self.content.drivers)
        what = f"driver {others} is" if others else "no driver is"
        return self._problem(f"{what} locked and group data says {version}")

    def uv(self, known: PinnedUv) -> Problem | None:
        """Why the lock's uv is another than this program's."""
        if self.content.uv == known:
            return None
        mine, its = known.version, self.content.uv.version
        other = "with other hashes" if mine == its else "here"
        return self._problem(f"uv {its} is locked and uv {mine} is known {other}")

    def _problem(self, what: str) -> Problem:
        return Problem(self.path, f"{what}; run {self.command}")

    def _differences(self, asks: Asks) -> Iterator[str]:
        """How the locked release that is most like another differs from it."""
        role = name_and_version(asks.requirements[0])[0] if asks.requirements else ""
        alike = [
            one.asks for one in self.content.releases if bool(one.asks.origin) == bool(asks.origin)
        ]
        alike = [
            one for one in alike if one.origin or name_and_version(one.requirements[0])[0] == role
        ]
        if not alike:
            yield f"{title(asks)} is not locked and group data asks for it"
            return
        yield from _unlike(max(alike, key=lambda one: _likeness(one, asks)), asks)


def _likeness(one: Asks, other: Asks) -> float:
    return SequenceMatcher(None, one.model_dump_json(), other.model_dump_json()).ratio()


def _unlike(locked: Asks, asks: Asks) -> list[str]:
    """A line for each thing in which two requests differ; at least one."""
    found = []
    alike = locked.origin.get("kind") == asks.origin.get("kind")
    for key in ORIGIN_KEYS if alike else ORIGIN_KEYS[:1]:
        one, other = (one.origin.get(key, "none") for one in (locked, asks))
        if one != other:
            found.append(f"{key} {one} of vllm is locked and group data says {other}")
    found += _other_requirements(locked.requirements, asks.requirements, "")
    found += _other_requirements(locked.overrides, asks.overrides, "the override ")
    ours = f" of {title(asks)} is locked and group data says "
    if locked.python != asks.python:
        found.append(f"Python {locked.python}{ours}{asks.python}")
    if locked.torch_backend != asks.torch_backend:
        one, other = (one.torch_backend or "none" for one in (locked, asks))
        found.append(f"torch backend {one}{ours}{other}")
    return found or [f"what {title(asks)} asks for is locked otherwise than group data has it"]


def _other_requirements(locked: list[str], asks: list[str], kind: str) -> Iterator[str]:
    before = {name_and_version(one)[0]: one for one in locked}
    after = {name_and_version(one)[0]: one for one in asks}
    for name in sorted({*before, *after}):
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if other is None:
            yield f"{kind}{one} is locked and group data does not ask for it"
        elif one is None:
            yield f"{kind}{other} is asked for by group data and not locked"
        else:
            versions = name_and_version(one)[1], name_and_version(other)[1]
            if versions[0] == versions[1]:
                yield f"{kind}{one} is locked and group data says {other}"
            else:
                yield f"{kind}{name} {versions[0]} is locked and group data says {versions[1]}"


def pinned(release: Release, locked: LockedRelease) -> Release:
    """The release as its lock has it: another lock is another release."""
    if locked.python is None:
        return release
    text, from_git = locked.requirements, [one for one in locked.packages if GIT.fullmatch(one)]
    parts = (locked.python, text, locked.wheel or "", *from_git)
    name = f"{release.id.rpartition('-')[0]}-{digest(release.id, *parts)}"
    fetched = not release.python.startswith("/")
    indexed = [one for one in release.requirements if " @ git+" not in one]
    return replace(
        release,
        id=name,
        path=f"{release.path.rpartition('/')[0]}/{name}",
        requirements=(*indexed, *from_git),
        origin={**release.origin, **({"sha256": locked.wheel} if locked.wheel else {})},
        python=locked.python if fetched else release.python,
        # The index's own torch is of the CUDA that vLLM's wheels there are built for.
        torch_backend=None if release.torch_backend == "auto" else release.torch_backend,
        lock=text,
        lock_python=locked.python,
    )


# ------------------------------------------------------------------------------------------- the file


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a key that stands twice: what a merge by hand leaves would win without a word."""


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key, _ in node.value:
        if key.value in keys:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key.value!r} stands twice", key.start_mark
            )
        keys.add(key.value)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(path: str, text: str) -> Lock:
    """A lock from its text. Raises SiteError with a line for each fault, path and place first."""
    document = _document(path, text)
    try:
        return Lock.model_validate(document)
    except ValidationError as error:
        raise SiteError(
            Problem(f"{path}: {_place(finding['loc'])}", _explained(finding))
            for finding in error.errors(include_url=False)
        ) from None


def _document(path: str, text: str) -> dict[Any, Any]:
    cure = "take it from git, or remove it and lock anew"
    if len(text) > LONGEST:
        raise SiteError([Problem(path, f"{len(text):,} characters are no lock; {cure}")])
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, see above
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}: line {mark.line + 1}" if mark else path
        raise SiteError([Problem(where, f"{error.problem}; {cure}")]) from None
    except Exception as error:  # PyYAML lets others through: ValueError, RecursionError
        what = f"is no YAML that can be read ({type(error).__name__}); {cure}"
        raise SiteError([Problem(path, what)]) from None
    if not isinstance(document, dict):
        held = "nothing" if document is None else f"a {type(document).__name__}"
        raise SiteError([Problem(path, f"holds {held} and no lock; {cure}")])
    if document.get("format") != FORMAT:
        what = f"is {document.get('format')!r}; this program writes and reads {FORMAT}; lock anew"
        raise SiteError([Problem(f"{path}: format", what)])
    return document


def _explained(finding: Mapping[str, Any]) -> str:
    kind = finding["type"]
    cure = "locks are written by `fleet lock`, not by hand"
    if kind == "missing":
        return f"missing; {cure}"
    if kind == "extra_forbidden":
        return f"unknown key; {cure}"
    if kind == "value_error":
        return f"{finding['ctx']['error']}; {cure}"
    if kind in EXPECTED_TYPES:
        return f"expected {EXPECTED_TYPES[kind]}, got {type(finding['input']).__name__}; {cure}"
    return f"{finding['msg'][0].lower()}{finding['msg'][1:]}; {cure}"


def _place(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":  # pydantic's own word, for a key of a mapping
            text = f"{text}.{part}" if text else part
    return text or "the file"


HEADER = """\
# What a roll-out of {inventory} installs, exactly. Written by `fleet lock {inventory}`:
# review it as a diff and commit it. After a change of group data, run that command again.
"""


def write(lock: Lock, inventory: str) -> str:
    """A lock's text: one line for each thing that is pinned, in an order of its own."""
    lines = [HEADER.format(inventory=inventory), f"format: {lock.format}", "", "uv:"]
    lines.append(f"  version: {_scalar(lock.uv.version)}")
    lines.append("  sha256:")
    lines += [f"    {name}: {_quoted(value)}" for name, value in sorted(lock.uv.sha256.items())]
    lines += ["", "releases:" if lock.releases else "releases: []"]
    for release in lock.releases:
        lines += _release_lines(release)
    lines += ["", "drivers:" if lock.drivers else "drivers: {}"]
    for version, systems in sorted(lock.drivers.items()):
        lines.append(f"  {_scalar(version)}:" + ("" if systems else " {}"))
        for system, packages in sorted(systems.items()):
            lines.append(f"    {_scalar(system)}:" + ("" if packages else " {}"))
            lines += [
                f"      {_scalar(name)}: {_scalar(value)}"
                for name, value in sorted(packages.items())
            ]
    lines += ["", "models:" if lock.models else "models: []"]
    for model in lock.models:
        lines += ["", f"- repository: {_scalar(model.repository)}"]
        lines += [f"  revision: {_scalar(model.revision)}", "  files:"]
        lines += [
            f"    {_scalar(name)}: {{size: {file.size}, sha256: {_quoted(file.sha256)}}}"
            for name, file in sorted(model.files.items())
        ]
    return "\n".join(lines) + "\n"


def _release_lines(release: LockedRelease) -> Iterator[str]:
    asks = release.asks
    yield ""
    yield "- asks:"
    yield f"    requirements: {_list(asks.requirements)}"
    if asks.overrides:
        yield f"    overrides: {_list(asks.overrides)}"
    yield f"    python: {_scalar(asks.python)}"
    if asks.torch_backend:
        yield f"    torch_backend: {_scalar(asks.torch_backend)}"
    if asks.origin:
        yield "    origin:"
        yield from (f"      {key}: {_scalar(value)}" for key, value in asks.origin.items())
    if release.python is None or release.platform is None:
        return
    yield f"  python: {_scalar(release.python)}"
    yield f"  platform: {_scalar(release.platform)}"
    yield "  packages:"
    for package, hashes in release.packages.items():
        if len(hashes) <= 1:
            yield f"    {_scalar(package)}: [{''.join(hashes)}]"
        else:
            yield f"    {_scalar(package)}:"
            yield from (f"    - {one}" for one in hashes)


def _list(values: Iterable[str]) -> str:
    return "[" + ", ".join(map(_quoted, values)) + "]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9/._+=-]*")
_ODD_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _scalar(text: str) -> str:
    """Text as YAML has it, quoted where it could be taken for something else."""
    if _PLAIN.fullmatch(text) and text.lower() not in _ODD_WORDS:
        return text
    return _quoted(text)


# ------------------------------------------------------------------------------- what is new, in words


@dataclass(frozen=True)
class Change:
    """Something that another lock pins otherwise; None where it is not there."""

    of: str
    what: str
    before: str | None
    after: str | None


def changes(before: Lock | None, after: Lock) -> list[Change]:
    """What differs between two locks, most important first; everything is new where there was none."""
    old = before or Lock(uv=after.uv)
    found = [Change("uv", "uv", old.uv.version, after.uv.version)]
    found += _release_changes(old, after)
    for version in sorted({*old.drivers, *after.drivers}):
        one, other = old.drivers.get(version, {}), after.drivers.get(version, {})
        for system in sorted({*one, *other}):
            mine, its = one.get(system, {}), other.get(system, {})
            for name in sorted({*mine, *its}):
                found.append(
                    Change(f"driver {version}, {system}", name, mine.get(name), its.get(name))
                )
    found += _model_changes(old, after)
    return [change for change in found if change.before != change.after]


def _release_changes(old: Lock, new: Lock) -> Iterator[Change]:
    unmatched = list(old.releases)
    for release in new.releases:
        previous = nearest(unmatched, release.asks)
        if previous is not None:
            unmatched.remove(previous)
            if previous.python != release.python:
                yield Change(title(release.asks), "Python", previous.python, release.python)
        yield from _package_changes(previous, release)
    for release in unmatched:
        yield from _package_changes(release, None)


def _package_changes(before: LockedRelease | None, after: LockedRelease | None) -> Iterator[Change]:
    shown = after or before
    assert shown is not None
    one, other = (before.packages if before else {}), (after.packages if after else {})
    versions = before.versions if before else {}, after.versions if after else {}
    hashes = {
        name_and_version(package)[0]: (one.get(package), other.get(package))
        for package in (*one, *other)
        if package in one and package in other
    }
    for name in sorted({*versions[0], *versions[1]}):
        mine, its = versions[0].get(name), versions[1].get(name)
        was, now = hashes.get(name, (None, None))
        if mine == its and was != now:
            yield Change(title(shown.asks), name, f"{mine} (files)", f"{its} (other files)")
        else:
            yield Change(title(shown.asks), name, mine, its)


def _model_changes(old: Lock, new: Lock) -> Iterator[Change]:
    def of(lock: Lock) -> dict[tuple[str, str], LockedModel]:
        return {(model.repository, model.revision): model for model in lock.models}

    before, after = of(old), of(new)
    for key in sorted({*before, *after}):
        mine, its = before.get(key), after.get(key)
        files = [f"{len(one.files)} files" if one else None for one in (mine, its)]
        if mine and its and mine != its:
            files = [f"{len(mine.files)} files", f"{len(its.files)} other files"]
        yield Change(key[0], f"at {key[1][:SHORT_COMMIT]}", *files)


def nearest(releases: Iterable[LockedRelease], asks: Asks) -> LockedRelease | None:
    """The release for the same purpose that is most like what is asked; None where there is none."""
    role = title(asks).partition(" ")[0]
    alike = [one for one in releases if title(one.asks).partition(" ")[0] == role]
    return max(alike, key=lambda one: _likeness(one.asks, asks), default=None)


def unpinned(plans: Iterable[HostPlan], lock: LockFile | None, inventory: Path) -> Iterator[str]:
    """What a roll-out of these plans takes as mirrors and builds have it, in one line; none if nothing."""
    plans, path = list(plans), lock_path(inventory)
    releases = {release.id: release for plan in plans for release in plan.releases}
    required = dict.fromkeys(
        title(asked(release))
        for release in releases.values()
        # An image has all that it requires, unless vLLM is built anew in it.
        if release.lock is None and (release.image is None or "commit" in release.origin)
    )
    models = dict.fromkeys(
        weights.repository for plan in plans for weights in plan.weights if weights.files is None
    )
    if lock is not None:
        if required:
            yield f"{path}: what is left to builds, on each host: the requirements of {', '.join(required)}"
        return
    what = [f"what {', '.join(required)} require"] if required else []
    what += [f"the hashes of {', '.join(models)}"] if models else []
    cure = f"`fleet lock {inventory}` pins them"
    yield f"{path} is not there, so mirrors decide {' and '.join(what)}; {cure}"


def needs_python(plans: Iterable[HostPlan], before: Lock | None, upgrade: Collection[str]) -> bool:
    """Must the version of the hosts' own Python be found out, for it is neither locked nor to stay?"""
    releases = before.releases if before and PYTHON not in upgrade else []
    known = any(one.asks.python == OS_PYTHON and one.python for one in releases)
    wanted = any(release.python == OS_PYTHON for plan in plans for release in plan.releases)
    return wanted and not known


def common_python(found: Mapping[str, str]) -> str:
    """The one version that all hosts have as their own, by host. Raises LockingError."""
    hosts: dict[str, list[str]] = {}
    for host, version in found.items():
        hosts.setdefault(version, []).append(host)
    if not hosts:
        raise LockingError(f"no host says which version its {OS_PYTHON} is; name it: --python 3.11")
    if len(hosts) > 1:
        both = "; ".join(f"{version} on {', '.join(names)}" for version, names in hosts.items())
        raise LockingError(
            f"{OS_PYTHON} is {both}: a lock is for one version; set vllm.python to a version, which uv "
            "fetches, or keep such hosts in inventories of their own"
        )
    return next(iter(hosts))


def upgradable(plans: Iterable[HostPlan], before: Lock | None) -> set[str]:
    """Names that `--upgrade` takes: packages that are locked or asked for, models, and python."""
    names = {PYTHON}
    for plan in plans:
        names |= {weights.repository.lower() for weights in plan.weights}
        for release in plan.releases:
            names |= {name_and_version(one)[0] for one in release.requirements}
    for locked in before.releases if before else ():
        names |= set(locked.versions)
    return names


def canonical(name: str) -> str:
    """A name to upgrade as locks have it: a package's, or a repository's in lower case."""
    return name.lower() if "/" in name else canonicalize_name(name)


def lock_path(inventory: Path) -> str:
    """Where the lock of an inventory lies, from the repository's root."""
    return f"{FOLDER}/{inventory.stem}.lock"


def sort_key(release: LockedRelease) -> tuple[str, ...]:
    """The order of releases in a lock, whatever order the inventory has."""
    return title(release.asks), release.python or "", release.asks.model_dump_json()
