"""The start of a pyinfra run: plan the site, refuse what cannot be planned, before any host is asked.

Called by config.py, which pyinfra reads first.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Mapping
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
OF_TASKS = {"to": "tasks.rollback.apply"}
"""Names in --data that say something to a task, and are no keys of group data."""
INSTALLS_NOTHING = re.compile(r"tasks\.(?:health|rollback)\.")
"""Tasks that are not to wait for a lock to be put right."""


def begin() -> None:
    """Plan the site that this pyinfra command names; ends the process where it cannot be planned."""
    context = click.get_current_context()
    options = context.params
    for option, (name, why) in REFUSED_OPTIONS.items():
        if options.get(option):
            refuse(f"{name}: not with this deploy; {why}")
    assignments = dict(map(_assignment, options.get("data") or ()))
    given = {name: text for name, text in assignments.items() if name in OF_TASKS}
    for name in given:
        if OF_TASKS[name] not in options["operations"]:
            refuse(f"--data {name}: is for {OF_TASKS[name]}; leave it out")
    operations = options["operations"]
    signal.signal(signal.SIGINT, _interrupted)
    try:
        site = inventory.load(
            options["inventory"],
            limit=options.get("limit") or (),
            exclude=options.get("exclude") or (),
            overrides=_overrides({k: text for k, text in assignments.items() if k not in given}),
            folders=options.get("group_data") or (),
            connecting=True,
            lock_may_differ=bool(operations) and all(map(INSTALLS_NOTHING.match, operations)),
        )
    except SiteError as error:
        refuse(*map(str, error.problems))
    for note in site.notes:
        click.secho(f"note: {note}", fg="yellow", err=True)
    facts.use(site, given)


def refuse(*lines: str) -> NoReturn:
    """One line per problem on standard error, and exit 2."""
    for line in lines:
        click.secho(f"error: {line}", fg="red", err=True)
    sys.exit(BAD_INPUT)


def _assignment(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        refuse(f"--data {text}: expected key=value")
    return key, value


def _overrides(texts: Mapping[str, str]) -> dict[str, object]:
    # pyinfra's command line changes the whole process as soon as it is imported.
    from pyinfra_cli.util import parse_cli_arg

    return {key: parse_cli_arg(text) for key, text in texts.items()}


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    """pyinfra exits 0 on Ctrl-C; work that was not done must not look done."""
    click.echo(
        "interrupted: what a host had begun goes on there; the same command goes on from here",
        err=True,
    )
    sys.exit(INTERRUPTED)
