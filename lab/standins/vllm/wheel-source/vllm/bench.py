"""`vllm bench serve`: requests of random words against a server, and the figures of them."""

from __future__ import annotations

import argparse
import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = ("river", "stone", "cloud", "light", "paper", "house", "green", "seven", "music", "north")
REQUEST_TIMEOUT_S = 600
MS = 1000.0


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    stamps_s: when each token came, seconds after the request was sent; empty if it failed
    """

    prompt_tokens: int
    stamps_s: list[float]


def add_command(commands: Any) -> None:
    """Add `bench serve` with the options that are understood here, all of vLLM's own names."""
    bench = commands.add_parser("bench", usage="vllm bench <bench_type> [options]")
    kinds = bench.add_subparsers(required=True, dest="bench_type")
    serve = kinds.add_parser("serve", usage="vllm bench serve [options]")
    serve.add_argument("--backend", default="openai")
    serve.add_argument("--base-url")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--endpoint", default="/v1/completions")
    serve.add_argument("--model")
    serve.add_argument("--served-model-name")
    serve.add_argument("--tokenizer")
    serve.add_argument("--trust-remote-code", action="store_true")
    serve.add_argument("--dataset-name", default="random", choices=["random"])
    serve.add_argument("--random-input-len", type=int, default=1024)
    serve.add_argument("--random-output-len", type=int, default=128)
    serve.add_argument("--num-prompts", type=int, default=1000)
    serve.add_argument("--max-concurrency", type=int)
    serve.add_argument("--ignore-eos", action="store_true")
    serve.add_argument("--seed", type=int, default=0)
    serve.add_argument("--save-result", action="store_true")
    serve.add_argument("--result-dir")
    serve.add_argument("--result-filename")


def run(options: argparse.Namespace) -> int:
    """Send the requests, print the figures and write them if asked; 1 if none was answered."""
    # Here, so that a server starts without them.
    import random
    from concurrent.futures import ThreadPoolExecutor

    chooser = random.Random(options.seed)
    prompts = [
        " ".join(chooser.choices(WORDS, k=options.random_input_len))
        for _ in range(options.num_prompts)
    ]
    began = time.monotonic()
    with ThreadPoolExecutor(options.max_concurrency or options.num_prompts) as pool:
        outcomes = list(pool.map(lambda prompt: _request(options, prompt), prompts))
    result = _summary(options, outcomes, time.monotonic() - began)
    _print(result)
    if options.save_result:
        name = options.result_filename or f"{options.backend}-{result['date']}.json"
        target = Path(options.result_dir or ".") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result), encoding="utf-8")
    return 0 if result["completed"] else 1


def _request(options: argparse.Namespace, prompt: str) -> Outcome:
    base = urlsplit(options.base_url or f"http://{options.host}:{options.port}")
    connection = http.client.HTTPConnection(
        base.hostname or "127.0.0.1", base.port, timeout=REQUEST_TIMEOUT_S
    )
    body = {
        "model": options.served_model_name or options.model,
        "prompt": prompt,
        "max_tokens": options.random_output_len,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if "chat" in options.endpoint:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    began = time.monotonic()
    stamps: list[float] = []
    prompt_tokens = 0
    try:
        connection.request(
            "POST", options.endpoint, json.dumps(body), {"Content-Type": "application/json"}
        )
        for line in connection.getresponse():
            event = line.decode().partition("data: ")[2].strip()
            if not event.startswith("{"):
                continue
            parsed = json.loads(event)
            prompt_tokens = (parsed.get("usage") or {}).get("prompt_tokens", prompt_tokens)
            if parsed.get("choices") and parsed["choices"][0]["finish_reason"] is None:
                stamps.append(time.monotonic() - began)
    except (OSError, http.client.HTTPException, ValueError):
        return Outcome(0, [])
    return Outcome(prompt_tokens, stamps)


def _summary(
    options: argparse.Namespace, outcomes: Sequence[Outcome], duration_s: float
) -> dict[str, Any]:
    import statistics

    answered = [outcome for outcome in outcomes if outcome.stamps_s]
    inputs = sum(outcome.prompt_tokens for outcome in answered)
    outputs = sum(len(outcome.stamps_s) for outcome in answered)
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "model_id": options.model,
        "tokenizer_id": options.tokenizer or options.model,
        "num_prompts": options.num_prompts,
        "max_concurrency": options.max_concurrency,
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(outcomes) - len(answered),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(answered) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
    }
    gaps = {
        "ttft": [outcome.stamps_s[0] for outcome in answered],
        "tpot": [
            (outcome.stamps_s[-1] - outcome.stamps_s[0]) / max(len(outcome.stamps_s) - 1, 1)
            for outcome in answered
        ],
        "itl": [
            later - sooner for outcome in answered for sooner, later in pairwise(outcome.stamps_s)
        ],
    }
    for name, seconds in gaps.items():
        ordered = sorted(second * MS for second in seconds) or [0.0]
        result[f"mean_{name}_ms"] = statistics.fmean(ordered)
        result[f"median_{name}_ms"] = statistics.median(ordered)
        result[f"std_{name}_ms"] = statistics.pstdev(ordered)
        result[f"p99_{name}_ms"] = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return result


def _print(result: dict[str, Any]) -> None:
    rows = {
        "Successful requests:": result["completed"],
        "Failed requests:": result["failed"],
        "Benchmark duration (s):": result["duration"],
        "Total input tokens:": result["total_input_tokens"],
        "Total generated tokens:": result["total_output_tokens"],
        "Request throughput (req/s):": result["request_throughput"],
        "Output token throughput (tok/s):": result["output_throughput"],
        "Total token throughput (tok/s):": result["total_token_throughput"],
    }
    for name in ("ttft", "tpot", "itl"):
        for kind in ("mean", "median", "p99"):
            rows[f"{kind.capitalize()} {name.upper()} (ms):"] = result[f"{kind}_{name}_ms"]
    print(f"{' Serving Benchmark Result ':=^50}")
    for label, value in rows.items():
        shown = f"{value:.2f}" if isinstance(value, float) else value
        print(f"{label:<40} {shown:<10}")
    print("=" * 50)
