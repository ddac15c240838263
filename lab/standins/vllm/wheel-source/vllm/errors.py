"""The exceptions that vLLM and its libraries end with, under the names that a journal shows."""

from __future__ import annotations


class _RenamedError(Exception):
    """An exception that prints as if it were defined elsewhere."""


class EngineDeadError(_RenamedError):
    """The engine's process is gone; no request can be answered any more."""

    __module__ = "vllm.v1.engine.exceptions"

    def __init__(self) -> None:
        """The only message there is."""
        super().__init__(
            "EngineCore encountered an issue. See stack trace (above) for the root cause."
        )


class ValidationError(_RenamedError):
    """pydantic's: the configuration is not valid."""

    __module__ = "pydantic_core._pydantic_core"

    def __init__(self, model: str, message: str, field: str | None = None) -> None:
        """model: the configuration class; message: what is wrong with it, or with its `field`."""
        where = "" if field is None else f"{field}\n"
        what = f"Value error, {message}" if field is None else message
        super().__init__(
            f"1 validation error for {model}\n{where}  {what} "
            "[type=value_error, input_value=ArgsKwargs((), {'model': ...}), input_type=ArgsKwargs]"
        )


class HFValidationError(_RenamedError):
    """huggingface_hub's: neither a directory nor the name of a repository."""

    __module__ = "huggingface_hub.errors"


class SafetensorError(_RenamedError):
    """safetensors': a file is not what it should be."""

    __module__ = "safetensors._safetensors_rust"


class OutOfMemoryError(_RenamedError):
    """torch's: a GPU has no memory left."""

    __module__ = "torch"
