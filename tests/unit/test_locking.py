"""Locks are filled in by the real uv, from an index, a hub and apt repositories that are served here."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from fleet.catalog import catalog
from fleet.lock import Lock, LockedFile, LockingError, changes
from fleet.locking import Wanted, explain, resolve
from fleet.plan import HostPlan
from lab.site.hub import git_object
from lab.site.server import Handler, SiteServer
from tests.unit.state import REVISION, plan_of, service
from tests.unit.test_fleet_command import fleet, site
from tests.unit.test_site_index import make_wheel, publish

MODEL = "MiniMaxAI/MiniMax-M2.5"
SMALL, LARGE = b'{"a": 1}\n', b"weights"
UBUNTU_DRIVER = "580.95.05-1ubuntu"


class Mirrors:
    """An index with vLLM and what it needs, a hub with one model, an apt repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = root / "files"
        self.files.mkdir(parents=True)
        self.said: list[str] = []
        make_wheel(self.files, "vllm", "0.33.0", ("leaf>=1", "twig"))
        make_wheel(self.files, "huggingface-hub", "2.4.0", ("leaf",))
        make_wheel(self.files, "leaf", "1.0")
        make_wheel(self.files, "twig", "1.0", ("leaf<9",))
        publish(self.files)
        self.hub({"config.json": SMALL}, {"model.safetensors": LARGE})
        self.server = SiteServer(("127.0.0.1", 0), root)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def hub(self, small: dict[str, bytes], large: dict[str, bytes]) -> None:
        entries = []
        for name, content in {**small, **large}.items():
            digest = hashlib.sha256(content).hexdigest()
            entry: dict[str, Any] = {"path": name, "size": len(content), "object": digest}
            entry["oid"] = git_object("blob", content)
            if name in large:
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            objects = self.root / "hub" / "objects"
            objects.mkdir(parents=True, exist_ok=True)
            (objects / digest).write_bytes(content)
            entries.append(entry)
        commit = {"date": "2026-01-01T00:00:00.000Z", "files": entries}
        repository = {"refs": {"main": REVISION}, "commits": {REVISION: commit}}
        index = {"repositories": {MODEL: repository}}
        (self.root / "hub" / "index.json").write_text(json.dumps(index))

    def plan(self, **data: Any) -> HostPlan:
        mirrors = {"index": f"{self.url}/simple", "hub": f"{self.url}/hub"} | data.pop(
            "mirrors", {}
        )
        return plan_of(service(), mirrors=mirrors, **data)

    def lock(self, before: Lock | None = None, *upgrade: str, **data: Any) -> Lock:
        """The lock of a host, made anew or from one before."""
        self.said.clear()
        wanted = Wanted(before=before, upgrade=upgrade, python="3.11", say=self.said.append)
        return resolve([self.plan(**data)], wanted)

    def fails(self, *upgrade: str, before: Lock | None = None, **data: Any) -> str:
        with pytest.raises(LockingError) as error:
            self.lock(before, *upgrade, **data)
        assert "\n" not in str(error.value)
        return str(error.value)

    def sha256(self, wheel: str) -> str:
        return hashlib.sha256((self.files / wheel).read_bytes()).hexdigest()


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirrors]:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    found = Mirrors(tmp_path / "root")
    thread = threading.Thread(target=found.server.serve_forever, args=[0.01])
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def packages(lock: Lock, purpose: str = "vllm") -> dict[str, list[str]]:
    release = next(one for one in lock.releases if any(p.startswith(purpose) for p in one.packages))
    return release.packages


def versions(lock: Lock) -> list[str]:
    return list(packages(lock))


# ---------------------------------------------------------------------------------------- wheels


def test_all_that_is_required_is_locked_with_the_hashes_of_its_files(mirrors: Mirrors) -> None:
    lock = mirrors.lock()

    assert packages(lock) == {
        f"{name}=={version}": [f"sha256:{mirrors.sha256(f'{name}-{version}-py3-none-any.whl')}"]
        for name, version in (("leaf", "1.0"), ("twig", "1.0"), ("vllm", "0.33.0"))
    }
    assert list(packages(lock, "huggingface")) == ["huggingface-hub==2.4.0", "leaf==1.0"]
    assert {one.python for one in lock.releases} == {"3.11"}
    assert lock.uv == catalog().tools.uv
    assert "vllm 0.33.0 for Python 3.11: resolving" in mirrors.said


