"""The `fleet` command: what a plan says, and what hosts serve. Thin: it prints what others work out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.version import InvalidVersion
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fleet import documents, inventory, markdown, options, picture, placement, show
from fleet.catalog import catalog
from fleet.errors import BAD_INPUT, Problem, SiteError, did_you_mean
from fleet.inventory import Site
from fleet.lock import Lock

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plans and watches a fleet that serves MiniMax models with vLLM.",
)
console = Console(soft_wrap=True, highlight=False)
TABLE_WIDTH = 160
"""Columns of a table where the output is no terminal, or a narrow one: cut names help nobody."""

Inventory = Annotated[Path, typer.Argument(help="inventory file, for example inventories/h20.py")]
Limit = Annotated[list[str] | None, typer.Option("--limit", help="host name, pattern or group")]
Json = Annotated[bool, typer.Option("--json", help="as JSON, for programs")]


@app.callback()
def about() -> None:
    """Roll-outs themselves are pyinfra's: `pyinfra INVENTORY deploy.py`."""


@app.command()
def plan(
    inventory_file: Inventory,
    limit: Limit = None,
    as_json: Json = False,
    diff: Annotated[
        bool,
        typer.Option("--diff", help="ask the hosts what they serve: what would restart, and why"),
    ] = False,
) -> None:
    """What each host will be, without asking any: models, GPUs, argv, environment, memory, ports."""
    site = _load(inventory_file, limit)
    if diff:
        _show_differences(site, inventory_file, as_json)
    elif as_json:
        _json([documents.host_document(host) for host in site.plans.values()])
    else:
        for part in show.site(site):
            _print(part)


@app.command()
def fit(  # noqa: PLR0913, PLR0917 - one for each option
    model: Annotated[str, typer.Argument(help="model of the catalogue: MiniMaxAI/MiniMax-M2.5")],
    gpus: Annotated[int, typer.Option(help="GPUs that one host has", min=1)] = 8,
    kind: Annotated[list[str] | None, typer.Option(help="GPU kind; all if not given")] = None,
    vllm: Annotated[
        str | None, typer.Option(help="vLLM version; the newest that serves it if not given")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="longest sequence; the model's own if not given", min=1)
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="also variations of recipes that hold the same")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="write a picture of it here")] = None,
    as_json: Json = False,
) -> None:
    """What fits where: every recipe of a model on every GPU kind, with its KV tokens."""
    known = catalog()
    name = _known("model", model, {name: name for name in known.models} | _short(known.models))
    kinds = [_known("--kind", one, dict.fromkeys(known.gpus)) for one in kind or known.gpus]
    version = _version(name, vllm)
    changes = {} if max_model_len is None else {"max-model-len": max_model_len}
    found = {
        one: list(placement.fits(name, known.gpus[one], gpus, version, changes)) for one in kinds
    }
    if not any(found.values()):
        raise _refusal(f"no recipe of {name} wants {gpus} GPUs or fewer; try --gpus 4 or 8")
    if svg is not None:
        try:
            svg.write_text(picture.fits(name, version, gpus, found), encoding="utf-8")
        except OSError as error:
            raise _refusal(f"--svg {svg} cannot be written: {error.strerror}") from None
    if as_json:
        _json([documents.fit_document(one, row) for one, rows in found.items() for row in rows])
    else:
        console.print(f"[bold]{name}[/] on up to {gpus} GPUs, vLLM {version}")
        _print(show.fits(found, everything=everything))


@app.command()
def catalogue(
    contradictions: Annotated[
        bool,
        typer.Option(
            "--contradictions", help="where the guides disagree with one another or with vLLM"
        ),
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="as Markdown, with the source of every flag")
    ] = False,
    as_json: Json = False,
) -> None:
    """The models, recipes and GPU kinds that plans are made of."""
    known = catalog()
    if as_markdown:
        sys.stdout.write(markdown.catalogue(known))
    elif as_json and contradictions:
        _json([row.model_dump() for row in known.contradictions])
    elif as_json:
        _json(
            {
                "models": {name: card.model_dump() for name, card in known.models.items()},
                "recipes": [
                    {"name": name, **recipe.model_dump()}
                    for (_, name), recipe in known.recipes.items()
                ],
                "gpus": {name: kind.model_dump() for name, kind in known.gpus.items()},
            }
        )
    elif contradictions:
        _print(show.contradictions(known))
    else:
        for part in show.catalogue(known):
            _print(part)


