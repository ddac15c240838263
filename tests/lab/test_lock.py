"""A site's lock: made from the mirrors, rolled out as it is, and proof against mirrors that change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.lock import Lock, LockedRelease, read
from lab import hosts as lab
from lab import paths
from lab.site import index, sources
from tests.lab import progress
from tests.lab.conftest import CPU, H20
from tests.lab.site import Site, main_pids
from tests.unit.test_site_index import make_wheel

FLEET = str(Path(sys.executable).with_name("fleet"))
HOST = H20[0]
LOCK = "locks/lab.lock"
NEXT = "0.33.1"
DEPENDENCY = "tqdm"
CACHE = "/opt/fleet/releases/.cache"


def fleet(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    progress.say(f"fleet {' '.join(words)}")
    return subprocess.run(
        [FLEET, *words], cwd=site.folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def locked(site: Site) -> Site:
    """A site with a lock of its own."""
    done = fleet(site, "lock", "inventories/lab.py")
    assert done.returncode == 0, done.stderr
    return site


def lock_of(site: Site) -> Lock:
    return read(LOCK, (site.folder / LOCK).read_text())


def release_of(lock: Lock, package: str) -> LockedRelease:
    return next(one for one in lock.releases if package in one.versions)


@pytest.fixture
def mirror() -> Iterator[Path]:
    """The files of the lab's package index, to be tampered with; afterwards they are as they were."""
    files, simple = paths.SITE_ROOT / "files", paths.SITE_ROOT / "simple"
    before = {file.name for file in files.iterdir()}
    stamp = (simple / index.STAMP).read_text()
    kept = paths.SITE_ROOT.parent / ".kept-by-a-test"
    kept.mkdir(exist_ok=True)
    for file in (*files.glob(f"vllm-{NEXT}-*"), *files.glob(f"{DEPENDENCY}-*")):
        shutil.copy2(file, kept)
    yield files
    for file in files.iterdir():
        if file.name not in before:
            file.unlink()
    for file in kept.iterdir():
        file.replace(files / file.name)
    kept.rmdir()
    index.write_index(files, simple)
    (simple / index.STAMP).write_text(stamp)


def put(files: Path, name: str, version: str) -> Path:
    """A wheel on the index, in place of one of that name if there is one."""
    wheel = make_wheel(files, name, version)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{name}-{version}.dist-info/METADATA")
    (files / f"{wheel.name}.metadata").write_bytes(metadata)
    index.write_index(files, files.parent / "simple")
    return wheel


def packages(host: str, release: str) -> dict[str, str]:
    """Version of each package that a release on a host has, by its own manifest."""
    manifest: dict[str, Any] = json.loads(lab.read_file(host, f"{release}/fleet-release.json"))
    assert manifest["locked"]
    return {one["name"].lower().replace("_", "-"): one["version"] for one in manifest["packages"]}


@pytest.mark.thorough
def test_what_is_locked_is_what_is_installed_whatever_the_index_gets(
    locked: Site, mirror: Path
) -> None:
    """On a stand-in, and on the host with the real vLLM, whose lock has more than a hundred packages."""
    lock = lock_of(locked)
    was = release_of(lock, "huggingface-hub").versions[DEPENDENCY]
    put(mirror, DEPENDENCY, "99.0")
    on = [word for host in (HOST, CPU) for word in ("--limit", host)]

    run = locked.roll_out_well(*on)

    assert "note: " not in run.output
    plans = locked.plans().plans
    for host in (HOST, CPU):
        for release in plans[host].releases:
            name = "vllm" if release.id.startswith("vllm") else "huggingface-hub"
            of = [one for one in lock.releases if one.requirements == release.lock]
            assert len(of) == 1
            assert packages(host, release.path) == of[0].versions
            assert name in of[0].versions
    assert len(release_of(lock, "torch").packages) > 100
    again = locked.roll_out_well(*on)
    assert again.changed == 0, again.changed_operations()

    unchanged = fleet(locked, "lock", "inventories/lab.py", "--check")
    assert unchanged.returncode == 0, unchanged.stdout
    moved = fleet(locked, "lock", "inventories/lab.py", "--check", "--upgrade", DEPENDENCY)
    assert moved.returncode == 1
    rows = [line.split() for line in moved.stdout.splitlines() if DEPENDENCY in line]
    assert [row[-3:] for row in rows] == [[DEPENDENCY, was, "99.0"]] * len(rows)
    assert rows
    assert lock_of(locked) == lock


