"""The start of a pyinfra run: plan the site, refuse what cannot be planned, before any host is asked.

Called by config.py, which pyinfra reads first.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from fleet import facts, inventory
from fleet.errors import BAD_INPUT, SiteError

INTERRUPTED = 130

REFUSED_OPTIONS = {
    "no_wait": ("--no-wait", "pyinfra then exits 0 when hosts fail, and waves are not kept"),
    "fail_percent": ("--fail-percent", "waves after a failed one would be cut over"),
    "serial": ("--serial", "each host would be cut over before the next is even looked at"),
}


def begin() -> None:
    """Plan the site that this pyinfra command names; ends the process where it cannot be planned."""
    context = click.get_current_context()
    options = context.params
    for option, (name, why) in REFUSED_OPTIONS.items():
        if options.get(option):
            refuse(f"{name}: not with this deploy; {why}")
    given = _overrides(options.get("data") or ())
    signal.signal(signal.SIGINT, _interrupted)
    try:
        site = inventory.load(
            options["inventory"],
            limit=options.get("limit") or (),
            exclude=options.get("exclude") or (),
            overrides=given,
            folders=options.get("group_data") or (),
            connecting=True,
        )
    except SiteError as error:
        refuse(*map(str, error.problems))
    facts.use(site)


def refuse(*lines: str) -> NoReturn:
    """One line per problem on standard error, and exit 2."""
    for line in lines:
        click.secho(f"error: {line}", fg="red", err=True)
    sys.exit(BAD_INPUT)


def _overrides(data: tuple[str, ...]) -> dict[str, object]:
    # pyinfra's command line changes the whole process as soon as it is imported.
    from pyinfra_cli.util import parse_cli_arg

    values = {}
    for assignment in data:
        key, separator, value = assignment.partition("=")
        if not separator:
            refuse(f"--data {assignment}: expected key=value")
        values[key] = parse_cli_arg(value)
    return values


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    """pyinfra exits 0 on Ctrl-C; work that was not done must not look done."""
    click.echo(
        "interrupted: what a host had begun goes on there; the same command goes on from here",
        err=True,
    )
    sys.exit(INTERRUPTED)
