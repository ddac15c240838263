"""The HTTP server: vLLM's routes, its errors, and the way it goes down."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

from vllm import lab, openai, text
from vllm.config import ServerConfig
from vllm.engine_client import DisconnectedError, EngineClient, EngineStoppedError
from vllm.errors import EngineDeadError
from vllm.logger import log, log_exception, write
from vllm.metrics import Metrics
from vllm.version import __version__

KEEP_ALIVE_S = 5.0
STATISTICS_EVERY_S = 10.0
POLL_S = 0.05

GUARDED = ("/v1", "/v2", "/inference", "/cohere")
ANY = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ROUTES = {
    **{"/health": ("GET",), "/ping": ("GET", "POST"), "/version": ("GET",), "/load": ("GET",)},
    **{"/metrics": ANY, "/openapi.json": ("HEAD", "GET"), "/docs": ("HEAD", "GET")},
    **{"/v1/models": ("GET",), "/v1/completions": ("POST",), "/v1/chat/completions": ("POST",)},
    **{"/tokenize": ("POST",), "/detokenize": ("POST",), "/invocations": ("POST",)},
    **{"/scale_elastic_ep": ("POST",), "/is_scaling_elastic_ep": ("POST",)},
}
# Only with VLLM_SERVER_DEV_MODE=1.
DEVELOPMENT_ROUTES = {"/pause": ("POST",), "/resume": ("POST",), "/server_info": ("GET",)}

# vLLM tears down the pool that reads prompts as soon as it drains, and says so to who comes late.
DRAINING = "cannot schedule new futures after shutdown"
DOCUMENTATION = "<!DOCTYPE html><title>FastAPI - Swagger UI</title>"
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def listen(host: str | None, port: int) -> socket.socket:
    """A bound socket, as vLLM makes it before it loads: it refuses connections until it serves.

    Raises OSError where the port is taken.
    """
    family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host or "", port))
    return bound


class Server(ThreadingHTTPServer):
    """One model server."""

    daemon_threads = True
    request_queue_size = 2048

    def __init__(
        self, bound: socket.socket, config: ServerConfig, engine: EngineClient, metrics: Metrics
    ) -> None:
        """Serve on a socket that `listen` has made."""
        super().__init__(bound.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.config = config
        self.engine = engine
        self.metrics = metrics
        self.routes = dict(ROUTES)
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            self.routes |= DEVELOPMENT_ROUTES
        self.draining = False
        self.pieces: dict[int, str] = {}
        self._asked_to_stop = threading.Event()
        self._signalled = False
        self._connections: dict[socket.socket, bool] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or the engine's death, and wind up as vLLM does."""
        log("INFO", "entry.py:139", f"Starting vLLM server on http://{self._address()}")
        log("INFO", "launcher.py:186", "Available routes are:")
        for route, methods in self.routes.items():
            log("INFO", "launcher.py:195", f"Route: {route}, Methods: {', '.join(methods)}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        write(f"INFO:     Started server process [{os.getpid()}]")
        write("INFO:     Waiting for application startup.")
        self.server_activate()
        write("INFO:     Application startup complete.")
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True).start()
        threading.Thread(target=self._report, daemon=True).start()
        while not self._signalled:
            time.sleep(POLL_S)
            if self.engine.dead.is_set():
                break
        else:
            self._asked_to_stop.set()
            self._stop_engine()
        write("INFO:     Shutting down")
        self.shutdown()
        self.server_close()
        self._close_connections()
        write("INFO:     Waiting for application shutdown.")
        write("INFO:     Application shutdown complete.")
        write(f"INFO:     Finished server process [{os.getpid()}]")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection, and close it."""
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def busy(self, connection: socket.socket, *, is_busy: bool) -> None:
        """Note whether a connection has a request that is being answered."""
        with self._lock:
            self._connections[connection] = is_busy

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Not the event itself: its lock may be held by the very code that the signal interrupts.
        self._signalled = True

    def _stop_engine(self) -> None:
        """Let the requests end, if there is time for that, and end the engine."""
        timeout_s = self.config.shutdown_timeout_s
        mode = "drain" if timeout_s else "abort"
        log("INFO", "launcher.py:254", "[shutdown] API server: shutdown triggered")
        log(
            "INFO",
            "launcher.py:270",
            f"[shutdown] API server: stopping engine client mode={mode} timeout={timeout_s}s",
        )
        if timeout_s:
            log(
                "INFO",
                "core.py:1655",
                "[shutdown] EngineCore: draining in-flight requests "
                f"count={self.engine.running} timeout={timeout_s}s",
            )
            # Still accepting: requests that come now are answered by an error.
            self.draining = True
            until = time.monotonic() + timeout_s
            while self.engine.running and time.monotonic() < until:
                if self.engine.dead.wait(POLL_S):
                    return
        if self.engine.running:
            log(
                "WARNING",
                "utils.py:648",
                "[shutdown] Process manager: force killing remaining processes count=1",
            )
        self.engine.stop()
        log("INFO", "launcher.py:279", "[shutdown] API server: engine client stopped")

    def _close_connections(self) -> None:
        """Close those that are idle and wait for the others, for as long as it takes.

        That can be for ever: requests that the engine does not answer any more end only when their
        clients give up.
        """
        said = False
        while True:
            with self._lock:
                idle = [connection for connection, busy in self._connections.items() if not busy]
                left = len(self._connections) - len(idle)
            for connection in idle:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
            if not left:
                return
            if not said:
                write("INFO:     Waiting for connections to close. (CTRL+C to force quit)")
                said = True
            time.sleep(POLL_S)

    def _report(self) -> None:
        """Log what was done, while there is something to do."""
        names = ("vllm:prompt_tokens", "vllm:generation_tokens")
        before = [self.metrics.value(name) for name in names]
        while not self._asked_to_stop.wait(STATISTICS_EVERY_S):
            now = [self.metrics.value(name) for name in names]
            prompt, generation = (
                (b - a) / STATISTICS_EVERY_S for a, b in zip(before, now, strict=True)
            )
            if now != before or self.engine.running:
                waiting = int(self.metrics.value("vllm:num_requests_waiting"))
                log(
                    "INFO",
                    "loggers.py:335",
                    f"Engine 000: Avg prompt throughput: {prompt:.1f} tokens/s, Avg generation "
                    f"throughput: {generation:.1f} tokens/s, Running: {self.engine.running} reqs, "
                    f"Waiting: {waiting} reqs, GPU KV cache usage: 0.0%, Prefix cache hit rate: "
                    "0.0%",
                )
            before = now

    def _address(self) -> str:
        return f"{self.config.host or '0.0.0.0'}:{self.config.port}"


class Handler(BaseHTTPRequestHandler):
    """One connection, which may carry several requests."""

    protocol_version = "HTTP/1.1"
    timeout = KEEP_ALIVE_S
    server: Server
    status = 0

    def handle_one_request(self) -> None:
        """As the base class does, but no method is unknown: that is for the routes to say."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self.server.busy(self.connection, is_busy=True)
        try:
            self._answer()
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.server.busy(self.connection, is_busy=False)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name
        """Nothing: _answer logs what uvicorn would."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        methods = self.server.routes.get(path)
        handler = path
        try:
            if path.startswith(GUARDED) and not self._is_authorised():
                self._send_json(401, {"error": "Unauthorized"})
            elif methods is None and self.server.routes.get(path.rstrip("/")):
                host = self.headers.get("Host", "")
                location = f"http://{host}{path.rstrip('/')}"
                self._send(307, b"", headers={"location": location})
            elif methods is None or self.command not in methods:
                handler = "none"
                self._refuse(methods)
            else:
                self._route(path, body)
        except openai.RequestError as error:
            self._send_json(error.status, error.body)
        except EngineStoppedError:
            # The engine was stopped under this request. vLLM says nothing, until the client leaves.
            while not self._has_left():
                time.sleep(POLL_S)
            self.close_connection = True
        except DisconnectedError:
            self.server.metrics.add("vllm:request_success", finished_reason="abort")
            self.close_connection = True
        except EngineDeadError:
            self._send_json(500, openai.error_body(500, DEAD, "InternalServerError"))
        finally:
            self._account(handler)

    def _route(self, path: str, body: bytes) -> None:
        if path in {"/v1/completions", "/v1/chat/completions", "/invocations"}:
            self._generate(path, openai.parse_body(self.headers.get("Content-Type", ""), body))
        elif path in {"/tokenize", "/detokenize"}:
            request = openai.parse_body(self.headers.get("Content-Type", ""), body)
            self._send_json(200, self._tokens(path, request))
        elif path == "/v1/models":
            config = self.server.config
            self._send_json(200, openai.models(config, openai.served_names(config, self._told())))
        elif path == "/metrics":
            self._send(
                200,
                self.server.metrics.render().encode(),
                "text/plain; version=1.0.0; charset=utf-8",
            )
        elif path == "/docs":
            self._send(200, DOCUMENTATION.encode(), "text/html; charset=utf-8")
        elif path in {"/health", "/ping"}:
            self._send(503 if self.server.engine.dead.is_set() else 200, b"")
        else:
            self._send_json(*self._small(path, body))

    def _small(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body of the routes that need no more than a line."""
        if path == "/scale_elastic_ep":
            request = openai.parse_body(self.headers.get("Content-Type", ""), body)
            if "new_data_parallel_size" not in request:
                message = "new_data_parallel_size is required"
                return 400, openai.error_body(400, message, "Bad Request")
        answers: dict[str, dict[str, Any]] = {
            "/version": {"version": __version__},
            "/load": {"server_load": 0},
            "/is_scaling_elastic_ep": {"is_scaling_elastic_ep": False},
            "/scale_elastic_ep": {"message": "Scaled"},
            "/pause": {"status": "paused"},
            "/resume": {"status": "resumed"},
            "/server_info": {"vllm_config": vars(self.server.config)},
            "/openapi.json": {
                "openapi": "3.1.0",
                "info": {"title": "FastAPI", "version": "0.1.0"},
                "paths": {
                    route: {method.lower(): {} for method in methods}
                    for route, methods in self.server.routes.items()
                },
            },
        }
        return 200, answers[path]

    def _generate(self, path: str, request: dict[str, Any]) -> None:
        server, behaviour = self.server, self._told()
        chat = path == "/v1/chat/completions" or (path == "/invocations" and "messages" in request)
        plan = openai.plan_chat if chat else openai.plan_completion
        job = plan(request, server.config, behaviour)
        if server.draining:
            raise openai.RequestError(500, DRAINING, kind="InternalServerError")
        began = time.monotonic()
        pieces = server.engine.generate(job.reply.pieces, job.prompt_tokens, self._has_left)
        parts = openai.deltas(job, server.config, pieces)
        if job.stream:
            self._stream(openai.chunks(job, parts))
        else:
            message: dict[str, str] = {}
            for part in parts:
                for name, value in part.items():
                    message[name] = message.get(name, "") + value
            self._send_json(200, openai.response(job, message))
        self._observe(job, time.monotonic() - began)

    def _observe(self, job: openai.Job, took_s: float) -> None:
        metrics, tokens = self.server.metrics, len(job.reply.pieces)
        reason = "length" if job.reply.finish_reason == "length" else "stop"
        metrics.add("vllm:request_success", finished_reason=reason)
        for name in ("e2e_request_latency", "request_inference_time", "request_decode_time"):
            metrics.observe(f"vllm:{name}_seconds", took_s)
        metrics.observe("vllm:request_time_per_output_token_seconds", took_s / max(tokens, 1))
        metrics.observe("vllm:request_prompt_tokens", job.prompt_tokens)
        metrics.observe("vllm:request_generation_tokens", tokens)
        metrics.observe("vllm:request_params_max_tokens", job.max_tokens)

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        """Send events as they come; errors come as an event, the status being sent already."""
        self._begin(
            200,
            {
                "content-type": "text/event-stream; charset=utf-8",
                "transfer-encoding": "chunked",
            },
        )
        try:
            for event in events:
                self._event(json.dumps(event, separators=(",", ":"), ensure_ascii=False))
        except EngineDeadError:
            self._event(json.dumps(openai.error_body(500, DEAD, "InternalServerError")))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: str) -> None:
        content = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def _tokens(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path == "/detokenize":
            if "tokens" not in request:
                raise openai.validation_error("missing", "tokens", "Field required", str(request))
            # Only what it has tokenised before: there is no vocabulary.
            known = self.server.pieces
            return {"prompt": "".join(known.get(token, "") for token in request["tokens"])}
        if "messages" in request:
            prompt = "".join(text.message_text(message) for message in request["messages"])
        elif "prompt" in request:
            prompt = request["prompt"]
        else:
            raise openai.validation_error("missing", "prompt", "Field required", str(request))
        pieces = text.tokenize(prompt)
        self.server.pieces.update({text.token_id(piece): piece for piece in pieces})
        return {
            "count": len(pieces),
            "max_model_len": self.server.config.max_model_len,
            "tokens": [text.token_id(piece) for piece in pieces],
            "token_strs": None,
        }

    def _refuse(self, methods: tuple[str, ...] | None) -> None:
        if methods is None:
            self._send_json(404, {"detail": "Not Found"})
        else:
            # A route of two functions, one for each method, names the first one's.
            allow = {"allow": ", ".join(methods if "HEAD" in methods else methods[:1])}
            self._send_json(405, {"detail": "Method Not Allowed"}, headers=allow)

    def _is_authorised(self) -> bool:
        keys = self.server.config.api_keys
        if not keys or self.command == "OPTIONS":
            return True
        scheme, _, given = (self.headers.get("Authorization") or "").partition(" ")
        digest = hashlib.sha256(given.encode()).digest()
        matches = [
            secrets.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys
        ]
        return scheme.lower() == "bearer" and any(matches)

    def _told(self) -> lab.Behaviour:
        return lab.behaviour(self.server.config.port)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        return self.rfile.read(int(length)) if length.isdigit() else b""

    def _has_left(self) -> bool:
        """Whether the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _send_json(
        self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False, default=str)
        self._send(status, encoded.encode(), "application/json", headers)

    def _send(
        self,
        status: int,
        content: bytes,
        content_type: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        types = {"content-type": content_type} if content_type else {}
        self._begin(status, {**(headers or {}), "content-length": str(len(content)), **types})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        """Send the head of an answer, as uvicorn writes it."""
        self.status = status
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"date: {formatdate(usegmt=True)}",
            "server: uvicorn",
            *(f"{name}: {value}" for name, value in headers.items()),
            "vary: Origin",
        ]
        if self.close_connection:
            lines.append("connection: close")
        self.wfile.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def _account(self, handler: str) -> None:
        """Count the request and write uvicorn's access line."""
        if not self.status:
            return
        status, self.status = self.status, 0
        self.server.metrics.add(
            "http_requests", handler=handler, method=self.command, status=f"{status // 100}xx"
        )
        if self.server.config.access_log:
            host, port = self.client_address[:2]
            phrase = HTTPStatus(status).phrase
            write(
                f'INFO:     {host}:{port} - "{self.command} {self.path} HTTP/1.1" {status} {phrase}'
            )
        if status == HTTPStatus.INTERNAL_SERVER_ERROR and self.server.engine.dead.is_set():
            log_exception(
                "serving.py:500", "Error in completion stream generator.", EngineDeadError()
            )
