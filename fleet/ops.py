"""Operations of ours: refuse a host, put files, run a long verb of the host program.

Each compares its part of the plan with what was seen and yields nothing where they agree.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import gevent
from paramiko import SSHException
from pyinfra import host, logger, state
from pyinfra.api import FunctionCommand, StringCommand, operation
from pyinfra.api.command import PyinfraCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.connectors.util import CommandOutput
from typing_extensions import override

from fleet import facts
from fleet.compare import proxy_is_stale, stale_services
from fleet.facts import BOOTSTRAP, GateResults, packed_program
from fleet.health import Answer, NoAnswerError, ask
from fleet.plan import PROGRAM, File, HostPlan, ServicePlan

Commands = Generator[PyinfraCommand, None, None]


class FollowedCommand(StringCommand):
    """A long verb whose lines a person sees as they come: it may run for an hour.

    A connection that is lost meanwhile, be it that the host reboots, is made anew, and the job followed
    from where its lines broke off. It is never begun a second time.
    """

    def __init__(self, verb: str, request: Mapping[str, Any]) -> None:
        super().__init__("python3", PROGRAM, "job", verb, _stdin=json.dumps(request))
        self.verb = verb
        self.request = request

    @override
    def execute(self, state: State, host: Host, connector_arguments: Any) -> Any:
        connector_arguments.update(self.connector_arguments)
        command: StringCommand = self
        seen = 0
        # Every line is printed as it comes; giving them back would print them again on failure.
        nothing = CommandOutput([])
        while True:
            try:
                done, output = host.run_shell_command(
                    command, print_output=True, print_input=state.print_input, **connector_arguments
                )
            except (OSError, EOFError, SSHException):
                # The connection was gone before: the same is asked once more.
                if is_connected(host) or not reconnect(host):
                    raise
                continue
            if done or is_connected(host):
                return done, nothing
            seen += sum(not FOLLOWERS_OWN.match(line) for line in output.stdout_lines)
            host.log(f"{self.verb}: the connection is lost; the host goes on by itself")
            if not reconnect(host):
                return False, nothing
            command = StringCommand("python3", PROGRAM, "follow", self.verb)
            connector_arguments["_stdin"] = json.dumps({"request": self.request, "seen": seen})


FOLLOWERS_OWN = re.compile(r"\w+: (?:waiting for|under way already)")
"""Lines that are not the job's, but of whoever follows it (see `job` of files/fleet_host.py)."""
RECONNECT_TIMEOUT_S = 2700
"""A machine with eight GPUs and a lot of memory may take half an hour from a reboot to its sshd."""
RECONNECT_EVERY_S = 3
RECONNECT_SAID_EVERY_S = 30


def is_connected(host: Host) -> bool:
    """Is the connection to a host still there? Other connectors than ssh have none to lose."""
    client = ssh_client(host)
    transport = client.get_transport() if client is not None else None
    return client is None or (transport is not None and transport.is_active())


def ssh_client(host: Host) -> Any:
    """What paramiko is to the host; None with another connector than ssh."""
    return getattr(host.connector, "client", None)


def reconnect(host: Host) -> bool:
    """Waits for a host that has gone away, saying so every so often; False where it does not come back."""
    began = said = time.monotonic()
    ssh_client(host).close()
    while True:
        try:
            host.connector.connect()
        except ConnectError as error:
            waited = time.monotonic() - began
            if waited > RECONNECT_TIMEOUT_S:
                what = f"not back after {waited:.0f} s: {error}; what was begun may go on there"
                host.log_styled(what, fg="red", log_func=logger.error)
                return False
            if time.monotonic() - said > RECONNECT_SAID_EVERY_S:
                said = time.monotonic()
                host.log(f"not back yet after {waited:.0f} s: {error}")
            gevent.sleep(RECONNECT_EVERY_S)
        else:
            facts.send_at_once(host)
            host.log(f"connected again after {time.monotonic() - began:.0f} s")
            return True


@operation()
def refuse(problems: Sequence[str]) -> Commands:
    """
    Fail this host, naming everything that is wrong with it; nothing where nothing is.

    + problems: one line each
    """

    if not problems:
        host.noop("nothing is wrong")
        return
    if not state.is_executing:
        # A dry run ends here: it says what is wrong, and its exit code says that something is.
        fail(state, host, problems)
        state.failed_hosts.add(host)
    yield FunctionCommand(fail, (problems,), {})


def tell(*lines: str) -> None:
    """Says something of the current host while its run is prepared, in a dry run as well."""
    for line in filter(None, lines):
        host.log(line)


