"""The stand-in for vLLM, as a process of its own on loopback ports."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab.standins.vllm.build import build_wheels, nearest_recording

NAME = "MiniMaxAI/MiniMax-M2.5"
JSON = {"Content-Type": "application/json"}
QUESTION = {
    "model": NAME,
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who won the world series in 2020?"}],
        },
    ],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "head_dim": 128,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "num_attention_heads": 48,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
M1 = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
    "model_type": "minimax_m1",
    "max_position_embeddings": 10240000,
    "num_attention_heads": 64,
}
PARSERS = (
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "minimax_m2", "--reasoning-parser", "minimax_m2"),
)


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unpacked wheels by version."""
    folder = tmp_path_factory.mktemp("wheels")
    unpacked = {}
    for wheel in build_wheels(folder, ["0.9.2", "0.23.0", "0.33.0"]):
        version = wheel.name.split("-")[1]
        unpacked[version] = folder / version
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked[version])
    return unpacked


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model of two shards, in the formats of the real ones."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number in (1, 2):
        shard = folder / f"model-0000{number}-of-00002.safetensors"
        header = {f"layer.{number}": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}
        encoded = json.dumps(header).encode()
        shard.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
        weight_map[f"layer.{number}"] = shard.name
    index = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", M2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Vllm:
    """Starts the stand-in in a host of its own, which is a directory."""

    root: Path
    releases: dict[str, Path]
    version: str = "0.33.0"
    environment: dict[str, str] = field(default_factory=dict)
    started: list[Server] = field(default_factory=list)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]

    def env(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM", "CUDA", "LAB_"))}
        return {
            **clean,
            "PYTHONPATH": str(self.releases[self.version]),
            "LAB_ROOT": str(self.root),
            **self.environment,
        }

    def behave(self, **told: Any) -> None:
        told = {"load_seconds": 0.05, "tokens_per_second": 1000, **told}
        file = self.root / "etc/lab/vllm.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told))

    def misbehave(self, mode: str, **rule: Any) -> None:
        self.behave(rules=[{"mode": mode, "port": None, "version": None, **rule}])

    def run(self, *arguments: str, timeout_s: float = 15) -> subprocess.CompletedProcess[str]:
        """Run until it ends by itself."""
        return subprocess.run(
            self.command(*arguments),
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, model: Path, *arguments: str) -> Server:
        """Start a server, without waiting for it."""
        port = free_port()
        address = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME)
        log = self.root / f"{port}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command("serve", str(model), *address, *arguments),
                env=self.env(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        server = Server(process, port, log)
        self.started.append(server)
        return server

    def serve(self, model: Path, *arguments: str) -> Server:
        """Start a server and wait until it is ready."""
        server = self.start(model, *arguments)
        wait_for(lambda: server.process.poll() is not None or server.health() == 200)
        assert server.process.poll() is None, server.journal()
        return server


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = self.json["choices"][0]["message"]
        return message

    @property
    def events(self) -> list[Any]:
        data = re.findall(r"^data: (.*)$", self.body.decode(), flags=re.MULTILINE)
        assert data[-1] == "[DONE]"
        return [json.loads(line) for line in data[:-1]]


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 10,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        encoded = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, encoded, {**(JSON if body else {}), **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())

    def get(self, path: str, **keywords: Any) -> Answer:
        return self.request("GET", path, **keywords)

    def post(self, path: str, body: Any, **keywords: Any) -> Answer:
        return self.request("POST", path, body, **keywords)

    def health(self) -> int:
        try:
            return self.get("/health").status
        except OSError:
            return 0

    def journal(self) -> str:
        return self.log.read_text()

    def in_background(self, body: dict[str, Any]) -> list[Any]:
        """Post a completion; the list has its answer, or the exception, when there is one."""
        came: list[Any] = []

        def post() -> None:
            try:
                came.append(self.post("/v1/completions", body))
            except (OSError, http.client.HTTPException) as error:
                came.append(error)

        threading.Thread(target=post, daemon=True).start()
        wait_for(lambda: bool(came) or self.metric("vllm:num_requests_running") > 0)
        return came

    def metric(self, name: str) -> float:
        found = re.search(
            rf"^{name}{{.*}} (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE
        )
        assert found is not None
        return float(found[1])

    def terminate(self, timeout_s: float = 5) -> int:
        self.process.terminate()
        return self.process.wait(timeout_s)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def children(pid: int) -> dict[int, str]:
    """Child processes and their titles."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_text().rstrip("\0") for child in listed}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def host(root: Path, releases: dict[str, Path]) -> Iterator[Vllm]:
    (root / "run/lab/gpu").mkdir(parents=True)
    starter = Vllm(root, releases)
    starter.behave()
    yield starter
    for server in starter.started:
        if server.process.poll() is None:
            for engine in children(server.process.pid):
                os.kill(engine, signal.SIGKILL)
            server.process.kill()
            server.process.wait()


@pytest.fixture
def vllm(tmp_path: Path, releases: dict[str, Path]) -> Iterator[Vllm]:
    yield from host(tmp_path / "root", releases)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, releases: dict[str, Path]) -> Iterator[Server]:
    """A server that well-behaved tests share."""
    folder = tmp_path_factory.mktemp("shared")
    for vllm in host(folder / "root", releases):
        yield vllm.serve(write_model(folder / "model", M2), *PARSERS)


# -- wheels ------------------------------------------------------------------------------------


def test_the_same_source_makes_the_same_wheel(tmp_path: Path) -> None:
    first, second = (build_wheels(tmp_path / name, ["0.33.1"])[0] for name in ("a", "b"))

    assert first.name == "vllm-0.33.1-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()


def test_a_version_has_the_options_of_the_nearest_recording() -> None:
    assert nearest_recording("0.33.1").name == "vllm-0.33.0.json"
    assert nearest_recording("0.23.0").name == "vllm-0.23.0.json"
    assert nearest_recording("0.30.0").name == "vllm-0.31.0.json"


# -- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--nope", "3"), "vllm: error: unrecognized arguments: --nope 3"),
        (("--port", "abc"), "argument --port: invalid int value: 'abc'"),
        (("--dtype", "floof"), "argument --dtype: invalid choice: 'floof' (choose from 'auto', "),
        (("--compilation-config", "{x"), "--compilation-config/-cc: 1 validation error for Comp"),
        (("--compilation-config", '{"x": 1}'), "Unexpected keyword argument"),
        (("--max-model-len", "1.5K"), "Did you mean to use 1.5k instead?"),
    ],
)
def test_a_wrong_option_ends_with_status_2(
    vllm: Vllm, arguments: tuple[str, ...], complaint: str
) -> None:
    done = vllm.run("serve", "model", *arguments)

    assert done.returncode == 2
    assert complaint in done.stdout


def test_the_command_says_its_version(vllm: Vllm) -> None:
    assert vllm.run("--version").stdout == "0.33.0\n"
    assert vllm.run().returncode == 0
    assert vllm.run("serve", "--help").returncode == 0


def test_options_are_read_as_vllm_reads_them(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(
        model,
        *("--max_model_len", "4k", "--enable_expert_parallel"),
        *("--compilation-config.cudagraph_mode", "PIECEWISE", "--no-enable-prefix-caching"),
    )

    journal = server.journal()

    for expected in (
        "'max_model_len': 4000",
        "'enable_expert_parallel': True",
        "'compilation_config': {'cudagraph_mode': 'PIECEWISE'}",
        "'enable_prefix_caching': False",
    ):
        assert expected in journal


def test_m1_is_served_in_the_way_of_its_guide(vllm: Vllm, tmp_path: Path) -> None:
    m1 = write_model(tmp_path / "m1", M1)
    vllm.version = "0.9.2"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--nope"]

    refused = vllm.run("serve", "--model", str(m1))
    wrong = subprocess.run(command, env=vllm.env(), capture_output=True, text=True, check=False)
    server = vllm.serve(
        m1,
        *("--tensor-parallel-size", "8", "--trust-remote-code", "--max_model_len", "4096"),
        *("--quantization", "experts_int8", "--dtype", "bfloat16"),
    )

    assert refused.returncode == 1
    assert "provide the model as a positional argument" in refused.stdout
    assert wrong.returncode == 2
    assert "api_server.py: error: unrecognized arguments: --nope" in wrong.stderr
    answer = server.post("/v1/chat/completions", QUESTION)
    assert "Dodgers" in answer.message["content"]
    assert "reasoning_content" in answer.message
    assert server.metric("vllm:gpu_cache_usage_perc") == 0


def test_unknown_environment_variables_are_told(vllm: Vllm, model: Path) -> None:
    vllm.environment = {"VLLM_USE_V1": "0", "VLLM_NO_USAGE_STATS": "1"}

    journal = vllm.serve(model).journal()

    assert "Unknown vLLM environment variable detected: VLLM_USE_V1" in journal
    assert "VLLM_NO_USAGE_STATS" not in journal


# -- what cannot be served ---------------------------------------------------------------------


def damage_missing(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()


def damage_truncated(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def damage_pointer(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (model / "model-00002-of-00002.safetensors").write_text(pointer)


def damage_all(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        shard.unlink()


def damage_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing, "FileNotFoundError: Weight files referenced in index but missing: {'"),
        (damage_truncated, "SafetensorError: Error while deserializing header: incomplete metad"),
        (damage_pointer, "SafetensorError: Error while deserializing header: header too large"),
        (damage_all, "RuntimeError: Cannot find any model weights with `"),
        (damage_config, "is not a valid JSON file"),
    ],
)
def test_a_damaged_model_ends_with_status_1(
    vllm: Vllm, model: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(model)

    done = vllm.run("serve", str(model), "--port", str(free_port()))

    assert done.returncode == 1
    assert words in done.stdout
    assert "Traceback (most recent call last):" in done.stdout


@pytest.mark.parametrize(
    ("version", "config", "arguments", "words"),
    [
        ("0.33.0", M1, ["--trust-remote-code"], "was supported in vLLM until v0.23.0"),
        ("0.23.0", M1, [], "pass the argument `trust_remote_code=True`"),
        ("0.9.2", M2, [], "['MiniMaxM2ForCausalLM'] are not supported for now"),
        ("0.33.0", M2, ["-tp", "8"], "gate's and up's weight = 192 is not divisible by"),
        ("0.33.0", M2, ["-dp", "8"], "weight = 192 is not divisible by weight quantization block"),
        ("0.33.0", M2, ["-tp", "5"], "heads (48) must be divisible by tensor parallel size (5)"),
        ("0.33.0", M2, ["--max-model-len", "200000"], "greater than the derived max_model_len"),
        ("0.33.0", M2, ["--gpu-memory-utilization", "95"], "less than or equal to 1"),
        ("0.33.0", M2, ["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        ("0.33.0", M2, ["--reasoning-parser", "x"], "Reasoning parser 'x' not found"),
    ],
)
def test_what_this_version_cannot_serve_ends_with_status_1(
    vllm: Vllm,
    tmp_path: Path,
    version: str,
    config: dict[str, Any],
    arguments: list[str],
    words: str,
) -> None:
    model = write_model(tmp_path / "other", config)
    vllm.version = version

    done = vllm.run("serve", str(model), "--port", str(free_port()), *arguments)

    assert done.returncode == 1
    assert words in done.stdout


def test_a_directory_that_is_not_there(vllm: Vllm) -> None:
    done = vllm.run("serve", "/nonexistent/model")

    assert done.returncode == 1
    assert "HFValidationError: Repo id must be in the form" in done.stdout


def test_a_taken_port_is_told_before_anything_is_loaded(vllm: Vllm, model: Path) -> None:
    first = vllm.serve(model)

    done = vllm.run("serve", str(model), "--host", "127.0.0.1", "--port", str(first.port))

    assert done.returncode == 1
    assert "OSError: [Errno 98] Address already in use" in done.stdout
    assert "Starting to load" not in done.stdout


# -- GPUs --------------------------------------------------------------------------------------


def test_more_ranks_than_visible_gpus_are_refused(vllm: Vllm, model: Path) -> None:
    vllm.environment = {"CUDA_VISIBLE_DEVICES": "0,1"}

    wide = vllm.run("serve", str(model), "-tp", "4", "--port", str(free_port()))
    many = vllm.run("serve", str(model), "-dp", "4", "-ep", "--port", str(free_port()))

    assert "World size (4) is larger than the number of available GPUs (2)" in wide.stdout
    assert "DP adjusted local rank 2 is out of bounds for 2 devices" in many.stdout
    assert {wide.returncode, many.returncode} == {1}


def test_gpus_are_those_that_nvidia_smi_lists(vllm: Vllm, model: Path, tmp_path: Path) -> None:
    hardware = vllm.root / "etc/lab/hardware.json"
    hardware.write_text(json.dumps({"gpus": 8, "memory_mib": 143771, "nvswitch": 0}))
    tools = tmp_path / "bin"
    tools.mkdir()
    vllm.environment = {"PATH": f"{tools}:/usr/bin:/bin"}

    without_driver = vllm.run("serve", str(model), "--port", str(free_port()))
    tool = tools / "nvidia-smi"
    tool.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: NVIDIA H20-3e (UUID: x)"; done\n')
    tool.chmod(0o755)
    seven = vllm.run("serve", str(model), "-tp", "4", "--port", str(free_port()))
    hardware.write_text(json.dumps({"gpus": 8, "memory_mib": 143771, "nvswitch": 4}))
    without_fabric = vllm.run("serve", str(model), "--port", str(free_port()))

    assert "Failed to infer device type" in without_driver.stdout
    assert "available GPUs (3)" in seven.stdout
    assert "Error 802: system not yet initialized" in without_fabric.stdout


def test_workers_hold_their_gpus_memory(vllm: Vllm, model: Path) -> None:
    vllm.environment = {"CUDA_VISIBLE_DEVICES": "4,5"}
    gpus = vllm.root / "run/lab/gpu"

    server = vllm.serve(model, "-tp", "2")
    engine, title = next(iter(children(server.process.pid).items()))
    workers = children(engine)
    second = vllm.run("serve", str(model), "-tp", "2", "--port", str(free_port()))

    assert title == "VLLM::EngineCore"
    assert list(workers.values()) == ["VLLM::Worker_TP0", "VLLM::Worker_TP1"]
    held = {
        gpu: (gpus / gpu / str(pid)).read_text() for gpu, pid in zip("45", workers, strict=True)
    }
    assert held == {"4": "132269", "5": "132269"}  # 0.92 of it
    assert second.returncode == 1
    assert "is less than desired GPU memory utilization" in second.stdout


def test_argv_and_environment_of_the_server_stay_readable(vllm: Vllm, model: Path) -> None:
    vllm.environment = {"FLEET_STAMP": "abc"}

    server = vllm.serve(model, "--hf-overrides", '{"a": "%$\'"}')

    argv = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    assert '{"a": "%$\'"}' in argv
    assert b"FLEET_STAMP=abc" in Path(f"/proc/{server.process.pid}/environ").read_bytes().split(
        b"\0"
    )


# -- HTTP --------------------------------------------------------------------------------------


def test_it_answers_the_guides_question(server: Server) -> None:
    answer = server.post("/v1/chat/completions", QUESTION)
    streamed = server.post(
        "/v1/chat/completions",
        {**QUESTION, "stream": True, "stream_options": {"include_usage": True}},
    )

    assert answer.status == 200
    assert "Los Angeles Dodgers" in answer.message["content"]
    assert answer.message["reasoning"]
    usage = answer.json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    deltas = [event["choices"][0]["delta"] for event in streamed.events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said.strip() == answer.message["content"]
    assert streamed.events[-1]["usage"] == {key: usage[key] for key in streamed.events[-1]["usage"]}


@pytest.mark.parametrize(
    ("parser", "begins"), [((), "The user"), (("minimax_m2_append_think",), "<think>The user")]
)
def test_thinking_stays_in_the_content_without_a_parser_that_takes_it_out(
    vllm: Vllm, model: Path, parser: tuple[str, ...], begins: str
) -> None:
    server = vllm.serve(model, *(("--reasoning-parser", *parser) if parser else ()))

    content = server.post("/v1/chat/completions", QUESTION).message["content"]

    assert content.startswith(begins)
    assert "</think>" in content
    assert "Dodgers" in content


def test_it_calls_tools_when_asked(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model, *PARSERS)
    weather = {"messages": [{"role": "user", "content": "How is the weather in Rome?"}]}

    called = server.post("/v1/chat/completions", {**weather, "tools": [WEATHER]})
    not_meant = server.post("/v1/chat/completions", {**QUESTION, "tools": [WEATHER]})
    required = server.post(
        "/v1/chat/completions", {**QUESTION, "tools": [WEATHER], "tool_choice": "required"}
    )
    without = server.post("/v1/chat/completions", {**weather, "tool_choice": "required"})

    call = called.message["tool_calls"][0]["function"]
    assert called.json["choices"][0]["finish_reason"] == "tool_calls"
    assert call == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert "tool_calls" not in not_meant.message
    assert required.message["tool_calls"]
    assert without.status == 400


def test_completions_keep_to_their_limits(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model, "--max-model-len", "64")

    def complete(**body: Any) -> Answer:
        return server.post("/v1/completions", {"prompt": "Tell me about rivers.", **body})

    short = complete(max_tokens=3).json
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert complete(max_tokens=50, ignore_eos=True).json["usage"]["completion_tokens"] == 50
    assert len(complete(n=2).json["choices"]) == 2
    too_many = complete(max_tokens=65)
    assert too_many.status == 400
    assert "max_tokens=65 cannot be greater than max_model_len=64" in too_many.body.decode()
    too_long = server.post("/v1/completions", {"prompt": "who " * 100})
    assert too_long.json["error"]["type"] == "BadRequestError"
    assert "maximum context length is 64 tokens" in too_long.body.decode()


def test_errors_have_vllms_form(server: Server) -> None:
    complete = "/v1/completions"

    assert server.get("/nosuch").json == {"detail": "Not Found"}
    refused = server.get(complete)
    assert (refused.status, refused.headers["allow"]) == (405, "POST")
    wrong_model = server.post(complete, {"model": "x", "prompt": "hi"})
    assert wrong_model.status == 404
    assert wrong_model.json["error"] == {
        "message": f"The model `x` does not exist. Valid aliases: {NAME}.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    for path, body, headers in (
        (complete, b"{", {}),
        (complete, b"{}", {"Content-Type": "text/plain"}),
        (complete, {"prompt": ""}, {}),
        (complete, {"prompt": "hi", "max_tokens": "x"}, {}),
        (complete, {"prompt": "hi", "temperature": -1}, {}),
        ("/v1/chat/completions", {"model": NAME}, {}),
        ("/v1/chat/completions", {"messages": []}, {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, {}),
    ):
        answer = server.post(path, body, headers=headers)
        assert answer.status == 400, (path, body)
        assert answer.json["error"]["code"] == 400


def test_keys_guard_v1_and_nothing_else(vllm: Vllm, model: Path) -> None:
    vllm.environment = {"VLLM_API_KEY": "secret"}
    server = vllm.serve(model)

    assert server.get("/v1/models").status == 401
    assert server.get("/v1/models").json == {"error": "Unauthorized"}
    assert server.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status == 401
    assert server.get("/v1/models", headers={"Authorization": "Bearer secret"}).status == 200
    for path in ("/health", "/metrics", "/version", "/load"):
        assert server.get(path).status == 200
    assert server.post("/invocations", {"prompt": "hi"}).status == 200
    assert server.get("/pause").status == 404
    assert "secret" not in server.journal()


def test_small_routes(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model, "--served-model-name", "one", "two")

    listed = server.get("/v1/models").json["data"]

    assert [entry["id"] for entry in listed] == ["one", "two"]
    assert listed[0]["max_model_len"] == 196608
    assert listed[0]["root"] == str(model)
    assert server.get("/version").json == {"version": "0.33.0"}
    tokens = server.post("/tokenize", {"prompt": "hello you"}).json
    assert tokens["count"] == len(tokens["tokens"])
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "hello you"}


def test_metrics_move(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model)

    server.post("/v1/completions", {"prompt": "one two", "max_tokens": 5})

    assert server.metric("vllm:generation_tokens_total") == 5
    assert server.metric("vllm:prompt_tokens_total") == 2
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:e2e_request_latency_seconds_count") == 1
    assert (
        f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{NAME}"}} 1.0'
        in (server.get("/metrics").body.decode())
    )


def test_its_bench_writes_vllms_figures(vllm: Vllm, model: Path, tmp_path: Path) -> None:
    server = vllm.serve(model)

    done = vllm.run(
        *("bench", "serve", "--backend", "vllm", "--base-url", f"http://127.0.0.1:{server.port}"),
        *("--model", NAME, "--random-input", "16", "--random-output", "8", "--num-prompt", "4"),
        *("--max-concurrency", "2", "--save-result", "--result-dir", str(tmp_path)),
        *("--result-filename", "result.json"),
    )

    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (4, 32)
    assert result["mean_ttft_ms"] > 0


# -- its end -----------------------------------------------------------------------------------

LONG = {"prompt": "hi", "max_tokens": 100, "ignore_eos": True}


def test_sigterm_ends_an_idle_server_with_status_0(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model)
    engine = next(iter(children(server.process.pid)))

    assert server.terminate() == 0
    assert not is_alive(engine)


def test_a_drain_answers_what_runs_and_refuses_what_comes(vllm: Vllm, model: Path) -> None:
    vllm.behave(tokens_per_second=100)
    server = vllm.serve(model, "--shutdown-timeout", "10")
    came = server.in_background(LONG)

    server.process.terminate()
    wait_for(lambda: "mode=drain" in server.journal())
    late = server.post("/v1/completions", LONG)
    health = server.get("/health").status

    assert late.status == 500
    assert "cannot schedule new futures after shutdown" in late.body.decode()
    assert health == 200
    assert server.process.wait(5) == 0
    wait_for(lambda: bool(came))
    assert came[0].json["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize("options", [(), ("--shutdown-timeout", "1")])
def test_requests_that_outlive_the_drain_hold_the_server_up(
    vllm: Vllm, model: Path, options: tuple[str, ...]
) -> None:
    vllm.behave(tokens_per_second=10)
    server = vllm.serve(model, *options)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", json.dumps(LONG), JSON)
    wait_for(lambda: server.metric("vllm:num_requests_running") == 1)

    server.process.terminate()
    wait_for(lambda: "Waiting for connections to close" in server.journal())
    time.sleep(0.3)

    assert server.process.poll() is None
    assert server.health() == 0
    connection.close()
    assert server.process.wait(5) == 0


def test_a_signal_to_all_its_processes_breaks_the_drain(vllm: Vllm, model: Path) -> None:
    vllm.behave(tokens_per_second=10)
    server = vllm.serve(model, "--shutdown-timeout", "10", "-tp", "2")
    came = server.in_background(LONG)
    engine = next(iter(children(server.process.pid)))

    for pid in (server.process.pid, engine, *children(engine)):
        os.kill(pid, signal.SIGTERM)

    assert server.process.wait(5) == 0
    wait_for(lambda: bool(came))
    assert came[0].status == 500
    assert "EngineDeadError" in server.journal()


def test_sigterm_while_it_loads_is_lost(vllm: Vllm, model: Path) -> None:
    vllm.behave(load_seconds=1)
    server = vllm.start(model)
    wait_for(lambda: "Starting to load model" in server.journal())

    server.process.terminate()

    wait_for(lambda: server.health() == 200)
    assert server.terminate() == 0


def test_an_engine_outlives_a_server_that_is_killed(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model)
    engine = next(iter(children(server.process.pid)))

    server.process.kill()
    server.process.wait()
    time.sleep(0.2)

    assert is_alive(engine)
    os.kill(engine, signal.SIGKILL)


def test_an_engine_that_is_killed_takes_the_server_with_it_at_status_0(
    vllm: Vllm, model: Path
) -> None:
    vllm.behave(tokens_per_second=10)
    server = vllm.serve(model)
    came = server.in_background({**LONG, "stream": True})

    os.kill(next(iter(children(server.process.pid))), signal.SIGKILL)

    assert server.process.wait(5) == 0
    assert "EngineDeadError: EngineCore encountered an issue." in server.journal()
    wait_for(lambda: bool(came))
    assert came[0].events[-1]["error"]["code"] == 500


# -- misbehaviour ------------------------------------------------------------------------------


def test_never_ready(vllm: Vllm, model: Path) -> None:
    vllm.misbehave("never-ready")
    server = vllm.start(model)

    wait_for(lambda: "Starting to load model" in server.journal())
    time.sleep(0.5)

    assert server.process.poll() is None
    assert server.health() == 0


def test_die_loading(vllm: Vllm, model: Path) -> None:
    vllm.misbehave("die-loading", text="CUDA error: Xid 79\nsecond line", exit_code=3)

    done = vllm.run("serve", str(model), "--port", str(free_port()))

    assert done.returncode == 3
    assert "\nCUDA error: Xid 79\nsecond line\n" in done.stdout


def test_oom(vllm: Vllm, model: Path) -> None:
    vllm.misbehave("oom")

    done = vllm.run("serve", str(model), "--port", str(free_port()))

    assert done.returncode == 1
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate" in done.stdout
    assert "RuntimeError: Engine core initialization failed." in done.stdout


def test_a_running_server_can_be_made_to_hang(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model)
    vllm.misbehave("hang")

    with pytest.raises(TimeoutError):
        server.post("/v1/chat/completions", QUESTION, timeout_s=0.5)

    assert server.health() == 200
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0)
    vllm.behave()
    assert server.post("/v1/chat/completions", QUESTION).status == 200


def test_garbage(vllm: Vllm, model: Path) -> None:
    vllm.misbehave("garbage")

    content = vllm.serve(model).post("/v1/chat/completions", QUESTION).message["content"]

    assert "\N{REPLACEMENT CHARACTER}" in content
    assert "Dodgers" not in content


def test_slow(vllm: Vllm, model: Path) -> None:
    vllm.misbehave("slow", seconds=0.7)
    server = vllm.serve(model)
    began = time.monotonic()

    assert server.post("/v1/completions", {"prompt": "hi", "max_tokens": 1}).status == 200

    assert time.monotonic() - began > 0.7


def test_wrong_model_on_one_port_of_one_version(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model)

    vllm.misbehave("wrong-model", port=server.port, version="0.33.0", text="other")
    assert server.get("/v1/models").json["data"][0]["id"] == "other"
    assert server.post("/v1/chat/completions", QUESTION).status == 404
    vllm.misbehave("wrong-model", port=server.port + 1)
    assert server.get("/v1/models").json["data"][0]["id"] == NAME
    vllm.misbehave("wrong-model", version="0.33.1")
    assert server.get("/v1/models").json["data"][0]["id"] == NAME


def test_engine_death_exits_0_and_once_spares_the_next_server(vllm: Vllm, model: Path) -> None:
    server = vllm.serve(model)
    vllm.misbehave("engine-death", once=True)

    answer = server.post("/v1/chat/completions", QUESTION)

    assert answer.status == 500
    assert server.process.wait(5) == 0
    assert "EngineDeadError" in server.journal()
    assert vllm.serve(model).post("/v1/chat/completions", QUESTION).status == 200
