"""The `lab` command: a whole site on this machine."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lab import LabError, hosts
from lab.hardware import Hardware, Mode, Rule, Smi
from lab.hosts import HostStatus

app = typer.Typer(
    help="A whole site on this machine: hosts that are real but for their GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

HostName = Annotated[str, typer.Argument(metavar="HOST", help="Host name, such as h20-01.")]
HostNames = Annotated[list[str], typer.Argument(metavar="HOST...", help="Host names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

STATE_STYLES = {"up": "green", "booting": "yellow", "crashed": "red", "off": "dim"}


def main() -> None:
    """Entry point: errors of the lab are one line and exit status 1."""
    try:
        app()
    except LabError as error:
        errors.print(f"lab: {error}", style="red", markup=False)
        raise SystemExit(1) from None


@app.command()
def up(
    fresh: Annotated[bool, typer.Option(help="Throw away what the hosts have written.")] = False,
) -> None:
    """Bring the lab up: LAB_HOSTS GPU hosts (default 3), cpu-01 unless LAB_CPU=0, and the site."""
    hosts.up(fresh=fresh, progress=_progress())
    _print_status(hosts.status())


@app.command()
def down(
    purge: Annotated[bool, typer.Option(help="Also remove the hosts' disks and all keys.")] = False,
    cache: Annotated[
        bool, typer.Option(help="Also remove what takes minutes to make again.")
    ] = False,
) -> None:
    """Power off all hosts, remove the lab from this machine and check that nothing is left."""
    hosts.down(purge=purge, cache=cache, progress=_progress())


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show the hosts, what they have and how they are."""
    found = hosts.status()
    if as_json:
        print(json.dumps([_status_document(entry) for entry in found], indent=1))
    else:
        _print_status(found)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def ssh(
    host: HostName,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND", help="Run this, rather than a shell."),
    ] = None,
) -> None:
    """Log in to a host as root, or run a command there."""
    hosts.get_hardware(host)
    argv = hosts.ssh_argv(host, *(command or []))
    os.execvp(argv[0], argv)


@app.command()
def start(names: HostNames) -> None:
    """Switch hosts on."""
    _for_each(names, hosts.start)


@app.command()
def stop(names: HostNames) -> None:
    """Power hosts off, as `poweroff` does inside."""
    _for_each(names, hosts.stop)


@app.command()
def reboot(names: HostNames) -> None:
    """Reboot hosts, as `reboot` does inside."""
    _for_each(names, hosts.reboot)


@app.command()
def crash(names: HostNames) -> None:
    """Cut hosts' power; `lab start` switches them on again."""
    _for_each(names, hosts.crash)


@app.command()
def reset(names: HostNames) -> None:
    """Make hosts new: empty disk, default hardware, good behaviour, the same keys."""
    _for_each(names, hosts.reset)


@app.command()
def hardware(  # noqa: PLR0913 - one option per field
    host: HostName,
    *,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs.")] = None,
    name: Annotated[str | None, typer.Option(help="Their name in nvidia-smi.")] = None,
    memory_mib: Annotated[int | None, typer.Option(help="Memory of each, MiB.")] = None,
    compute_capability: Annotated[str | None, typer.Option(help="Such as 9.0.")] = None,
    nvswitch: Annotated[int | None, typer.Option(help="Number of NVSwitch chips.")] = None,
    smi: Annotated[Smi | None, typer.Option(help="How nvidia-smi behaves.")] = None,
    missing: Annotated[
        str | None,
        typer.Option(help="GPUs that fell off the bus, such as 3,5; none if empty."),
    ] = None,
) -> None:
    """Show or change a host's simulated GPUs; a running host sees the change at once."""
    changes: dict[str, Any] = {
        "gpus": gpus,
        "name": name,
        "memory_mib": memory_mib,
        "compute_capability": compute_capability,
        "nvswitch": nvswitch,
        "smi": smi.value if smi else None,
        "missing": None if missing is None else _indexes(missing),
    }
    wanted = {key: value for key, value in changes.items() if value is not None}
    now = hosts.set_hardware(host, **wanted) if wanted else hosts.get_hardware(host)
    console.print_json(data=asdict(now))


