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
from fleet.errors import BAD_INPUT, SiteError
from fleet.health import NoAnswerError, ask
from fleet.inventory import Site
from lab import LabError, hosts
from lab.process import Progress

INVENTORY = "inventories/lab.py"
LOADING_TIMEOUT_S = 300.0
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
  add "max_model_len": 131072 to a service in group_data/h20.py and roll out: the canary first

Commands are in {bin}: export PATH={bin}:$PATH
Take it down with: make lab-down
"""


def main() -> int:
    """0 when every service answered, 1 when one did not or this machine cannot carry a lab, 2 for bad
    group data."""
    console = Console(highlight=False, soft_wrap=True)
    console.rule("a site on this machine", align="left")

    def tell(line: str) -> None:
        console.print(f"lab: {line}", markup=False)

    try:
        hosts.up(progress=tell)
    except LabError as error:
        console.print(f"lab: {error}", style="red", markup=False)
        return 1
    try:
        site = inventory.load(INVENTORY)
    except SiteError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return BAD_INPUT
    wait_for_servers(site, tell)
    console.rule(" ".join(COMMAND), align="left")
    programs = Path(sys.executable).parent
    done = subprocess.run([programs / COMMAND[0], *COMMAND[1:]], check=False)
    if done.returncode:
        return done.returncode
    console.rule("what it serves", align="left")
    as_planned = not subprocess.run(
        [programs / "fleet", "status", INVENTORY], check=False
    ).returncode
    everyone_answered = answers(site, console)
    console.print(NEXT.format(inventory=INVENTORY, command=" ".join(COMMAND), bin=programs))
    return 0 if as_planned and everyone_answered else 1


def wait_for_servers(site: Site, tell: Progress) -> None:
    """Servers of an earlier demo load their models when their hosts boot, and would be asked too early."""
    for plan in site.plans.values():
        for service in plan.services:
            health = f"curl -sf -o /dev/null http://127.0.0.1:{service.engine_port}/health"
            loading = f"systemctl is-active --quiet {service.unit} && ! {health}"
            if hosts.ssh(plan.name, loading).returncode == 0:
                tell(f"{plan.name}: {service.name} loads its model again")
                wait = f"timeout {LOADING_TIMEOUT_S:g} sh -c 'until {health}; do sleep 1; done'"
                hosts.ssh(plan.name, wait, timeout_s=None)


def answers(site: Site, console: Console) -> bool:
    """Ask each service the guides' question at its public port, and print what it says."""
    everyone_answered = True
    for plan in site.plans.values():
        for service in plan.services:
            where = f"http://{site.addresses[plan.name]}:{service.port}"
            try:
                answer = ask(service, site.addresses[plan.name])
            except NoAnswerError as error:
                everyone_answered = False
                line = f"{plan.name} {service.name}: {error}"
                console.print(line, style="red", markup=False)
            else:
                text = " ".join(answer.text.split())
                console.print(f"{where:<26} {answer.seconds:5.2f} s  {text[:160]}", markup=False)
    return everyone_answered


if __name__ == "__main__":
    sys.exit(main())
