"""The stand-in beside the real vLLM: what the lab's simulated hosts claim rests on this.

Both are started on a spare port of their host, from the release and with the options of a service
that was rolled out there, and asked the same. The real one is the CPU build, a version below the
stand-in's, and gets workers of its own as a server on several GPUs has: without them some of its
ends are gentler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lab import hosts as lab
from tests.lab.conftest import CPU, H20
from tests.lab.site import Site

PROBE = Path(__file__).with_name("vllm_probe.py")
# The real one takes a minute to start where the machine is small, and some scenarios start several.
TIMEOUT_S = 900.0

# What the project reads: the gate, `fleet status`, monitoring.
METRICS_IN_USE = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
    *("vllm:e2e_request_latency_seconds_count", "vllm:iteration_tokens_total_count"),
    "http_requests_total",
)
# A proxy must not let these through: keys do not guard them.
OPEN = ("/health", "/ping", "/version", "/load", "/metrics", "/tokenize", "/detokenize")
OPEN_TO_HARM = ("/invocations", "/scale_elastic_ep", "/openapi.json", "/docs")

# The real one goes by another limit, or by every kind of message that it knows.
OTHER_PARAMETER = ("a prompt too long", "a number for content")


@dataclass(frozen=True)
class Pair:
    """What a scenario of the probe told of the two."""

    standin: dict[str, Any]
    real: dict[str, Any]


Compare = Callable[[str], Pair]


@pytest.fixture(scope="module")
def compare(served: Site) -> Compare:
    """Runs a scenario of the probe on both hosts at once, each scenario once."""

    def probe(host: str, scenario: str) -> dict[str, Any]:
        done = lab.ssh(
            host, f"python3 - {scenario}", check=True, stdin=PROBE.read_text(), timeout_s=TIMEOUT_S
        )
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    @cache
    def both(scenario: str) -> Pair:
        with ThreadPoolExecutor() as pool:
            standin, real = pool.map(probe, (H20[0], CPU), (scenario, scenario))
        return Pair(standin, real)

    return both


def surplus(standin: Any, real: Any, where: str = "") -> list[str]:
    """Keys of the stand-in's answer that the real one's has not."""
    if isinstance(standin, dict) and isinstance(real, dict):
        found = [f"{where}.{key}" for key in standin.keys() - real.keys()]
        for key in standin.keys() & real.keys():
            found += surplus(standin[key], real[key], f"{where}.{key}")
        return found
    if isinstance(standin, list) and isinstance(real, list) and standin and real:
        return surplus(standin[0], real[0], f"{where}[]")
    return []


def test_routes_methods_and_headers(compare: Compare) -> None:
    told = compare("describe")

    differ = {
        route: (answer, told.real["routes"][route])
        for route, answer in told.standin["routes"].items()
        if answer != told.real["routes"][route] and not route.endswith(" /metrics")
    }

    assert differ == {}
    for route in ("GET /metrics", "POST /metrics"):
        assert told.standin["routes"][route]["status"] == 200
        assert told.real["routes"][route]["status"] == 200


def test_keys_guard_the_same(compare: Compare) -> None:
    told = compare("describe")

    assert told.standin["open"] == told.real["open"]
    assert set(told.standin["open"]) >= {*OPEN, *OPEN_TO_HARM}
    assert told.standin["unauthorised"] == told.real["unauthorised"]
    assert told.real["unauthorised"][0] == 401


def test_wrong_requests_are_refused_alike(compare: Compare) -> None:
    told = compare("describe")

    def essence(name: str, answer: list[Any]) -> list[Any]:
        status, body = answer
        fields = ["type", "code"] if name in OTHER_PARAMETER else ["type", "code", "param"]
        return [status, *(body["error"][field] for field in fields)]

    for name, answer in told.standin["errors"].items():
        assert essence(name, answer) == essence(name, told.real["errors"][name]), name


def test_answers_have_no_fields_of_their_own(compare: Compare) -> None:
    told = compare("describe")

    assert surplus(told.standin["answers"], told.real["answers"]) == []
    assert surplus(told.standin["events"], told.real["events"]) == []
    for path, events in told.standin["events"].items():
        for field in ("status", "type", "end"):
            assert events[field] == told.real["events"][path][field]


def test_metrics_are_some_of_the_real_ones(compare: Compare) -> None:
    told = compare("describe")

    for name, labels in told.standin["metrics"].items():
        assert told.real["metrics"].get(name) == labels, name
    assert told.standin["metrics"].keys() >= set(METRICS_IN_USE)


def test_processes_and_their_titles(compare: Compare) -> None:
    told = compare("describe")

    for one in (told.standin, told.real):
        engine, worker = one["processes"]
        assert engine == "VLLM::EngineCore"
        assert worker.startswith("VLLM::Worker")
        # The plan is compared with these.
        assert one["argv is readable"]
        assert one["environment is readable"]


def test_a_drain_lets_requests_end_and_accepts_no_others(compare: Compare) -> None:
    told = compare("describe")

    assert told.standin["drain"] == told.real["drain"]
    assert told.real["drain"]["answered"] == [200, 900]
    assert told.real["drain"]["exit"] == 0
    # It listens until it is done, so a proxy cannot tell by its health.
    assert told.real["drain"]["health"] == 200
    assert told.real["drain"]["late"][0] == 500


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        # With no time to drain nobody answers any more, health included.
        ("abort", {"health": 0, "exit": 0}),
        # Workers die of the signal: only a server that is signalled alone can drain.
        ("signal_all", {"exit": 0}),
        ("engine_death", {"exit": 0, "told": True}),
    ],
)
def test_ends(compare: Compare, scenario: str, expected: dict[str, Any]) -> None:
    told = compare(scenario)

    # Whether clients that stay connected hold it up differs from one run of the real one to the next.
    for one in (told.standin, told.real):
        one.pop("held up", None)
    assert told.standin == told.real
    assert told.real | expected == told.real


def test_what_cannot_start_says_why_and_with_which_status(compare: Compare) -> None:
    told = compare("exits")

    assert told.standin == told.real
    codes = {name: code for name, (code, _) in told.real.items()}
    assert codes.pop("an unknown option") == 2
    assert codes.pop("a bad number") == 2
    assert set(codes.values()) == {1}
    assert all(words for _, words in told.real.values())
