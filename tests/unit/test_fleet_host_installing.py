"""The program that runs on hosts: what it sees of GPUs and packages, and how it installs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

DRIVER = "580.95.05"
PERSISTENCED, FABRIC_MANAGER = "nvidia-persistenced.service", "nvidia-fabricmanager.service"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place: needs root")


def done(stdout: str = "", returncode: int = 0, stderr: str = "") -> SimpleNamespace:
    """A finished command."""
    return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)


# ------------------------------------------------------------------------------------ nvidia-smi

ROW = "{}, NVIDIA H20-3e, 143771, 9.0, 580.95.05, 00000000:9A:00.0\n"
LOST = "Unable to determine the device handle for GPU0000:65:00.0: Unknown Error\n"
COMMUNICATION = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
    "the latest NVIDIA driver is installed and running.\n\n"
)


@pytest.mark.parametrize(
    ("answer", "error", "devices"),
    [
        (done(ROW.format(0) + ROW.format(1)), None, [0, 1]),
        (done(ROW.format(0) + LOST + ROW.format(2)), "Unable to determine", [0, 2]),
        (done(LOST), "Unable to determine", None),
        (done("WARNING: infoROM is corrupted at gpu 0\n" + ROW.format(0)), "infoROM", [0]),
        (done(ROW.format(0) + "\n\n"), None, [0]),
        (done("0, NVIDIA H20-3e, 143771\n"), "0, NVIDIA H20-3e, 143771", None),
        (done("GPU, lost, 0, 9.0, 580, 0\n"), "GPU, lost, 0, 9.0, 580, 0", None),
        (done(""), None, []),
        (done(COMMUNICATION, returncode=9), "couldn't communicate", None),
        (done("", returncode=255), "nvidia-smi exited 255", None),
    ],
    ids=[
        "well",
        "one lost",
        "all lost",
        "warning",
        "blank",
        "short",
        "no index",
        "none",
        "failed",
        "mute",
    ],
)
def test_whatever_nvidia_smi_says_is_a_finding_and_no_traceback(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    answer: SimpleNamespace,
    error: str | None,
    devices: list[int] | None,
) -> None:
    monkeypatch.setattr(program, "run", lambda *argv, **options: answer)

    state = program.gpus_state()

    assert (error in state["error"]) if error else state["error"] is None
    found = state["devices"]
    assert (found if found is None else [device["index"] for device in found]) == devices


# --------------------------------------------------------------------------------------- the clock


def test_asking_others_does_not_make_the_hosts_clock_look_wrong(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control machine takes the host's time for that of the middle of its question."""
    empty = (
        "files",
        "users",
        "directories",
        "sysctl",
        "units",
        "ports",
        "disks",
        "releases",
        "accepted",
    )
    question = {
        **dict.fromkeys((*empty, "weights", "models", "sources"), ()),
        **dict.fromkeys(("gpus", "fabric_manager")),
        **{key: {} for key in ("kernel_headers", "drivers", "engines", "cutover")},
        **{
            "packages": {},
            "services": "/nowhere",
            "uv": "/nowhere",
            "mirrors": {},
            "outside": True,
        },
    }
    monkeypatch.setattr(program, "units_state", lambda units: {})
    monkeypatch.setattr(program, "due", lambda request, units: {})
    monkeypatch.setattr(program, "needs_state", lambda *_: time.sleep(0.4))

    began = time.time()
    seen = program.probe(question)

    assert abs(seen["time"] - (began + time.time()) / 2) < 0.1


# -------------------------------------------------------------------- what is where it is looked for


def request(**changes: Any) -> dict[str, Any]:
    """What the probe is asked, as far as it concerns what the host needs."""
    mirrors = {"apt": {}, "index": "https://index.example/simple", "hub": "https://huggingface.co"}
    sources: dict[str, list[object]] = {"apt": [], "dnf": []}
    return {"mirrors": mirrors, "models": [], "images": [], "sources": sources, **changes}


def state(**changes: Any) -> dict[str, Any]:
    nothing = {"packages": {"git": None}, "uv": True, "releases": {"/r": True}, "weights": {}}
    return {**nothing, **changes}


