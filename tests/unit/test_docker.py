"""The channel docker: its plan, the words that Docker is given, and what the host's program does of it."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fleet import container
from fleet.catalog import catalog
from fleet.plan import HostPlan
from fleet.preflight import problems
from fleet.releases import image_release
from fleet.spec import HostSpec
from tests.unit.state import converged, plan_of, planned, service

DIGEST = f"sha256:{'a' * 64}"
IMAGE = f"vllm/vllm-openai@{DIGEST}"
COMMIT = "c" * 40
VLLM: dict[str, Any] = {"channel": "docker", "version": "0.33.0", "image": IMAGE}
ID = "0123456789abcdef" * 4
OTHER = "f" * 64


def docker_plan(*services: dict[str, Any], **changes: Any) -> HostPlan:
    return plan_of(*(services or (service(),)), **{"vllm": VLLM, **changes})


def done(stdout: str = "", returncode: int = 0, stderr: str = "") -> SimpleNamespace:
    return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)


# ------------------------------------------------------------------------------------------ the plan


def test_a_service_runs_docker_in_the_foreground() -> None:
    plan = docker_plan(service(gpus=[4, 5, 6, 7]))
    (planned_service,) = plan.services
    argv = planned_service.argv

    assert argv[:2] == ("/usr/bin/docker", "run")
    assert '--gpus="device=4,5,6,7"' in argv
    assert "--detach" not in argv
    assert "--privileged" not in argv
    image = argv.index(container.tag(plan.release.id))
    assert argv[image - 1 : image + 2] == ("--entrypoint=vllm", plan.release.image, "serve")
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    # What it sees is counted from 0 again, and its programs are the image's.
    assert not {"CUDA_VISIBLE_DEVICES", "PATH"} & planned_service.environment.keys()
    assert planned_service.environment["HOME"] == "/var/lib/minimax/cache/m25"
    given = {word.removeprefix("--env=") for word in argv if word.startswith("--env=")}
    assert given == planned_service.environment.keys()
    assert planned_service.document()["image"] == plan.release.image
    assert planned_service.request()["release"] == plan.release.path


def test_what_the_parser_is_given_is_what_follows_the_image() -> None:
    asked = docker_plan().arguments_request()["services"][0]

    assert (asked["entrypoint"], asked["gpus"]) == ("serve", [0, 1, 2, 3])
    assert asked["words"][0].startswith("/var/lib/minimax/models/")
    assert asked["words"][1] == "--served-model-name"


def test_m1_is_started_by_its_module() -> None:
    m1 = service(
        model="MiniMaxAI/MiniMax-M1-40k",
        revision="2d1d1c2f00c97fc1245bfce7648649b76e0a8e6e",
        recipe="m1-tp8",
        gpus=[*range(8)],
        max_model_len=65536,
    )
    image = {"channel": "docker", "version": "0.9.2", "image": IMAGE, "commit": COMMIT}
    plan = plan_of(m1, vllm=image)
    argv = plan.services[0].argv

    at = argv.index(str(plan.release.image))
    assert argv[at - 1] == "--entrypoint=python3"
    assert argv[at + 1 : at + 3] == ("-m", "vllm.entrypoints.openai.api_server")
    assert plan.services[0].invocation()["entrypoint"] == "vllm.entrypoints.openai.api_server"


def test_a_key_is_named_and_never_a_word() -> None:
    services = plan_with_key().services

    assert "--env=VLLM_API_KEY" in services[0].argv
    assert "very-secret" not in services[0].unit_text
    assert f"EnvironmentFile={services[0].stage_dir}/secrets.env" in services[0].unit_text


def plan_with_key() -> HostPlan:
    from fleet.planner import Planner, Texts
    from fleet.spec import SecretReference

    data = {
        **{"gpu": "h20-141", "gpu_count": 8, "vllm": VLLM},
        "services": [service(api_key={"file": "key"})],
    }
    texts = Texts({SecretReference(file="key"): "very-secret"}, {}, {})
    plan = Planner({}, texts).plan("h20-01", "h20", HostSpec.model_validate(data))
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("image", "mirror", "pulled", "address"),
    [
        (IMAGE, None, f"docker.io/{IMAGE}", "https://registry-1.docker.io/v2/"),
        (f"python@{DIGEST}", None, f"docker.io/library/python@{DIGEST}", None),
        (f"vllm/vllm-openai:v0.33.0@{DIGEST}", None, f"docker.io/{IMAGE}", None),
        (f"nvcr.io/nvidia/vllm:1@{DIGEST}", None, f"nvcr.io/nvidia/vllm@{DIGEST}", None),
        (f"localhost/x@{DIGEST}", None, f"localhost/x@{DIGEST}", "https://localhost/v2/"),
        (f"h:5000/x:1@{DIGEST}", None, f"h:5000/x@{DIGEST}", "https://h:5000/v2/"),
        (IMAGE, "https://m.example/hub/", f"m.example/hub/{IMAGE}", "https://m.example/v2/"),
        (f"nvcr.io/n/x@{DIGEST}", "http://m:5000", f"m:5000/n/x@{DIGEST}", "http://m:5000/v2/"),
    ],
)
def test_where_an_image_comes_from(
    image: str, mirror: str | None, pulled: str, address: str | None
) -> None:
    assert container.pulled_from(image, mirror) == pulled
    if address:
        assert container.registry_address(image, mirror) == address


def test_only_a_mirror_of_plain_http_is_told_to_docker() -> None:
    assert container.without_tls("http://m:5000/hub") == "m:5000"
    assert container.without_tls("https://m:5000/hub") is None
    assert container.without_tls(None) is None


def test_the_mirror_changes_no_release_and_what_is_built_does() -> None:
    def release(mirrors: dict[str, Any] | None = None, **changes: Any) -> str:
        data = {"vllm": VLLM | changes, "services": [], "mirrors": mirrors or {}}
        return image_release(HostSpec.model_validate(data), {"p": "text"}).id

    assert release() == release({"registry": "http://m"}) != release(image=f"vllm/x@{DIGEST}")
    built = release(commit=COMMIT)
    assert built.startswith("vllm-0.33.0-cccccccccccc-")
    assert built != release(commit=COMMIT, patches=["p"])
    assert container.tag("vllm-0.19.1+cu129-1").endswith(":vllm-0.19.1-cu129-1")


@pytest.mark.parametrize(
    ("vllm", "changes", "message"),
    [
        ({"patches": ["p"]}, {}, "patches is for a build inside the image; give commit"),
        ({"max_jobs": 4}, {}, "max_jobs is for a build inside the image; give commit"),
        ({}, {"env": {"DOCKER_HOST": "tcp://x"}}, "DOCKER_HOST would steer Docker's client"),
        ({"commit": COMMIT, "patches": ["p"]}, {}, "patches[0]: p is missing on this machine"),
    ],
)
def test_what_is_refused(vllm: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    try:
        found = planned(service(**changes), vllm=VLLM | vllm)[1]
    except ValueError as error:
        found = [str(error)]

    assert message in "\n".join(found)


def test_a_host_without_gpus_gets_the_engine_alone() -> None:
    cpu = service(recipe="cpu", gpus=[], max_model_len=1024)
    plan = plan_of(cpu, gpu=None, gpu_count=0, driver=None, vllm=VLLM | {"version": "0.32.0"})

    assert list(plan.engine_packages("debian-12")) == ["docker.io"]
    assert not any(word.startswith("--gpus") for word in plan.services[0].argv)
    assert "nvidia-ctk" not in plan.services[0].unit_text
    assert list(docker_plan().engine_packages("debian-12", ["docker-ce"])) == [
        *("docker-ce", "docker-ce-cli", "containerd.io", "nvidia-container-toolkit")
    ]
    assert plan_of(service()).engine_packages("debian-12") == {}


def test_room_is_wanted_where_docker_keeps_images() -> None:
    plan = docker_plan()
    seen = converged(plan)
    assert problems(plan, seen, 0.0) == []

    seen["releases"][plan.release.path] = False
    seen["disks"][container.ROOT] = {"free_bytes": 10**9, "device": 7}
    (found,) = problems(plan, seen, 0.0)

    assert found.startswith(f"disk at {container.ROOT}: ")
    assert f"{catalog().tools.image_bytes / 2**30:.1f} GiB needed" in found


def test_where_the_toolkit_is_to_be_had_is_said() -> None:
    plan = docker_plan()
    seen = converged(plan)
    seen["packages"]["nvidia-container-toolkit"] = None
    seen["needs"]["packages"] = {"versions": {"nvidia-container-toolkit": []}}

    (found,) = problems(plan, seen, 0.0)

    assert "nvidia-container-toolkit is in NVIDIA's repository libnvidia-container" in found


# -------------------------------------------------------------------- as Docker's own client reads it


class Engine(BaseHTTPRequestHandler):
    """As much of the engine's API as `docker run` asks for before it creates a container."""

    asked: dict[str, Any]

    def do_GET(self) -> None:
        self._answer(200, {})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Engine.asked = {"path": self.path, "body": json.loads(body or b"{}")}
        self._answer(500, {"message": "that is all"})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Api-Version", "1.41")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing on standard error."""


