"""Every way of installing vLLM, from the site's mirrors alone: rolled out twice, and to each other."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

import pytest
import requests

from lab import hosts as lab
from lab import topology
from lab.site import sources
from lab.standins.vllm import build as standins
from tests.lab.conftest import H20
from tests.lab.site import Site, argv_of, main_pids

HOST = H20[0]
ONLY = ("--limit", HOST)
UNIT = "minimax-m25-a.service"
SITE = f"http://{topology.site().address}"


def patch(file: str, before: str, after: str) -> str:
    """A patch of the stand-in's sources that replaces one text."""
    old = (standins.SOURCE / file).read_text(encoding="utf-8")
    assert before in old
    new = old.replace(before, after)
    before_lines, after_lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before_lines, after_lines, f"a/{file}", f"b/{file}"))


HARMLESS = ("vllm/version.py", "was built as.", "was built as, and the site's patch.")
USAGE = 'USAGE = "vllm serve'
FORGETS = (
    'RECORDED["options"] = [o for o in RECORDED["options"] if "--max-model-len" not in o["flags"]]'
)


def wheel_on_the_mirror(version: str) -> dict[str, str]:
    """A wheel of the package index, as a file that the site keeps."""
    page = requests.get(f"{SITE}/simple/vllm/", timeout=10).text
    found = re.search(rf'href="\.\./\.\.(/files/vllm-{version}-[^"#]+)#sha256=([0-9a-f]+)"', page)
    assert found
    return {"url": f"{SITE}{found[1]}", "sha256": found[2]}


def ways() -> dict[str, dict[str, Any]]:
    """Each way of installing vLLM by name, as `vllm` of group data."""
    commits = sources.commits()
    by_commit = {"version": "0.33.1", "commit": commits["new"]}
    return {
        "nightly": {"channel": "nightly", **by_commit},
        "source": {"channel": "source", **by_commit, "patches": ["a.patch"]},
        "full build": {"channel": "source", **by_commit, "precompiled": False},
        "wheel": {
            "channel": "wheel",
            "version": "0.30.0",
            "wheel": wheel_on_the_mirror("0.30.0"),
        },
        "stable": {"version": "0.33.0"},
    }


def install(site: Site, vllm: dict[str, Any]) -> None:
    """Have group data say so from now on."""
    site.edit("h20", r"(?m)^vllm = .*$", f"vllm = {vllm!r}")


def manifest(path: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(lab.read_file(HOST, f"{path}/fleet-release.json"))
    return document


@pytest.fixture
def channels(gpu_site: Site) -> Site:
    (gpu_site.folder / "a.patch").write_text(patch(*HARMLESS))
    gpu_site.append("h20", 'cuda_toolkit = "12.9"')
    return gpu_site


def test_each_channel_rolls_out_and_to_the_next_and_changes_nothing_again(channels: Site) -> None:
    lab.ssh(HOST, "rm -rf /opt/fleet/releases/vllm-*-* /opt/fleet/releases/.wheels", check=True)
    channels.roll_out_well(*ONLY)
    lab.clear_requests()
    for name, vllm in ways().items():
        install(channels, vllm)

        channels.roll_out_well(*ONLY)

        release = channels.plans().plans[HOST].release
        assert argv_of(HOST, main_pids(HOST)[UNIT])[1].startswith(release.path), name
        said = lab.ssh(HOST, "curl -s http://127.0.0.1:18000/version", check=True).stdout
        assert json.loads(said)["version"].startswith(vllm["version"]), name
        assert channels.roll_out_well(*ONLY).changed == 0, name
        built = manifest(release.path)
        assert built["asked"]["origin"] == release.origin
        assert all(re.fullmatch("[0-9a-f]{64}", p["sha256"][0]) for p in built["packages"]), built
        assert built["libraries"] == (["vllm._C"] if "commit" in vllm else [])
    asked = {request["path"].split("/")[1] for request in lab.requests()}
    assert asked >= {"simple", "files", "nightly", "git"}
    # The host has no way to anywhere but the lab's own network.
    assert lab.ssh(HOST, "ip route get 192.0.2.1").returncode != 0


def test_the_guides_copying_of_libraries_where_a_build_brings_none(channels: Site) -> None:
    vllm = {"channel": "source", "version": "0.23.0", "commit": sources.commits()["old"]}
    install(channels, vllm)

    run = channels.roll_out(*ONLY)

    assert run.exit_code == 0, run.output
    assert "the build has no vllm._C; 1 files copied from vllm-0.23.0.dev7" in run.output
    release = channels.plans().plans[HOST].release
    assert manifest(release.path)["libraries"] == ["vllm._C"]


def test_arguments_that_a_release_does_not_take_are_found_before_anything_is_stopped(
    channels: Site,
) -> None:
    """Group data says what version a build is; only the build itself knows its options."""
    before = main_pids(HOST)
    forgetful = patch("vllm/arguments.py", USAGE, f"{FORGETS}\n{USAGE}")
    (channels.folder / "a.patch").write_text(forgetful)
    channels.set_in_services("h20", '"max_model_len": 65536')
    install(channels, ways()["source"])

    run = channels.roll_out(*ONLY)

    assert run.exit_code == 1
    assert "m25-a: its vLLM does not take its arguments:" in run.output
    assert "--max-model-len" in run.output
    assert main_pids(HOST) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "0" * 40}, "no build of commit 000000000000 at "),
        (
            {"channel": "source", "precompiled": False, "commit": "0" * 40},
            "has no commit 0000000000",
        ),
        ({"channel": "source", "patches": ["b.patch"]}, "b.patch does not apply to "),
    ],
)
def test_what_cannot_be_built_is_told_and_what_serves_goes_on(
    channels: Site, change: dict[str, Any], message: str
) -> None:
    misfit = patch(*HARMLESS).replace("The version", "Another text")
    (channels.folder / "b.patch").write_text(misfit)
    before = main_pids(HOST)
    install(channels, ways()["nightly"] | change)

    run = channels.roll_out(*ONLY)

    assert run.exit_code == 1
    assert message in run.output
    assert "Traceback" not in run.output
    assert main_pids(HOST) == before


def test_a_wheel_of_another_hash_is_refused(channels: Site) -> None:
    vllm = ways()["wheel"]
    vllm["wheel"]["sha256"] = "0" * 64
    before = main_pids(HOST)
    install(channels, vllm)

    run = channels.roll_out(*ONLY)

    assert run.exit_code == 1
    assert f"not {'0' * 64}: not the file that was meant" in run.output
    assert main_pids(HOST) == before
