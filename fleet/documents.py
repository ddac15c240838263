"""Plans as plain data: for `--json`, and on hosts as the record of what was applied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fleet.memory import Memory
from fleet.placement import Fit
from fleet.plan import HostPlan


def host_document(host: HostPlan) -> dict[str, Any]:
    return {
        "host": host.name,
        "group": host.group,
        "gpu": host.gpu_name,
        "gpu_count": host.spec.gpu_count,
        "driver": host.spec.driver.version if host.spec.driver else None,
        "release": host.release.id,
        "locked": host.release.lock is not None,
        "services": [
            {
                **service.document(),
                "memory": memory_document(service.memory),
                "claims": [claim.model_dump() for claim in service.claims],
                "notes": list(service.notes),
            }
            for service in host.services
        ],
    }


def memory_document(held: Memory | None) -> dict[str, Any] | None:
    """Sizes in bytes per GPU but for `kv_tokens`, lengths and counts; inputs included."""
    if held is None:
        return None
    inputs = held.inputs
    return {
        "gpu_bytes": inputs.gpu_bytes,
        "utilisation": inputs.utilisation,
        "overhead_bytes": inputs.overhead_bytes,
        "weights_bytes": held.weights_bytes,
        "kv_cache_bytes": max(0, held.kv_bytes),
        "kv_bytes_per_token": held.token_bytes,
        "state_bytes_per_sequence": held.state_bytes,
        "pools": held.pools,
        "kv_tokens_per_pool": held.pool_tokens,
        "kv_tokens": held.tokens,
        "max_model_len": held.max_model_len,
        "largest_max_model_len": held.largest_max_model_len,
        "sequences_at_max_model_len": held.sequences,
        "fits": held.fits,
    }


def fit_document(kind: str, fit: Fit) -> dict[str, Any]:
    return {
        "gpu": kind,
        "gpus": fit.gpus,
        "recipe": fit.recipe_name,
        "parallel": str(fit.recipe.parallel),
        "reasons": list(fit.reasons),
        "memory": memory_document(fit.memory),
    }


def changes(applied: Mapping[str, Any] | None, planned: Mapping[str, Any]) -> Iterator[str]:
    """What makes a service another than what was applied, one line each; nothing where it is the same.

    Both are ServicePlan.document()s; `applied` is None for a service that is not there.
    """
    if applied is None:
        yield "new"
        return
    for key in ("model", "repository", "revision", "vllm", "recipe", "port", "engine_port"):
        if applied.get(key) != planned[key]:
            yield f"{key}: {applied.get(key)} → {planned[key]}"
    if applied.get("gpus") != planned["gpus"]:
        yield f"GPUs: {_numbers(applied.get('gpus', ()))} → {_numbers(planned['gpus'])}"
    yield from _differences("", _options(applied.get("argv", ())), _options(planned["argv"]))
    yield from _differences("env ", applied.get("environment", {}), planned["environment"])
    if applied.get("stamp") != planned["stamp"] and _same_but_stamp(applied, planned):
        yield "its secret, or the unit's own text"


def _same_but_stamp(applied: Mapping[str, Any], planned: Mapping[str, Any]) -> bool:
    return {**applied, "stamp": None} == {**planned, "stamp": None}


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _options(argv: Iterable[str]) -> dict[str, str]:
    """Options of an argv by name; what comes before the first is the program."""
    found: dict[str, str] = {}
    name = "program"
    for word in argv:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = f"{found.get(name, '')} {word}".strip()
    return found


def _differences(
    label: str, applied: Mapping[str, str], planned: Mapping[str, str]
) -> Iterator[str]:
    for name in sorted({*applied, *planned}):
        before, after = applied.get(name), planned.get(name)
        if before == after:
            continue
        if before is None:
            yield f"{label}{name}: added{f' {after}' if after else ''}"
        elif after is None:
            yield f"{label}{name}: removed{f' (was {before})' if before else ''}"
        else:
            yield f"{label}{name}: {before} → {after}"
