"""What the documents say is so: keys and defaults, links, commands, examples, paths, messages."""

from __future__ import annotations

import ast
import re
import shlex
import types
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel

from fleet import cli, command, inventory
from fleet.catalog import catalog
from fleet.errors import BAD_INPUT
from fleet.plan import HostPlan
from fleet.run import INTERRUPTED, REFUSED_OPTIONS
from fleet.spec import HostSpec
from lab import cli as lab_cli
from lab.hardware import Mode

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
GROUP_DATA, RUNBOOK, LAB = (
    ROOT / "docs" / name for name in ("group-data.md", "runbook.md", "lab.md")
)
DEBIAN = {"id": "debian", "version_id": "12"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, without the indentation of a list that they stand in."""
    return [
        re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        for indent, found, text in FENCE.findall(page.read_text())
        if found == language
    ]


def code(page: Path) -> Iterator[str]:
    """All that is set as code: blocks and spans."""
    yield from (text for _, _, text in FENCE.findall(page.read_text()))
    yield from SPAN.findall(prose(page))


def rows(page: Path, header: str) -> list[list[str]]:
    """Cells of every table whose header row begins with these words; code spans without backticks."""
    found, inside = [], False
    for line in prose(page).splitlines():
        if line.startswith(f"| {header} |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            found.append([cell.strip("`") if cell.count("`") == 2 else cell for cell in cells])
    return found


# ------------------------------------------------------------------------------------- group data


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, type and default of all that a model takes, as docs/group-data.md writes them."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        holder, inner = nested(field.annotation)
        default = "required" if field.is_required() else literal(field.default)
        if inner is None or holder is not None:
            yield key, " or ".join(kinds(field.annotation)), default
        if inner is not None:
            separator = "[]." if holder is list else ".NAME." if holder is dict else "."
            yield from keys(inner, f"{key}{separator}")


def literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def nested(annotation: Any) -> tuple[Any, type[BaseModel] | None]:
    """The model in an annotation, and what holds it: a list, a dict, None-able, or nothing (None)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return None, annotation
    for argument in get_args(annotation):
        _, inner = nested(argument)
        if inner is not None:
            return get_origin(annotation), inner
    return None, None


def kinds(annotation: Any) -> list[str]:
    """Names of the plain types that an annotation takes, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin is Literal:
        return sorted({type(value).__name__ for value in get_args(annotation)})
    if origin in (Union, types.UnionType):
        found = [kind for part in get_args(annotation) for kind in kinds(part)]
        return [kind for kind in found if kind != "NoneType"]
    plain = origin or annotation
    return ["dict" if issubclass(plain, BaseModel) else plain.__name__]


def test_every_key_is_documented_with_its_type_and_default() -> None:
    documented = {row[0]: (row[1], row[2]) for row in rows(GROUP_DATA, "key | type | default")}
    known = {key: (kind, default) for key, kind, default in keys(HostSpec)}

    assert documented == known


def test_the_readmes_short_table_says_the_same() -> None:
    known = {key: (kind, default) for key, kind, default in keys(HostSpec)}
    short = rows(ROOT / "README.md", "key | type | default")

    assert short
    assert {row[0]: (row[1], row[2]) for row in short}.items() <= known.items()


def test_what_args_and_env_refuse_is_documented() -> None:
    documented = {
        flag.removeprefix("--"): row[1]
        for row in rows(GROUP_DATA, "options | key")
        for flag in re.findall(r"--[a-z-]+", row[0])
    }

    assert documented == command.MANAGED_FLAGS
    for name in command.MANAGED_ENVIRONMENT:
        assert f"`{name}`" in prose(GROUP_DATA)


# ------------------------------------------------------------------------------ links and commands


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as they are made on code hosting sites."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    ours = re.compile(
        r"(?:docs|fleet|files|inventories|group_data|lab|tasks|templates|tests)/[\w./-]*"
    )
    of_the_reader = {"inventories/mysite.py", "group_data/all.py"}
    for name in {name for text in code(page) for name in text.split()} - of_the_reader:
        if ours.fullmatch(name) and (name.endswith("/") or "." in Path(name).name):
            assert (ROOT / name).exists(), name


@each_page
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in code(page):
        for name in re.findall(r"\bmake ([a-z][a-z-]*)", text):
            assert name in targets, text


def commands(app: typer.Typer) -> set[str]:
    return {
        entry.name or entry.callback.__name__ for entry in app.registered_commands if entry.callback
    }


@each_page
@pytest.mark.parametrize(("program", "app"), [("fleet", cli.app), ("lab", lab_cli.app)])
def test_commands_that_are_named_exist(page: Path, program: str, app: typer.Typer) -> None:
    for text in code(page):
        for name in re.findall(rf"^(?:\.venv/bin/)?{program} ([a-z]+)", text, re.MULTILINE):
            assert name in commands(app), text


@each_page
def test_deploys_that_are_named_exist(page: Path) -> None:
    for text in code(page):
        for module, function in re.findall(r"\btasks\.(\w+)\.(\w+)", text):
            assert f"def {function}(" in (ROOT / "tasks" / f"{module}.py").read_text(), text


def test_every_command_of_the_lab_and_every_misbehaviour_is_documented() -> None:
    text = prose(LAB)

    for name in commands(lab_cli.app):
        assert f"`lab {name}" in text, name
    assert [row[0] for row in rows(LAB, "mode")] == [mode.value for mode in Mode]


# --------------------------------------------------------------------------------------- examples


def example(name: str) -> str:
    """The README's block for a file, which names it in its first line."""
    (text,) = (
        text for text in blocks(ROOT / "README.md", "python") if text.startswith(f"# {name}\n")
    )
    return text


def test_the_readmes_site_is_planned(tmp_path: Path) -> None:
    for name in ("inventories/mysite.py", "group_data/all.py", "group_data/h20.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(example(name))

    site = inventory.load(tmp_path / "inventories" / "mysite.py", cwd=tmp_path)

    assert site.addresses == {"h20-01": "192.0.2.11", "h20-02": "192.0.2.12"}
    assert [service.port for service in site.plans["h20-01"].services] == [8000, 8001]


def test_the_readmes_group_data_is_the_shipped_one() -> None:
    def code_of(text: str) -> str:
        return text.partition("\n")[2].strip()

    shipped = (ROOT / "group_data" / "h20.py").read_text()

    assert code_of(example("group_data/h20.py")) == code_of(shipped)


def test_examples_of_group_data_are_python() -> None:
    for text in blocks(GROUP_DATA, "python"):
        ast.parse(text)


# ------------------------------------------------------------------------------------------ hosts


def paths_on_a_host(plan: HostPlan) -> Iterator[str]:
    """Everything that a roll-out puts on a host, but for packages."""
    for file in (*plan.system_files, *plan.driver_files(DEBIAN), *plan.staged_files):
        yield file.path
    for manager in ("apt", "dnf"):
        yield from (file.path for file in plan.repository_files(manager))
    assert plan.exporter_file is not None
    yield plan.exporter_file.path
    yield from plan.directories
    yield from (release.path for release in plan.releases)
    yield plan.uv["path"]
    yield from (f"/etc/systemd/system/{service.unit}" for service in plan.services)
    program = (ROOT / "files" / "fleet_host.py").read_text()
    yield from re.findall(
        r'^[A-Z]+ = pathlib\.Path\("(/(?:var|run|etc/minimax)[^"]*)"\)', program, re.M
    )


def test_the_removal_leaves_nothing_that_a_roll_out_puts_there(tmp_path: Path) -> None:
    (removal,) = (text for text in blocks(ROOT / "README.md", "sh") if text.startswith("# removal"))
    text = removal.replace("\\\n", " ").replace(
        "rm -f minimax-", "rm -f /etc/systemd/system/minimax-"
    )
    removed = [
        word.rstrip(")") for line in text.splitlines() if "rm -" in line for word in line.split()
    ]
    (tmp_path / "inventories").mkdir()
    (tmp_path / "group_data").mkdir()
    (tmp_path / "key.asc").write_text("key")
    (tmp_path / "inventories" / "site.py").write_text('h20 = ["a"]\n')
    nvidia = '{"nvidia": {"url": "http://192.0.2.1", "key": "key.asc"}}'
    mirrors = f'mirrors = {{"apt": {nvidia}, "dnf": {nvidia}}}\ndcgm_exporter = True\n'
    shipped = (ROOT / "group_data" / "h20.py").read_text()
    (tmp_path / "group_data" / "h20.py").write_text(shipped + mirrors)
    plan = inventory.load(tmp_path / "inventories" / "site.py", cwd=tmp_path).plans["a"]

    left = [
        path
        for path in paths_on_a_host(plan)
        if not any(
            fnmatchcase(path, pattern) or path.startswith(f"{pattern}/") for pattern in removed
        )
    ]

    assert left == []


def test_the_readme_names_every_package_that_a_roll_out_installs() -> None:
    (row,) = (row for row in rows(ROOT / "README.md", "step") if row[0] == "system")
    named = re.findall(r"`([a-z0-9.+-]+)`", row[1].partition(", and those")[0])

    assert named == catalog().tools.packages["apt"]


def test_the_readme_names_the_exit_codes_and_every_option_that_is_refused() -> None:
    codes = {row[0] for row in rows(ROOT / "README.md", "exit code")}

    assert codes == {"0", "1", str(BAD_INPUT), str(INTERRUPTED)}
    for option, _ in REFUSED_OPTIONS.values():
        assert f"`{option}`" in prose(ROOT / "README.md"), option


def said() -> list[str]:
    """Every text in the code that messages are made of, with … for what is filled in."""
    texts = []
    for file in (*(ROOT / "fleet").glob("*.py"), *(ROOT / "files").glob("*.py")):
        source = file.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
                texts.append("".join(parts))
        steps = re.findall(r'GateError\(\s*"(\w+)"|step = "(\w+)" if holder else "(\w+)"', source)
        texts += [f"gate, {step}: expected …" for names in steps for step in names if step]
    return texts


def test_messages_that_the_runbook_explains_are_in_the_code() -> None:
    texts = said()
    messages = [row[0] for row in rows(RUNBOOK, "message")]

    assert messages
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_going_back_by_hand_is_done_where_the_program_does_it() -> None:
    program = (ROOT / "files" / "fleet_host.py").read_text()
    places = dict(re.findall(r'^([A-Z]+) = pathlib\.Path\("(/[^"]+)"\)', program, re.MULTILINE))
    (block,) = (text for text in blocks(RUNBOOK, "sh") if "previous=$(" in text)

    for path in (
        f"{places['RECORDS']}/services/$name.json",
        f"{places['SERVICES']}/$name/$previous/unit.service",
        f"{places['UNITS']}/minimax-$name.service",
        f"{places['DRAINING']}/$name",
    ):
        assert path in block


def test_shell_examples_are_complete_commands() -> None:
    for page in PAGES:
        for text in blocks(page, "sh"):
            assert shlex.split(text, comments=True), text
