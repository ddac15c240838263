"""Releases: a Python environment with vLLM, built beside the one that runs; the long verb `release`."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
import time
import urllib.parse

import fleet_host as core


def release(request):
    """A Python environment built beside the running one: under a temporary name, checked, renamed.

    It is checked as the user that services run as, who must be able to read all of it.
    """
    path = pathlib.Path(request["path"])
    if core.release_complete(path):
        return
    uv = install_uv(request["uv"], request["index"])
    began = time.monotonic()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    env = {
        "UV_CACHE_DIR": str(path.parent / ".cache"),
        "UV_NO_PROGRESS": "1",
        "UV_LINK_MODE": "hardlink",
        "UV_NO_CONFIG": "1",
        # uv's own place for the interpreters that it fetches is in root's home, closed to services.
        "UV_PYTHON_INSTALL_DIR": request["pythons"],
    }
    if request["index"]:
        env["UV_DEFAULT_INDEX"] = request["index"]
        host = urllib.parse.urlsplit(request["index"])
        if host.scheme == "http":
            env["UV_INSECURE_HOST"] = host.netloc
    core.say(f"{path.name}: building")
    venv = (uv, "venv", "--relocatable", "--python", request["python"], str(partial))
    core.run_long(f"{path.name}: Python", *venv, env=env)
    backend = ["--torch-backend", request["torch_backend"]] if request["torch_backend"] else []
    python = str(partial / "bin" / "python3")
    check_python(python, request["user"])
    bytecode = ["--compile-bytecode"] if request["bytecode"] else []
    # --refresh: a version that came to the index a moment ago counts, whatever uv has cached of it.
    install = (uv, "pip", "install", "--refresh", *bytecode, "--python", python, *backend)
    core.run_long(f"{path.name}: installing", *install, *request["requirements"], env=env)
    program, *arguments = request["check"]
    check = core.as_user(request["user"], str(partial / "bin" / program), *arguments)
    checked = core.run_long(
        f"{path.name}: checking", *check, env={"HF_HUB_OFFLINE": "1", "HOME": request["home"]}
    )
    frozen = core.run(uv, "pip", "freeze", "--python", python, env=env).stdout.split("\n")
    manifest = {
        "requirements": request["requirements"],
        "packages": [line for line in frozen if line],
        "checked": checked.stdout.strip().splitlines()[-1:],
        "seconds": round(time.monotonic() - began, 1),
        "built_at": time.time(),
    }
    # The manifest is what makes a release complete, so it comes last; the rename makes it appear whole.
    core.write_atomically(partial / core.MANIFEST, json.dumps(manifest, indent=1))
    os.sync()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    core.say(
        f"{path.name}: complete after {manifest['seconds']:.0f} s, {len(manifest['packages'])} packages"
    )


HIDDEN_FROM_SERVICES = ("/home/", "/root/", "/run/user/")
"""What ProtectHome of the units hides."""


def check_python(python, user):
    """Raises HostError where services, which run as `user`, could not run this interpreter."""
    place = os.path.realpath(python)
    cure = "set vllm.python to a version, or to an interpreter elsewhere"
    if place.startswith(HIDDEN_FROM_SERVICES):
        raise core.HostError(f"its Python is {place}, where no service may look; {cure}")
    if core.run(*core.as_user(user, python, "-c", ""), check=False).returncode:
        raise core.HostError(f"its Python is {place}, which user {user} cannot run; {cure}")


def install_uv(uv, index):
    """uv at its pinned version, from the package index, by hash; the path of its program."""
    program = pathlib.Path(uv["path"])
    if os.access(program, os.X_OK):
        return str(program)
    folder = program.parent.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with core.locked(folder.with_name(f".{folder.name}.lock")):
        if os.access(program, os.X_OK):
            return str(program)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        machine = platform.machine()
        if machine not in uv["sha256"]:
            raise core.HostError(f"uv {uv['version']} is not pinned for {machine}")
        wanted = partial.with_suffix(".txt")
        core.write_atomically(
            wanted, f"uv=={uv['version']} --hash=sha256:{uv['sha256'][machine]}\n"
        )
        source = []
        if index:
            host = urllib.parse.urlsplit(index)
            source = ["--index-url", index]
            source += ["--trusted-host", host.hostname] if host.scheme == "http" else []
        core.say(f"uv {uv['version']}: installing")
        core.run_long(
            f"uv {uv['version']}",
            *("/usr/bin/python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"),
            *("--disable-pip-version-check", "--only-binary=:all:"),
            *(*source, "--require-hashes", "--target", str(partial), "-r", str(wanted)),
            # As an option it is unknown to the pip of Ubuntu 22.04, which takes no offence at this.
            env={"PIP_ROOT_USER_ACTION": "ignore"},
        )
        wanted.unlink()
        partial.rename(folder)
    return str(program)
