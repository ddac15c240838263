"""Releases that are images: pulled by digest, or built on one that was; the long verb `image`.

A release's directory holds only its manifest, and Docker the image, by the release's own tag. So it is
complete, unused or gone like any other, and a unit names it by that tag.

Also the long verb `image_arguments`: do units' argv mean to their image what the plan means?
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import urllib.parse

import fleet_host as core
import fleet_release as releases

DAEMON = pathlib.Path("/etc/docker/daemon.json")
CREDENTIALS = "/root/.docker"
"""Docker's own, where `docker login` of root leaves them."""
HUB_KEY = "https://index.docker.io/v1/"
"""By which Docker's configuration knows Docker Hub."""
NO_DRIVER = "could not select device driver"
"""What Docker says that was started before NVIDIA's container toolkit was there."""
SOURCE = "/opt/minimax-fleet/vllm"
"""vLLM's source inside an image that is built on the host."""


def image(request):
    """The image of a release: pulled, built on if a commit is asked for, tagged, checked; a manifest."""
    path = pathlib.Path(request["path"])
    if core.release_complete(path):
        return
    if request["netrc"]:
        os.environ["NETRC"] = request["netrc"]
    making = Making(request)
    making.begin()
    start_engine()
    if making.image["without_tls"]:
        believe(making.image["without_tls"])
    there = core.image_id(making.image["pull"]) is not None
    if not there:
        with login(making.image["pull"]) as configuration:
            env = {"DOCKER_CONFIG": configuration}
            making.run("pulling", "docker", "pull", making.image["pull"], env=env)
    if making.origin.get("commit"):
        build(making)
    else:
        core.run("docker", "tag", making.image["pull"], making.image["tag"])
    if not there:
        # By the release's tag it is found, and with the release it goes.
        core.run("docker", "rmi", making.image["pull"])
    making.finish(checked(making))


class Making:
    """An image under construction: its release's folder under a temporary name, and the log of it all.

    What fleet_release does with a build of its own is done with this one, too.
    """

    def __init__(self, request):
        self.request = request
        self.origin = request["origin"]
        self.image = request["image"]
        self.began = time.monotonic()
        self.path = pathlib.Path(request["path"])
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.log = releases.LOGS / f"{self.path.name}.log"
        self.env = releases.uv_environment(request)

    def begin(self):
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        releases.LOGS.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        core.say(f"{self.path.name}: {self.image['pull']}")

    def run(self, what, *argv, env=None, cwd=None):
        """A step that may take minutes; its output goes to the log, and its last lines into an error."""
        label = f"{self.path.name}: {what}"
        releases.logged(label, self.log, argv, {**self.env, **(env or {})}, cwd)

    def finish(self, found):
        """The release appears under its name, complete."""
        asked = ("origin",)
        size = size_of_image(self.image["tag"])
        manifest = {
            "asked": {key: self.request[key] for key in asked},
            "image": {"tag": self.image["tag"], "id": core.image_id(self.image["tag"])},
            "digest": f"sha256:{self.origin['sha256']}",
            "pulled": self.image["pull"],
            **found,
            "log": str(self.log),
            "seconds": round(time.monotonic() - self.began, 1),
            "bytes": size,
            "built_at": time.time(),
        }
        for left in self.partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        releases.appear(self.path, self.partial, manifest)


# ----------------------------------------------------------------------------------------- the engine


@contextlib.contextmanager
def login(image_name):
    """The folder of Docker's own configuration, with what the site's netrc file has for the registry; else
    root's own, where `docker login` leaves it."""
    registry = image_name.partition("/")[0]
    known = core.login_for(registry)
    if known is None:
        yield CREDENTIALS
        return
    key = HUB_KEY if registry == "docker.io" else registry
    text = json.dumps({"auths": {key: {"auth": known.partition(" ")[2]}}})
    # Nobody but root may enter such a folder, and it is gone afterwards.
    with tempfile.TemporaryDirectory(prefix="minimax-fleet-docker-") as folder:
        core.write_atomically(pathlib.Path(folder) / "config.json", text, 0o600)
        yield folder


