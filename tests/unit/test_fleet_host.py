"""The program that runs on hosts: what it can be asked without being one."""

from __future__ import annotations

import ast
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleet.plan import PROGRAM_FILES
from tests.unit.conftest import PROGRAM


def test_wrong_use_is_exit_2() -> None:
    done = subprocess.run([sys.executable, PROGRAM, "explode"], capture_output=True, check=False)

    assert done.returncode == 2
    assert b"fleet_host.py probe" in done.stderr


@pytest.mark.parametrize("file", PROGRAM_FILES)
def test_it_needs_nothing_but_the_standard_library(file: str) -> None:
    tree = ast.parse((PROGRAM.parent / file).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
        )
    }

    ours = {Path(name).stem for name in PROGRAM_FILES}
    assert imported - ours <= sys.stdlib_module_names


def test_a_file_appears_whole_with_its_mode(program: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "new" / "secrets.env"

    program.write_atomically(target, "K=v\n", 0o600)

    assert target.read_text() == "K=v\n"
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("state", "version", "there"),
    [
        (None, None, False),
        ({"version": "1.2-1", "held": True}, None, True),
        ({"version": "580.95.05-0ubuntu1", "held": True}, "580.95.05-*", True),
        ({"version": "580.95.050-1", "held": True}, "580.95.05-*", False),
    ],
)
def test_installed(
    program: ModuleType, state: dict[str, Any] | None, version: str | None, there: bool
) -> None:
    assert program.installed(state, version) is there


class Weights:
    """A downloaded folder with what the hub says of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = b"x" * 1000
        self.file = folder / "model-00001.safetensors"
        self.file.write_bytes(self.content)

    def expected(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.content).hexdigest()
        return {"size": len(self.content), "sha256": digest, "blob": None}


@pytest.fixture
def fetched(tmp_path: Path) -> Weights:
    return Weights(tmp_path)


def test_f9_a_corrupt_file_is_not_verified(weights: ModuleType, fetched: Weights) -> None:
    assert weights.verified(fetched.file, fetched.expected())
    fetched.file.write_bytes(b"y" + fetched.content[1:])

    expected = fetched.expected()
    assert not weights.verified(fetched.file, expected)
    with pytest.raises(weights.core.HostError, match=r"model-00001.safetensors is corrupt.*twice"):
        weights.explain_bad(fetched.file, expected, last=True)


def test_f10_an_lfs_pointer_is_named_with_its_size(weights: ModuleType, fetched: Weights) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
    fetched.file.write_bytes(pointer)

    message = f"is a Git LFS pointer of {len(pointer)} bytes in place of 1000 bytes"
    with pytest.raises(weights.core.HostError, match=message):
        weights.explain_bad(fetched.file, fetched.expected(), last=True)


def test_a_plain_file_is_verified_by_its_git_id(weights: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"{}")
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    expected = {"size": 2, "sha256": None, "blob": blob}

    assert weights.verified(file, expected)
    assert expected["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert not weights.verified(file, expected | {"blob": "0" * 40})


def test_weights_are_complete_only_as_they_were_verified(
    program: ModuleType, fetched: Weights
) -> None:
    status = fetched.file.stat()
    known = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    stamp = fetched.folder / program.WEIGHTS_STAMP
    assert not program.weights_complete(fetched.folder)
    stamp.write_text(json.dumps({"files": {fetched.file.name: known}}))
    assert program.weights_complete(fetched.folder)

    time.sleep(0.01)
    fetched.file.write_bytes(fetched.content)
    assert not program.weights_complete(fetched.folder)
    fetched.file.unlink()
    assert not program.weights_complete(fetched.folder)


def test_who_listens_on_a_port_is_found(program: ModuleType) -> None:
    import os

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        holder = program.ports_state([port])[str(port)]

    assert holder["pid"] == os.getpid()
    assert program.ports_state([port])[str(port)] is None


# A service as the gate sees it, with a server that the test tells what to answer.

ANSWER = {"choices": [{"message": {"content": "The Los Angeles Dodgers."}}]}
MODELS = {"data": [{"id": "MiniMaxAI/MiniMax-M2.5"}]}
ODD_ANSWER = "answer: expected .*, got an answer of another shape"
Reply = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A server on loopback; `paths` says what each path answers."""

    def __init__(self) -> None:
        self.paths: dict[str, Reply] = {
            "/health": say({}),
            "/v1/models": say(MODELS),
            "/v1/chat/completions": say(ANSWER),
        }
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths[self.path](self)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.paths[self.path](self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


def say(document: object, status: int = 200) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        body = json.dumps(document).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def hang(_: BaseHTTPRequestHandler) -> None:
    time.sleep(30)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """Never silent for long, and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()


@pytest.fixture
def service(program: ModuleType, server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A running unit of which systemd and /proc say what a healthy one's would."""
    unit = "minimax-m25.service"
    running = {
        "active": "active",
        "sub": "running",
        "pid": 1,
        "restarts": 0,
        "result": "success",
        "exit_status": 0,
    }
    holder = {"pid": 1, "command": "vllm", "unit": unit}
    monkeypatch.setattr(program, "units_state", lambda units: dict.fromkeys(units, running))
    monkeypatch.setattr(
        program, "ports_state", lambda ports: {str(port): dict(holder) for port in ports}
    )
    monkeypatch.setattr(program, "journal", lambda unit, lines=1: ["last line"])
    monkeypatch.setattr(program, "MODELS_TIMEOUT_S", 1)
    return {
        "name": "m25",
        "unit": unit,
        "stamp": "0" * 12,
        "engine_port": server.port,
        "gate": {
            "model": "MiniMaxAI/MiniMax-M2.5",
            "expect": "Dodgers",
            "answer_timeout_s": 1,
            "request": {"messages": []},
        },
    }


def test_a_service_that_serves_passes(program: ModuleType, service: dict[str, Any]) -> None:
    timings = program.pass_gate(service, ready_timeout_s=5)

    assert timings["answer"] == "The Los Angeles Dodgers."
    assert timings["ready_s"] >= 0


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("/health", say({}, 503), "health: expected /health 200 within 1 s, got 503"),
        ("/v1/models", say({"data": [{"id": "other"}]}), "model: expected .*M2.5, got other"),
        ("/v1/chat/completions", hang, "answer: expected .* within 1 s, got none"),
        ("/v1/chat/completions", trickle, "answer: expected .* within 1 s, got none"),
        ("/v1/chat/completions", say({"error": "no"}, 500), "got HTTP 500"),
        ("/v1/models", say({"data": None}), "model: .* got /v1/models: an answer of another shape"),
        ("/v1/models", say([]), "model: .* got /v1/models: an answer of another shape"),
        ("/v1/models", say({"data": ["MiniMax"]}), "model: .* an answer of another shape"),
        ("/v1/models", trickle, "model: expected .*, got /v1/models: TimeoutError"),
        ("/v1/chat/completions", say({}), ODD_ANSWER),
        ("/v1/chat/completions", say([]), ODD_ANSWER),
        ("/v1/chat/completions", say({"choices": None}), ODD_ANSWER),
        ("/v1/chat/completions", say({"choices": {}}), ODD_ANSWER),
        ("/v1/chat/completions", say({"choices": [{"message": None}]}), ODD_ANSWER),
        ("/v1/chat/completions", say({"choices": [{"message": {"content": [{}]}}]}), ODD_ANSWER),
        (
            "/v1/chat/completions",
            say({"choices": [{"message": {"content": "Dodgers \N{REPLACEMENT CHARACTER}"}}]}),
            "answer: expected",
        ),
        (
            "/v1/chat/completions",
            say({"choices": [{"message": {"content": "the the the"}}]}),
            "got 'the the the'",
        ),
    ],
)
def test_each_step_of_the_gate_can_fail(
    program: ModuleType,
    service: dict[str, Any],
    server: Server,
    path: str,
    reply: Reply,
    message: str,
) -> None:
    server.paths[path] = reply

    with pytest.raises(program.GateError, match=f"gate, {message}" if ":" in message else message):
        program.pass_gate(service, ready_timeout_s=1)


