"""Distribution packages and the NVIDIA driver: the long verbs `packages` and `driver`."""

from __future__ import annotations

import shutil
import time

import fleet_host as core


def packages(request):
    """Distribution packages installed, at exact versions where one is given, and those held.

    Says whether any was installed.
    """
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_MODE": "l"}
    finish_interrupted_installation(quiet)
    for unit in request["mask"]:
        core.run("systemctl", "mask", unit)
    state = core.packages_state(list(request["packages"]))
    wanted = [
        f"{name}={version}" if version else name
        for name, version in request["packages"].items()
        if not core.installed(state[name], version)
    ]
    if wanted:
        core.say(f"packages: {', '.join(wanted)}")
        core.run_long("packages: reading the repositories", *core.APT, "update", env=quiet)
        core.run_long(
            "packages: installing",
            *core.APT,
            "install",
            "--allow-downgrades",
            "--allow-change-held-packages",
            *wanted,
            env=quiet,
        )
    pinned = [name for name, version in request["packages"].items() if version]
    if pinned:
        core.run("apt-mark", "hold", *pinned)
    return bool(wanted)


def finish_interrupted_installation(env):
    """Configures what a killed installation left unpacked; waits for whoever holds dpkg's lock."""
    deadline = time.monotonic() + core.LOCK_TIMEOUT_S
    while core.run("dpkg", "--audit").stdout.strip():
        done = core.run("dpkg", "--configure", "-a", check=False, env=env)
        if (done.returncode and "lock" not in done.stderr) or time.monotonic() > deadline:
            raise core.HostError(f"dpkg --configure -a: {done.stderr.strip()}")
        time.sleep(1)


def driver(request):
    """The NVIDIA driver at its version: installed, its daemons running, every GPU answering."""
    # Packages of two branches exclude each other, which apt cannot solve around a hold of ours.
    held = set(core.run("apt-mark", "showhold").stdout.split()) & set(request["unhold"])
    if held:
        core.run("apt-mark", "unhold", *sorted(held))
    changed = packages(request)
    if shutil.which("modprobe"):
        # Best effort: whether the driver works is what nvidia-smi is asked below.
        core.run("modprobe", "nvidia-uvm", check=False)
    # All of them before any is started: what cannot run beside the old module runs after a reboot.
    core.run("systemctl", "enable", "--quiet", *request["start"])
    # Restarting the fabric manager under running services would end them.
    verb = "restart" if changed and not core.active_services() else "start"
    for unit in request["start"]:
        core.run("systemctl", verb, unit, check=False)
    seen = core.gpus_state()
    if seen["devices"] is None:
        raise core.HostError(
            f"driver {request['version']}: {seen['error'] or 'nvidia-smi is missing'}"
        )
    for unit in request["start"]:
        if core.unit_state(unit)["active"] != "active":
            raise core.HostError(f"{unit} does not run:\n" + "\n".join(core.journal(unit)))
    versions = sorted({device["driver"] for device in seen["devices"]})
    if len(seen["devices"]) != request["gpus"] or versions != [request["version"]]:
        raise core.HostError(
            f"driver {request['version']}: nvidia-smi sees {len(seen['devices'])}/{request['gpus']} "
            f"GPUs with driver {', '.join(versions)}"
        )
    core.say(f"driver {request['version']}: {len(seen['devices'])} GPUs")
