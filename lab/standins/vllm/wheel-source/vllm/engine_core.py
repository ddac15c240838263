"""The engine's process and its workers: they load, hold the GPUs, and can be killed.

As with vLLM they outlive a server that is killed, so that only something like systemd's control
groups frees the GPUs then. They are forked, which costs less than to start Python anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm import checkpoint, devices, lab
from vllm.errors import OutOfMemoryError
from vllm.logger import log, log_exception, name_process, write
from vllm.version import __version__, release

PR_SET_PDEATHSIG = 1
READY = b"1"

FIRST_COMPILE_WORDS_UNTIL = (0, 14)
# Of the time that loading takes: what the weights take, compilation, and capturing graphs.
PHASES = (0.5, 0.3, 0.2)
POLL_S = 0.02
MIB, GIB, MIB_PER_GIB = 2**20, 2**30, 2**10


@dataclass(frozen=True)
class Task:
    """What an engine is to load.

    model: directory
    expert_width, block: of its configuration, None if it has none
    ranks: tensor parallel × pipeline parallel × data parallel
    expert_ranks: over how many ranks each expert is split
    gpus: indexes of the GPUs that CUDA offers
    utilization: part of each GPU's memory to take
    kv_bytes_per_token: over all ranks
    max_model_len: tokens
    eager: without compilation and graphs
    port: the server's, by which its misbehaviour is looked up
    """

    model: str
    expert_width: int | None
    block: list[int] | None
    ranks: int
    expert_ranks: int
    gpus: list[int]
    utilization: float
    kv_bytes_per_token: int
    max_model_len: int
    eager: bool
    port: int


def start(task: Task, says_ready: int, not_to_keep: Sequence[int]) -> int:
    """Fork the engine's process and return its process id.

    says_ready: descriptor to which it writes a byte when the model is loaded
    not_to_keep: descriptors of the server that it closes
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for descriptor in not_to_keep:
            os.close(descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = _run(task, says_ready)
    except Exception as error:
        log_exception("core.py:1586", "EngineCore encountered a fatal error.", error)
    finally:
        # Whatever happens, this process does not go on as a second server.
        os._exit(status)


def _run(task: Task, says_ready: int) -> int:
    """Load, say so, and stay; the exit status is 1 if something went wrong."""
    name_process("EngineCore", "VLLM::EngineCore")
    workers: list[int] = []
    loaded, says_loaded = os.pipe()
    try:
        log(
            "INFO",
            "core.py:133",
            f"Initializing a V1 LLM engine (v{__version__}) with config: model={task.model!r}, "
            f"tokenizer={task.model!r}, max_seq_len={task.max_model_len}, world_size={task.ranks}",
        )
        began = time.monotonic()
        for rank in range(task.ranks):
            workers.append(_start_worker(rank, task, says_loaded))
        os.close(says_loaded)
        _wait_for(loaded, task, workers)
        log(
            "INFO",
            "core.py:402",
            "init engine (profile, create kv cache, warmup model) took "
            f"{time.monotonic() - began:.2f} s",
        )
    except _WorkerFailedError as error:
        log_exception("core.py:1584", "EngineCore failed to start.", error)
        _kill(workers)
        return error.exit_code
    # A server that was killed meanwhile does not hear it.
    with contextlib.suppress(BrokenPipeError):
        os.write(says_ready, READY)
    os.close(says_ready)
    return _stay(workers)


class _WorkerFailedError(Exception):
    """A worker ended while the model was loaded."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(
            "WorkerProc initialization failed due to an exception in a background process. See "
            "stack trace for root cause."
        )
        self.exit_code = exit_code


def _wait_for(loaded: int, task: Task, workers: list[int]) -> None:
    """Wait until the model is loaded. Raises _WorkerFailedError when a worker ends before."""
    while True:
        heard, _, _ = select.select([loaded], [], [], POLL_S)
        if heard and os.read(loaded, 1) == READY:
            return
        # The pipe also ends with the last worker that could write to it.
        ended, _ = os.waitpid(-1, 0 if heard else os.WNOHANG)
        if ended:
            workers.remove(ended)
            behaviour = lab.behaviour(task.port)
            told = behaviour.exit_code if behaviour.mode == "die-loading" else None
            raise _WorkerFailedError(1 if told is None else told)


def _stay(workers: list[int]) -> int:
    """Until a worker ends; the exit status."""

    def on_sigterm(number: int, frame: object) -> None:
        log("INFO", "core.py:1454", "[shutdown] EngineCore: trigger received signal=SIGTERM")
        # The server, which had the same signal, decides when this process ends. Workers just die
        # of it, as vLLM's do: requests survive only where systemd signals the server alone.

    signal.signal(signal.SIGTERM, on_sigterm)
    ended, status = os.wait()
    workers.remove(ended)
    log(
        "ERROR",
        "multiproc_executor.py:276",
        f"Worker proc VllmWorker died unexpectedly (exit code: {status}), shutting down executor.",
    )
    error = RuntimeError("Executor failed.")
    log_exception("core.py:1586", "EngineCore encountered a fatal error.", error)
    _kill(workers)
    return 1


def _kill(workers: list[int]) -> None:
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def _start_worker(rank: int, task: Task, says_loaded: int) -> int:
    """Fork a worker and return its process id; the first one writes a byte when it has loaded."""
    process = os.fork()
    if process:
        return process
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        suffix = f"_TP{rank}" if task.ranks > 1 else ""
        name_process(f"Worker{suffix}", f"VLLM::Worker{suffix}")
        if _load(rank, task):
            os.write(says_loaded, READY)
    except Exception as error:
        log_exception("multiproc_executor.py:953", "WorkerProc failed to start.", error)
        os._exit(1)
    while True:
        signal.pause()


def _load(rank: int, task: Task) -> bool:
    """Load a worker's part; True from the first, when it is done: it speaks and waits for all."""
    behaviour = lab.behaviour(task.port)
    if rank >= len(task.gpus):
        raise AssertionError(
            f"DP adjusted local rank {rank} is out of bounds for {len(task.gpus)} devices."
        )
    gpu = task.gpus[rank]
    wanted_mib = int(task.utilization * devices.memory_mib())
    if devices.free_mib(gpu) < wanted_mib:
        raise ValueError(
            f"Free memory on device cuda:{rank} ({devices.free_mib(gpu) / MIB_PER_GIB:.2f}/"
            f"{devices.memory_mib() / MIB_PER_GIB:.2f} GiB) on startup is less than desired GPU memory "
            f"utilization ({task.utilization}, {wanted_mib / MIB_PER_GIB:.2f} GiB). Decrease GPU memory "
            "utilization or reduce GPU memory used by other processes."
        )
    devices.hold(gpu, wanted_mib)
    if (
        task.block
        and task.expert_width
        and (task.expert_width // task.expert_ranks) % task.block[0]
    ):
        raise ValueError(
            "The output_size of gate's and up's weight = "
            f"{task.expert_width // task.expert_ranks} is not divisible by weight quantization "
            f"block_n = {task.block[0]}."
        )
    if rank:
        return False
    log("INFO", "gpu_model_runner.py:4979", f"Starting to load model {task.model}...")
    weights_bytes = checkpoint.read_weights(Path(task.model))
    _misbehave(behaviour)
    if behaviour.mode == "never-ready":
        return False
    _report(task, behaviour.load_seconds, weights_bytes, wanted_mib)
    return True


def _misbehave(behaviour: lab.Behaviour) -> None:
    """Die, if that is what the lab asks for."""
    if behaviour.mode not in {"die-loading", "oom"}:
        return
    time.sleep(behaviour.load_seconds / 2 if behaviour.seconds is None else behaviour.seconds)
    if behaviour.mode == "oom":
        total_gib = devices.memory_mib() / MIB_PER_GIB
        raise OutOfMemoryError(
            behaviour.text
            or f"CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total "
            f"capacity of {total_gib:.2f} GiB of which 1.02 GiB is free. Including non-PyTorch "
            f"memory, this process has {total_gib - 1.02:.2f} GiB memory in use."
        )
    if behaviour.text is None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    write(behaviour.text)
    os._exit(1)


def _report(task: Task, load_seconds: float, weights_bytes: int, wanted_mib: int) -> None:
    """Take the time that loading takes, and say what vLLM says of it."""
    weights_s, compile_s, capture_s = (share * load_seconds for share in PHASES)
    time.sleep(weights_s)
    rank_bytes = weights_bytes / task.ranks
    log("INFO", "default_loader.py:507", f"Loading weights took {weights_s:.2f} seconds")
    log(
        "INFO",
        "gpu_model_runner.py:5089",
        f"Model loading took {rank_bytes / GIB:.2f} GiB memory and {weights_s:.6f} seconds",
    )
    time.sleep(compile_s)
    if not task.eager:
        word = "takes" if release() < FIRST_COMPILE_WORDS_UNTIL else "took"
        log("INFO", "monitor.py:48", f"torch.compile {word} {compile_s:.2f} s in total")
    free_bytes = wanted_mib * MIB - rank_bytes
    tokens = int(free_bytes * task.ranks / task.kv_bytes_per_token)
    concurrency = tokens / task.max_model_len
    log("INFO", "gpu_worker.py:773", f"Available KV cache memory: {free_bytes / GIB:.2f} GiB")
    log("INFO", "kv_cache_utils.py:1144", f"GPU KV cache size: {tokens:,} tokens")
    log(
        "INFO",
        "kv_cache_utils.py:1149",
        f"Maximum concurrency for {task.max_model_len:,} tokens per request: {concurrency:.2f}x",
    )
    time.sleep(capture_s)
    if not task.eager:
        log(
            "INFO",
            "gpu_model_runner.py:6517",
            f"Graph capturing finished in {capture_s:.0f} secs, took 0.62 GiB",
        )
