"""The server's metrics, under vLLM's names and labels, in Prometheus' text format."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from vllm.version import release

Labels = tuple[tuple[str, str], ...]

GAUGES = {
    "vllm:num_requests_running": "Requests that are being answered.",
    "vllm:num_requests_waiting": "Requests that wait to be answered.",
    "vllm:kv_cache_usage_perc": "Used part of the KV cache; 1 is all of it.",
    "vllm:engine_sleep_state": "Whether the engine is awake.",
}
COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens processed.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:request_success": "Requests that ended, by reason.",
    "vllm:num_preemptions": "Requests that had to give way.",
    "vllm:prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Tokens found in the prefix cache.",
}
_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0)
_TOKENS = (1.0, 8.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Time to the first token.", _SECONDS),
    "vllm:inter_token_latency_seconds": ("Time between two tokens.", _SECONDS),
    "vllm:request_time_per_output_token_seconds": ("Mean time per token of a request.", _SECONDS),
    "vllm:e2e_request_latency_seconds": ("Time that a request takes in all.", _SECONDS),
    "vllm:request_queue_time_seconds": ("Time that a request waits.", _SECONDS),
    "vllm:request_inference_time_seconds": ("Time that a request runs.", _SECONDS),
    "vllm:request_prefill_time_seconds": ("Time for the prompt.", _SECONDS),
    "vllm:request_decode_time_seconds": ("Time for the answer.", _SECONDS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
    "vllm:request_params_max_tokens": ("What requests asked for at most.", _TOKENS),
    "vllm:iteration_tokens_total": ("Tokens of a step of the engine.", _TOKENS),
}
FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")

# What releases of the guides' time called some of them.
OLD_NAMES_UNTIL = (0, 10)
OLD_NAMES = {
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
    "vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds",
    "vllm:prefix_cache_queries": "vllm:gpu_prefix_cache_queries",
    "vllm:prefix_cache_hits": "vllm:gpu_prefix_cache_hits",
}


class Metrics:
    """Counts what happens; safe to use from several threads."""

    def __init__(self, model_name: str, engines: int = 1) -> None:
        """model_name: the first served name; engines: data parallel ranks"""
        self._lock = threading.Lock()
        self._engines = engines
        self._model_name = model_name
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[str, list[float]] = {name: [] for name in HISTOGRAMS}
        self._created = time.time()
        for name in (*GAUGES, *COUNTERS):
            if name == "vllm:engine_sleep_state":
                for state in ("awake", "weights_offloaded", "discard_all"):
                    self._values[name, (("sleep_state", state),)] = float(state == "awake")
            elif name == "vllm:request_success":
                for reason in FINISHED_REASONS:
                    self._values[name, (("finished_reason", reason),)] = 0.0
            else:
                self._values[name, ()] = 0.0

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter or a gauge."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + amount

    def value(self, name: str) -> float:
        """The present value of a counter or gauge without labels of its own."""
        with self._lock:
            return self._values[name, ()]

    def observe(self, name: str, value: float) -> None:
        """Note a value for a histogram."""
        with self._lock:
            self._histograms[name].append(value)

    def render(self) -> str:
        """All of them, as GET /metrics answers."""
        with self._lock:
            values = dict(self._values)
            histograms = {name: list(observed) for name, observed in self._histograms.items()}
        lines = list(self._process())
        for name, text in {**GAUGES, **COUNTERS, "http_requests": "Requests by handler."}.items():
            kind = "gauge" if name in GAUGES else "counter"
            shown = _shown(name) + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {shown} {text}", f"# TYPE {shown} {kind}"]
            for (of, labels), value in values.items():
                if of == name:
                    lines += self._lines(shown, labels, value, engine=name.startswith("vllm:"))
        for name, (text, bounds) in HISTOGRAMS.items():
            lines += self._histogram(_shown(name), text, bounds, histograms[name])
        return "\n".join([*lines, ""])

    def _process(self) -> Iterable[str]:
        resident_kib = 0
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                resident_kib = int(line.split()[1])
        yield "# HELP process_start_time_seconds When the process started, since the epoch."
        yield "# TYPE process_start_time_seconds gauge"
        yield f"process_start_time_seconds {self._created}"
        yield "# HELP process_resident_memory_bytes Resident memory in bytes."
        yield "# TYPE process_resident_memory_bytes gauge"
        yield f"process_resident_memory_bytes {resident_kib * 1024.0}"

    def _labels(self, engine: int) -> Labels:
        return (("engine", str(engine)), ("model_name", self._model_name))

    def _lines(self, name: str, labels: Labels, value: float, *, engine: bool) -> list[str]:
        if not engine:
            return [f"{name}{_braces(labels)} {value}"]
        # The stand-in's requests all go to the first rank.
        return [
            f"{name}{_braces((*self._labels(rank), *labels))} {0.0 if rank else value}"
            for rank in range(self._engines)
        ]

    def _histogram(
        self, name: str, text: str, bounds: Iterable[float], observed: list[float]
    ) -> list[str]:
        lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        labels = self._labels(0)
        for bound in bounds:
            count = float(sum(value <= bound for value in observed))
            lines.append(f"{name}_bucket{_braces((*labels, ('le', str(bound))))} {count}")
        lines.append(f"{name}_bucket{_braces((*labels, ('le', '+Inf')))} {float(len(observed))}")
        lines.append(f"{name}_count{_braces(labels)} {float(len(observed))}")
        lines.append(f"{name}_sum{_braces(labels)} {float(sum(observed))}")
        return lines


def _shown(name: str) -> str:
    return OLD_NAMES.get(name, name) if release() < OLD_NAMES_UNTIL else name


def _braces(labels: Labels) -> str:
    inner = ",".join(f'{name}="{value}"' for name, value in sorted(labels))
    return f"{{{inner}}}" if inner else ""
