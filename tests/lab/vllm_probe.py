"""Runs on a lab host: starts the host's own vLLM on a spare port, and tells what it does, as JSON.

    python3 - SCENARIO < vllm_probe.py

It takes argv and environment of a service that runs, so that it asks what the roll-out installed.
Standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PORT = 18900
KEY = "probe-key"
USER = "minimax"
FOLDER = "/var/lib/minimax"
READY_TIMEOUT_S = 240
EXIT_TIMEOUT_S = 60
# Longer than a drain's begin takes, shorter than any model needs for MANY_TOKENS.
A_MOMENT_S = 1.0
MANY_TOKENS = 900
# Long enough to tell a server that waits from one that is slow to end.
HELD_UP_S = 8.0

PATHS = (
    *("/health", "/ping", "/version", "/load", "/metrics", "/openapi.json", "/docs"),
    *("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
    *("/invocations", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/pause", "/server_info"),
    *("/nosuch", "/v1/nosuch", "/health/", "/"),
)
LONG = {"prompt": "hi", "max_tokens": MANY_TOKENS, "ignore_eos": True}
HELLO = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD_REQUESTS: dict[str, tuple[str, Any]] = {
    "no JSON": ("/v1/completions", b"{"),
    "no prompt": ("/v1/completions", {}),
    "empty prompt": ("/v1/completions", {"prompt": ""}),
    "another model": ("/v1/completions", {"model": "nope", "prompt": "hi"}),
    "another model to chat with": ("/v1/chat/completions", {"model": "nope", "messages": HELLO}),
    "tokens in words": ("/v1/completions", {"prompt": "hi", "max_tokens": "x"}),
    "no tokens": ("/v1/completions", {"prompt": "hi", "max_tokens": 0}),
    "too many tokens": ("/v1/completions", {"prompt": "hi", "max_tokens": 10**9}),
    "a prompt too long": ("/v1/completions", {"prompt": "who " * 250_000, "max_tokens": 1}),
    "cold": ("/v1/completions", {"prompt": "hi", "temperature": -1}),
    "no messages": ("/v1/chat/completions", {"max_tokens": 1}),
    "an empty conversation": ("/v1/chat/completions", {"messages": []}),
    "a number for content": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": 5}]},
    ),
    "no choice": ("/v1/chat/completions", {"messages": HELLO, "n": 0}),
    "a tool that is not there": (
        "/v1/chat/completions",
        {
            "messages": HELLO,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "nope"}},
        },
    ),
    "a choice without tools": (
        "/v1/chat/completions",
        {"messages": HELLO, "tool_choice": "required"},
    ),
}


def running_service() -> tuple[list[str], dict[str, str]]:
    """argv and environment of a vLLM service of this host."""
    listed = subprocess.run(
        ["systemctl", "show", "--property=MainPID", "--value", "minimax-*.service"],
        capture_output=True,
        text=True,
        check=True,
    )
    for pid in listed.stdout.split():
        argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1] if pid != "0" else []
        if "serve" in argv and any(part.endswith("/bin/vllm") for part in argv):
            pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            return argv, {**environment, "VLLM_API_KEY": KEY}
    sys.exit("no service of this host runs vllm")


class Server:
    """A vLLM process on the spare port."""

    def __init__(self, *options: str, model: str | None = None) -> None:
        """Start it with the service's options, and these."""
        argv, environment = running_service()
        if model is not None:
            argv[argv.index("serve") + 1] = model
        # Beside the services, which have most of the GPUs' memory; and with workers of their own,
        # as on several GPUs, however few the service has.
        spare = ["--host", "127.0.0.1", "--port", str(PORT), "--gpu-memory-utilization", "0.05"]
        backend = ["--distributed-executor-backend", "mp"]
        self.command = [*argv, *spare, *backend, *options]
        self.environment = environment
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115 - lives as long
        self.process = subprocess.Popen(
            self.command,
            env=environment,
            cwd=FOLDER,
            user=USER,
            group=USER,
            stdout=Path(self.log.name).open("w"),  # noqa: SIM115 - the child's
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Return when /health is 200, or end this program with the server's log."""
        until = time.monotonic() + READY_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < until:
            if self.health() == 200:
                return
            time.sleep(0.2)
        sys.exit(f"{self.command} is not ready:\n{self.journal()[-3000:]}")

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = KEY,
        timeout_s: float = 60,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.getheaders()},
                answer.read(),
            )

    def health(self) -> int:
        """Its status, 0 if nobody listens."""
        try:
            return self.request("GET", "/health", timeout_s=5)[0]
        except OSError:
            return 0

    def journal(self) -> str:
        """What it wrote."""
        return Path(self.log.name).read_text(errors="replace")

    def children(self) -> dict[int, str]:
        """Its descendants, by their titles, but for Python's own helpers."""
        found: dict[int, str] = {}
        to_ask = [self.process.pid]
        while to_ask:
            pid = to_ask.pop()
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                title = Path(f"/proc/{child}/cmdline").read_text().strip("\0")
                to_ask.append(int(child))
                if title.startswith("VLLM::"):
                    found[int(child)] = title
        return found

    def exit_code(self, timeout_s: float = EXIT_TIMEOUT_S) -> int | None:
        """What it ends with, None if it does not."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(*options: str, model: str | None = None) -> Iterator[Server]:
    """A server that is ready."""
    server = Server(*options, model=model)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def shape(value: Any) -> Any:
    """The keys of an answer, with what is below them; lists by their first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return None


