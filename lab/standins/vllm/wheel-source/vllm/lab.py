"""What the lab tells the stand-in: how to misbehave, which GPUs the host has.

    /etc/lab/vllm.json       {"load_seconds": 2.0, "tokens_per_second": 100, "rules": [...]}
    /etc/lab/hardware.json   the host's simulated GPUs; absent outside the lab's GPU hosts
    /run/lab/gpu/<index>/<process id>   the memory that a process holds of a GPU, in MiB

A rule is {"mode", "port", "version", "text", "exit_code", "seconds", "once"}; the first whose port
and version match counts. With "once", it does not touch a server that started after the file was
written, so that one which it killed comes back well. The files are elsewhere when LAB_ROOT,
LAB_VLLM_CONFIG or LAB_HARDWARE say so.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm.version import __version__

ROOT = Path(os.environ.get("LAB_ROOT") or "/")
BEHAVIOUR = Path(os.environ.get("LAB_VLLM_CONFIG") or ROOT / "etc/lab/vllm.json")
HARDWARE = Path(os.environ.get("LAB_HARDWARE") or ROOT / "etc/lab/hardware.json")
GPU_USERS = ROOT / "run/lab/gpu"
# There while the GPUs are registered with the NVLink fabric, by the fabric manager's stand-in.
FABRIC = ROOT / "run/lab/nvidia-fabric"

LOAD_SECONDS = 2.0
TOKENS_PER_SECOND = 100.0

_started = time.time()


@dataclass(frozen=True)
class Behaviour:
    """How a server is to behave.

    mode: a way to misbehave, "" for none
    text: what it writes or answers, None for the mode's own
    exit_code: what it exits with, if it dies while loading
    seconds: how long it takes to die, or before it answers, None for the mode's own
    load_seconds: how long loading takes
    tokens_per_second: how fast it answers
    """

    mode: str = ""
    text: str | None = None
    exit_code: int | None = None
    seconds: float | None = None
    load_seconds: float = LOAD_SECONDS
    tokens_per_second: float = TOKENS_PER_SECOND


def behaviour(port: int) -> Behaviour:
    """What the file says now about the server on this port; an absent or broken file says nothing."""
    try:
        written = BEHAVIOUR.stat().st_mtime
        told = json.loads(BEHAVIOUR.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Behaviour()
    general = Behaviour(
        load_seconds=float(told.get("load_seconds", LOAD_SECONDS)),
        tokens_per_second=float(told.get("tokens_per_second", TOKENS_PER_SECOND)),
    )
    for rule in told.get("rules", []):
        if rule.get("port") not in (None, port) or rule.get("version") not in (None, __version__):
            continue
        if rule.get("once") and _started > written:
            continue
        return replace(
            general,
            mode=rule["mode"],
            text=rule.get("text"),
            exit_code=rule.get("exit_code"),
            seconds=rule.get("seconds"),
        )
    return general


def hardware() -> dict[str, Any] | None:
    """The host's simulated GPUs; None where the lab describes none."""
    try:
        described: dict[str, Any] = json.loads(HARDWARE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return described
