"""How a release is built on a host: files/fleet_release.py, with real git, HTTP and zip files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMMIT = "403424d29e681455711006547540b62ff94d02df"
WHEEL = "vllm-0.33.1.dev7+g403424d29-cp38-abi3-manylinux_2_31_x86_64.whl"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that is served over HTTP, and its address."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def request(folder: Path, **changes: Any) -> dict[str, Any]:
    addresses: dict[str, Any] = {
        "extra_index": [],
        "nightly": "http://127.0.0.1:1/nightly",
        "python": None,
        "git": {},
        "vllm": "https://git.example/vllm.git",
        "deep_gemm": "https://git.example/deep_gemm.git",
        "wheel": None,
    }
    return {
        "path": str(folder / "releases" / "vllm-1"),
        "requirements": [],
        "python": sys.executable,
        "torch_backend": None,
        "bytecode": False,
        "check": ["vllm", "--version"],
        "modules": ["vllm"],
        "origin": {"kind": "nightly", "version": "0.33.1", "commit": COMMIT, "variant": ""},
        "patches": [],
        "cuda_home": None,
        "max_jobs": None,
        "lock": None,
        "overrides": [],
        "netrc": None,
        "lock_python": None,
        "index": None,
        "pythons": "/opt/fleet/python",
        "user": "root",
        "home": "/root",
        **changes,
        "addresses": addresses | changes.get("addresses", {}),
    }


def build(releases: ModuleType, folder: Path, **changes: Any) -> Any:
    """A build whose folder is there, and nothing in it."""
    log = folder / "log"
    log.mkdir(exist_ok=True)
    vars(releases)["LOGS"] = log
    made = releases.Build(request(folder, **changes), "/bin/uv")
    made.wheels.mkdir(parents=True)
    made.log.touch()
    return made


def test_an_interpreter_that_uv_fetches_lies_where_services_can_read_it(
    program: ModuleType, releases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def run(
        *argv: str, env: dict[str, str] | None = None, **_: Any
    ) -> subprocess.CompletedProcess[str]:
        calls.append((argv, env or {}))
        said = "0.33.0\n" if "--version" in argv else '{"packages": {}}\n'
        return subprocess.CompletedProcess(argv, 0, said, "")

    def logged(
        _label: str, _log: Path, argv: tuple[str, ...], env: dict[str, str], *_: Any
    ) -> None:
        calls.append((argv, env))
        if "venv" in argv:
            Path(argv[-1], "bin").mkdir(parents=True)
        if "compile" in argv:
            Path(argv[argv.index("-o") + 1]).write_text("vllm==0.33.0 --hash=sha256:0\n")

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(releases, "logged", logged)
    monkeypatch.setattr(releases, "LOGS", tmp_path / "log")
    monkeypatch.setattr(releases, "install_uv", lambda uv, index: uv["path"])
    asked = request(
        tmp_path,
        requirements=["vllm==0.33.0"],
        origin={"kind": "index", "version": "0.33.0"},
        uv={"path": "/opt/fleet/uv/1/bin/uv", "version": "1", "sha256": {}},
        user="minimax",
        home="/var/lib/minimax",
    )

    releases.release(asked)

    environments = {argv[1:3]: env for argv, env in calls if argv[0].endswith("/uv")}
    for words in (("venv", "--relocatable"), ("pip", "compile"), ("pip", "install")):
        assert environments[words]["UV_PYTHON_INSTALL_DIR"] == "/opt/fleet/python"
    checks = [(argv, env) for argv, env in calls if argv[0] == "setpriv"]
    assert [argv[1] for argv, _ in checks] == ["--reuid=minimax"] * 3
    _, (argv, env), _ = checks
    assert argv[-1] == "--version"
    assert env["HOME"] == "/var/lib/minimax"


# ---------------------------------------------------------------------------------------- nightly


def publish(folder: Path, *names: str, variant: str = "", fragment: str = "") -> None:
    page = folder / "nightly" / COMMIT / variant / "vllm" / "index.html"
    page.parent.mkdir(parents=True)
    links = "".join(
        f'<a href="../{name.replace("+", "%2B")}{fragment}">{name}</a>\n' for name in names
    )
    page.write_text(f"<html><body>{links}</body></html>")
    for name in names:
        (page.parent.parent / name).write_bytes(name.encode())


def test_the_wheel_of_a_commit_is_the_one_for_this_machine(
    releases: ModuleType, mirror: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = mirror
    publish(folder, WHEEL.replace("x86_64", "aarch64"), WHEEL)
    made = build(releases, tmp_path, addresses={"nightly": f"{address}/nightly"})

    wheel = releases.from_nightly(made)

    assert wheel.name == WHEEL
    assert wheel.read_bytes() == WHEEL.encode()


def test_a_nightly_of_another_cuda_is_in_a_folder_of_its_own(
    releases: ModuleType, mirror: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = mirror
    publish(folder, WHEEL, variant="cu129")
    origin = {"kind": "nightly", "version": "0.33.1+cu129", "commit": COMMIT, "variant": "cu129"}
    made = build(releases, tmp_path, addresses={"nightly": f"{address}/nightly"}, origin=origin)

    assert releases.nightly_wheel(made) == (
        f"{address}/nightly/{COMMIT}/cu129/{WHEEL.replace('+', '%2B')}",
        None,
    )


def test_a_commit_without_a_build_is_told_and_nothing_else_is_taken(
    releases: ModuleType, mirror: tuple[Path, str], tmp_path: Path
) -> None:
    made = build(releases, tmp_path, addresses={"nightly": f"{mirror[1]}/nightly"})

    with pytest.raises(
        releases.core.HostError, match=r"no build of commit 403424d29e68 at http.*ound; old ones"
    ):
        releases.from_nightly(made)


def test_a_page_without_a_wheel_for_this_machine_is_told(
    releases: ModuleType, mirror: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = mirror
    publish(folder, WHEEL.replace("x86_64", "riscv64"))
    made = build(releases, tmp_path, addresses={"nightly": f"{address}/nightly"})

    with pytest.raises(releases.core.HostError, match="has no wheel for x86_64"):
        releases.from_nightly(made)


def test_a_page_that_names_a_hash_is_held_to_it(
    releases: ModuleType, mirror: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = mirror
    publish(folder, WHEEL, fragment=f"#sha256={'0' * 64}")
    made = build(releases, tmp_path, addresses={"nightly": f"{address}/nightly"})

    with pytest.raises(
        releases.core.HostError, match=f"not {'0' * 64}: not the file that was meant"
    ):
        releases.from_nightly(made)


@pytest.mark.parametrize(
    ("said", "origin", "wrong"),
    [
        ("0.33.0", {"version": "0.33.0"}, None),
        ("0.33.0+cu129", {"version": "0.33.0"}, None),
        ("0.33.01", {"version": "0.33.0"}, "it calls itself 0.33.01, not 0.33.0"),
        ("0.33.1", {"version": "0.33.0"}, "it calls itself 0.33.1, not 0.33.0"),
        ("2.4.0", {}, None),
        ("0.33.1.dev7+g403424d29", {"version": "0.33.1", "commit": COMMIT}, None),
        ("0.33.1.dev7+g403424d29.cu129", {"version": "0.33.1", "commit": COMMIT}, None),
        (
            "0.33.1.dev7+g503424d29",
            {"version": "0.33.1", "commit": COMMIT},
            "it calls itself 0.33.1.dev7+g503424d29, which is not commit 403424d29e68",
        ),
        (
            "0.33.1",
            {"version": "0.33.1", "commit": COMMIT},
            "it calls itself 0.33.1, which is not commit 403424d29e68",
        ),
    ],
)
def test_a_release_is_what_it_calls_itself(
    releases: ModuleType, said: str, origin: dict[str, str], wrong: str | None
) -> None:
    assert releases.unlike(said, origin) == wrong


# ------------------------------------------------------------------------------------------ wheel


def test_a_wheel_of_another_hash_is_refused_and_one_that_lies_here_is_not_copied(
    releases: ModuleType, tmp_path: Path
) -> None:
    wheel = tmp_path / "vllm-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    good, bad = hashlib.sha256(b"wheel").hexdigest(), "0" * 64
    made = build(releases, tmp_path)

    assert releases.fetched(made, wheel.as_uri(), wheel.name, good) == wheel
    with pytest.raises(releases.core.HostError, match=f"has SHA-256 {good}, not {bad}"):
        releases.fetched(made, wheel.as_uri(), wheel.name, bad)
    wheel.unlink()
    with pytest.raises(releases.core.HostError, match=r"is not there; vllm\.wheel\.url names it"):
        releases.fetched(made, wheel.as_uri(), wheel.name, good)


# ----------------------------------------------------------------------------------------- source


@pytest.fixture
def repository(tmp_path: Path) -> tuple[str, list[str]]:
    """A git repository with two commits; its address and their ids."""
    folder = tmp_path / "origin.git"
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(folder))
    git(folder, "config", "user.email", "a@b.invalid")
    git(folder, "config", "user.name", "a")
    # As the big servers have it.
    git(folder, "config", "uploadpack.allowReachableSHA1InWant", "true")
    commits = []
    for text in ("one\n", "two\n"):
        (folder / "file").write_text(text)
        git(folder, "add", "file")
        git(folder, "commit", "--quiet", "--message", text)
        commits.append(git(folder, "rev-parse", "HEAD").strip())
    return folder.as_uri(), commits


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_commit_that_is_no_branchs_head_comes_alone(
    releases: ModuleType, repository: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, (first, _) = repository
    made = build(releases, tmp_path)
    tree = made.partial / ".source"

    releases.checkout(made, address, first, tree)

    assert (tree / "file").read_text() == "one\n"
    assert git(tree, "rev-list", "--count", "--all", "HEAD").strip() == "1"


def test_git_addresses_are_fetched_from_their_mirror(
    releases: ModuleType, repository: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, (_, second) = repository
    mirrors = {"https://git.example/": f"{address.rpartition('/')[0]}/"}
    made = build(releases, tmp_path, addresses={"git": mirrors})
    tree = made.partial / ".source"

    releases.checkout(made, "https://git.example/origin.git", second, tree)

    assert (tree / "file").read_text() == "two\n"


def test_a_commit_that_is_not_there_is_told(
    releases: ModuleType, repository: tuple[str, list[str]], tmp_path: Path
) -> None:
    made = build(releases, tmp_path)

    with pytest.raises(releases.core.HostError, match=f"has no commit {COMMIT}; is it on a branch"):
        releases.checkout(made, repository[0], COMMIT, made.partial / ".source")


PATCH = "--- a/file\n+++ b/file\n@@ -1 +1 @@\n-two\n+three\n"


def test_patches_are_applied_in_order_and_one_that_does_not_fit_is_named(
    releases: ModuleType, repository: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, (_, second) = repository
    again = PATCH.replace("-two", "-three").replace("+three", "+four")
    patches = [["patches/a.patch", PATCH], ["patches/b.patch", again]]
    made = build(releases, tmp_path, patches=patches)
    tree = made.partial / ".source"
    releases.checkout(made, address, second, tree)

    releases.apply_patches(made, tree)

    assert (tree / "file").read_text() == "four\n"
    with pytest.raises(
        releases.core.HostError, match=r"patches/a.patch does not apply to 403424d29e68: error"
    ):
        releases.apply_patches(made, tree)


@pytest.mark.parametrize(
    ("machine", "asked", "jobs"),
    [((64, 4), None, "4"), ((64, 96), None, "8"), ((4, 8), None, "1"), ((64, 96), 20, "20")],
)
def test_as_many_compilers_as_cores_and_memory_carry(
    releases: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: tuple[int, int],
    asked: int | None,
    jobs: str,
) -> None:
    """`machine` is its memory in GiB and its cores."""
    memory_gib, cores = machine
    sizes = {"SC_PHYS_PAGES": memory_gib << 18, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(releases.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(releases.os, "cpu_count", lambda: cores)

    assert releases.compilers(build(releases, tmp_path, max_jobs=asked))["MAX_JOBS"] == jobs


def test_the_declared_toolkit_is_the_one_that_compiles(
    releases: ModuleType, tmp_path: Path
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    with pytest.raises(releases.core.HostError, match=r"cuda/bin/nvcc is missing; is cuda_toolkit"):
        releases.cuda_environment({"cuda_home": str(tmp_path / "cuda")})
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)

    env = releases.cuda_environment({"cuda_home": str(tmp_path / "cuda")})

    assert env["CUDA_HOME"] == str(tmp_path / "cuda")
    assert env["PATH"].startswith(f"{nvcc.parent}:")


# ---------------------------------------------------------------------------------- vllm._C's cures


def package(made: Any, *files: str) -> Path:
    folder = made.partial / "lib" / "python3.11" / "site-packages" / "vllm"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(b"built")
    return Path(folder)


@pytest.fixture
def precompiled(tmp_path: Path) -> Path:
    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("_C.abi3.so", "_moe_C.abi3.so", "vllm_flash_attn/fa.py", "version.py"):
            archive.writestr(f"vllm/{name}", "of the wheel")
        archive.writestr("vllm-1.dist-info/x.so", "")
    return wheel


def test_a_build_without_its_library_gets_the_wheels(
    releases: ModuleType, tmp_path: Path, precompiled: Path
) -> None:
    made = build(releases, tmp_path, origin={"kind": "source", "copy_libraries": True})
    made.precompiled = precompiled
    folder = package(made, "version.py")

    releases.copy_libraries(made)

    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"_C.abi3.so", "_moe_C.abi3.so", "vllm_flash_attn/fa.py", "version.py"}
    assert (folder / "version.py").read_bytes() == b"built"
    assert not list(folder.parent.glob("*.dist-info"))


@pytest.mark.parametrize(
    ("origin", "files"),
    [
        ({"kind": "source", "copy_libraries": True}, ["_C.abi3.so"]),
        ({"kind": "source", "copy_libraries": False}, ["version.py"]),
    ],
    ids=["it has one", "a version that the cure does not fit"],
)
def test_the_cure_is_left_where_it_does_not_fit(
    releases: ModuleType,
    tmp_path: Path,
    precompiled: Path,
    origin: dict[str, Any],
    files: list[str],
) -> None:
    made = build(releases, tmp_path, origin=origin)
    made.precompiled = precompiled
    folder = package(made, *files)

    releases.copy_libraries(made)

    assert {path.name for path in folder.iterdir()} == set(files)


def test_a_missing_library_is_told_with_the_guides_other_cure(releases: ModuleType) -> None:
    error = releases.core.HostError("ModuleNotFoundError: No module named 'vllm._C'")

    assert releases.with_cure(error).endswith("channel 'source' with precompiled = False")
    assert releases.with_cure(ValueError("libcudart.so.13")) == "libcudart.so.13"


# --------------------------------------------------------------------------------- steps and their log


def test_a_step_that_fails_is_told_with_its_last_lines_and_where_the_rest_is(
    releases: ModuleType, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("of a step before\n")
    script = "for n in $(seq 30); do echo line $n; done; exit 3"

    with pytest.raises(releases.core.HostError) as failed:
        releases.logged("vllm-1: building", log, ("sh", "-c", script), {})

    first, *last = str(failed.value).splitlines()
    assert first == f"vllm-1: building exited 3; all of it is in {log}:"
    assert last == [f"line {n}" for n in range(11, 31)]
    assert log.read_text().startswith("of a step before\n$ sh -c")


def test_a_step_that_takes_long_says_its_last_line(
    releases: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(releases.core, "HEARTBEAT_S", 0.2)

    script = "echo '[1/9] Building CUDA object'; sleep 0.5"
    releases.logged("vllm-1: building", tmp_path / "log", ("sh", "-c", script), {})

    assert "vllm-1: building: 0 s [1/9] Building CUDA object" in capsys.readouterr().out


LOCKED = """\
vllm==0.33.0 \\
    --hash=sha256:{a} \\
    --hash=sha256:{b}
