"""vLLM in a container: Docker's own engine on a host, an image of the site's registry, simulated GPUs."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

import pytest
import requests

from fleet.container import ROOT
from fleet.plan import HostPlan
from lab import hosts as lab
from lab import paths
from lab.site import containers, sources
from tests.lab.site import Site, argv_of, main_pids, unit_text, wait_for

HOST = "h20-03"
UNIT = "minimax-m25-a.service"
CONTAINER = "minimax-m25-a"
REMOTE_COMMANDS = 6


def on_host(command: str, *, timeout_s: float = 120) -> str:
    return lab.ssh(HOST, command, check=True, timeout_s=timeout_s).stdout


@pytest.fixture
def docker_site(site: Site) -> Site:
    """The lab's site, whose h20 hosts are to serve by the image of the site's registry."""
    site.set_in_services("h20", '"gate": {"ready_timeout_s": 180, "answer_timeout_s": 20}')
    use(site, "")
    # A host's disk is an overlay, and on that Docker can make none: it would copy whole images instead.
    on_host(
        f"mountpoint --quiet {ROOT} || {{ systemctl stop docker.socket docker.service 2>/dev/null;"
        f" mkdir -p {ROOT} && mount -t tmpfs -o size=64g docker {ROOT}; }}"
    )
    return site


def use(site: Site, more: str, *, version: str = containers.VERSION) -> None:
    image = containers.images(paths.SITE_ROOT)["vllm"]
    what = f'"channel": "docker", "version": "{version}", "image": "{image}"'
    site.edit("h20", r"(?m)^vllm = .*$", f"vllm = {{{what}{more}}}")


def plan(site: Site) -> HostPlan:
    return site.plans().plans[HOST]


def roll_out(site: Site) -> None:
    site.roll_out_well("--limit", HOST)


def settled(site: Site) -> None:
    """A second run changes nothing."""
    assert site.roll_out_well("--limit", HOST).changed_operations() == {}


def inspected(name: str, template: str) -> str:
    return on_host(f"docker container inspect --format '{template}' {name}").strip()


def no_containers() -> bool:
    return on_host("docker ps --all --quiet") == ""


def answers(site: Site) -> None:
    """Both services are public, and say what vLLM they are."""
    for service in plan(site).services:
        url = f"http://{site.plans().addresses[HOST]}:{service.port}"
        assert requests.get(f"{url}/v1/models", timeout=10).status_code == 200
        said = requests.get(f"{url}/version", timeout=10).json()["version"]
        assert said.startswith(service.vllm_version)


def test_from_a_release_to_an_image_and_back(docker_site: Site, served: Site) -> None:
    before = main_pids(HOST)
    roll_out(docker_site)

    answers(docker_site)
    made = plan(docker_site).release
    manifest = json.loads(lab.read_file(HOST, f"{made.path}/fleet-release.json"))
    assert manifest["checked"] == containers.VERSION
    assert manifest["image"]["tag"] == made.image
    assert manifest["digest"] == containers.images(paths.SITE_ROOT)["vllm"].partition("@")[2]
    assert "vllm" in {package["name"] for package in manifest["packages"]}
    pids = main_pids(HOST)
    numbers = on_host("echo $(id -u minimax):$(id -g minimax)").strip()
    for service in plan(docker_site).services:
        assert pids[service.unit] not in before.values()
        told = [word.replace("minimax:minimax", numbers) for word in service.argv]
        assert argv_of(HOST, pids[service.unit]) == told
        # Docker has understood these words as they were meant.
        name = service.unit.removesuffix(".service")
        assert inspected(name, "{{.Image}}") == manifest["image"]["id"]
        assert inspected(name, "{{.Config.User}}") == numbers
        asked = json.loads(inspected(name, "{{json .HostConfig.DeviceRequests}}"))
        assert asked[0]["DeviceIDs"] == [str(gpu) for gpu in service.gpus]
        assert inspected(name, "{{.HostConfig.NetworkMode}} {{.HostConfig.IpcMode}}") == "host host"
        assert (
            inspected(name, "{{.HostConfig.Privileged}} {{.HostConfig.CapDrop}}") == "false [ALL]"
        )
        limits = json.loads(inspected(name, "{{json .HostConfig.Ulimits}}"))
        assert {limit["Name"]: limit["Hard"] for limit in limits} == {
            "memlock": -1,
            "stack": 67108864,
            "nofile": 1048576,
        }
        mounts = json.loads(inspected(name, "{{json .Mounts}}"))
        assert {mount["Source"]: mount["RW"] for mount in mounts} == {
            service.weights.path: False,
            f"/var/lib/minimax/cache/{service.name}": True,
        }
        # vLLM's process is the service's user, without a right, and sees its GPUs counted from 0.
        inside = inspected(name, "{{.State.Pid}}")
        status = on_host(f"cat /proc/{inside}/status")
        assert re.search(r"^CapEff:\s*0+$", status, re.M)
        assert re.search(rf"^Uid:\s*{numbers.partition(':')[0]}\b", status, re.M)
        seen = on_host(f"docker exec {name} nvidia-smi -L")
        assert re.findall(r"^GPU (\d+):", seen, re.M) == ["0", "1", "2", "3"]

    assert unchanged(docker_site)

    # The release was not touched meanwhile: going back builds nothing and fetches nothing.
    lab.clear_requests()
    run = served.roll_out_well("--limit", HOST)
    assert not [name for name in run.changed_operations() if "Release of" in name]
    assert lab.requests() == []
    answers(served)
    assert no_containers()
    assert unit_text(HOST, UNIT) == plan(served).services[0].unit_text
    settled(served)

    # And again, from the image that is still there.
    lab.clear_requests()
    roll_out(docker_site)
    assert lab.requests() == []
    answers(docker_site)


def unchanged(site: Site) -> bool:
    """A second run changes nothing, and asks the host no more than any other."""
    before = main_pids(HOST)
    lab.write_file(HOST, "/etc/ssh/sshd_config.d/99-count.conf", "LogLevel VERBOSE\n")
    on_host("systemctl reload ssh")
    wait_for(lambda: lab.ssh(HOST, "true").returncode == 0, 10, "sshd listens again")
    since = on_host("date +%s.%N").strip()
    run = site.roll_out_well("--limit", HOST)
    log = on_host(f"journalctl -u ssh --since @{since} -o cat")
    on_host("rm /etc/ssh/sshd_config.d/99-count.conf && systemctl reload ssh")
    wait_for(lambda: lab.ssh(HOST, "true").returncode == 0, 10, "sshd listens again")
    commands = len(re.findall(r"Starting session: (?:command|subsystem)", log)) - 1
    assert run.changed == 0, run.changed_operations()
    assert main_pids(HOST) == before
    assert 1 <= commands <= REMOTE_COMMANDS, log
    return True


@pytest.mark.thorough
def test_an_image_goes_with_its_release_and_is_pulled_again(
    docker_site: Site, served: Site
) -> None:
    roll_out(docker_site)
    made = plan(docker_site).release

    # While a container is of it, Docker itself refuses.
    refused = lab.ssh(HOST, prune(made.path))
    assert refused.returncode != 0
    assert "is using its referenced image" in refused.stderr
    assert lab.ssh(HOST, f"test -d {made.path}").returncode == 0

    served.roll_out_well("--limit", HOST)
    on_host(prune(made.path))

    assert on_host(f"docker images --quiet {made.image}") == ""
    assert on_host(f"ls -d {made.path}* || true") == ""
    lab.clear_requests()
    roll_out(docker_site)
    assert any(entry["path"].startswith("/v2/") for entry in lab.requests())
    answers(docker_site)


def prune(path: str) -> str:
    """What pruning does with a release that nothing needs."""
    code = (
        "import sys, pathlib; sys.path.insert(0, '/usr/local/lib/minimax-fleet'); "
        f"import fleet_prune; fleet_prune.remove(pathlib.Path('{path}'))"
    )
    return f'python3 -c "{code}"'


@pytest.mark.thorough
def test_what_ends_a_container_or_its_client_leaves_nothing_and_it_comes_back(
    docker_site: Site,
) -> None:
    roll_out(docker_site)
    first, id_before = main_pids(HOST)[UNIT], inspected(CONTAINER, "{{.Id}}")

    # The client alone: the container would go on, and keep GPUs and port.
    on_host(f"kill -KILL {first}")
    wait_for(lambda: serves_anew(docker_site, first), 90, "the service is back")
    assert inspected(CONTAINER, "{{.Id}}") != id_before
    assert on_host("docker ps --all --quiet").count("\n") == len(plan(docker_site).services)

    # The engine: a service of it ends, and wakes it again.
    second = main_pids(HOST)[UNIT]
    on_host("systemctl restart docker.service", timeout_s=180)
    wait_for(lambda: serves_anew(docker_site, second), 120, "the service is back")

    settled(docker_site)


def serves_anew(site: Site, pid: int) -> bool:
    service = plan(site).services[0]
    try:
        url = f"http://{site.plans().addresses[HOST]}:{service.port}/v1/models"
        answered = requests.get(url, timeout=5).status_code == 200
    except requests.RequestException:
        return False
    return answered and main_pids(HOST).get(UNIT) not in (None, 0, pid)


def test_a_foreign_container_on_the_port_is_named_and_ours_is_ours(docker_site: Site) -> None:
    roll_out(docker_site)
    service = plan(docker_site).services[0]
    asked = docker_site.pyinfra("-y", "inventories/lab.py", "tasks.health.check", "--limit", HOST)
    assert asked.exit_code == 0, asked.output
    tag = plan(docker_site).release.image
    on_host(
        f"docker run --detach --rm --name=squatter --network=host --entrypoint=python3 {tag}"
        " -m http.server 19000"
    )
    pid = inspected("squatter", "{{.State.Pid}}")
    docker_site.edit("h20", rf'"port": {service.port}', '"port": 9000')

    run = docker_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", HOST)

    on_host("docker stop -t 1 squatter")
    assert run.exit_code == 1
    assert f"port 19000 for m25-a is held by PID {pid} (python3)" in run.output
    assert main_pids(HOST)[UNIT] > 0


@pytest.mark.thorough
def test_an_image_that_does_not_pass_is_put_back_to_the_release(
    docker_site: Site, served: Site
) -> None:
    served.roll_out_well("--limit", HOST)
    before = unit_text(HOST, UNIT)
    docker_site.edit(
        "h20", r'"ready_timeout_s": 180', '"ready_timeout_s": 180, "expect": "Yankees"'
    )

    run = docker_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", HOST)

    assert run.exit_code == 1
    assert "gate, answer: expected an answer that matches /Yankees/" in run.output
    assert "m25-a was put back and serves" in run.output
    assert unit_text(HOST, UNIT) == before
    assert no_containers()
    answers(served)


@pytest.mark.thorough
def test_the_way_back_leads_between_images_and_releases(docker_site: Site, served: Site) -> None:
    served.roll_out_well("--limit", HOST)
    roll_out(docker_site)
    first = plan(docker_site)
    docker_site.set_in_services("h20", '"max_model_len": 131072')
    roll_out(docker_site)
    assert "131072" in argv_of(HOST, main_pids(HOST)[UNIT])
    lab.clear_requests()

    assert go_back(docker_site)
    assert inspected(CONTAINER, "{{.Config.Image}}") == first.release.image
    assert unit_text(HOST, UNIT) == first.services[0].unit_text
    answers(docker_site)

    assert go_back(docker_site, "--data", f"to={plan(served).release.id}")
    assert unit_text(HOST, UNIT) == plan(served).services[0].unit_text
    assert no_containers()
    answers(served)
    assert lab.requests() == []


def go_back(site: Site, *arguments: str) -> bool:
    """By the command; whether a second time changes nothing."""
    command = ("-y", "inventories/lab.py", "tasks.rollback.apply", "--limit", HOST, *arguments)
    done = site.pyinfra(*command)
    assert done.exit_code == 0, done.output
    again = site.pyinfra("--json", *command)
    assert again.exit_code == 0, again.output
    return again.changed_operations() == {}


def test_vllm_of_a_commit_is_built_inside_the_image(docker_site: Site, served: Site) -> None:
    commit = sources.commits()["new"]
    before = (Path(sources.TREE) / "pyproject.toml").read_text().splitlines(keepends=True)
    after = [
        'description = "patched in the lab"\n' if line.startswith("description") else line
        for line in before
    ]
    patch = difflib.unified_diff(before, after, "a/pyproject.toml", "b/pyproject.toml")
    (docker_site.folder / "patches").mkdir()
    (docker_site.folder / "patches" / "lab.patch").write_text("".join(patch))
    use(
        docker_site,
        f', "commit": "{commit}", "patches": ["patches/lab.patch"], "max_jobs": 1',
        version="0.33.1",
    )
    made = plan(docker_site).release
    on_host(f"test ! -d {made.path} || {prune(made.path)}")
    lab.clear_requests()

    roll_out(docker_site)

    asked = [entry["path"] for entry in lab.requests()]
    assert any(path.startswith("/git/") for path in asked)
    answers(docker_site)
    manifest = json.loads(lab.read_file(HOST, f"{made.path}/fleet-release.json"))
    assert manifest["checked"] == f"0.33.1+g{commit[:9]}"
    assert manifest["libraries"] == ["vllm._C"]
    said = on_host(f"docker exec {CONTAINER} python3 -m pip show vllm")
    assert "Summary: patched in the lab" in said
    assert "Editable project location: /opt/minimax-fleet/vllm" in said
    settled(docker_site)


def test_a_key_reaches_vllm_and_no_command_line(docker_site: Site) -> None:
    key = "lab-key-of-a-container"
    (docker_site.folder / "key").write_text(key)
    docker_site.set_in_services("h20", '"api_key": {"file": "key"}')

    roll_out(docker_site)

    service = plan(docker_site).services[0]
    url = f"http://{docker_site.plans().addresses[HOST]}:{service.port}/v1/models"
    assert requests.get(url, timeout=10).status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    assert requests.get(url, headers=headers, timeout=10).status_code == 200
    assert key not in on_host("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert key not in on_host(f"systemctl show {UNIT}")
    assert key not in on_host(f"journalctl -u {UNIT} -u docker.service -o cat")