@app.command()
def status(inventory_file: Inventory, limit: Limit = None, as_json: Json = False) -> None:
    """What each host serves now: one question to each, nothing changed."""
    from fleet.status import rows

    site = _load(inventory_file, limit, lock_may_differ=True)
    found = rows(site, inventory_file)
    if as_json:
        _json(found)
    else:
        Console(width=max(TABLE_WIDTH, console.width)).print(_status_table(found))
    if not all(row["ok"] for row in found):
        raise typer.Exit(1)


@app.command()
def history(inventory_file: Inventory, limit: Limit = None, as_json: Json = False) -> None:
    """What each host has served, and what it can go back to; nothing changed."""
    from fleet.status import histories

    found = histories(_load(inventory_file, limit, lock_may_differ=True), inventory_file)
    if as_json:
        _json(found)
    else:
        Console(width=max(TABLE_WIDTH, console.width)).print(_table(HISTORY_COLUMNS, found))
    if any(row["state"] == "cannot be reached" for row in found):
        raise typer.Exit(1)


@app.command()
def lock(
    inventory_file: Inventory,
    upgrade: Annotated[
        list[str] | None,
        typer.Option("--upgrade", help="a package, or a model, that need not stay as it is locked"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit 1 if the lock would change")
    ] = False,
    python: Annotated[
        str | None,
        typer.Option(help="version of the hosts' /usr/bin/python3, so that they need not be asked"),
    ] = None,
) -> None:
    """Pin what a roll-out installs: wheels, models, driver, by hash; into locks/SITE.lock."""
    from fleet import lock as locks

    site = _load(inventory_file, None, with_lock=False)
    plans = list(site.plans.values())
    path = locks.lock_path(inventory_file)
    before = _site_lock(inventory_file)
    names = locks.upgradable(plans, before)
    moving = [locks.canonical(name) for name in upgrade or ()]
    for name in moving:
        if name not in names:
            hint = did_you_mean(name, names)
            raise _refusal(f"--upgrade {name}: nothing of that name is locked{hint}")
    if python is not None and not re.fullmatch(r"3\.[0-9]+", python):
        raise _refusal(f"--python {python!r} is no version of Python; write for example 3.11")
    try:
        if python is None and locks.needs_python(plans, before, moving):
            python = locks.common_python(_pythons(site, inventory_file))
        # Only now: gevent changes modules that it imports, for the hosts' connections.
        from fleet.locking import Wanted, resolve

        wanted = Wanted(before=before, upgrade=moving, python=python, say=_to_stderr)
        after = resolve(plans, wanted)
    except locks.LockingError as error:
        typer.secho(f"error: {Problem(path, str(error))}", fg="red", err=True)
        raise typer.Exit(1) from error
    changes = locks.changes(before, after)
    text = locks.write(after, str(inventory_file))
    if before is None:
        console.print(f"{path}: {show.lock_summary(after)}")
    elif changes:
        _print(show.lock_changes(changes))
    as_before = before is not None and not changes
    if check:
        console.print(f"{path}: {'is up to date' if as_before else 'would change'}")
        raise typer.Exit(0 if as_before else 1)
    _write_lock(Path(path), text)
    console.print(f"{path}: {'nothing changed' if as_before else 'written; review and commit it'}")


def _site_lock(inventory_file: Path) -> Lock | None:
    try:
        found = inventory.lock_file(inventory_file, Path.cwd())
    except SiteError as error:
        raise _refusals(error) from error
    return found.content if found else None


def _pythons(site: Site, inventory_file: Path) -> dict[str, str]:
    """The version of each host's own Python, of those that answer."""
    from fleet.connection import states

    _to_stderr("asking the hosts for the version of their /usr/bin/python3")
    return {
        name: ".".join(seen["os"]["python"].split(".")[:2])
        for name, seen in states(site, inventory_file).items()
        if seen is not None
    }


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _write_lock(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise _refusal(f"{path} cannot be written: {error.strerror}") from error


def _load(
    inventory_file: Path,
    limit: list[str] | None,
    *,
    with_lock: bool = True,
    lock_may_differ: bool = False,
) -> Site:
    try:
        site = inventory.load(
            inventory_file,
            limit=limit or (),
            with_lock=with_lock,
            lock_may_differ=lock_may_differ,
        )
    except SiteError as error:
        raise _refusals(error) from error
    if lock_may_differ:
        for note in site.notes:
            typer.secho(f"note: {note}", fg="yellow", err=True)
    return site


def _refusals(error: SiteError) -> typer.Exit:
    for problem in error.problems:
        typer.secho(f"error: {problem}", fg="red", err=True)
    return typer.Exit(BAD_INPUT)


def _show_differences(site: Site, inventory_file: Path, as_json: bool) -> None:
    from fleet.status import differences

    found = differences(site, inventory_file)
    if as_json:
        _json(found)
    else:
        _print(show.differences(found))
    if any(row["error"] for row in found):
        raise typer.Exit(1)


def _json(document: object) -> None:
    """JSON on standard output; of a list, a line for each item, so that programs may read line by line
    and versions can be compared. Indented, a thousand hosts would take longer to write than to plan."""
    if isinstance(document, list):
        lines = (json.dumps(item, ensure_ascii=False) for item in document)
        sys.stdout.write("[\n" + ",\n".join(lines) + "\n]\n")
    else:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _print(part: RenderableType) -> None:
    """Tables as wide as they need where the output is no terminal: cut names help nobody."""
    wide = isinstance(part, Text) or console.is_terminal
    (console if wide else Console(width=TABLE_WIDTH)).print(part)


def _known(what: str, word: str, names: Mapping[str, str | None]) -> str:
    """The catalogue's own name for a word."""
    if word in names:
        return names[word] or word
    hint = did_you_mean(word, names) or f"; known are {', '.join(names)}"
    raise _refusal(f"{what} {word!r} is not in the catalogue{hint}")


def _short(models: Iterable[str]) -> dict[str, str]:
    """`MiniMax-M2.5` and `m2.5` for MiniMaxAI/MiniMax-M2.5, where that is one model only."""
    shorts: dict[str, list[str]] = {}
    for name in models:
        base = name.split("/")[1]
        for short in (base, base.lower(), base.lower().removeprefix("minimax-")):
            shorts.setdefault(short, []).append(name)
    return {short: names[0] for short, names in shorts.items() if len(set(names)) == 1}


def _version(model: str, asked: str | None) -> str:
    """The vLLM version asked for, or the newest recorded one that serves a model."""
    card = catalog().models[model]
    if asked is None:
        return next(found for found in reversed(options.recorded_versions()) if card.accepts(found))
    try:
        serves = card.accepts(asked)
    except InvalidVersion:
        raise _refusal(f"--vllm {asked!r} is no version; write for example 0.33.0") from None
    if not serves:
        raise _refusal(f"--vllm {asked} does not serve {model}: supported {card.vllm_range}")
    return asked


def _refusal(message: str) -> typer.Exit:
    typer.secho(f"error: {message}", fg="red", err=True)
    return typer.Exit(BAD_INPUT)


COLUMNS = ("host", "GPUs", "vLLM", "model at revision", "unit", "gate", "start", "first answer")


def _status_table(found: list[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for row in found:
        style = None if row["ok"] else "red"
        table.add_row(*(row[column] for column in COLUMNS), style=style)
    return table


HISTORY_COLUMNS = ("host", "passed", "release", "services", "revisions", "generation", "state")


def _table(columns: tuple[str, ...], found: list[dict[str, Any]]) -> Table:
    """Rows as a table; only the last column may be folded."""
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in found:
        table.add_row(*(row[column] for column in columns))
    return table


def main() -> None:
    """Entry point of the `fleet` command."""
    app()


if __name__ == "__main__":
    main()