def start_engine():
    """Docker answers. Raises HostError."""
    core.run("systemctl", "enable", "--quiet", "--now", "docker.service")
    core.run("docker", "version", timeout=60)


def believe(registry):
    """A registry without TLS is asked all the same: what it gives is known by its digest."""
    if trusts(registry):
        return
    try:
        known = json.loads(DAEMON.read_text()) if DAEMON.exists() else {}
        insecure = known.setdefault("insecure-registries", [])
        insecure.append(registry)
    except (ValueError, AttributeError) as error:
        raise core.HostError(
            f"{DAEMON} is not what Docker takes ({core.reason(error)}); mend it"
        ) from error
    core.write_atomically(DAEMON, json.dumps(known, indent=4) + "\n")
    # It ends no container, as a restart would.
    core.run("systemctl", "reload", "docker.service")
    deadline = time.monotonic() + core.PROXY_TIMEOUT_S
    while not trusts(registry):
        if time.monotonic() > deadline:
            raise core.HostError(
                f"Docker does not take {registry} of {DAEMON} for a plain registry"
            )
        time.sleep(0.2)
    core.say(f"Docker asks {registry} without TLS, by {DAEMON}")


def trusts(registry):
    """Does Docker ask this registry without TLS?"""
    said = core.run("docker", "info", "--format={{json .RegistryConfig}}").stdout
    known = (json.loads(said).get("IndexConfigs") or {}).get(registry)
    return known is not None and not known["Secure"]


def size_of_image(name):
    """Bytes on the disk, those of layers that other images share counted in."""
    return int(core.run("docker", "image", "inspect", "--format={{.Size}}", name).stdout)


# ------------------------------------------------------------------------------------ built in an image


DOCKERFILE = """\
FROM {base}
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST
COPY source {source}
WORKDIR {source}
RUN MAX_JOBS={jobs} SETUPTOOLS_SCM_PRETEND_VERSION={version} \\
    python3 -m pip install --no-cache-dir --disable-pip-version-check -e .
"""


def build(making):
    """vLLM of a commit, built inside the pinned image as the M1 guides do, and that as an image."""
    tree = making.partial / "source"
    commit = making.origin["commit"]
    releases.checkout(making, making.request["addresses"]["vllm"], commit, tree)
    releases.apply_patches(making, tree)
    jobs = releases.compilers(making)["MAX_JOBS"]
    # By a name of its own: builders take neither an id nor a digest without asking a registry.
    base = f"{making.image['tag']}-base"
    core.run("docker", "tag", making.image["pull"], base)
    version = making.origin["version"].partition("+")[0]
    text = DOCKERFILE.format(
        base=base,
        source=SOURCE,
        jobs=jobs,
        version=f"{version}+g{commit[:9]}",
    )
    core.write_atomically(making.partial / "Dockerfile", text)
    given = [
        word for pair in build_arguments(making).items() for word in ("--build-arg", "=".join(pair))
    ]
    command = ("docker", "build", "--network=host", "--force-rm", *given)
    making.run("building", *command, f"--tag={making.image['tag']}", str(making.partial))
    core.run("docker", "rmi", "--no-prune", base)


def build_arguments(making):
    """Where pip finds what the build asks for: the site's index, and the proxies of whoever began this."""
    index, extra = making.request["index"], making.request["addresses"]["extra_index"]
    given = {
        name: value
        for name, value in os.environ.items()
        if name.lower() in ("http_proxy", "https_proxy", "no_proxy")
    }
    if index:
        given["PIP_INDEX_URL"] = index
    if extra:
        given["PIP_EXTRA_INDEX_URL"] = " ".join(extra)
    hosts = [urllib.parse.urlsplit(url) for url in (index, *extra) if url]
    plain = sorted({host.hostname for host in hosts if host.scheme == "http"})
    if plain:
        given["PIP_TRUSTED_HOST"] = " ".join(plain)
    return given


