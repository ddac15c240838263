"""Reads a site as pyinfra does (inventory file and group data) and refuses what pyinfra lets pass.

pyinfra 3.10 turns a missing inventory, a `--limit` that matches nothing, or a group that is a dict into
zero hosts and exit 0, drops imported names from group data, ignores group data of no group, and lets
the last of two groups win. Here each of these is an error, before a host is contacted.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fleet.errors import Problem, SiteError, did_you_mean
from fleet.lock import LockFile, lock_path, unpinned
from fleet.lock import read as read_lock
from fleet.plan import HostPlan
from fleet.planner import RECIPE_FILES, Planner, Texts
from fleet.spec import (
    CAPABILITY,
    CUDA_LINE,
    DRIVER_VERSION,
    NAME,
    PACKAGE,
    PLAIN_WORDS,
    SHA256,
    TORCH_BACKEND,
    VERSION,
    HostSpec,
    SecretReference,
)
from fleet.waves import batch_size, waves

GROUP_DATA = "group_data"
SECRET_LITERAL = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})"
)
CONNECTION_KEYS = frozenset(
    {
        *("ssh_hostname", "ssh_port", "ssh_user", "ssh_password", "ssh_key", "ssh_key_password"),
        *("ssh_allow_agent", "ssh_look_for_keys", "ssh_forward_agent", "ssh_config_file"),
        *("ssh_known_hosts_file", "ssh_strict_host_key_checking", "ssh_paramiko_connect_kwargs"),
        *("ssh_connect_retries", "ssh_connect_retry_min_delay", "ssh_connect_retry_max_delay"),
        "ssh_file_transfer_protocol",
    }
)
"""Keys that pyinfra's ssh connector reads from host data (tests/unit/test_inventory.py compares)."""
GLOBAL_ARGUMENT = re.compile(r"_[a-z_]+")
"""pyinfra's global arguments: `_sudo` and the like."""


@dataclass(frozen=True)
class Host:
    """A host of the inventory with its merged data; `origins` says which file each key is from."""

    name: str
    groups: tuple[str, ...]
    data: Mapping[str, Any]
    origins: Mapping[str, str]

    @property
    def address(self) -> tuple[str, int]:
        return str(self.data.get("ssh_hostname", self.name)), int(self.data.get("ssh_port", 22))


