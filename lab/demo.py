"""`make demo`: a site on this machine, MiniMax rolled out to it by the command that users type.

Ends with what the fleet serves and an answer from each public port, asked with the guides' own
request. The lab stays up.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from fleet import inventory
from fleet.health import NoAnswerError, ask
from lab import hosts

INVENTORY = "inventories/lab.py"
COMMAND = ("pyinfra", "-y", INVENTORY, "deploy.py")

NEXT = """
[bold]The lab stays up.[/] Look around:
  fleet plan {inventory} --limit h20-01     what that host is meant to be, argv and all
  fleet status {inventory}                  what the fleet serves now
  lab status · lab ssh h20-01               the hosts; a shell on one
  lab ssh h20-01 journalctl -u minimax-m25-a
  curl http://10.86.1.1:8000/v1/models

Try next:
  {command}                  again: nothing changes
  lab misbehave h20-01 hang                 a server that is healthy and never answers …
  pyinfra {inventory} tasks.health.check    … is found (lab behave h20-01 cures it)
  change max_model_len in group_data/h20.py and roll out: canary first, then the others

Commands are in {bin}: export PATH={bin}:$PATH
Take it down with: make lab-down
"""


def main() -> int:
    """0 when every service answered."""
    console = Console(highlight=False, soft_wrap=True)
    console.rule("a site on this machine", align="left")
    hosts.up(progress=lambda line: console.print(f"lab: {line}", markup=False))
    console.rule(" ".join(COMMAND), align="left")
    programs = Path(sys.executable).parent
    done = subprocess.run([programs / COMMAND[0], *COMMAND[1:]], check=False)
    if done.returncode:
        return done.returncode
    console.rule("what it serves", align="left")
    subprocess.run([programs / "fleet", "status", INVENTORY], check=True)
    failed = not answers(console)
    console.print(NEXT.format(inventory=INVENTORY, command=" ".join(COMMAND), bin=programs))
    return int(failed)


def answers(console: Console) -> bool:
    """Ask each service the guides' question at its public port, and print what it says."""
    site = inventory.load(INVENTORY)
    everyone_answered = True
    for plan in site.plans.values():
        for service in plan.services:
            where = f"http://{site.addresses[plan.name]}:{service.port}"
            try:
                answer = ask(service, site.addresses[plan.name])
            except NoAnswerError as error:
                everyone_answered = False
                console.print(f"[red]{plan.name} {service.name}[/]: {error}", markup=True)
            else:
                text = " ".join(answer.text.split())
                console.print(f"{where:<26} {answer.seconds:5.2f} s  {text[:160]}", markup=False)
    return everyone_answered


if __name__ == "__main__":
    sys.exit(main())