def in_background(server: Server, came: list[Any]) -> None:
    """Ask for a long answer; `came` has its status and body, or what went wrong instead."""

    def ask() -> None:
        try:
            status, _, body = server.request("POST", "/v1/completions", LONG)
            came.append([status, json.loads(body)])
        except (OSError, http.client.HTTPException) as error:
            came.append([0, type(error).__name__])

    threading.Thread(target=ask, daemon=True).start()
    time.sleep(A_MOMENT_S)


def describe() -> dict[str, Any]:
    """Routes, errors, shapes, metrics and processes of a server; and how it drains."""
    with serving("--shutdown-timeout", "40") as server:
        told: dict[str, Any] = {"routes": {}, "errors": {}, "open": []}
        for path in PATHS:
            for method, body in (("GET", None), ("POST", {}), ("DELETE", None)):
                status, headers, content = server.request(method, path, body)
                told["routes"][f"{method} {path}"] = {
                    "status": status,
                    "type": headers.get("content-type"),
                    "allow": sorted(headers.get("allow", "").split(", ")),
                    "headers": sorted(headers),
                    "detail": content.decode() if status in {404, 405} else None,
                }
            if server.request("GET", path, key=None)[0] != 401:
                told["open"].append(path)
        unauthorised = server.request("POST", "/v1/completions", {}, key="wrong")
        told["unauthorised"] = [unauthorised[0], unauthorised[2].decode()]
        for name, (path, body) in BAD_REQUESTS.items():
            status, _, content = server.request("POST", path, body)
            told["errors"][name] = [status, json.loads(content)]
        chat = {"messages": HELLO, "max_tokens": 8}
        completion = {"prompt": "hi", "max_tokens": 8}
        told["answers"] = {
            path: shape(json.loads(server.request("POST", path, body)[2]))
            for path, body in (
                ("/v1/completions", completion),
                ("/v1/chat/completions", chat),
                ("/invocations", chat),
                ("/tokenize", {"prompt": "hi"}),
            )
        }
        told["answers"]["/v1/models"] = shape(json.loads(server.request("GET", "/v1/models")[2]))
        told["events"] = {
            path: events(server, path, body)
            for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat))
        }
        told["metrics"] = metrics(server)
        told["processes"] = sorted(
            {title.rstrip("0123456789") for title in server.children().values()}
        )
        argv = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")[:-1]
        told["argv is readable"] = argv[-len(server.command) + 1 :] == server.command[1:]
        environ = Path(f"/proc/{server.process.pid}/environ").read_text().split("\0")
        told["environment is readable"] = f"VLLM_API_KEY={KEY}" in environ
        told["drain"] = drain(server)
        return told


