"""The `fleet` command: what a plan says, and what hosts serve. Thin: it prints what others work out."""

from __future__ import annotations

import json
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
from fleet.errors import BAD_INPUT, SiteError, did_you_mean
from fleet.inventory import Site

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

    site = _load(inventory_file, limit)
    found = rows(site, inventory_file)
    if as_json:
        _json(found)
    else:
        Console(width=max(TABLE_WIDTH, console.width)).print(_status_table(found))
    if not all(row["ok"] for row in found):
        raise typer.Exit(1)


def _load(inventory_file: Path, limit: list[str] | None) -> Site:
    try:
        return inventory.load(inventory_file, limit=limit or ())
    except SiteError as error:
        for problem in error.problems:
            typer.secho(f"error: {problem}", fg="red", err=True)
        raise typer.Exit(BAD_INPUT) from error


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


def main() -> None:
    """Entry point of the `fleet` command."""
    app()


if __name__ == "__main__":
    main()