@app.command()
def misbehave(  # noqa: PLR0913 - one option per field
    host: HostName,
    mode: Annotated[Mode, typer.Argument(help="What goes wrong.")],
    *,
    port: Annotated[int | None, typer.Option(help="Only the server on this port.")] = None,
    version: Annotated[str | None, typer.Option(help="Only this vLLM version.")] = None,
    text: Annotated[str | None, typer.Option(help="What it logs or answers.")] = None,
    exit_code: Annotated[int | None, typer.Option(help="What it exits with.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long it takes.")] = None,
    load_seconds: Annotated[
        float | None,
        typer.Option(help="How long it loads a model."),
    ] = None,
) -> None:
    """Have a host's stand-in model servers misbehave, from now on."""
    rule = Rule(mode, port, version, text, exit_code, seconds)
    hosts.misbehave(host, rule, load_seconds=load_seconds)


@app.command()
def behave(names: HostNames) -> None:
    """Have hosts' stand-in model servers behave again."""
    for name in names:
        hosts.behave(name)


@app.command()
def requests(
    clear: Annotated[bool, typer.Option("--clear", help="Forget them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the site host was asked, by whom and how many bytes it sent."""
    if clear:
        hosts.clear_requests()
    elif as_json:
        print(json.dumps(hosts.requests(), indent=1))
    else:
        _print_requests(hosts.requests())


def _print_requests(asked: list[dict[str, Any]]) -> None:
    names = {entry.host.address: entry.host.name for entry in hosts.status()}
    table = Table("client", "method", "path", "status", "bytes", box=None)
    for request in asked:
        client = str(request.get("client"))
        columns = (request.get(key, "") for key in ("method", "path", "status", "bytes_sent"))
        table.add_row(names.get(client, client), *(str(column) for column in columns))
    console.print(table)


def _print_status(found: list[HostStatus]) -> None:
    table = Table("host", "address", "group", "state", "uptime", "GPUs", "notes", box=None)
    for entry in found:
        table.add_row(
            entry.host.name,
            entry.host.address,
            entry.host.group or "-",
            f"[{STATE_STYLES[entry.state]}]{entry.state}[/]",
            "-" if entry.uptime_s is None else str(timedelta(seconds=int(entry.uptime_s))),
            _gpus(entry.hardware),
            _notes(entry),
        )
    console.print(table)


def _gpus(has: Hardware) -> str:
    return f"{has.gpus} x {has.name}" if has.gpus else "none"


def _notes(entry: HostStatus) -> str:
    has = entry.hardware
    notes = [f"GPUs {', '.join(map(str, has.missing))} missing"] if has.missing else []
    notes += [f"nvidia-smi {has.smi}"] if has.gpus and has.smi != Smi.OK.value else []
    notes += [] if entry.behaves else ["model servers misbehave"]
    return "; ".join(notes)


def _status_document(entry: HostStatus) -> dict[str, Any]:
    return {
        "name": entry.host.name,
        "address": entry.host.address,
        "group": entry.host.group,
        "state": entry.state,
        "uptime_s": entry.uptime_s,
        "hardware": asdict(entry.hardware),
        "behaves": entry.behaves,
    }


def _indexes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(index) for index in text.split(",") if index)
    except ValueError:
        raise LabError(f"--missing {text}: use GPU indexes such as 3,5") from None


def _for_each(names: list[str], action: Callable[..., None]) -> None:
    progress = _progress()
    for name in names:
        action(name, progress=progress)
        progress(f"{name}: done")


def _progress() -> Callable[[str], None]:
    begun = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun:6.1f} s[/]  ", end="")
        console.print(line, markup=False)

    return say