@pytest.fixture
def reached(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were tried; those with `down` in them cannot be reached."""
    tried: list[str] = []

    def reach(url: str) -> str | None:
        tried.append(url)
        return "Connection refused" if "down" in url else None

    monkeypatch.setattr(program, "reach", reach)
    monkeypatch.setattr(program, "apt_versions", lambda names, sources: {"versions": names})
    return tried


def test_the_default_index_is_tried_where_something_will_come_from_it(
    program: ModuleType, reached: list[str]
) -> None:
    program.needs_state(request(), state(), {})
    assert reached == []

    needs = program.needs_state(request(), state(releases={"/r": False}), {})

    assert reached == ["https://index.example/simple"]
    assert needs["mirrors"]["index"] == {"url": "https://index.example/simple", "error": None}


def test_apt_is_asked_only_for_what_is_missing(program: ModuleType, reached: list[str]) -> None:
    there = {"git": {"version": "1:2.39", "held": False}, "nvidia-driver-cuda": None}

    assert program.needs_state(request(), state(packages=there), {"git": None})["packages"] is None
    wanted = {"git": None, "nvidia-driver-cuda": "580.95.05-1"}
    needs = program.needs_state(request(), state(packages=there), wanted)

    assert needs["packages"] == {"versions": ["nvidia-driver-cuda"]}


def test_an_apt_mirror_that_is_down_is_told_once(program: ModuleType, reached: list[str]) -> None:
    mirrors = {"apt": {"nvidia": "http://down"}, "index": None, "hub": ""}

    needs = program.needs_state(request(mirrors=mirrors), state(), {"git": None})

    assert needs["mirrors"]["apt nvidia"]["error"] == "Connection refused"
    assert needs["packages"] is None


SOURCES = [
    {"path": "/etc/apt/keyrings/minimax-nvidia.asc", "content": "the key"},
    {
        "path": "/etc/apt/sources.list.d/minimax-nvidia.sources",
        "content": "URIs: http://mirror\nSigned-By: /etc/apt/keyrings/minimax-nvidia.asc\n",
    },
]
MADISON = """\
nvidia-driver-cuda | 580.95.05-1 | http://mirror  Packages
nvidia-driver-cuda | 570.172.08-1 | http://mirror  Packages
"""


def test_versions_are_asked_of_the_mirrors_to_come_and_nothing_of_the_host_changes(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def run(*argv: str, **_: Any) -> SimpleNamespace:
        calls.append(argv)
        options = dict(word[3:].split("=", 1) for word in argv if word.startswith("-o=Dir::"))
        source = Path(options["Dir::Etc::SourceParts"]) / "minimax-nvidia.sources"
        keyring = Path(source.read_text().split("Signed-By: ")[1].strip())
        assert keyring.read_text() == "the key"
        assert all(path.startswith("/tmp/") for path in (str(keyring), *options.values()))
        return done(MADISON if "madison" in argv else "")

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(program.tempfile, "tempdir", "/tmp")

    found = program.apt_versions(["nvidia-driver-cuda", "git-lfs"], SOURCES)

    assert found == {
        "versions": {"nvidia-driver-cuda": ["580.95.05-1", "570.172.08-1"], "git-lfs": []}
    }
    assert [argv[0] for argv in calls] == ["apt-get", "apt-cache"]


def test_sources_that_cannot_be_read_are_told_in_apts_words(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = "W: odd\nE: The repository 'http://mirror  Release' is not signed.\n"
    monkeypatch.setattr(program, "run", lambda *argv, **options: done("", 100, stderr))

    found = program.apt_versions(["git"], [])

    assert found == {"error": "The repository 'http://mirror  Release' is not signed."}


# --------------------------------------------------------------------------------------- release


@pytest.mark.parametrize("home", ["/root", "/home/me", "/run/user/0"])
def test_an_interpreter_in_somebodys_home_is_refused_before_anything_is_installed(
    program: ModuleType, releases: ModuleType, tmp_path: Path, home: str
) -> None:
    python = tmp_path / "python3"
    python.symlink_to(f"{home}/.local/share/uv/python/cpython-3.12/bin/python3.12")

    with pytest.raises(program.HostError, match=rf"its Python is {home}/.*no service may look"):
        releases.check_python(str(python), "minimax")


@as_root
def test_an_interpreter_that_the_services_user_cannot_run_is_refused(
    program: ModuleType, releases: ModuleType, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python3").symlink_to("/bin/sh")
    releases.check_python("/bin/sh", "daemon")

    with pytest.raises(program.HostError, match="which user daemon cannot run"):
        releases.check_python(str(closed / "python3"), "daemon")


def test_pip_of_ubuntu_22_04_knows_every_option(
    program: ModuleType, releases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pip 22.0; `--root-user-action` came with 22.1."""
    calls: list[tuple[str, ...]] = []

    def run(*argv: str, **_: Any) -> SimpleNamespace:
        calls.append(argv)
        Path(argv[argv.index("--target") + 1]).mkdir()
        return done()

    monkeypatch.setattr(program, "run", run)
    uv = {
        "path": str(tmp_path / "uv" / "1" / "bin" / "uv"),
        "version": "1",
        "sha256": {releases.platform.machine(): "0" * 64},
    }

    releases.install_uv(uv, None)

    assert not any("root-user-action" in word for word in calls[0])


# --------------------------------------------------------------------------------------- hashing


def test_hashing_says_how_far_it_is_and_names_bad_files_in_order(
    weights: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = {f"model-{n}.safetensors": {"size": 10**9} for n in range(4)}

    def verified(path: Path, _file: dict[str, Any]) -> bool:
        time.sleep(0.3 if path.name == "model-3.safetensors" else 0)
        return path.name not in ("model-1.safetensors", "model-3.safetensors")

    monkeypatch.setattr(weights, "PROGRESS_EVERY_S", 0.1)
    monkeypatch.setattr(weights, "verified", verified)

    bad = weights.not_verified("MiniMaxAI/MiniMax-M2.5", tmp_path, expected)

    assert bad == ["model-1.safetensors", "model-3.safetensors"]
    assert "MiniMaxAI/MiniMax-M2.5: 3.0 of 4.0 GB verified" in capsys.readouterr().out