def test_only_files_that_fit_the_hosts_are_locked(mirrors: Mirrors) -> None:
    wheel = make_wheel(mirrors.files, "leaf", "2.0")
    for tag in (
        "cp311-cp311-manylinux_2_28_x86_64",
        "cp312-cp312-manylinux_2_28_x86_64",
        "cp311-cp311-manylinux_2_35_x86_64",
        "cp311-cp311-manylinux_2_28_aarch64",
        "cp311-cp311-win_amd64",
    ):
        content = wheel.read_bytes() + tag.encode()
        (mirrors.files / f"leaf-2.0-{tag}.whl").write_bytes(content)
    wheel.unlink()
    publish(mirrors.files)

    fits = mirrors.sha256("leaf-2.0-cp311-cp311-manylinux_2_28_x86_64.whl")
    assert packages(mirrors.lock())["leaf==2.0"] == [f"sha256:{fits}"]


def test_what_is_locked_stays_when_the_index_gets_something_newer(mirrors: Mirrors) -> None:
    before = mirrors.lock()
    make_wheel(mirrors.files, "leaf", "2.0")
    make_wheel(mirrors.files, "twig", "2.0")
    publish(mirrors.files)

    assert mirrors.lock(before) == before
    assert versions(mirrors.lock(before, "leaf")) == ["leaf==2.0", "twig==1.0", "vllm==0.33.0"]
    assert versions(mirrors.lock()) == ["leaf==2.0", "twig==2.0", "vllm==0.33.0"]


def test_another_vllm_leaves_the_rest_where_it_still_does(mirrors: Mirrors) -> None:
    before = mirrors.lock()
    make_wheel(mirrors.files, "leaf", "2.0")
    make_wheel(mirrors.files, "twig", "2.0")
    make_wheel(mirrors.files, "vllm", "0.33.1", ("leaf>=1", "twig>=2"))
    publish(mirrors.files)

    after = mirrors.lock(before, vllm={"version": "0.33.1"})

    assert [(one.what, one.before, one.after) for one in changes(before, after)] == [
        ("twig", "1.0", "2.0"),
        ("vllm", "0.33.0", "0.33.1"),
    ]


def test_other_files_under_a_locked_version_are_refused(mirrors: Mirrors) -> None:
    before = mirrors.lock()
    was = mirrors.sha256("leaf-1.0-py3-none-any.whl")
    make_wheel(mirrors.files, "leaf", "1.0", last="added.py")
    publish(mirrors.files)

    message = mirrors.fails(before=before)

    assert (
        f"the index has other files of leaf 1.0 than are locked (sha256:{was[:12]}… is" in message
    )
    assert "; `--upgrade leaf` takes them" in message
    taken = packages(mirrors.lock(before, "leaf"))["leaf==1.0"]
    assert taken == [f"sha256:{mirrors.sha256('leaf-1.0-py3-none-any.whl')}"]


def test_a_file_that_the_index_adds_to_a_locked_version_changes_nothing(mirrors: Mirrors) -> None:
    before = mirrors.lock()
    content = (mirrors.files / "leaf-1.0-py3-none-any.whl").read_bytes()
    (mirrors.files / "leaf-1.0-py2.py3-none-any.whl").write_bytes(content + b"added")
    publish(mirrors.files)

    assert mirrors.lock(before) == before


def test_a_requirement_that_the_index_cannot_meet_is_settled_by_an_override(
    mirrors: Mirrors,
) -> None:
    make_wheel(mirrors.files, "vllm", "0.33.0", ("leaf>=7",))
    publish(mirrors.files)

    message = mirrors.fails()
    assert message == (
        "cannot be resolved: Because only leaf==1.0 is available and all versions of vllm depend on "
        "leaf>=7, we can conclude that all versions of vllm cannot be used; change vllm.packages, or "
        "settle it by vllm.overrides"
    )
    vllm = {"version": "0.33.0", "overrides": ["leaf>=1"]}
    assert versions(mirrors.lock(vllm=vllm)) == ["leaf==1.0", "vllm==0.33.0"]