typing_extensions==4.16.0 ; python_version < "3.13" \\
    --hash=sha256:{c}
""".format(a="a" * 64, b="b" * 64, c="c" * 64)


def test_hashes_are_read_off_a_lock(releases: ModuleType) -> None:
    assert releases.hashes_of(LOCKED) == {
        "vllm": ["a" * 64, "b" * 64],
        "typing-extensions": ["c" * 64],
    }
    assert releases.hashes_of("") == {}


def test_what_a_release_is_made_of_comes_from_the_sites_mirrors_alone(
    releases: ModuleType, tmp_path: Path
) -> None:
    addresses: dict[str, Any] = {
        "extra_index": ["http://b.example/torch", "https://c.example/more"],
        "python": "http://d.example/python",
        "git": {"https://github.com/": "http://e.example/git"},
    }
    asked = request(tmp_path, index="http://a.example/simple", addresses=addresses)

    env = releases.uv_environment(asked)

    assert env["UV_DEFAULT_INDEX"] == "http://a.example/simple"
    assert env["UV_INDEX"] == "http://b.example/torch https://c.example/more"
    assert env["UV_INSECURE_HOST"] == "a.example b.example"
    assert env["UV_PYTHON_INSTALL_MIRROR"] == "http://d.example/python"
    assert env["GIT_CONFIG_COUNT"] == "1"
    assert env["GIT_CONFIG_KEY_0"] == "url.http://e.example/git/.insteadOf"
    assert env["GIT_CONFIG_VALUE_0"] == "https://github.com/"
    assert env["UV_NO_CONFIG"] == "1"


# -------------------------------------------------------------------------------------- arguments


def test_arguments_are_asked_of_the_release_once(
    program: ModuleType,
    releases: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(*argv: str, **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        return subprocess.CompletedProcess(argv, 0, "understood\n", "")

    monkeypatch.setattr(program, "SERVICES", tmp_path)
    monkeypatch.setattr(program, "run", run)
    service = {
        "name": "m25",
        "stamp": "abc",
        "python": "/r/bin/python3",
        "entrypoint": "serve",
        "words": ["/models/m", "--port", "18000"],
        "environment": {"CUDA_VISIBLE_DEVICES": "0"},
    }

    releases.arguments({"user": "minimax", "services": [service]})
    releases.arguments({"user": "minimax", "services": [service]})

    assert len(asked) == 1
    assert asked[0][0] == "setpriv"
    assert asked[0][-4:] == ("serve", "/models/m", "--port", "18000")
    assert json.loads((tmp_path / "m25" / "abc" / "accepted.json").read_text())


def test_arguments_that_a_release_does_not_take_are_told_in_its_words(
    program: ModuleType, releases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = "usage: vllm serve\nvllm serve: error: unrecognized arguments: --no-such\n"
    failed = subprocess.CompletedProcess((), 2, "", stderr)
    monkeypatch.setattr(program, "SERVICES", tmp_path)
    monkeypatch.setattr(program, "run", lambda *argv, **_: failed)
    service = {
        **{"name": "m25", "stamp": "abc", "python": "/r/bin/python3", "entrypoint": "serve"},
        **{"words": ["--no-such"], "environment": {}},
    }

    with pytest.raises(
        program.HostError,
        match=r"m25: its vLLM does not take its arguments: .*unrecognized arguments: --no-such",
    ):
        releases.arguments({"user": "minimax", "services": [service]})

    assert not list(tmp_path.rglob("accepted.json"))