@dataclass(frozen=True)
class Site:
    """A planned site: one plan per host of the run, in inventory order."""

    inventory: Path
    plans: Mapping[str, HostPlan]
    addresses: Mapping[str, str]
    """Host name to the address of its public ports."""
    notes: tuple[str, ...] = ()
    """What a person should know of the lock, and what stops nothing."""

    def waves(self, hosts: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The order in which these hosts are cut over. The size of a batch is the whole run's, the
        smallest of its groups', so that fewer hosts never make more waves."""
        plans = [self.plans[name] for name in hosts]
        sizes = (plan.spec.rollout.batch for plan in self.plans.values())
        size = min(batch_size(batch, len(self.plans)) for batch in sizes)
        return waves([(plan.name, plan.group) for plan in plans], size)


def load(  # noqa: PLR0913 - as many as pyinfra has
    inventory: str | Path,
    *,
    limit: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    folders: Sequence[str | Path] = (),
    cwd: Path | None = None,
    connecting: bool = False,
    with_lock: bool = True,
    lock_may_differ: bool = False,
) -> Site:
    """The site of an inventory file, planned.

    `limit` and `exclude` are pyinfra's (group names or host patterns), `overrides` its `--data`,
    `folders` its `--group-data`. `connecting` also asks for what is needed to reach hosts. Without
    `with_lock` the plans are made as if there were no lock; where `lock_may_differ`, also if there is
    one that does not answer group data, which is then a note: for what installs nothing. Raises
    SiteError with every problem found.
    """
    path = Path(inventory)
    cwd = cwd or Path.cwd()
    hosts = select(
        read(path, folders=folders, cwd=cwd, overrides=overrides or {}), path, limit, exclude
    )
    lock = lock_file(path, cwd) if with_lock else None
    plans, problems = _plan(hosts, path, cwd, lock)
    notes: list[str] = []
    if lock_may_differ and lock is not None and problems:
        notes = list(dict.fromkeys(map(str, problems)))
        plans, problems = _plan(hosts, path, cwd, None)
    elif not lock_may_differ:
        notes = list(unpinned(plans.values(), lock, path))
    if connecting:
        problems.extend(_missing_ssh_files(hosts, cwd))
    if problems:
        raise SiteError(problems)
    return Site(
        inventory=path,
        plans=plans,
        addresses={host.name: host.address[0] for host in hosts},
        notes=tuple(notes),
    )


def lock_file(inventory: Path, cwd: Path) -> LockFile | None:
    """The lock of an inventory, None where there is none. Raises SiteError for one that is no lock."""
    path = lock_path(inventory)
    if not (cwd / path).exists():
        return None
    return LockFile(path, str(inventory), read_lock(path, _text(path, cwd)))


def read(
    path: Path, *, folders: Sequence[str | Path], cwd: Path, overrides: Mapping[str, Any]
) -> list[Host]:
    """Every host of an inventory file with its data merged as pyinfra merges it."""
    if not path.is_file():
        raise SiteError([Problem(str(path), "no such inventory file; selects 0 hosts")])
    problems: list[Problem] = []
    groups = _groups(path, problems)
    if problems:
        raise SiteError(problems)
    data, files = _group_data(path, folders, cwd, problems)
    known = _known_groups(path, groups)
    for group, origin in files.items():
        if group not in known:
            hint = did_you_mean(group, known)
            problems.append(Problem(origin, f"no inventory group {group!r}{hint}"))
    hosts = _merge(path, groups, data, files, overrides, problems)
    _check_addresses(path, hosts, problems)
    if not hosts and not problems:
        problems.append(Problem(str(path), "selects 0 hosts; list some in a group"))
    if problems:
        raise SiteError(problems)
    return hosts


def select(
    hosts: Sequence[Host], path: Path, limit: Sequence[str], exclude: Sequence[str]
) -> list[Host]:
    """The hosts that `--limit` and `--exclude` leave, in inventory order."""

    def matches(host: Host, pattern: str) -> bool:
        return pattern in host.groups or fnmatch(host.name, pattern)

    names = {host.name for host in hosts} | {group for host in hosts for group in host.groups}
    for option, patterns in (("--limit", limit), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(matches(host, pattern) for host in hosts):
                hint = did_you_mean(pattern, names)
                raise SiteError(
                    [Problem(f"{option} {pattern}", f"selects 0 hosts of {path}{hint}")]
                )
    chosen = [
        host
        for host in hosts
        if (not limit or any(matches(host, pattern) for pattern in limit))
        and not any(matches(host, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise SiteError([Problem(str(path), "selects 0 hosts; --exclude leaves none")])
    return chosen


def _run(path: Path) -> dict[str, Any]:
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        line = _line_of(error, path)
        what = f"{type(error).__name__}: {error}"
        raise SiteError([Problem(f"{path}{line}", what.splitlines()[0])]) from error


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    frame, line = error.__traceback__, ""
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(path):
            line = f":{frame.tb_lineno}"
        frame = frame.tb_next
    return line


def _groups(path: Path, problems: list[Problem]) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Group name to (hosts, data), as the inventory file defines them."""
    groups: dict[str, tuple[list[Any], dict[str, Any]]] = {}
    for name, value in _run(path).items():
        if name.startswith("_") or isinstance(value, (types.ModuleType, types.FunctionType, type)):
            continue
        hosts, data = value if _is_hosts_and_data(value) else (value, {})
        if not isinstance(hosts, (list, tuple)):
            got = type(hosts).__name__
            problems.append(Problem(f"{path}: {name}", f"expected a list of hosts, got {got}"))
            continue
        bad = [host for host in hosts if not _is_host(host)]
        if bad:
            what = f"expected a host name or (name, data), got {type(bad[0]).__name__}"
            problems.append(Problem(f"{path}: {name}", what))
            continue
        groups[name] = (list(hosts), dict(data))
    return groups


def _is_hosts_and_data(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2  # noqa: PLR2004
        and isinstance(value[0], list)
        and isinstance(value[1], dict)
    )


def _is_host(host: object) -> bool:
    return isinstance(host, str) or (
        isinstance(host, tuple)
        and len(host) == 2  # noqa: PLR2004
        and isinstance(host[0], str)
        and isinstance(host[1], dict)
    )


def _group_data(
    path: Path, folders: Sequence[str | Path], cwd: Path, problems: list[Problem]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Group to its data and to the file it is from, from the folders that pyinfra reads."""
    places = [cwd / GROUP_DATA, path.resolve().parent / GROUP_DATA, *map(Path, folders)]
    data: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for folder in dict.fromkeys(place.resolve() for place in places):
        for file in sorted(folder.glob("*.py")):
            origin = _relative(file, cwd)
            values = _run(file)
            imported = _imported(file)
            for name, value in values.items():
                if name.startswith("_"):
                    continue
                if name in imported:
                    if not isinstance(value, (types.ModuleType, types.FunctionType, type)):
                        what = f"{name} is imported; assign it ({name} = …): imported names are dropped"
                        problems.append(Problem(origin, what))
                    continue
                _refuse_secret(f"{origin}: {name}", value, problems)
                data.setdefault(file.stem, {})[name] = value
            files[file.stem] = origin
    return data, files


def _refuse_secret(where: str, value: object, problems: list[Problem]) -> None:
    if SECRET_LITERAL.search(repr(value)):
        what = "holds what looks like a secret; name a file or an environment variable instead"
        problems.append(Problem(where, what))


def _imported(file: Path) -> set[str]:
    names: set[str] = set()
    # As bytes, for a file may declare an encoding of its own.
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
    return names


def _relative(file: Path, cwd: Path) -> str:
    try:
        return str(file.relative_to(cwd.resolve()))
    except ValueError:
        return str(file)


def _known_groups(path: Path, groups: Mapping[str, Any]) -> set[str]:
    """Groups of this inventory and of those beside it: they share one group_data folder."""
    known = {"all", path.stem, *groups}
    for sibling in path.parent.glob("*.py"):
        if sibling.name != path.name:
            ignored: list[Problem] = []
            try:
                known |= {sibling.stem, *_groups(sibling, ignored)}
            except SiteError:
                # A broken neighbour is reported when it is used itself.
                known.add(sibling.stem)
    return known


def _merge(  # noqa: PLR0913 - what a site is read from
    path: Path,
    groups: Mapping[str, tuple[list[Any], dict[str, Any]]],
    data: Mapping[str, dict[str, Any]],
    files: Mapping[str, str],
    overrides: Mapping[str, Any],
    problems: list[Problem],
) -> list[Host]:
    """Hosts in the order of the inventory; a key that two groups set is a problem."""
    own: dict[str, dict[str, Any]] = {}
    member: dict[str, list[str]] = {}
    for group, (entries, _) in groups.items():
        for entry in entries:
            name, values = (entry, {}) if isinstance(entry, str) else entry
            own.setdefault(name, {}).update(values)
            member.setdefault(name, []).append(group)
    hosts = []
    for name, values in own.items():
        named = [group for group in member[name] if group != "all"]
        if path.stem not in groups:
            named.append(path.stem)
        merged = dict(groups.get("all", ([], {}))[1]) | dict(data.get("all", {}))
        origins = dict.fromkeys(merged, files.get("all", str(path)))
        setter: dict[str, str] = {}
        for group in named:
            for key, value in (groups.get(group, ([], {}))[1] | data.get(group, {})).items():
                other = setter.setdefault(key, group)
                if other != group:
                    first, second = files.get(other, other), files.get(group, group)
                    what = f"set by groups {other!r} ({first}) and {group!r} ({second}); keep one"
                    problems.append(Problem(f"{path}: {name}: {key}", what))
                merged[key] = value
                origins[key] = files.get(group, str(path))
        for key, value in values.items():
            _refuse_secret(f"{path}: {name}: {key}", value, problems)
            merged[key] = value
            origins[key] = f"{path}: {name}"
        for key, value in overrides.items():
            merged[key] = value
            origins[key] = "--data"
        hosts.append(Host(name, (*named, "all"), merged, origins))
    return hosts


def _check_addresses(path: Path, hosts: Sequence[Host], problems: list[Problem]) -> None:
    names: dict[tuple[str, int], str] = {}
    for host in hosts:
        port = host.data.get("ssh_port", 22)
        if not isinstance(port, int):
            where = f"{host.origins['ssh_port']}: ssh_port"
            problems.append(Problem(where, f"expected int, got {type(port).__name__}"))
            continue
        other = names.setdefault(host.address, host.name)
        if other != host.name:
            address = host.address[0]
            what = f"{other!r} and {host.name!r} are one address, {address}; list a machine once"
            problems.append(Problem(str(path), what))


def _missing_ssh_files(hosts: Sequence[Host], cwd: Path) -> Iterator[Problem]:
    """Files of ssh that group data names and this machine does not have."""
    for host in hosts:
        for key in ("ssh_key", "ssh_known_hosts_file", "ssh_config_file"):
            name = host.data.get(key)
            if name is not None and not (cwd / Path(str(name)).expanduser()).is_file():
                where = f"{host.origins[key]}: {key}"
                yield Problem(where, f"{name} is missing on this machine")


def _plan(
    hosts: Sequence[Host], path: Path, cwd: Path, lock: LockFile | None
) -> tuple[dict[str, HostPlan], list[Problem]]:
    plans: dict[str, HostPlan] = {}
    problems: list[Problem] = []
    # Hosts of a group mostly share every word of their data: one plan is made and renamed.
    alike: dict[str, HostPlan | None] = {}
    for host in hosts:
        group = next(
            (
                group
                for group in host.groups
                if host.origins.get("services", "").endswith(f"/{group}.py")
            ),
            host.groups[0],
        )
        data = {key: value for key, value in host.data.items() if not _is_pyinfras(key)}
        key = f"{group}\n{data!r}\n{host.origins.get('services')}"
        if key not in alike:
            alike[key] = _plan_one(host, group, data, path, cwd, problems, lock)
        plan = alike[key]
        if plan is not None:
            plans[host.name] = replace(plan, name=host.name)
    return plans, problems


def _is_pyinfras(key: object) -> bool:
    return key in CONNECTION_KEYS or bool(GLOBAL_ARGUMENT.fullmatch(str(key)))


def _plan_one(  # noqa: PLR0913, PLR0917 - a host, and where it is from
    host: Host,
    group: str,
    data: dict[str, Any],
    path: Path,
    cwd: Path,
    problems: list[Problem],
    lock: LockFile | None,
) -> HostPlan | None:
    try:
        spec = HostSpec.model_validate(data)
    except ValidationError as error:
        problems.extend(_explain(error, host, path, data))
        return None
    texts = Texts(_secrets(spec, cwd), _keys(spec, cwd), _documents(spec, cwd))
    planner = Planner(host.origins, texts, lock)
    plan = planner.plan(host.name, group, spec)
    problems.extend(planner.problems)
    return plan


def _secrets(spec: HostSpec, cwd: Path) -> dict[SecretReference, str]:
    """Values of the secrets that this host's data names; a missing one is simply absent."""
    secrets = {}
    named = [spec.mirrors.credentials, *(service.api_key for service in spec.services)]
    for reference in filter(None, named):
        if reference.env is not None:
            value = os.environ.get(reference.env, "")
        else:
            value = _text(str(reference.file), cwd).strip()
        if value:
            secrets[reference] = value
    return secrets


def _keys(spec: HostSpec, cwd: Path) -> dict[str, str]:
    """Texts of the public keys of this host's repositories."""
    return _texts(spec.mirrors.repository_keys().values(), cwd)


def _documents(spec: HostSpec, cwd: Path) -> dict[str, str]:
    """Texts of the recipe files that services name, of their models' config.json, and of patches."""
    named = [service.model for service in spec.services if service.model.endswith(RECIPE_FILES)]
    configs = [service.model_config_file for service in spec.services]
    return _texts([*named, *filter(None, configs), *spec.vllm.patches], cwd)


def _texts(paths: Iterable[str], cwd: Path) -> dict[str, str]:
    """Contents by path; a missing file is simply absent."""
    return {path: _text(path, cwd) for path in paths if (cwd / path).is_file()}


def _text(path: str, cwd: Path) -> str:
    """Contents of a file, "" where there is none. Raises SiteError for one that cannot be read as text."""
    try:
        return (cwd / path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ""
    except OSError as error:
        raise SiteError([Problem(path, f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        what = (
            "is not text (UTF-8); a key in binary form is made text by "
            f"`gpg --no-default-keyring --keyring ./{path} --export --armor`"
        )
        raise SiteError([Problem(path, what)]) from error


PATTERNS = {
    VERSION: "no version; write for example '0.33.0'",
    SHA256: "no SHA-256; write its 64 hex digits",
    CUDA_LINE: "no line of a CUDA toolkit; write for example '12.9'",
    DRIVER_VERSION: "no exact driver version; write for example '580.95.05'",
    NAME: "no name; use lower-case letters, digits and hyphens, 32 at most",
    CAPABILITY: "no compute capability; write for example '9.0'",
    TORCH_BACKEND: "no torch backend; write 'auto', 'cpu' or for example 'cu129'",
    PACKAGE: "no name of a distribution package",
    PLAIN_WORDS: "not plain words",
}
"""What a pattern of the schema means to a person."""

Place = tuple[int | str, ...]
"""Keys and indices that lead to a value in group data."""

TYPES = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "string_type": "str",
    "bool_type": "bool",
    "list_type": "list",
    "dict_type": "dict",
    "model_type": "dict",
    "model_attributes_type": "dict",
}


def _explain(
    error: ValidationError, host: Host, path: Path, data: Mapping[str, Any]
) -> Iterator[Problem]:
    """pydantic's findings as one line each: file, path within it, what is wrong, what is meant."""
    findings = [
        (_place(finding["loc"], data, wrong_type=finding["type"] in TYPES), finding)
        for finding in error.errors()
    ]
    wrong_types: dict[Place, list[str]] = {}
    for place, finding in findings:
        where = f"{host.origins.get(str(place[0]), f'{path}: {host.name}')}: {dotted(place)}"
        kind = finding["type"]
        if kind == "extra_forbidden":
            hint = did_you_mean(str(place[-1]), _fields(place[:-1]))
            yield Problem(where, f"unknown key{hint or '; no such key here'}")
        elif kind == "missing":
            yield Problem(where, f"missing; set it in group_data/{host.groups[0]}.py")
        elif kind in TYPES:
            # Members of a union are tried one after another; what is wrong within one says more.
            if not any(other[: len(place)] == place and other != place for other, _ in findings):
                wrong_types.setdefault(place, []).append(TYPES[kind])
                if len(wrong_types[place]) == sum(other == place for other, _ in findings):
                    expected = " or ".join(dict.fromkeys(wrong_types[place]))
                    got = type(finding["input"]).__name__
                    yield Problem(where, f"expected {expected}, got {got}")
        elif kind == "value_error":
            yield Problem(where, str(finding["ctx"]["error"]))
        elif kind == "string_pattern_mismatch":
            words = PATTERNS[finding["ctx"]["pattern"]]
            yield Problem(where, f"{finding['input']!r} is {words}")
        else:
            yield Problem(where, finding["msg"][0].lower() + finding["msg"][1:])


def _place(location: Place, data: Any, *, wrong_type: bool) -> Place:
    """A finding's place in group data: pydantic adds which member of a union it tried."""
    found: list[int | str] = []
    for index, part in enumerate(location):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            last = index == len(location) - 1
            if last and not wrong_type:
                found.append(part)
        else:
            found.append(part)
    return tuple(found)


def dotted(location: Iterable[int | str]) -> str:
    """`services[0].gate.expect`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _fields(location: Iterable[int | str]) -> list[str]:
    """Known keys at a place in group data."""
    model: Any = HostSpec
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next(
            (found for found in _nested(annotation) if issubclass(found, BaseModel)), BaseModel
        )
    return [*model.model_fields, *(CONNECTION_KEYS if model is HostSpec else ())]


def _nested(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _nested(argument)