def test_a_package_without_a_wheel_is_named(mirrors: Mirrors) -> None:
    for file in mirrors.files.glob("leaf-*"):
        file.unlink()
    folder = mirrors.root / "simple" / "leaf"
    (mirrors.files / "leaf-1.0.tar.gz").write_bytes(b"no archive")
    (folder / "index.html").write_text('<a href="../../files/leaf-1.0.tar.gz">leaf-1.0.tar.gz</a>')

    message = mirrors.fails()

    assert "leaf==1.0 has no usable wheels" in message
    assert "vllm.overrides" in message


def test_an_index_without_hashes_is_hashed(mirrors: Mirrors) -> None:
    for page in mirrors.root.glob("simple/*/index.html"):
        page.write_text(re.sub(r"#sha256=[0-9a-f]+", "", page.read_text()))

    lock = mirrors.lock()

    assert packages(lock)["leaf==1.0"] == [f"sha256:{mirrors.sha256('leaf-1.0-py3-none-any.whl')}"]


def test_an_index_that_cannot_be_reached_is_one_line(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")

    message = mirrors.fails(mirrors={"index": "http://127.0.0.1:9/simple"})

    assert message.startswith("Failed to fetch: http://127.0.0.1:9/simple/")
    assert "Connection refused" in message


class Guarded(Handler):
    """Answers those who say who they are."""

    @override
    def do_GET(self) -> None:
        word = base64.b64encode(b"fleet:s3cret").decode()
        if self.headers["Authorization"] == f"Basic {word}":
            super().do_GET()
        else:
            self.send_error(401)

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's


def test_the_sites_credentials_are_said_to_its_mirrors(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_lock = mirrors.lock()
    monkeypatch.setattr(mirrors.server, "RequestHandlerClass", Guarded)
    monkeypatch.delenv("NETRC", raising=False)
    assert "401 Unauthorized" in mirrors.fails()

    text = "machine 127.0.0.1 login fleet password s3cret\n"
    plan = replace(mirrors.plan(), credentials=text)
    locked = resolve([plan], Wanted(python="3.11", say=mirrors.said.append))

    assert locked == open_lock
    assert "s3cret" not in "".join(mirrors.said)


def test_what_this_machine_has_set_for_uv_has_no_say(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "constraints.txt").write_text("leaf==0.1\n")
    monkeypatch.setenv("UV_CONSTRAINT", str(tmp_path / "constraints.txt"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")

    assert "leaf==1.0" in versions(mirrors.lock())


DYNAMIC = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "branch"
dynamic = ["version", "dependencies"]
"""
BACKEND = """\
import pathlib

def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder) / "branch-3.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: branch\\nVersion: 3\\nRequires-Dist: leaf\\n"
    (info / "METADATA").write_text(text)
    return info.name

def build_wheel(folder, settings=None, metadata=None):
    raise NotImplementedError("only what it requires is of interest here")
"""
"""A package that says what it requires only when its own code is run."""


def test_what_comes_from_git_is_locked_by_its_commit_and_brings_what_it_needs(
    mirrors: Mirrors, tmp_path: Path
) -> None:
    folder = tmp_path / "fork"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(DYNAMIC)
    (folder / "backend.py").write_text(BACKEND)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "-m", "x"],
        ["tag", "v3"],
    ):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    vllm = {"version": "0.33.0", "packages": ["branch @ git+https://git.example/fork@v3"]}
    prefix = {"https://git.example/": f"{mirrors.url}/git/"}
    # A mirror over plain HTTP, which is how hosts would reach it: git needs its lists of what is there.
    subprocess.run([*git, "update-server-info"], check=True)
    (mirrors.root / "git").mkdir()
    (mirrors.root / "git" / "fork").symlink_to(folder / ".git")

    lock = mirrors.lock(vllm=vllm, mirrors={"git": prefix})

    assert f"branch @ git+https://git.example/fork@{head.stdout.strip()}" in versions(lock)
    assert "leaf==1.0" in versions(lock)


COMMIT = "1" * 40
NIGHTLY = {"channel": "nightly", "version": "0.34.0", "commit": COMMIT}


def test_a_nightly_is_locked_from_the_folder_of_its_commit(mirrors: Mirrors) -> None:
    folder = mirrors.root / "nightly" / COMMIT / "vllm"
    folder.mkdir(parents=True)
    wheel = make_wheel(folder, "vllm", f"0.34.0rc1.dev5+g{COMMIT[:9]}", ("leaf",))
    link = wheel.name.replace("+", "%2B")
    (folder / "index.html").write_text(f'<a href="{link}">{wheel.name}</a>')

    lock = mirrors.lock(vllm=NIGHTLY, mirrors={"nightly": f"{mirrors.url}/nightly"})

    own = f"vllm==0.34.0rc1.dev5+g{COMMIT[:9]}"
    assert versions(lock) == ["leaf==1.0", own]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert packages(lock)[own] == [f"sha256:{digest}"]


def test_a_wheel_is_locked_with_what_it_requires_if_it_is_the_declared_one(
    mirrors: Mirrors,
) -> None:
    wheel = mirrors.files / "vllm-0.33.0-py3-none-any.whl"
    url = f"{mirrors.url}/files/{wheel.name}"
    vllm = {
        "channel": "wheel",
        "version": "0.33.0",
        "wheel": {"url": url, "sha256": mirrors.sha256(wheel.name)},
    }

    assert versions(mirrors.lock(vllm=vllm)) == ["leaf==1.0", "twig==1.0", f"vllm @ {url}"]
    vllm["wheel"] = {"url": url, "sha256": "0" * 64}
    assert f"its SHA-256 is {mirrors.sha256(wheel.name)} and group" in mirrors.fails(vllm=vllm)
    vllm["wheel"] = {"url": f"file:///srv/{wheel.name}", "sha256": "0" * 64}
    assert "lies on the hosts, where this machine cannot read" in mirrors.fails(vllm=vllm)


def test_a_source_build_and_an_image_are_locked_by_name(mirrors: Mirrors) -> None:
    lock = mirrors.lock(vllm={**NIGHTLY, "channel": "source"})

    source = next(one for one in lock.releases if one.asks.origin)
    assert source.asks.origin == {"kind": "source", "commit": COMMIT}
    assert source.packages == {}
    docker = {"channel": "docker", "version": "0.33.0", "image": f"vllm/vllm@sha256:{'2' * 64}"}
    image = next(one for one in mirrors.lock(vllm=docker).releases if one.asks.origin)
    assert image.asks.origin == {"kind": "docker", "name": "vllm/vllm", "sha256": "2" * 64}
    assert image.packages == {}


# --------------------------------------------------------------------------------------- Pythons


def test_an_interpreter_that_uv_fetches_is_locked_to_the_patch_release(mirrors: Mirrors) -> None:
    vllm = {"version": "0.33.0", "python": "3.12"}

    before = mirrors.lock(vllm=vllm)

    (python,) = {one.python for one in before.releases}
    assert re.fullmatch(r"3\.12\.[0-9]+", str(python))
    older = [one.model_copy(update={"python": "3.12.1"}) for one in before.releases]
    locked = before.model_copy(update={"releases": older})
    assert {one.python for one in mirrors.lock(locked, vllm=vllm).releases} == {"3.12.1"}
    assert {one.python for one in mirrors.lock(locked, "python", vllm=vllm).releases} == {python}


@pytest.mark.parametrize(
    ("python", "version"), [("3.12.4", "3.12.4"), ("/opt/py/bin/python3.10", "3.10")]
)
def test_an_interpreter_may_say_its_version(mirrors: Mirrors, python: str, version: str) -> None:
    lock = mirrors.lock(vllm={"version": "0.33.0", "python": python})

    assert {one.python for one in lock.releases} == {version}


def test_an_interpreter_that_does_not_say_its_version_is_refused(mirrors: Mirrors) -> None:
    message = mirrors.fails(vllm={"version": "0.33.0", "python": "/opt/py/bin/python"})

    assert message.startswith("vllm.python: /opt/py/bin/python does not say its version; name it")


# ---------------------------------------------------------------------------------------- models


def test_a_model_is_locked_file_by_file(mirrors: Mirrors) -> None:
    (model,) = mirrors.lock().models

    assert (model.repository, model.revision) == (MODEL, REVISION)
    assert model.files == {
        name: LockedFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in (("config.json", SMALL), ("model.safetensors", LARGE))
    }


def test_a_locked_revision_is_not_asked_for_again(mirrors: Mirrors) -> None:
    before = mirrors.lock()
    mirrors.hub({"config.json": SMALL + SMALL}, {})

    assert mirrors.lock(before).models == before.models
    assert not any("asking the hub" in line for line in mirrors.said)
    (model,) = mirrors.lock(before, MODEL.lower()).models
    assert list(model.files) == ["config.json"]


def test_a_small_file_that_is_not_the_hubs_is_refused(mirrors: Mirrors) -> None:
    object_ = mirrors.root / "hub" / "objects" / hashlib.sha256(SMALL).hexdigest()
    object_.write_bytes(SMALL.swapcase())

    url = f"{mirrors.url}/hub/{MODEL}/resolve/{REVISION}/config.json"
    blob = git_object("blob", SMALL)
    assert mirrors.fails() == f"{url}: is not the file that the hub names (git blob {blob})"


def test_a_model_that_the_hub_does_not_have_is_one_line(mirrors: Mirrors) -> None:
    (mirrors.root / "hub" / "index.json").write_text('{"repositories": {}}')

    url = f"{mirrors.url}/hub/api/models/{MODEL}/revision/{REVISION}?blobs=true"
    assert mirrors.fails() == f"{url}: HTTP 401 Unauthorized"


def test_a_hub_that_is_none_is_one_line(mirrors: Mirrors) -> None:
    hub = f"{mirrors.url}/hub/api/models/{MODEL}"

    assert "HTTP 404" in mirrors.fails(mirrors={"hub": hub})
    message = mirrors.fails(mirrors={"hub": "http://127.0.0.1:9"})
    assert message.startswith("http://127.0.0.1:9/api/models/")
    assert message.endswith("Connection refused")


# --------------------------------------------------------------------------------------- drivers


def test_the_drivers_revision_is_the_newest_that_the_apt_mirrors_have(
    mirrors: Mirrors, tmp_path: Path
) -> None:
    names = [name for name, version in mirrors.plan().packages("ubuntu-24.04").items() if version]
    stanzas = [
        f"Package: {name}\nVersion: {UBUNTU_DRIVER}{revision}\n"
        for name in names
        for revision in (9, 10, 2)
    ]
    stanzas.append(f"Package: {names[0]}\nVersion: 580.99.01-1ubuntu99\n")
    folder = mirrors.root / "apt" / "nvidia"
    folder.mkdir(parents=True)
    (folder / "Packages.gz").write_bytes(gzip.compress("\n".join(stanzas).encode()))
    apt = {"nvidia": {"url": f"{mirrors.url}/apt/nvidia", "key": "key.asc"}}
    data = plan_data(mirrors, apt)

    lock = resolve([data], Wanted(python="3.11", say=mirrors.said.append))

    assert lock.drivers["580.95.05"]["ubuntu-24.04"] == dict.fromkeys(names, f"{UBUNTU_DRIVER}10")
    assert set(lock.drivers["580.95.05"]["debian-12"].values()) == {"580.95.05-1"}


def plan_data(mirrors: Mirrors, apt: dict[str, Any]) -> HostPlan:
    """A plan whose apt mirrors have a key, as a site's own file."""
    plan = mirrors.plan()
    spec = plan.spec.model_copy(
        update={
            "mirrors": plan.spec.mirrors.model_validate(
                {**plan.spec.mirrors.model_dump(), "apt": apt}
            )
        }
    )
    return replace(plan, spec=spec)


def test_a_locked_revision_stays(mirrors: Mirrors) -> None:
    before = mirrors.lock()
    names = [n for n, version in mirrors.plan().packages("ubuntu-24.04").items() if version]
    systems = {**before.drivers["580.95.05"], "ubuntu-24.04": dict.fromkeys(names, "580.95.05-1")}
    locked = before.model_copy(update={"drivers": {"580.95.05": systems}})

    assert mirrors.lock(locked).drivers == locked.drivers


def test_apt_mirrors_that_only_hosts_reach_are_no_obstacle(mirrors: Mirrors) -> None:
    plan = plan_data(mirrors, {"nvidia": {"url": "http://127.0.0.1:9", "key": "key.asc"}})

    lock = resolve([plan], Wanted(python="3.11", say=mirrors.said.append))

    assert "debian-12" in lock.drivers["580.95.05"]
    assert "ubuntu-24.04" not in lock.drivers["580.95.05"]
    assert any(
        "Connection refused; so a driver's version is locked only" in s for s in mirrors.said
    )


def test_without_a_mirror_a_revision_is_left_open(mirrors: Mirrors) -> None:
    systems = mirrors.lock().drivers["580.95.05"]

    assert "debian-12" in systems
    assert "ubuntu-24.04" not in systems


# ------------------------------------------------------------------------------ what uv says, in a line


@pytest.mark.parametrize(
    ("stderr", "line"),
    [
        (
            "error: No solution found when resolving dependencies\n"
            "  cause: Because only a<=1 is available and b>=2 depends on a>=2, we can conclude that b>=2\n"
            "         cannot be used.\n"
            "         And because you require b==2, we can conclude that your requirements are\n"
            "         unsatisfiable.\n",
            "cannot be resolved: Because only a<=1 is available and b>=2 depends on a>=2, we can conclude "
            "that b>=2 cannot be used; change vllm.packages, or settle it by vllm.overrides",
        ),
        (
            "warning: The requested Python version 3.12 is not available\n"
            "error: Failed to fetch: http://a/simple/x/\n  cause: error sending request\n"
            "  cause: tcp connect error\n",
            "Failed to fetch: http://a/simple/x/: error sending request: tcp connect error",
        ),
        ("", "uv failed without a word"),
    ],
)
def test_what_uv_says_becomes_one_line(stderr: str, line: str) -> None:
    assert explain(stderr) == line


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(mirrors: Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site behind these mirrors, in the current folder."""
    root = tmp_path / "site"
    root.mkdir()
    site(root, mirrors={"index": f"{mirrors.url}/simple", "hub": f"{mirrors.url}/hub"})
    monkeypatch.chdir(root)
    return root


def test_the_command_writes_a_lock_that_plans_take_and_says_what_changes(
    mirrors: Mirrors, folder: Path
) -> None:
    words = ("lock", "inventories/h20.py")
    path = "locks/h20.lock"

    missing = fleet(*words, "--python", "3.11", "--check")
    assert (missing.exit_code, (folder / path).exists()) == (1, False)
    assert f"{path}: would change" in missing.output

    first = fleet(*words, "--python", "3.11")
    assert first.exit_code == 0, first.output
    assert f"{path}: 2 releases of 5 packages, 1 model of 2 files\n" in first.output
    assert f"{path}: written; review and commit it\n" in first.output
    assert fleet("plan", "inventories/h20.py").exit_code == 0
    text = (folder / path).read_text()

    again = fleet(*words)
    assert f"{path}: nothing changed" in again.output
    assert fleet(*words, "--check").exit_code == 0

    make_wheel(mirrors.files, "twig", "2.0")
    publish(mirrors.files)
    moved = fleet(*words, "--upgrade", "twig", "--check")
    assert moved.exit_code == 1
    assert [line.split() for line in moved.output.splitlines() if " 2.0" in line] == [
        ["vllm", "0.33.0", "twig", "1.0", "2.0"]
    ]
    assert (folder / path).read_text() == text
    assert fleet(*words, "--upgrade", "twig").exit_code == 0
    lines = set((folder / path).read_text().splitlines()) ^ set(text.splitlines())
    assert sorted(line.split(":")[0].strip() for line in lines) == ["twig==1.0", "twig==2.0"]


def test_a_command_that_fails_leaves_the_lock_as_it_is(mirrors: Mirrors, folder: Path) -> None:
    (mirrors.root / "hub" / "index.json").write_text('{"repositories": {}}')

    done = fleet("lock", "inventories/h20.py", "--python", "3.11")

    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("error: locks/h20.lock: http://127.0.0.1:")
    assert not (folder / "locks").exists()
