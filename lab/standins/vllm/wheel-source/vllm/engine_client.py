"""The server's side of the engine: starts its process, paces requests, notices its end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm import engine_core, lab
from vllm.engine_core import READY, Task
from vllm.errors import EngineDeadError
from vllm.logger import log, log_exception
from vllm.metrics import Metrics

FIRST_TOKEN_S = 0.02
SLOW_FIRST_TOKEN_S = 5.0
SLOW_TOKENS_PER_SECOND = 2.0
POLL_S = 0.05
START_POLL_S = 0.02


class DisconnectedError(Exception):
    """The client went away before it had its answer."""


class EngineStoppedError(Exception):
    """The engine was stopped by the server itself: whoever waits for an answer waits in vain."""


class EngineClient:
    """An engine process and the requests that run in it."""

    def __init__(
        self, task: Task, metrics: Metrics, max_num_seqs: int, bound: socket.socket
    ) -> None:
        """Start the process; `wait_until_ready` says when it can be used.

        bound: the server's socket, which the process is not to keep
        """
        self.metrics = metrics
        self.dead = threading.Event()
        self._task = task
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._slots = threading.Semaphore(max_num_seqs)
        self._heard, says_ready = os.pipe()
        self._pid = engine_core.start(task, says_ready, not_to_keep=(bound.fileno(), self._heard))
        os.close(says_ready)

    def wait_until_ready(self) -> None:
        """Return when the model is loaded.

        Raises RuntimeError when the engine's process ends before; SystemExit with its status where
        the lab asked for another than 1.
        """
        # A worker may still have the pipe's other end when the engine is gone, so both are asked.
        os.set_blocking(self._heard, False)
        while True:
            try:
                if os.read(self._heard, 1) == READY:
                    break
            except BlockingIOError:
                pass
            ended, wait_status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(wait_status)
                if status not in {1, -signal.SIGKILL, -signal.SIGTERM}:
                    sys.exit(status)
                raise RuntimeError(
                    "Engine core initialization failed. See root cause above. "
                    f"Failed core proc(s): {{'EngineCore': {status}}}"
                )
            time.sleep(START_POLL_S)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return int(self.metrics.value("vllm:num_requests_running"))

    def generate(
        self, pieces: list[str], prompt_tokens: int, has_left: Callable[[], bool]
    ) -> Iterator[str]:
        """Yield `pieces` one by one, at the pace that the lab has set.

        has_left: whether the client is gone

        Raises EngineDeadError when the engine dies meanwhile, EngineStoppedError when the server
        stops it, DisconnectedError when the client leaves.
        """
        with self._slot(has_left):
            began = time.monotonic()
            behaviour = lab.behaviour(self._task.port)
            if behaviour.mode == "engine-death":
                self._die()
            if behaviour.mode == "hang":
                self._sleep_until(float("inf"), has_left)
            first_s, per_second = FIRST_TOKEN_S, behaviour.tokens_per_second
            if behaviour.mode == "slow":
                first_s = SLOW_FIRST_TOKEN_S if behaviour.seconds is None else behaviour.seconds
                per_second = SLOW_TOKENS_PER_SECOND
            self.metrics.add("vllm:prompt_tokens", prompt_tokens)
            self.metrics.add("vllm:prefix_cache_queries", prompt_tokens)
            for position, piece in enumerate(pieces):
                self._sleep_until(began + first_s + position / per_second, has_left)
                if position:
                    self.metrics.observe("vllm:inter_token_latency_seconds", 1 / per_second)
                else:
                    took_s = time.monotonic() - began
                    self.metrics.observe("vllm:time_to_first_token_seconds", took_s)
                    self.metrics.observe("vllm:request_prefill_time_seconds", took_s)
                self.metrics.add("vllm:generation_tokens")
                self.metrics.observe("vllm:iteration_tokens_total", 1.0)
                yield piece

    def stop(self) -> None:
        """End the engine's process and its workers; requests that run are not answered."""
        self._stopped.set()
        for pid in (self._pid, *_children(self._pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ended.wait()

    @contextmanager
    def _slot(self, has_left: Callable[[], bool]) -> Iterator[None]:
        """Wait for room in the batch."""
        self.metrics.add("vllm:num_requests_waiting")
        began = time.monotonic()
        try:
            while not self._slots.acquire(timeout=POLL_S):
                self._check(has_left)
        finally:
            self.metrics.add("vllm:num_requests_waiting", -1)
        self.metrics.observe("vllm:request_queue_time_seconds", time.monotonic() - began)
        self.metrics.add("vllm:num_requests_running")
        try:
            yield
        finally:
            self.metrics.add("vllm:num_requests_running", -1)
            self._slots.release()

    def _sleep_until(self, when: float, has_left: Callable[[], bool]) -> None:
        self._check(has_left)
        while (left_s := when - time.monotonic()) > 0:
            time.sleep(min(left_s, POLL_S))
            self._check(has_left)

    def _check(self, has_left: Callable[[], bool]) -> None:
        if self._stopped.is_set():
            raise EngineStoppedError
        if self.dead.is_set():
            raise EngineDeadError
        if has_left():
            raise DisconnectedError

    def _die(self) -> None:
        """What the lab calls engine-death: as if a kernel had failed in a worker."""
        for worker in _children(self._pid):
            os.kill(worker, signal.SIGKILL)
        self.dead.wait()

    def _watch(self) -> None:
        """Notice when the engine's process ends of itself."""
        os.waitpid(self._pid, 0)
        self._ended.set()
        if self._stopped.is_set():
            return
        log(
            "WARNING",
            "core_client.py:817",
            "[shutdown] MPClient: engine core exited unexpectedly; starting cleanup",
        )
        log_exception("async_llm.py:906", "AsyncLLM output_handler failed.", EngineDeadError())
        self.dead.set()


def _children(pid: int) -> list[int]:
    """Process ids of a process' children, in the order of their start."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(child) for child in listed.split()]
