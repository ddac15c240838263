"""What hosts serve now, beside their plans: one probe to each, over pyinfra's own connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.compare import stale_services
from fleet.plan import HostPlan, ServicePlan


def describe(plan: HostPlan, seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each service of a host."""
    stale = set(stale_services(plan, seen))
    return [_row(plan, service, seen, service.name in stale) for service in plan.services]


def _row(
    plan: HostPlan, service: ServicePlan, seen: Mapping[str, Any], stale: bool
) -> dict[str, Any]:
    unit = seen["units"][service.unit]
    record = seen["records"].get(service.name) or {}
    passed = record.get("stamp") == service.stamp == unit["stamp"]
    kind = f"{plan.spec.gpu_count}×{plan.spec.gpu}" if plan.spec.gpu else "CPU"
    return {
        "host": plan.name,
        "GPUs": f"{ranges(service.gpus)} of {kind}" if service.gpus else kind,
        "vLLM": service.vllm_version,
        "model at revision": f"{service.weights.repository} @ {service.weights.revision[:12]}",
        "unit": f"{service.unit}: {unit['active']}",
        "gate": "passed" if passed else "differs from the plan" if stale else "not passed",
        "start": f"{record['ready_s']:.1f} s" if passed else "",
        "first answer": f"{record['first_answer_s']:.2f} s" if passed else "",
        "ok": not stale,
    }


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,6` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def rows(site: Any, inventory_file: Path) -> list[dict[str, Any]]:
    """Rows of every host of the site; a host that cannot be asked is a row that says so."""
    from fleet.connection import states

    found: list[dict[str, Any]] = []
    for name, seen in states(site, inventory_file).items():
        plan = site.plans[name]
        if seen is None:
            found.append(_unreachable(plan))
        else:
            found.extend(describe(plan, seen))
    return found


def _unreachable(plan: HostPlan) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("GPUs", "vLLM", "model at revision", "unit", "gate", "start", "first answer"), ""
    )
    return {"host": plan.name, **empty, "gate": "cannot be reached", "ok": False}
