"""What a server is to serve: options and model configuration, checked as vLLM checks them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

from vllm import checkpoint, devices
from vllm.arguments import RECORDED
from vllm.engine_core import Task
from vllm.errors import ValidationError
from vllm.logger import log

# Where config.json does not say.
DEFAULT_MAX_MODEL_LEN = 4096
DEFAULT_UTILIZATION = 0.9
BYTES_PER_ELEMENT = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class ServerConfig:
    """Everything that the HTTP server goes by.

    names: the model's served names, the first is the one that answers carry
    model: directory
    max_model_len: tokens of prompt and answer together
    reasoning_parser, tool_call_parser: "" for none
    auto_tools: whether a model may call tools of its own accord
    opens_thinking: the prompt ends in <think>, so that answers begin inside it
    api_keys: any of them opens /v1; none, and it is open
    host, port, shutdown_timeout_s, max_num_seqs, access_log: as their options
    engines: data parallel ranks
    """

    names: list[str]
    model: str
    max_model_len: int
    reasoning_parser: str
    tool_call_parser: str
    auto_tools: bool
    opens_thinking: bool
    api_keys: list[str]
    host: str | None
    port: int
    shutdown_timeout_s: int
    max_num_seqs: int
    access_log: bool
    engines: int


def validate_options(options: argparse.Namespace) -> None:
    """Refuse what vLLM refuses right after parsing. Raises TypeError."""
    if options.enable_auto_tool_choice and not options.tool_call_parser:
        raise TypeError("Error: --enable-auto-tool-choice requires --tool-call-parser")


def validate_parsers(options: argparse.Namespace) -> None:
    """Refuse parser names that this version does not have. Raises KeyError."""
    parsers = RECORDED["tool_parsers"]
    if options.enable_auto_tool_choice and options.tool_call_parser not in parsers:
        raise KeyError(
            f"invalid tool call parser: {options.tool_call_parser} "
            f"(chose from {{ {','.join(parsers)} }})"
        )
    parser = options.reasoning_parser
    if parser and parser not in RECORDED["reasoning_parsers"]:
        raise KeyError(
            f"Reasoning parser '{parser}' not found. "
            f"Available parsers: {', '.join(RECORDED['reasoning_parsers'])}"
        )


def configure(options: argparse.Namespace) -> tuple[ServerConfig, Task]:
    """What to serve, and what its engine is to load.

    Raises ValidationError and others, as vLLM does, for what cannot work.
    """
    model = options.model_tag or options.model
    config = checkpoint.read_config(model, trust_remote_code=options.trust_remote_code)
    architecture = _architecture(config)
    log("INFO", "model.py:744", f"Resolved architecture: {architecture}")
    max_model_len = _max_model_len(options, config)
    log("INFO", "model.py:2170", f"Using max model len {max_model_len}")
    utilization = _utilization(options)
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    data = options.data_parallel_size
    gpus = devices.visible()
    _check_ranks(config, tensor, tensor * pipeline, len(gpus))
    server = ServerConfig(
        names=options.served_model_name or [model],
        model=model,
        max_model_len=max_model_len,
        reasoning_parser=options.reasoning_parser or "",
        tool_call_parser=options.tool_call_parser or "",
        auto_tools=options.enable_auto_tool_choice,
        opens_thinking="M1" not in architecture,
        api_keys=_api_keys(options),
        host=options.host,
        port=options.port,
        shutdown_timeout_s=getattr(options, "shutdown_timeout", 0),
        max_num_seqs=getattr(options, "max_num_seqs", None) or 1024,
        access_log=not options.disable_uvicorn_access_log,
        engines=data,
    )
    quantization = config.get("quantization_config") or {}
    task = Task(
        model=model,
        expert_width=config.get("intermediate_size"),
        block=quantization.get("weight_block_size"),
        ranks=tensor * pipeline * data,
        # Experts are split over all ranks, unless each rank has whole ones.
        expert_ranks=1 if options.enable_expert_parallel else tensor * data,
        gpus=gpus,
        utilization=utilization,
        kv_bytes_per_token=_kv_bytes_per_token(options, config, tensor),
        max_model_len=max_model_len,
        eager=options.enforce_eager,
        port=options.port,
    )
    return server, task


def _architecture(config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    for architecture in architectures:
        if architecture in RECORDED["minimax_architectures"]:
            return str(architecture)
    for architecture in architectures:
        last = RECORDED["removed_architectures"].get(architecture)
        if last:
            raise ValidationError(
                "ModelConfig",
                f"Model architecture {architecture} was supported in vLLM until v{last}, and is "
                "not supported anymore. Please use an older version of vLLM if you want to use "
                "this model architecture.",
            )
    raise ValidationError(
        "ModelConfig",
        f"Model architectures {architectures} are not supported for now. Supported architectures: "
        f"dict_keys({RECORDED['minimax_architectures']})",
    )


def _max_model_len(options: argparse.Namespace, config: dict[str, Any]) -> int:
    derived = int(config.get("max_position_embeddings", DEFAULT_MAX_MODEL_LEN))
    asked = options.max_model_len
    if asked in (None, -1):
        return derived
    if asked > derived and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
        raise ValidationError(
            "ModelConfig",
            f"User-specified max_model_len ({asked}) is greater than the derived max_model_len "
            f"(max_position_embeddings={float(derived)} or model_max_length=None in model's "
            "config.json). To allow overriding this maximum, set the env var "
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1.",
        )
    return int(asked)


def _utilization(options: argparse.Namespace) -> float:
    utilization = float(options.gpu_memory_utilization or DEFAULT_UTILIZATION)
    if not 0 < utilization <= 1:
        raise ValidationError(
            "CacheConfig",
            f"Input should be {'greater than 0' if utilization <= 0 else 'less than or equal to 1'}",
            field="gpu_memory_utilization",
        )
    return utilization


def _check_ranks(config: dict[str, Any], tensor: int, world: int, gpus: int) -> None:
    heads = config.get("num_attention_heads", tensor)
    if heads % tensor:
        raise ValidationError(
            "VllmConfig",
            f"Total number of attention heads ({heads}) must be divisible by tensor parallel size "
            f"({tensor}).",
        )
    if world > gpus:
        raise ValidationError(
            "ParallelConfig",
            f"World size ({world}) is larger than the number of available GPUs ({gpus}) in this "
            "node. If this is intentional and you are using:\n"
            "- ray, set '--distributed-executor-backend ray'.\n"
            "- multiprocessing, set '--nnodes' appropriately.",
        )


def _kv_bytes_per_token(options: argparse.Namespace, config: dict[str, Any], tensor: int) -> int:
    """Keys and values of all attention layers; KV heads are repeated where there are more ranks."""
    kinds = config.get("attn_type_list")
    layers = sum(kinds) if kinds else config.get("num_hidden_layers", 1)
    heads = max(config.get("num_key_value_heads", 1), tensor)
    element = BYTES_PER_ELEMENT.get(options.kv_cache_dtype, 2)
    return int(2 * layers * heads * config.get("head_dim", 128) * element)


def _api_keys(options: argparse.Namespace) -> list[str]:
    keys = options.api_key
    if keys is None:
        keys = os.environ.get("VLLM_API_KEY") or []
    return [key for key in ([keys] if isinstance(keys, str) else keys) if key]
