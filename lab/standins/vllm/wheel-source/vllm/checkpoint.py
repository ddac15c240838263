"""What vLLM reads of a model's directory: the configuration and the headers of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.errors import HFValidationError, SafetensorError, ValidationError

# safetensors refuses longer ones.
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8

# Model types that the transformers library knows by itself; others bring code of their own.
KNOWN_MODEL_TYPES = ("minimax", "minimax_m2", "minimax_m3")


def read_config(model: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """The content of the model's config.json.

    Raises HFValidationError or ValidationError where there is none, OSError where it is not JSON.
    """
    directory = Path(model)
    if not directory.is_dir() and model.count("/") > 1:
        raise HFValidationError(
            "Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
            f"'{model}'. Use `repo_type` argument if needed."
        )
    file = directory / "config.json"
    if not file.is_file():
        raise ValidationError(
            "ModelConfig",
            f"Invalid repository ID or local directory specified: '{model}'.\n"
            "Please verify the following requirements:\n"
            "1. Provide a valid Hugging Face repository ID.\n"
            "2. Specify a local directory that contains a recognized configuration file.\n"
            "   - For Hugging Face models: ensure the presence of a 'config.json'.\n",
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise OSError(
            f"It looks like the config file at '{file}' is not a valid JSON file."
        ) from None
    if (
        config.get("auto_map")
        and config.get("model_type") not in KNOWN_MODEL_TYPES
        and not trust_remote_code
    ):
        raise ValidationError(
            "ModelConfig",
            f"The repository {model} contains custom code which must be executed to correctly load "
            "the model. Please pass the argument `trust_remote_code=True` to allow custom code to "
            "be run.",
        )
    return config


def read_weights(directory: Path) -> int:
    """Read every shard's header, and return the bytes of the weights.

    Raises what vLLM would end with: FileNotFoundError for a shard that the index names and that is
    not there, RuntimeError for a directory without weights, SafetensorError for a file that is
    truncated or no safetensors file at all.
    """
    shards = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file() and shards:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = {str(directory / name) for name in named} - {str(shard) for shard in shards}
        if missing:
            raise FileNotFoundError(
                "Weight files referenced in index but missing: {"
                + ", ".join(repr(name) for name in sorted(missing))
                + "}"
            )
        shards = [shard for shard in shards if shard.name in named]
    if not shards:
        raise RuntimeError(f"Cannot find any model weights with `{directory}`")
    return sum(_read_header(shard) for shard in shards)


def _read_header(shard: Path) -> int:
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES:
            raise SafetensorError("Error while deserializing header: header too small")
        # A Git LFS pointer ends here: its first eight characters make an immense number.
        if length > MAX_HEADER_BYTES:
            raise SafetensorError("Error while deserializing header: header too large")
        if LENGTH_BYTES + length > size:
            raise SafetensorError("Error while deserializing header: invalid header length")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise SafetensorError(
                "Error while deserializing header: invalid JSON in header"
            ) from None
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if LENGTH_BYTES + length + max(ends, default=0) != size:
        raise SafetensorError(
            "Error while deserializing header: incomplete metadata, file not fully covered"
        )
    return max(ends, default=0)