def test_an_answer_in_the_reasoning_field_counts(
    program: ModuleType, service: dict[str, Any], server: Server
) -> None:
    message = {"content": None, "reasoning": "It was the Dodgers"}
    server.paths["/v1/chat/completions"] = say({"choices": [{"message": message}]})

    assert program.pass_gate(service, ready_timeout_s=1)["answer"] == "It was the Dodgers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": "failed", "pid": 0, "exit_status": 1, "result": "exit-code"}, "exit status 1"),
        ({"active": "failed", "pid": 0, "result": "oom-kill"}, "want of memory"),
        ({"restarts": 3}, "ended with exit status 0"),
        ({"active": "inactive", "sub": "dead", "pid": 0}, r"inactive \(dead\)"),
    ],
    ids=["died", "killed for memory", "restarted", "stopped"],
)
def test_a_process_that_ends_is_not_waited_for(
    program: ModuleType,
    service: dict[str, Any],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    healthy = program.units_state([service["unit"]])[service["unit"]]
    looks = iter([healthy])
    monkeypatch.setattr(
        program,
        "units_state",
        lambda units: dict.fromkeys(units, next(looks, healthy | change)),
    )
    server.paths["/health"] = say({}, 503)

    began = time.monotonic()
    with pytest.raises(program.GateError, match=f"gate, process: .*{message}"):
        program.pass_gate(service, ready_timeout_s=60)
    assert time.monotonic() - began < 10


def test_f4_a_foreign_process_on_the_engines_port_is_named(
    program: ModuleType, service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    squatter = {"pid": 4711, "command": "python3", "unit": "squatter.service"}
    monkeypatch.setattr(
        program, "ports_state", lambda ports: dict.fromkeys(map(str, ports), squatter)
    )

    with pytest.raises(program.GateError, match=r"gate, port: .*held by PID 4711 \(python3\)"):
        program.pass_gate(service, ready_timeout_s=5)


def test_the_api_key_is_read_as_systemd_reads_it(
    program: ModuleType, service: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fleet.command import environment_file

    monkeypatch.setattr(program, "SERVICES", tmp_path)
    folder = tmp_path / service["name"] / service["stamp"]
    folder.mkdir(parents=True)
    key = 'a"b\\c$d`e'
    (folder / "secrets.env").write_text(environment_file({"VLLM_API_KEY": key}))

    assert program.api_key(service) == key


def test_what_nobody_foresaw_is_told_of_its_service_and_of_no_other(
    program: ModuleType, service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {**service, "name": "broken", "gate": {}}

    results = program.gate({"services": [broken, service], "answer": True})

    assert results[0]["journal"] == ["last line"]
    assert "\n" not in results[0]["error"]
    assert results[1]["error"] is None


# The journal, played by a journalctl that says what a test wants.


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    """Puts a journalctl with this to say on the PATH; gives the file with its arguments."""

    def make(said: bytes) -> Path:
        (tmp_path / "said").write_bytes(said)
        for name, text in (
            ("systemctl", "#!/bin/sh\necho invocation\n"),
            ("journalctl", f'#!/bin/sh\necho "$@" >{tmp_path}/asked\ncat {tmp_path}/said\n'),
        ):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "asked"

    return make


def test_only_the_end_of_a_journal_is_read(
    program: ModuleType, journalctl: Callable[[bytes], Path]
) -> None:
    asked = journalctl(b"RuntimeError: the cause\n" + b"a line\n" * 30)

    said = program.journal("minimax-m25.service")

    assert said[0] == "RuntimeError: the cause"
    assert len(said) == program.JOURNAL_LINES + 1
    assert "--lines=2000" in asked.read_text()
    assert program.last_line("minimax-m25.service") == "a line"
    assert "--lines=1 " in asked.read_text()


def test_a_broken_byte_in_a_journal_is_no_error(
    program: ModuleType, journalctl: Callable[[bytes], Path]
) -> None:
    journalctl(b"broken: \xff\n")

    assert program.journal("minimax-m25.service") == ["broken: \N{REPLACEMENT CHARACTER}"]


def test_a_journal_that_cannot_be_read_hides_nothing_else(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    (line,) = program.journal("minimax-m25.service")

    assert line.startswith("the journal of minimax-m25.service cannot be read: ")
    assert program.last_line("minimax-m25.service") == "its journal cannot be read"


# What a session brings along.


def call(verb: str, request: dict[str, Any], umask: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"umask {umask} && exec {sys.executable} {PROGRAM} {verb}"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hardened_sessions_umask_closes_nothing_to_others(tmp_path: Path) -> None:
    file = {"path": str(tmp_path / "etc" / "keyrings" / "key.asc"), "content": "", "mode": "644"}

    done = call("files", {"files": [file], "then": []}, umask="077")

    assert done.returncode == 0, done.stderr
    for made in (tmp_path / "etc", tmp_path / "etc" / "keyrings"):
        assert made.stat().st_mode & 0o777 == 0o755


def test_what_nobody_foresaw_is_one_line() -> None:
    done = call("files", {"files": None}, umask="022")

    assert done.returncode == 1
    assert done.stderr.startswith(
        "TypeError: 'NoneType' object is not iterable (fleet_host.py, files"
    )
    assert len(done.stderr.splitlines()) == 1


def test_what_an_interrupted_download_left_is_counted(
    program: ModuleType, server: Server, tmp_path: Path
) -> None:
    partial = tmp_path / ".abc.partial" / "sub"
    partial.mkdir(parents=True)
    (partial / "shard").write_bytes(b"x" * 700)
    siblings = [{"rfilename": "a", "size": 900}, {"rfilename": "b", "size": None}]
    server.paths["/api/models/a/b/revision/abc?blobs=true"] = say({"siblings": siblings})
    weights = {"path": str(tmp_path / "abc"), "repository": "a/b", "revision": "abc"}

    assert program.hub_bytes(f"http://127.0.0.1:{server.port}", weights) == {
        "bytes": 900,
        "fetched_bytes": 700,
    }


@pytest.mark.parametrize("document", [[], {"siblings": None}, {"siblings": ["a"]}])
def test_an_odd_answer_of_the_hub_is_told(
    program: ModuleType, weights: ModuleType, server: Server, tmp_path: Path, document: object
) -> None:
    server.paths["/api/models/a/b/revision/abc?blobs=true"] = say(document)
    hub = f"http://127.0.0.1:{server.port}"
    request = {"path": str(tmp_path / "abc"), "repository": "a/b", "revision": "abc", "hub": hub}

    assert "an answer of another shape" in program.hub_bytes(hub, request)["error"]
    with pytest.raises(program.HostError, match="an answer of another shape"):
        weights.hub_files(request)
