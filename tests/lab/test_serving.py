"""What every service must do once it serves, on the simulated hosts and on the real vLLM alike."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
import requests

from fleet.plan import QUESTION, ServicePlan
from lab import hosts as lab
from tests.lab.conftest import CPU, H20
from tests.lab.site import Site, main_pids, wait_for

MODEL = "MiniMaxAI/MiniMax-M2.5"
HIDDEN = ("/metrics", "/invocations", "/pause", "/load", "/tokenize", "/docs", "/openapi.json", "/")
METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:request_success_total",
)


class Target:
    """One service of a host, and its public address."""

    def __init__(self, site: Site, host: str) -> None:
        plans = site.plans()
        self.host = host
        self.service: ServicePlan = plans.plans[host].services[0]
        self.url = f"http://{plans.addresses[host]}:{self.service.port}"

    def ask(self, **changes: object) -> requests.Response:
        body = {"model": MODEL, "max_tokens": 60, **QUESTION, **changes}
        return requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def inside(self, path: str) -> str:
        """A GET on the host itself, past the proxy."""
        url = f"http://127.0.0.1:{self.service.engine_port}{path}"
        return lab.ssh(self.host, f"curl -sf {url}", check=True).stdout


@pytest.fixture(params=[H20[0], CPU])
def target(served: Site, request: pytest.FixtureRequest) -> Target:
    return Target(served, request.param)


def test_the_guides_question_is_answered(target: Target) -> None:
    answer = target.ask()

    assert answer.status_code == 200
    assert "Dodgers" in answer.json()["choices"][0]["message"]["content"]


def test_an_answer_is_streamed(target: Target) -> None:
    answer = target.ask(stream=True)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    pieces = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]

    assert lines[-1] == "[DONE]"
    assert len(pieces) > 2
    assert "Dodgers" in "".join(piece.get("content") or "" for piece in pieces)


@pytest.mark.parametrize("path", HIDDEN)
def test_only_what_the_proxy_lists_is_answered_outside(target: Target, path: str) -> None:
    assert requests.get(f"{target.url}{path}", timeout=10).status_code == 404


def test_vllms_own_port_is_not_reachable_from_outside(target: Target) -> None:
    host = target.url.removeprefix("http://").split(":")[0]

    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://{host}:{target.service.engine_port}/health", timeout=5)


def test_metrics_have_vllms_names_and_move(target: Target) -> None:
    def tokens() -> float:
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in target.inside("/metrics").splitlines()
            if line.startswith("vllm:generation_tokens_total")
        )

    text, before = target.inside("/metrics"), tokens()
    target.ask()

    assert all(name in text for name in METRICS)
    wait_for(lambda: tokens() > before, 10, "generated tokens are counted")


def test_a_running_answer_is_finished_before_a_service_stops(
    target: Target, back_in_service: None
) -> None:
    long_answer = {"max_tokens": 400, "ignore_eos": True, "stream": True}
    pieces: list[str] = []
    began = threading.Event()

    def read() -> None:
        body = {"model": MODEL, **QUESTION, **long_answer}
        url = f"{target.url}/v1/chat/completions"
        with requests.post(url, json=body, stream=True, timeout=60) as answer:
            for line in answer.iter_lines(decode_unicode=True):
                if line:
                    pieces.append(line)
                    began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(30)
    lab.ssh(target.host, f"systemctl stop {target.service.unit}", check=True)
    reader.join(30)

    assert pieces[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in pieces[-2]


@pytest.fixture
def back_in_service(target: Target) -> Iterator[None]:
    yield
    lab.ssh(target.host, f"systemctl start {target.service.unit}", check=True)
    wait_for(lambda: lab.ssh(target.host, health(target)).returncode == 0, 120, "serves again")


def health(target: Target) -> str:
    return f"curl -sf http://127.0.0.1:{target.service.engine_port}/health"


def test_a_server_that_is_killed_is_started_again(target: Target) -> None:
    before = main_pids(target.host)[target.service.unit]

    lab.ssh(target.host, f"kill -KILL {before}", check=True)

    def again() -> bool:
        pid = main_pids(target.host).get(target.service.unit, 0)
        return pid not in (0, before) and lab.ssh(target.host, health(target)).returncode == 0

    wait_for(again, 120, f"{target.service.unit} serves again")
    time.sleep(0.1)
    assert target.ask().status_code == 200


def test_f21_an_engine_that_dies_ends_the_server_with_exit_0_and_is_started_again(
    served: Site,
) -> None:
    target = Target(served, H20[0])
    unit = target.service.unit
    before = main_pids(target.host)[unit]
    starts = f"systemctl show -p NRestarts --value {unit}"
    restarts = int(lab.ssh(target.host, starts, check=True).stdout)

    since = lab.ssh(target.host, "date +%s.%N", check=True).stdout.strip()
    engine = f"pgrep --parent {before} --full EngineCore"
    pid = lab.ssh(target.host, engine, check=True).stdout.strip()
    lab.ssh(target.host, f"kill -KILL {pid}", check=True)

    def again() -> bool:
        return lab.ssh(target.host, health(target)).returncode == 0

    wait_for(lambda: main_pids(target.host).get(unit, 0) not in (0, before), 60, "starts again")
    wait_for(again, 120, f"{unit} serves again")
    assert int(lab.ssh(target.host, starts, check=True).stdout) == restarts + 1
    said = lab.ssh(target.host, f"journalctl --since @{since} -u {unit} -t systemd -o cat").stdout
    assert "Deactivated successfully" in said, said
    assert "Main process exited" not in said
    assert target.ask().status_code == 200