@pytest.fixture
def engine() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"tcp://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.skipif(shutil.which("docker") is None, reason="Docker's client is not here")
def test_docker_understands_every_word_as_it_is_meant(engine: str, tmp_path: Path) -> None:
    odd = 'a "quoted" $value, 100%'
    piecewise = {"compilation-config": {"cudagraph_mode": "PIECEWISE"}}
    planned_service = docker_plan(
        service(gpus=[4, 5, 6, 7], env={"ODD": odd}, args=piecewise)
    ).services[0]
    cid = f"--cidfile={container.runtime_folder('m25')}/container.id"
    words = [
        word.replace("minimax:minimax", "998:997").replace(
            cid, f"--cidfile={tmp_path / 'container.id'}"
        )
        for word in planned_service.argv[1:]
    ]
    env = {**planned_service.environment, "DOCKER_HOST": engine, "DOCKER_CONFIG": str(tmp_path)}

    client = str(shutil.which("docker"))
    asked = subprocess.run([client, *words], env=env, capture_output=True, text=True, check=False)

    assert "that is all" in asked.stderr
    body = Engine.asked["body"]
    assert "name=minimax-m25" in Engine.asked["path"]
    assert body["Image"] == planned_service.image
    assert body["Entrypoint"] == ["vllm"]
    assert body["Cmd"][:2] == ["serve", planned_service.weights.path]
    assert body["Cmd"][2:] == [word for words in planned_service.options for word in words]
    assert body["User"] == "998:997"
    assert dict(pair.split("=", 1) for pair in body["Env"]) == planned_service.environment
    host = body["HostConfig"]
    assert (host["NetworkMode"], host["IpcMode"], host["Privileged"]) == ("host", "host", False)
    assert (host["AutoRemove"], host["Init"], host["LogConfig"]["Type"]) == (True, True, "none")
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["4", "5", "6", "7"]
    assert {limit["Name"]: limit["Hard"] for limit in host["Ulimits"]} == {
        "memlock": -1,
        "stack": 67108864,
        "nofile": 1048576,
    }
    assert {mount["Target"]: mount.get("ReadOnly", False) for mount in host["Mounts"]} == {
        planned_service.weights.path: True,
        "/var/lib/minimax/cache/m25": False,
    }


