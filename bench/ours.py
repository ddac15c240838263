"""This project's own roll-out, by the command that users type, and the floor under it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench import BenchError
from bench.labhosts import Fleet
from bench.measuring import Command, Meter, Series, shown
from fleet.facts import BOOTSTRAP, packed_program
from fleet.inventory import Site
from lab.paths import CONTROL_KEY, KNOWN_HOSTS, REPOSITORY, SSH_CONFIG

PYINFRA = Path(sys.executable).with_name("pyinfra")
ASKING = Path(__file__).with_name("asking.py")
INVENTORY = Path("inventories/lab.py")
ROLL_OUT = ("-y", INVENTORY, "deploy.py")
# Each measurement connects anew, as a roll-out does.
NOT_SHARED = ("-o", "ControlMaster=no", "-o", "ControlPath=none")
QUIET = {"PYINFRA_PROGRESS": "off"}


def first(meter: Meter, fleet: Fleet) -> Series:
    """The roll-out to hosts that are new."""
    command = Command([PYINFRA, *ROLL_OUT, *fleet.limit])
    name = "minimax-fleet, first"
    return Series((meter.run(name, [command], cwd=REPOSITORY, env=QUIET),))


def no_op(meter: Meter, fleet: Fleet, times: int) -> Series:
    """The same command again, several times; each time there is nothing to do.

    Raises BenchError if there was something to do after all.
    """
    command = Command([PYINFRA, *ROLL_OUT, *fleet.limit])
    name = "minimax-fleet, no-op"
    with fleet.counting_sessions() as sessions:
        samples = meter.series(name, times, [command], cwd=REPOSITORY, env=QUIET)
    check_no_op(meter, fleet)
    return Series(samples, sessions=sessions[0] / len(samples))


def check_no_op(meter: Meter, fleet: Fleet) -> None:
    """One more run, not measured, that says what it changed: nothing, on every host."""
    name = "minimax-fleet, no-op as JSON"
    command = Command([PYINFRA, "--json", *ROLL_OUT, *fleet.limit])
    meter.run(name, [command], cwd=REPOSITORY, env=QUIET)
    problem = changes(meter.log(name).read_text(encoding="utf-8"), len(fleet.names))
    if problem:
        raise BenchError(f"{name}: {problem}; see {shown(meter.log(name))}")


def changes(output: str, host_count: int) -> str | None:
    """What is wrong with a run that pyinfra reports as JSON and that was to change nothing."""
    # Warnings may come before it: the log has both of pyinfra's streams.
    start = output.find('{"')
    start = output.find("{\n") if start < 0 else start
    try:
        results = json.JSONDecoder().raw_decode(output[max(start, 0) :])[0]["results"]
        totals = results["totals"]
    except (ValueError, KeyError, TypeError):
        return "no results as JSON"
    # JSON's "success" means changed.
    if totals["success"] or totals["error"] or results["failed_hosts"]:
        return f"{totals['success']} operations changed something, {totals['error']} failed"
    if totals["hosts"] < host_count:
        return f"{totals['hosts']} hosts in place of {host_count}"
    return None


def ssh_true(meter: Meter, fleet: Fleet, times: int) -> Series:
    """`ssh HOST true` to all hosts at once."""
    asked = [_on(name, "true") for name in fleet.names]
    return Series(meter.series("ssh true", times, asked, cwd=REPOSITORY))


def probe(meter: Meter, fleet: Fleet, site: Site, times: int, folder: Path) -> Series:
    """The very program and question that a roll-out asks each host, by one ssh per host at once.

    folder: where the questions are kept
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, answers = [], []
    for name in fleet.names:
        question, answer = folder / f"{name}.question", folder / f"{name}.answer"
        text = f"{packed_program()}\n{json.dumps(site.plans[name].question())}\n"
        question.write_text(text, encoding="utf-8")
        asked.append(_on(name, f'python3 -c "{BOOTSTRAP}" probe', stdin=question, output=answer))
        answers.append(answer)

    def all_answered() -> None:
        for answer in answers:
            json.loads(answer.read_text(encoding="utf-8"))
            answer.unlink()

    return Series(meter.series("probe", times, asked, cwd=REPOSITORY, after_each=all_answered))


def answers(meter: Meter, fleet: Fleet, site: Site, times: int, folder: Path) -> Series:
    """A chat completion of every service at once: time that belongs to the services.

    folder: where the questions are kept
    """
    questions = folder / "questions.json"
    asked = [
        {
            "url": f"http://{site.addresses[name]}:{service.port}/v1/chat/completions",
            "body": service.gate["request"],
        }
        for name in fleet.names
        for service in site.plans[name].services
    ]
    questions.write_text(json.dumps(asked), encoding="utf-8")
    command = Command([sys.executable, "-I", ASKING], stdin=questions)
    return Series(meter.series("chat completions", times, [command], cwd=folder))


def start_up(meter: Meter, times: int, folder: Path) -> Series:
    """`pyinfra --version`: what it costs to start pyinfra at all."""
    command = Command([PYINFRA, "--version"])
    return Series(meter.series("pyinfra --version", times, [command], cwd=folder))


def empty_deploy(meter: Meter, fleet: Fleet, site: Site, times: int, folder: Path) -> Series:
    """A pyinfra run without any operation, to the same hosts and without this project's config.py.

    folder: where the deploy and its inventory are written
    """
    folder.mkdir(parents=True, exist_ok=True)
    connection = {
        "ssh_user": "root",
        "ssh_key": str(CONTROL_KEY),
        "ssh_known_hosts_file": str(KNOWN_HOSTS),
        "ssh_strict_host_key_checking": "yes",
    }
    hosts = [(name, {"ssh_hostname": site.addresses[name], **connection}) for name in fleet.names]
    (folder / "inventory.py").write_text(f"lab = {hosts!r}\n", encoding="utf-8")
    (folder / "deploy.py").write_text('"""Nothing to do."""\n', encoding="utf-8")
    command = Command([PYINFRA, "-y", "inventory.py", "deploy.py"])
    return Series(meter.series("pyinfra, empty deploy", times, [command], cwd=folder, env=QUIET))


def _on(
    host: str, command: str, *, stdin: Path | None = None, output: Path | None = None
) -> Command:
    return Command(["ssh", "-F", SSH_CONFIG, *NOT_SHARED, host, command], stdin, output)