# --------------------------------------------------------------------------------------------- checked


def checked(making):
    """What the image says of itself, with the host's GPUs, as services will run it. Raises HostError."""
    gpus = ["--gpus=all"] if making.image["gpus"] else []
    run = inside(making.image["tag"], making.request["user"], gpus, {})
    program, *arguments = making.request["check"]
    label = f"{making.path.name}: checking"
    try:
        said = asked(label, (*run(program), *arguments))
        version = (said.stdout.strip().splitlines() or [""])[-1]
        modules = json.dumps(making.request["modules"])
        looked = asked(label, (*run("python3"), "-c", releases.LOOK, modules))
    except core.HostError as error:
        raise core.HostError(
            f"{making.path.name} does not run: {releases.with_cure(error)}"
        ) from error
    wrong = releases.unlike(version, making.origin)
    if wrong:
        raise core.HostError(f"{making.path.name}: {wrong}")
    found = json.loads(looked.stdout.splitlines()[-1])
    found["packages"] = [
        {"name": name, **known}
        for name, known in sorted(
            found["packages"].items(), key=lambda item: releases.normal(item[0])
        )
    ]
    return {"checked": version, **found}


def inside(tag, user, gpus, env):
    """Makes the words that run a program in an image, once and without a network, as a service's user."""
    given = [f"--env={name}={value}" for name, value in env.items()]
    words = (
        *("docker", "run", "--rm", "--pull=never", "--network=none", "--log-driver=none"),
        *(f"--user={core.numbers_of(user)}", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
        *(
            "--workdir=/tmp",
            "--env=HOME=/tmp",
            "--env=HF_HUB_OFFLINE=1",
            "--env=PYTHONNOUSERSITE=1",
        ),
        *(f"--env=USER={user}", f"--env=LOGNAME={user}", *given, *gpus),
    )
    return lambda entrypoint: (*words, f"--entrypoint={entrypoint}", tag)


def asked(label, command):
    """A container that runs to its end. Docker is started anew where it does not know of GPUs yet.

    It knows of them when NVIDIA's hook is there as it starts (moby, daemon/nvidia_linux.go), so no
    configuration is needed for --gpus.
    """
    done = core.run_long(label, *command, check=False)
    if done.returncode and NO_DRIVER in done.stderr:
        others = core.run("docker", "ps", "--format={{.Names}}").stdout.split()
        if others:
            raise core.HostError(
                "Docker was started before NVIDIA's container toolkit was there and knows of no GPUs; a "
                f"restart would end {', '.join(others)}: `systemctl restart docker` when that may be"
            )
        core.say("Docker is started anew, to know of the GPUs")
        core.run("systemctl", "restart", "docker.service")
        done = core.run_long(label, *command, check=False)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = said[-1][: core.LINE_LENGTH] if said else f"exit status {done.returncode}"
        raise core.HostError(why)
    return done


def image_arguments(request):
    """Every unit's arguments, parsed by the very image that it is to run from, as its user.

    What an image understands is noted beside the staged unit, so that it is asked once.
    """
    for service in request["services"]:
        stage = core.SERVICES / service["name"] / service["stamp"]
        if (stage / releases.ACCEPTED).is_file():
            continue
        devices = ",".join(map(str, service["gpus"]))
        gpus = [f'--gpus="device={devices}"'] if devices else []
        run = inside(service["image"], request["user"], gpus, service["environment"])
        words = ("-c", releases.PARSE, service["entrypoint"], *service["words"])
        command = (*run("python3"), *words)
        try:
            asked(f"{service['name']}: arguments", command)
        except core.HostError as error:
            raise core.HostError(
                f"{service['name']}: its vLLM does not take its arguments: {error}"
            ) from error
        core.write_atomically(stage / releases.ACCEPTED, json.dumps({"image": service["image"]}))
        core.say(f"{service['name']}: its arguments are understood")