def fail(state: State, host: Host, problems: Sequence[str]) -> bool:
    """Fails the operation on this host, with its problems on the screen."""
    for problem in problems:
        for line in problem.splitlines():
            host.log_styled(line, fg="red", log_func=logger.error)
    return False


@operation()
def confirm(needed: bool) -> Commands:
    """
    Fail this host if it still differs from its plan once its wave is over.

    + needed: False where the host was as planned when the run began; it is not asked again
    """
    if not needed:
        host.noop("the host was as planned")
        return
    if not state.is_executing:
        # Before the waves it differs; what counts is what is there after them.
        return
    left = unlike_plan(facts.plan(), facts.look())
    if left:
        yield FunctionCommand(fail, (left,), {})


def unlike_plan(plan: HostPlan, seen: Mapping[str, Any]) -> list[str]:
    """What of a host is not what its plan says, for a person; empty when all is."""
    why = dict(stale_services(plan, seen))
    if proxy_is_stale(seen):
        why["the proxy"] = seen["due"]["proxy"]
    if not why:
        return []
    what = ", ".join(f"{name} ({reason})" for name, reason in why.items())
    return [f"{what}: still not what the plan says after the last wave; roll out once more"]


@operation()
def judge() -> Commands:
    """
    Fail this host unless each of its services runs and answers the guides' question in public.
    """
    if not state.is_executing:
        # Before the roll-out there may be nothing to judge; what counts is what is there after it.
        return
    plan = facts.plan()
    problems = judged(plan, facts.site().addresses[plan.name])
    if problems:
        yield FunctionCommand(fail, (problems,), {})


def judged(plan: HostPlan, address: str) -> list[str]:
    """What is wrong with a host's services, each with its last journal lines; empty when all serve.

    Everything is asked at once: the host of its units, and each service, in public, the question.
    """
    asking = {
        service.name: gevent.spawn(answer_or_error, service, address) for service in plan.services
    }
    problems = [explain(result) for result in gate(plan, answer=False) if result["error"]]
    gevent.joinall(asking.values())
    if problems:
        return problems
    for service in plan.services:
        answer = asking[service.name].get()
        if isinstance(answer, Answer):
            host.log(f"{service.name} answers on port {service.port} in {answer.seconds:.2f} s")
            continue
        inside = gate(plan, answer=True, only=service.name)[0]
        if inside["error"]:
            problems.append(f"{service.name}: {answer}\n{explain(inside)}")
            continue
        # It may only just have become ready; what answers on the host must answer in public now.
        again = answer_or_error(service, address)
        if isinstance(again, NoAnswerError):
            problems.append(f"{service.name}: {again}\non the host itself it answers")
    return problems


def answer_or_error(service: ServicePlan, address: str) -> Answer | NoAnswerError:
    """The service's answer, or why there is none."""
    try:
        return ask(service, address)
    except NoAnswerError as error:
        return error


def gate(plan: HostPlan, *, answer: bool, only: str | None = None) -> list[dict[str, Any]]:
    """The gate's results on the host, in the order of the services; an error each if it says nothing."""
    services = [
        service.request() for service in plan.services if only is None or service.name == only
    ]
    silent = [
        {
            "name": service["name"],
            "error": "its host does not say how it is; see above",
            "journal": [],
        }
        for service in services
    ]
    return list(facts.ask(GateResults, {"services": services, "answer": answer}) or silent)


def explain(result: Mapping[str, Any]) -> str:
    """A failed gate with the journal's last lines."""
    tail = [f"    {line}" for line in result["journal"]]
    return "\n".join([f"{result['name']}: {result['error']}", *tail])


@operation()
def files(
    files: Sequence[File], then: Sequence[Sequence[str]] = (), always: bool = False
) -> Commands:
    """
    Put files in place in one command, each atomically, then run what makes them count.

    + files: those that differ
    + then: commands, as argv
    + always: run `then` although no file differs

    Contents travel on standard input, so that a secret shows neither in a process list nor in --diff.
    """
    if not files and not always:
        host.noop("every file is as planned")
        return
    request = {"files": [asdict(file) for file in files], "then": list(then)}
    # The program may be among the files, so this call brings its own.
    yield StringCommand(
        f'python3 -c "{BOOTSTRAP}" files', _stdin=[packed_program(), json.dumps(request)]
    )


@operation()
def job(verb: str, request: Mapping[str, Any], needed: bool) -> Commands:
    """
    Carry out a long verb of the host program as a transient unit, following its lines.

    + verb: packages, driver, release, weights, cutover, rollback or prune
    + request: what it is told
    + needed: False where the host is seen to have it already
    """
    if not needed:
        host.noop(f"{verb}: nothing to do")
        return
    yield FollowedCommand(verb, request)