# -------------------------------------------------------------------------------- the host's program


@pytest.fixture
def images(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the verb `image`, over `program`."""
    return importlib.import_module("fleet_image")


SCOPE = f"0::/system.slice/docker-{ID}.scope\n"
OLD = f"12:memory:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/docker/{ID}\n"
NESTED = f"0::/system.slice/docker-{ID}.scope/init.service\n"


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        (SCOPE, "minimax-m25-a.service"),
        (OLD, "minimax-m25-a.service"),
        (NESTED, "minimax-m25-a.service"),
        (SCOPE.replace(ID, OTHER), None),
        (OLD.replace(ID, OTHER), None),
        ("0::/system.slice/minimax-m25-b.service\n", "minimax-m25-b.service"),
        ("0::/system.slice/docker.service\n", "docker.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", None),
    ],
    ids=["systemd", "cgroupfs", "nested", "other", "other, cgroupfs", "unit", "engine", "session"],
)
def test_whose_a_process_of_a_container_is(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cgroup: str,
    unit: str | None,
) -> None:
    monkeypatch.setattr(program, "CONTAINERS", tmp_path)
    for name, known in (("m25-a", ID), ("m25-b", "0" * 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "container.id").write_text(known)
    (tmp_path / "starting").mkdir()

    assert program.unit_of_cgroup(cgroup) == unit


def test_the_plan_and_the_program_mean_the_same_folder(program: ModuleType) -> None:
    assert str(program.CONTAINERS) == container.RUNTIME
    assert program.unit_of("x") == f"{container.unit_name('x')}.service"


def release_at(folder: Path, image: dict[str, str] | None) -> Path:
    folder.mkdir()
    manifest = {"built_at": 1.0, "bytes": 7, **({"image": image} if image else {})}
    (folder / "fleet-release.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("image", "there", "complete"),
    [
        (None, None, True),
        ({"tag": "t:1", "id": "sha256:1"}, "sha256:1", True),
        ({"tag": "t:1", "id": "sha256:1"}, "sha256:2", False),
        ({"tag": "t:1", "id": "sha256:1"}, None, False),
    ],
    ids=["no image", "there", "another of that name", "gone"],
)
def test_a_release_is_complete_with_its_image(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    image: dict[str, str] | None,
    there: str | None,
    complete: bool,
) -> None:
    asked: list[str] = []

    def image_id(name: str) -> str | None:
        asked.append(name)
        return there

    monkeypatch.setattr(program, "image_id", image_id)

    assert program.release_complete(release_at(tmp_path / "r", image)) is complete
    assert asked == (["t:1"] if image else [])


def test_an_engine_that_is_not_there_has_no_image(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    assert program.image_id("t:1") is None


@pytest.mark.parametrize(("runs", "due"), [("sha256:1", None), ("sha256:2", "another image")])
def test_a_container_of_another_image_is_exchanged(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    runs: str,
    due: str | None,
) -> None:
    release = release_at(tmp_path / "r", {"tag": "t:1", "id": "sha256:1"})
    said = {"container": runs, "image": "sha256:1"}
    monkeypatch.setattr(program, "docker", lambda kind, *_: said[kind])
    known = {"unit": "minimax-a.service", "image": "t:1", "release": str(release)}

    found = program.container_due(known)

    assert (due is None) == (found is None)
    assert program.container_due({"unit": "minimax-a.service"}) is None


def test_arguments_are_compared_as_the_process_has_them(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "numbers_of", {"minimax": "998:997"}.__getitem__)

    assert program.as_started(["docker", container.USER, "x"]) == ["docker", "--user=998:997", "x"]
    assert f"--user={program.USER}:{program.USER}" == container.USER


def test_an_engine_that_is_there_is_kept(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [["docker.io", "toolkit"], ["docker-ce", "docker-ce-cli", "toolkit"]]
    has = {"docker.io": None, "docker-ce": {"version": "1", "held": False}}
    monkeypatch.setattr(program, "packages_state", lambda names: {n: has[n] for n in names})

    assert program.engine_packages(sets) == sets[1]
    has["docker-ce"] = None
    assert program.engine_packages(sets) == sets[0]
    assert program.engine_packages(None) == []


def test_the_registry_is_asked_only_for_an_image_that_is_missing(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(program, "reach", asked.append)
    mirrors = {"apt": {}, "dnf": {}, "index": "http://index", "registry": "http://m/v2/", "hub": ""}
    question = {"mirrors": mirrors, "images": ["/r/image"], "models": []}
    state: dict[str, Any] = {"uv": True, "releases": {"/r/image": True, "/r/hub": True}}

    program.needs_state(question, state, {})
    assert asked == []
    state["releases"]["/r/image"] = False
    program.needs_state(question, state, {})
    assert asked == ["http://m/v2/"]


class Docker:
    """Stands in for every command that the program runs; answers by how a command begins."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: list[tuple[str, Callable[[], SimpleNamespace]]] = []

    def says(self, begins: str, *answers: SimpleNamespace) -> None:
        queue = [*answers]
        self.answers.insert(0, (begins, lambda: queue.pop(0) if len(queue) > 1 else queue[0]))

    def run(self, *argv: str, check: bool = True, **_: Any) -> SimpleNamespace:
        line = " ".join(argv)
        self.asked.append(line)
        found = next(
            (answer() for begins, answer in self.answers if line.startswith(begins)), done()
        )
        assert not (check and found.returncode), f"{line} was not to fail"
        return found

    def run_long(self, _label: str, *argv: str, **options: Any) -> SimpleNamespace:
        return self.run(*argv, **options)


@pytest.fixture
def docker(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Docker:
    docker = Docker()
    monkeypatch.setattr(program, "run", docker.run)
    monkeypatch.setattr(program, "run_long", docker.run_long)
    return docker


NO_GPUS = done(
    returncode=125, stderr='docker: … could not select device driver "" with capabilities: [[gpu]].'
)


def test_docker_is_started_anew_to_know_of_gpus_where_nobody_minds(
    images: ModuleType, docker: Docker
) -> None:
    docker.says("docker run", NO_GPUS, done("0.33.0\n"))
    docker.says("docker ps", done("\n"))

    assert images.asked("checking", ("docker", "run", "--gpus=all")).stdout == "0.33.0\n"
    assert "systemctl restart docker.service" in docker.asked


def test_docker_is_not_started_anew_under_containers(
    images: ModuleType, program: ModuleType, docker: Docker
) -> None:
    docker.says("docker run", NO_GPUS)
    docker.says("docker ps", done("database\nminimax-m25\n"))

    with pytest.raises(program.HostError, match=r"a restart would end database, minimax-m25"):
        images.asked("checking", ("docker", "run", "--gpus=all"))
    assert not any("restart" in line for line in docker.asked)


TRUSTED = '{"IndexConfigs": {"docker.io": {"Secure": true}, "10.86.0.2": {"Secure": false}}}'


def test_a_plain_registry_is_added_to_what_docker_has(
    images: ModuleType, docker: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "daemon.json"
    file.write_text('{"data-root": "/big", "insecure-registries": ["other"]}')
    monkeypatch.setattr(images, "DAEMON", file)
    docker.says("docker info", done('{"IndexConfigs": {}}'), done(TRUSTED))

    images.believe("10.86.0.2")

    assert json.loads(file.read_text()) == {
        "data-root": "/big",
        "insecure-registries": ["other", "10.86.0.2"],
    }
    assert "systemctl reload docker.service" in docker.asked
    before, written = len(docker.asked), file.stat().st_mtime_ns
    images.believe("10.86.0.2")
    assert (len(docker.asked), file.stat().st_mtime_ns) == (before + 1, written)


@pytest.mark.parametrize("text", ["{broken", "[]", '{"insecure-registries": "x"}'])
def test_a_broken_daemon_json_is_left_and_named(
    images: ModuleType,
    program: ModuleType,
    docker: Docker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
) -> None:
    file = tmp_path / "daemon.json"
    file.write_text(text)
    monkeypatch.setattr(images, "DAEMON", file)
    docker.says("docker info", done('{"IndexConfigs": null}'))

    with pytest.raises(program.HostError, match=rf"{file} is not what Docker takes .*; mend it"):
        images.believe("10.86.0.2")
    assert file.read_text() == text


LOOKED = '{"python": "3.12.1", "libraries": [], "packages": {"b": {"version": "2"}, "A": {"version": "1"}}}'


@pytest.fixture
def asked_for(
    images: ModuleType, program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Any]:
    """What the verb `image` is told, with folders below tmp_path."""
    plan = docker_plan(mirrors={"registry": "https://m.example"})
    request = plan.image_request(plan.release)
    request["path"] = str(tmp_path / "releases" / plan.release.id)
    monkeypatch.setattr(images.releases, "LOGS", tmp_path / "log")
    monkeypatch.setattr(program, "numbers_of", lambda _user: "998:997")
    return dict(request)


def test_an_image_is_pulled_tagged_checked_and_noted(
    images: ModuleType,
    program: ModuleType,
    docker: Docker,
    asked_for: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pulled: list[tuple[dict[str, str], tuple[str, ...]]] = []
    monkeypatch.setattr(
        images.releases, "logged", lambda _label, _log, argv, env, cwd: pulled.append((env, argv))
    )
    docker.says("docker image inspect --format={{.Size}}", done("123\n"))
    docker.says("docker image inspect --format={{.Id}}", done(returncode=1), done("sha256:1\n"))
    docker.says("docker run", done("0.33.0\n"), done(f"{LOOKED}\n"))

    images.image(asked_for)

    ((env, argv),) = pulled
    assert argv == ("docker", "pull", f"m.example/{IMAGE}")
    assert env["DOCKER_CONFIG"] == images.CREDENTIALS
    tag = asked_for["image"]["tag"]
    assert f"docker tag m.example/{IMAGE} {tag}" in docker.asked
    assert f"docker rmi m.example/{IMAGE}" in docker.asked
    checks = [line for line in docker.asked if line.startswith("docker run")]
    assert all("--gpus=all" in line and "--network=none" in line for line in checks)
    assert all("--user=998:997" in line for line in checks)
    manifest = json.loads((Path(asked_for["path"]) / "fleet-release.json").read_text())
    assert manifest["image"] == {"tag": tag, "id": "sha256:1"}
    assert (manifest["checked"], manifest["digest"], manifest["bytes"]) == ("0.33.0", DIGEST, 123)
    assert [package["name"] for package in manifest["packages"]] == ["A", "b"]
    # Nothing else lies there, and a second call finds it.
    assert os.listdir(asked_for["path"]) == ["fleet-release.json"]
    before = len(docker.asked)
    images.image(asked_for)
    assert len(docker.asked) == before + 1


def test_a_login_of_the_site_is_dockers_for_as_long_as_it_pulls(
    images: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine m.example login joe password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    with images.login(f"m.example:5000/{IMAGE}") as folder:
        file = Path(folder) / "config.json"
        assert file.stat().st_mode & 0o777 == 0o600
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        (auth,) = json.loads(file.read_text())["auths"].items()
    assert auth == ("m.example:5000", {"auth": base64.b64encode(b"joe:secret").decode()})
    assert not file.exists()
    with images.login(f"other.example/{IMAGE}") as folder:
        assert folder == images.CREDENTIALS


def test_an_image_of_another_version_is_refused(
    images: ModuleType,
    program: ModuleType,
    docker: Docker,
    asked_for: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images.releases, "logged", lambda *_: None)
    docker.says("docker image inspect", done(returncode=1))
    docker.says("docker run", done("0.32.0\n"), done(f"{LOOKED}\n"))

    with pytest.raises(program.HostError, match=r"it calls itself 0\.32\.0, not 0\.33\.0"):
        images.image(asked_for)
    assert not Path(asked_for["path"]).exists()


def test_a_build_starts_from_the_pinned_image(
    images: ModuleType,
    docker: Docker,
    asked_for: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_for["origin"] = {**asked_for["origin"], "commit": COMMIT}
    asked_for["index"], asked_for["max_jobs"] = "http://m:80/simple", 3
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    made: list[str] = []
    monkeypatch.setattr(
        images.releases, "logged", lambda _l, _log, argv, _env, _cwd: made.append(" ".join(argv))
    )
    monkeypatch.setattr(images.releases, "checkout", lambda making, url, commit, tree: tree.mkdir())
    making = images.Making(asked_for)
    making.begin()

    images.build(making)

    text = (making.partial / "Dockerfile").read_text()
    tag = asked_for["image"]["tag"]
    assert text.startswith(f"FROM {tag}-base\n")
    assert "MAX_JOBS=3 SETUPTOOLS_SCM_PRETEND_VERSION=0.33.0+gccccccccc" in text
    assert re.search(r"pip install .* -e \.$", text, re.M)
    (command,) = made
    assert command.endswith(f"--tag={tag} {making.partial}")
    for given in (
        "PIP_INDEX_URL=http://m:80/simple",
        "PIP_TRUSTED_HOST=m",
        "HTTPS_PROXY=http://proxy",
    ):
        assert f"--build-arg {given}" in command
    assert f"docker tag {asked_for['image']['pull']} {tag}-base" in docker.asked


def test_an_image_goes_with_its_release(
    program: ModuleType, docker: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prune = importlib.import_module("fleet_prune")
    release = release_at(tmp_path / "r", {"tag": "t:1", "id": "sha256:1"})
    plain = release_at(tmp_path / "p", None)
    docker.says("docker image inspect", done("sha256:1"))

    assert (program.image_bytes(release), program.image_bytes(plain)) == (7, 0)
    prune.remove(release)
    prune.remove(plain)

    assert [line for line in docker.asked if "rmi" in line] == ["docker rmi t:1"]
    assert [*tmp_path.iterdir()] == []
