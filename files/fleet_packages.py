"""Distribution packages, by apt or dnf: the long verbs `packages` and `exporter`."""

from __future__ import annotations

import fnmatch
import http.client
import pathlib
import time

import fleet_host as core

QUIET = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_MODE": "l"}


def packages(request):
    """Distribution packages installed, at exact versions where one is given, and those held.

    Says whether any was installed.
    """
    finish_interrupted_installation(QUIET)
    for unit in request["mask"]:
        core.run("systemctl", "mask", unit)
    state = core.packages_state(list(request["packages"]))
    wanted = {
        name: version
        for name, version in request["packages"].items()
        if not core.installed(state[name], version)
    }
    # With dnf: names of dependencies, too, with `*` in them, and the version that they are kept at.
    locks = request.get("lock", {})
    if wanted:
        core.say(f"packages: {', '.join(words(wanted))}")
        install(wanted, locks)
    hold([name for name, version in request["packages"].items() if version], locks)
    return bool(wanted)


def words(wanted):
    """Names with their versions as the package manager takes them."""
    between = "-" if core.package_manager() == "dnf" else "="
    return [f"{name}{between}{version}" if version else name for name, version in wanted.items()]


def install(wanted, locks):
    """Packages installed, be they held at another version; those of another branch make way."""
    if core.package_manager() == "dnf":
        # A lock hides every other version.
        unhold([*wanted, *locks])
        core.run_long(
            "packages: installing",
            *(*core.DNF, "--refresh", "--best", "--allowerasing", "install", *words(wanted)),
        )
        return
    core.run_long("packages: reading the repositories", *core.APT, "update", env=QUIET)
    core.run_long(
        "packages: installing",
        *(*core.APT, "install", "--allow-downgrades", "--allow-change-held-packages"),
        *words(wanted),
        env=QUIET,
    )


def hold(names, locks):
    """Packages kept at the version that they have; with dnf also what of `locks` is installed at its
    version, for an update of the host fails where only some of what belongs together are locked."""
    if core.package_manager() != "dnf":
        if names:
            core.run("apt-mark", "hold", *names)
        return
    if locks:
        listed = core.run("rpm", "-qa", "--qf", "%{NAME}\\t%{VERSION}-%{RELEASE}\\n").stdout
        there = [line.split("\t") for line in listed.splitlines()]
        names = {*names, *(name for name, version in there if is_of(locks, name, version))}
    held = core.packages_state(sorted(names))
    free = [name for name, state in held.items() if state and not state["held"]]
    if free:
        unhold(free)
        core.run(*core.DNF, "--quiet", "versionlock", "add", *free)


def is_of(locks, name, version):
    """Is a package one that `locks` keep, and at their version?"""
    return any(
        fnmatch.fnmatchcase(name, pattern) and fnmatch.fnmatchcase(version, wanted)
        for pattern, wanted in locks.items()
    )


def unhold(patterns):
    """What is held of these packages, `*` in their names, is released. Its names."""
    if core.package_manager() == "dnf":
        # The plugin itself would match a `*` against versions, too.
        names = {lock.rsplit("-", 2)[0] for lock in core.version_locks()}
        command = (*core.DNF, "--quiet", "versionlock", "delete")
    else:
        names = set(core.run("apt-mark", "showhold").stdout.split())
        command = ("apt-mark", "unhold")
    held = sorted(
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )
    if held:
        core.run(*command, *held)
    return held


EXPORTER_TIMEOUT_S = 60
"""How long the exporter may take until it answers: it looks at every GPU first."""


def exporter(request):
    """DCGM's exporter installed, enabled and answering by its drop-in; or ours ended, without one."""
    unit, path = request["unit"], pathlib.Path(request["drop_in"])
    if request["content"] is None:
        if core.unit_state(unit)["loaded"]:
            core.run("systemctl", "disable", "--quiet", "--now", unit)
        path.unlink(missing_ok=True)
        core.run("systemctl", "daemon-reload")
        core.say(f"{unit} is stopped and disabled")
        return
    packages(request)
    core.write_if_other(path, request["content"].encode())
    core.run("systemctl", "daemon-reload")
    core.run("systemctl", "enable", "--quiet", unit)
    core.run("systemctl", "reset-failed", unit, check=False)
    core.run("systemctl", "restart", unit, check=False)
    deadline = time.monotonic() + EXPORTER_TIMEOUT_S
    while (problem := exporter_problem(request)) is not None:
        if time.monotonic() > deadline:
            said = "\n".join(core.journal(unit))
            raise core.HostError(f"{unit}: {problem}\n{said}")
        time.sleep(1)
    core.say(f"{unit} answers on port {request['port']}")


def exporter_problem(request):
    """What is wrong with the exporter now, in a line; None where its process is as planned and answers."""
    state = core.unit_state(request["unit"])
    if (state["active"], state["stamp"]) != ("active", request["stamp"]):
        return f"{state['active']}, {state['result']}"
    where = f"/metrics at port {request['port']}"
    connection = http.client.HTTPConnection(request["host"], request["port"], timeout=5)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        return f"{where}: {core.reason(error)}"
    finally:
        connection.close()
    return None if b"DCGM_FI_" in text else f"{where} has no metrics of DCGM's"


def finish_interrupted_installation(env):
    """Configures what a killed installation left unpacked; waits for whoever holds dpkg's lock.

    dnf waits by itself, and rpm leaves nothing to configure.
    """
    if core.package_manager() == "dnf":
        return
    deadline = time.monotonic() + core.LOCK_TIMEOUT_S
    while core.run("dpkg", "--audit").stdout.strip():
        done = core.run("dpkg", "--configure", "-a", check=False, env=env)
        if (done.returncode and "lock" not in done.stderr) or time.monotonic() > deadline:
            raise core.HostError(f"dpkg --configure -a: {done.stderr.strip()}")
        time.sleep(1)