def events(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """How a streamed answer is built."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, content = server.request("POST", path, {**body, **options})
    lines = re.findall(r"^data: (.*)$", content.decode(), flags=re.MULTILINE)
    return {
        "status": status,
        "type": headers.get("content-type"),
        "first": shape(json.loads(lines[0])),
        "usage": shape(json.loads(lines[-2]))["usage"],
        "end": lines[-1],
    }


def metrics(server: Server) -> dict[str, list[str]]:
    """Names of the samples, with the names of their labels."""
    _, _, content = server.request("GET", "/metrics")
    found: dict[str, list[str]] = {}
    for line in content.decode().splitlines():
        sample = re.match(r"([\w:]+)(?:{(.*)})? ", line)
        if sample and not line.startswith("#"):
            found[sample[1]] = sorted(re.findall(r"(\w+)=\"", sample[2] or ""))
    return found


def drain(server: Server) -> dict[str, Any]:
    """SIGTERM while it answers, with time to finish."""
    came: list[Any] = []
    in_background(server, came)
    server.process.terminate()
    time.sleep(A_MOMENT_S)
    late = server.request("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 2})
    told = {"late": [late[0], json.loads(late[2])], "health": server.health()}
    told["exit"] = server.exit_code()
    status, body = came[0] if came else (0, {})
    told["answered"] = [status, body["usage"]["completion_tokens"] if status == 200 else body]
    return told


def abort() -> dict[str, Any]:
    """SIGTERM while it answers, with no time to finish: the client has to give up first."""
    with serving("--shutdown-timeout", "0") as server:
        connection = socket.create_connection(("127.0.0.1", PORT))
        body = json.dumps(LONG)
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        time.sleep(A_MOMENT_S)
        server.process.terminate()
        told = {"held up": server.exit_code(HELD_UP_S) is None, "health": server.health()}
        connection.close()
        return {**told, "exit": server.exit_code()}


def signal_all() -> dict[str, Any]:
    """SIGTERM to all processes, as systemd does where it is not told otherwise."""
    with serving("--shutdown-timeout", "40") as server:
        came: list[Any] = []
        in_background(server, came)
        for pid in (server.process.pid, *server.children()):
            os.kill(pid, signal.SIGTERM)
        told = {"exit": server.exit_code()}
        return {**told, "answered": came[0] if came else None}


def engine_death() -> dict[str, Any]:
    """The engine is killed while it answers."""
    with serving() as server:
        came: list[Any] = []
        in_background(server, came)
        engines = [pid for pid, title in server.children().items() if "EngineCore" in title]
        os.kill(engines[0], signal.SIGKILL)
        told = {"exit": server.exit_code(), "told": "EngineDeadError" in server.journal()}
        return {**told, "answered": came[0] if came else None}


def exits() -> dict[str, Any]:
    """How it ends where it cannot start: exit status and the last line that says why."""

    def end(*options: str, model: str | None = None, words: str) -> list[Any]:
        server = Server(*options, model=model)
        try:
            code = server.exit_code(READY_TIMEOUT_S)
        finally:
            server.kill()
        return [code, sorted(set(re.findall(words, server.journal())))]

    argv, _ = running_service()
    model = Path(argv[argv.index("serve") + 1])
    told = {
        "an unknown option": end("--nope", "3", words=r"vllm: error: .*"),
        "a bad number": end("--max-num-seqs", "many", words=r"argument --max-num-seqs: .*"),
        "no model": end(model="/nonexistent/model", words=r"HFValidationError: Repo id must be"),
        "a parser that is not there": end(
            *("--enable-auto-tool-choice", "--tool-call-parser", "nope"),
            words=r"KeyError: 'invalid tool call parser: nope",
        ),
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", PORT))
        taken.listen()
        told["a taken port"] = end(words=r"OSError: \[Errno 98\] Address already in use")
    for name, change in DAMAGE.items():
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix="probe-") as folder:
            copy = Path(folder, "model")
            shutil.copytree(model, copy)
            change(sorted(copy.glob("*.safetensors"))[-1])
            for path in (Path(folder), copy, *copy.rglob("*")):
                shutil.chown(path, USER, USER)
            told[name] = end(
                model=str(copy), words=r"(?:FileNotFoundError|SafetensorError): [A-Z][a-z ]+"
            )
    return told


def _pointer(shard: Path) -> None:
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a missing shard": Path.unlink,
    "a pointer for a shard": _pointer,
}
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function for function in (describe, abort, signal_all, engine_death, exits)
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(SCENARIOS[sys.argv[1]]()))
