"""The `fleet` command: what a plan says, and what hosts serve. Thin: it prints what others work out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleet import command, inventory
from fleet.errors import BAD_INPUT, SiteError
from fleet.inventory import Site
from fleet.plan import HostPlan, ServicePlan

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
def options() -> None:
    """Roll-outs themselves are pyinfra's: `pyinfra INVENTORY deploy.py`."""


@app.command()
def plan(inventory_file: Inventory, limit: Limit = None, as_json: Json = False) -> None:
    """What each host will be, without asking any: models, GPUs, argv, environment, units, ports."""
    site = _load(inventory_file, limit)
    if as_json:
        json.dump([_host_document(host) for host in site.plans.values()], sys.stdout, indent=2)
        print()  # noqa: T201 - JSON goes to standard output as it is
        return
    for host in site.plans.values():
        _print_host(host)
    order = " → ".join(", ".join(wave) for wave in site.waves(site.plans))
    console.print(f"[bold]Order of cut-over[/]: {order}")


@app.command()
def status(inventory_file: Inventory, limit: Limit = None, as_json: Json = False) -> None:
    """What each host serves now: one question to each, nothing changed."""
    from fleet.status import rows

    site = _load(inventory_file, limit)
    found = rows(site, inventory_file)
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        print()  # noqa: T201
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


def _print_host(host: HostPlan) -> None:
    hardware = f"{host.spec.gpu_count} × {host.gpu.name}" if host.gpu else "CPU"
    driver = f", driver {host.spec.driver.version}" if host.spec.driver else ""
    console.print(f"[bold]{host.name}[/] ({host.group}): {hardware}{driver}")
    console.print(f"  release  {host.release.id}")
    for service in host.services:
        gpus = ", ".join(map(str, service.gpus)) or "none"
        console.print(f"\n  [bold]{service.name}[/]")
        for label, value in (
            ("model", f"{service.model} at {service.weights.revision}"),
            ("GPUs", gpus),
            ("ports", f"{service.port} public, {service.engine_port} on loopback"),
            ("unit", f"{service.unit} ({service.stamp})"),
        ):
            console.print(f"    {label:<8} {value}", markup=False)
        text = command.shell(service.argv, service.environment)
        console.print("    " + text.replace("\n", "\n    "), markup=False)
    console.print()


def _host_document(host: HostPlan) -> dict[str, Any]:
    return {
        "host": host.name,
        "group": host.group,
        "gpu": host.spec.gpu,
        "gpu_count": host.spec.gpu_count,
        "driver": host.spec.driver.version if host.spec.driver else None,
        "release": host.release.id,
        "services": [_service_document(service) for service in host.services],
    }


def _service_document(service: ServicePlan) -> dict[str, Any]:
    return {
        "name": service.name,
        "model": service.model,
        "repository": service.weights.repository,
        "revision": service.weights.revision,
        "recipe": service.recipe,
        "gpus": list(service.gpus),
        "port": service.port,
        "engine_port": service.engine_port,
        "unit": service.unit,
        "stamp": service.stamp,
        "argv": list(service.argv),
        "environment": dict(service.environment),
    }


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
