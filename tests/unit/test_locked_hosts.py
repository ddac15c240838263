"""What hosts make of a lock: models and releases are its files, or are refused."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleet.plan import Weights
from tests.unit.state import plan_of, service

SMALL, LARGE = b"{}", b"weights"
REVISION = "1" * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def locked() -> dict[str, list[object]]:
    """As a request has it, which went through JSON."""
    return {"config.json": [2, sha256(SMALL)], "model": [7, sha256(LARGE)]}


def siblings() -> dict[str, dict[str, Any]]:
    """As a hub lists them."""
    return {
        "config.json": {"rfilename": "config.json", "size": 2, "blobId": "0" * 40},
        "model": {"rfilename": "model", "size": 7, "lfs": {"sha256": sha256(LARGE)}},
    }


@pytest.fixture
def listed(weights: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the hub lists, to be changed."""
    files = siblings()

    def answer(_url: str) -> io.BytesIO:
        return io.BytesIO(json.dumps({"siblings": list(files.values())}).encode())

    monkeypatch.setattr(weights.core, "open_url", answer)
    return files


def request(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "path": str(folder / REVISION),
        "repository": "own/model",
        "revision": REVISION,
        "hub": "http://hub.example",
        "files": locked(),
        **changes,
    }


def test_files_are_verified_by_the_lock_and_not_by_the_hub(
    weights: ModuleType, listed: dict[str, Any], tmp_path: Path
) -> None:
    files = weights.hub_files(request(tmp_path))

    assert files == {
        name: {"size": size, "sha256": digest, "blob": None}
        for name, (size, digest) in locked().items()
    }
    # The hub's own id of this content would fit: only the lock knows better.
    listed["config.json"]["blobId"] = hashlib.sha1(b"blob 2\0[]").hexdigest()
    (tmp_path / "config.json").write_bytes(b"[]")
    unlocked = weights.hub_files(request(tmp_path, files=None))["config.json"]
    assert weights.verified(tmp_path / "config.json", unlocked)
    assert not weights.verified(tmp_path / "config.json", files["config.json"])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "model",
            {"lfs": {"sha256": "a" * 64}},
            f"names aaaaaaaaaaaa… of model, and the lock {sha256(LARGE)[:12]}…",
        ),
        ("model", {"size": 8}, "has 8 bytes of model, and the lock 7"),
        ("model", None, "has no model, which is in the lock"),
        (
            "extra",
            {"rfilename": "extra", "size": 1, "blobId": "0"},
            "has a file extra, which is not in the lock",
        ),
    ],
)
def test_a_hub_that_lists_other_files_than_are_locked_is_refused(
    weights: ModuleType,
    listed: dict[str, Any],
    tmp_path: Path,
    name: str,
    change: dict[str, Any] | None,
    says: str,
) -> None:
    if change is None:
        del listed[name]
    else:
        listed[name] = {**listed.get(name, {}), **change}

    with pytest.raises(weights.core.HostError) as error:
        weights.hub_files(request(tmp_path))

    assert str(error.value) == (
        f"own/model at {REVISION[:12]}: http://hub.example {says}; a commit never changes: find out why"
    )
    # Without a lock the hub is believed.
    assert weights.hub_files(request(tmp_path, files=None)).keys() == listed.keys()


@pytest.fixture
def complete(program: ModuleType, tmp_path: Path) -> Path:
    """A model that was fetched and verified before there was a lock."""
    folder = tmp_path / REVISION
    folder.mkdir()
    stamp: dict[str, Any] = {"files": {}}
    for name, content in (("config.json", SMALL), ("model", LARGE)):
        (folder / name).write_bytes(content)
        status = (folder / name).stat()
        stamp["files"][name] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256(content),
        }
    (folder / program.WEIGHTS_STAMP).write_text(json.dumps(stamp))
    return folder


def named(**changes: tuple[int, str]) -> str | None:
    """How the plan names the locked files."""
    files = {name: (len(name), str(digest)) for name, (_, digest) in locked().items()} | changes
    return Weights(repository="own/model", revision=REVISION, path="", files=files).digest


def test_a_model_that_is_there_is_complete_if_it_is_the_locked_one(
    program: ModuleType, complete: Path
) -> None:
    assert program.weights_complete(complete)
    assert program.weights_complete(complete, named())
    assert not program.weights_complete(complete, named(model=(7, "a" * 64)))


def test_a_model_that_is_there_and_locked_is_not_fetched_again(
    weights: ModuleType, listed: dict[str, Any], complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def ask(_request: dict[str, Any]) -> dict[str, Any]:
        fetched.append("asked")
        return {}

    monkeypatch.setattr(weights, "hub_files", ask)
    monkeypatch.setattr(weights, "download", lambda *_: fetched.append("fetched"))
    del listed

    weights.weights(request(complete.parent))
    assert fetched == []

    other = locked() | {"model": [7, "a" * 64]}
    weights.weights(request(complete.parent, files=other))
    assert fetched == ["asked", "fetched"]


# --------------------------------------------------------------------------------------- releases


def test_a_release_is_not_built_on_another_python_than_the_lock_is_for(
    releases: ModuleType,
) -> None:
    version = platform.python_version()
    minor = ".".join(version.split(".")[:2])

    for known in (None, version, minor):
        releases.check_locked_python(sys.executable, known)
    for other in ("3.1", "2.7", f"{version}1"):
        with pytest.raises(
            releases.core.HostError, match=f"is {version}, and the lock is for {other};"
        ):
            releases.check_locked_python(sys.executable, other)


class Steps:
    """A build whose commands are noted and not run."""

    def __init__(self, releases: ModuleType, tmp_path: Path, **changes: Any) -> None:
        plan = plan_of(service(), vllm={"version": "0.33.0", "overrides": ["certifi>=2026"]})
        asked = json.loads(json.dumps(plan.release_request(plan.release)))
        asked.update(path=str(tmp_path / "releases" / plan.release.id), **changes)
        self.texts: dict[str, str] = {}
        self.commands: list[tuple[str, ...]] = []
        self.build = releases.Build(asked, "uv")
        self.build.partial.mkdir(parents=True)
        self.build.run = self.run

    def run(self, _what: str, *argv: str, **_: Any) -> None:
        self.commands.append(argv)
        for flag, name in (("--overrides", "overrides"), ("-r", "lock")):
            if flag in argv:
                self.texts[name] = Path(argv[argv.index(flag) + 1]).read_text()
        if "-o" in argv:
            Path(argv[argv.index("-o") + 1]).write_text("a==1 --hash=sha256:00\n")


def test_a_locked_release_is_installed_from_the_lock_alone(
    releases: ModuleType, tmp_path: Path
) -> None:
    text = f"a==1 --hash=sha256:{'0' * 64}\n"
    steps = Steps(releases, tmp_path, lock=text)

    steps.build.install(None)

    (install,) = steps.commands
    assert install[:3] == ("uv", "pip", "install")
    assert {"--require-hashes", "--no-deps"} <= set(install)
    assert steps.texts == {"lock": text}


def test_without_a_lock_overrides_have_their_say_on_the_host(
    releases: ModuleType, tmp_path: Path
) -> None:
    steps = Steps(releases, tmp_path)

    steps.build.install(None)

    resolve, install = steps.commands
    assert resolve[:3] == ("uv", "pip", "compile")
    assert steps.texts["overrides"] == "certifi>=2026\n"
    # What was resolved with overrides could not be resolved again without them.
    assert "--no-deps" in install