def test_a_wheel_whose_bytes_changed_on_the_mirror_is_refused(locked: Site, mirror: Path) -> None:
    locked.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')
    assert fleet(locked, "lock", "inventories/lab.py").returncode == 0
    before = main_pids(HOST)
    (wheel,) = mirror.glob(f"vllm-{NEXT}-*.whl")
    # Another wheel of the same name, which the index lists with the hash that it has now.
    assert put(mirror, "vllm", NEXT) == wheel
    lab.ssh(HOST, f"rm -rf {CACHE}", check=True)

    run = locked.roll_out("--limit", HOST)

    assert run.exit_code == 1
    (release,) = (one for one in lock_of(locked).releases if NEXT in one.requirements)
    (digest,) = release.packages[f"vllm=={NEXT}"]
    assert digest in run.output
    assert "Hash mismatch" in run.output
    assert main_pids(HOST) == before
    plan = locked.plans().plans[HOST]
    assert lab.ssh(HOST, f"ls -d {plan.release.path}").returncode != 0
    # What is locked is not silently locked anew either.
    anew = fleet(locked, "lock", "inventories/lab.py")
    assert anew.returncode == 1
    assert f"error: {LOCK}: vllm {NEXT} for Python " in anew.stderr
    assert f"the index has other files of vllm {NEXT} than are locked" in anew.stderr


def test_a_model_that_is_not_the_locked_one_is_refused_and_what_serves_is_left(
    locked: Site,
) -> None:
    locked.roll_out_well("--limit", HOST)
    before = main_pids(HOST)
    plan = locked.plans().plans[HOST]
    (model,) = (m for m in lock_of(locked).models if m.repository == plan.weights[0].repository)
    name = next(name for name in model.files if name.endswith(".safetensors"))
    good = model.files[name].sha256
    text = (locked.folder / LOCK).read_text()
    (locked.folder / LOCK).write_text(text.replace(good, "0" * 64))

    run = locked.roll_out("--limit", HOST)

    assert run.exit_code == 1
    assert f"names {good[:12]}… of {name}, and the lock 000000000000…" in run.output
    assert main_pids(HOST) == before
    assert lab.ssh(HOST, f"sha256sum {plan.weights[0].path}/{name}").stdout.split()[0] == good


def test_a_build_by_commit_is_the_locked_wheel_with_the_locked_requirements(site: Site) -> None:
    vllm = {"channel": "nightly", "version": NEXT, "commit": sources.commits()["new"]}
    site.edit("h20", r"(?m)^vllm = .*$", f"vllm = {vllm!r}")
    assert fleet(site, "lock", "inventories/lab.py").returncode == 0
    (release,) = (one for one in lock_of(site).releases if one.asks.origin)
    assert release.asks.origin["commit"] == vllm["commit"]

    site.roll_out_well("--limit", HOST)

    planned = site.plans().plans[HOST].release
    manifest = json.loads(lab.read_file(HOST, f"{planned.path}/fleet-release.json"))
    assert (manifest["locked"], manifest["wheel"]["sha256"]) == (True, release.wheel)
    assert site.roll_out_well("--limit", HOST).changed == 0

    assert release.wheel is not None
    text = (site.folder / LOCK).read_text()
    (site.folder / LOCK).write_text(text.replace(release.wheel, "0" * 64))
    before = main_pids(HOST)
    refused = site.roll_out("--limit", HOST)
    assert refused.exit_code == 1
    assert f"has SHA-256 {release.wheel}, not {'0' * 64}" in refused.output
    assert main_pids(HOST) == before


def test_a_lock_that_does_not_answer_group_data_stops_the_roll_out_before_any_host(
    locked: Site,
) -> None:
    locked.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')

    refused = locked.pyinfra("-y", "inventories/lab.py", "deploy.py")
    lines = refused.output.splitlines()
    line = (
        f"{LOCK}: vllm 0.33.0 is locked and group data says {NEXT}; "
        "run `fleet lock inventories/lab.py`"
    )
    assert refused.exit_code == 2
    assert [one for one in lines if "error" in one] == [f"error: {line}"]
    assert "Connecting" not in refused.output

    # What installs nothing is not to wait for that.
    healthy = locked.pyinfra("-y", "inventories/lab.py", "tasks.health.check", "--limit", HOST)
    assert healthy.exit_code == 0, healthy.output
    assert f"note: {line}\n" in healthy.output


def test_without_a_lock_a_roll_out_says_once_what_is_not_pinned(served: Site) -> None:
    run = served.pyinfra("--dry", "inventories/lab.py", "deploy.py", "--limit", "h20")

    assert run.exit_code == 0, run.output
    assert run.output.count("note: ") == 1
    assert f"note: {LOCK} is not there, so mirrors decide what " in run.output
    quiet = served.pyinfra("-y", "inventories/lab.py", "tasks.health.check", "--limit", HOST)
    assert "note: " not in quiet.output
