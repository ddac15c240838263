"""What hosts serve now, beside their plans: one probe to each, over pyinfra's own connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.compare import driver_is_stale, driver_reason, proxy_is_stale, stale_services
from fleet.documents import changes
from fleet.plan import HostPlan, ServicePlan
from fleet.rollback import rolled_back
from fleet.rollback import rows as history_rows


def describe(plan: HostPlan, seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each service of a host."""
    stale = stale_services(plan, seen)
    proxy = f"the proxy: {seen['due']['proxy']}" if proxy_is_stale(seen) else None
    back = rolled_back(seen["history"])
    why = {one.name: stale.get(one.name) or proxy for one in plan.services}
    if back:
        why = {name: reason and f"{reason}; {back}" for name, reason in why.items()}
    return [_row(plan, one, seen, why[one.name]) for one in plan.services]


def _row(
    plan: HostPlan, service: ServicePlan, seen: Mapping[str, Any], why: str | None
) -> dict[str, Any]:
    """`why`: what of the service, or of the proxy before it, is not as planned; None where all is."""
    unit = seen["units"][service.unit]
    record = seen["records"].get(service.name) or {}
    passed = record.get("stamp") == service.stamp == unit["stamp"]
    kind = f"{plan.spec.gpu_count}×{plan.gpu_name}" if plan.gpu else "CPU"
    return {
        "host": plan.name,
        "GPUs": f"{ranges(service.gpus)} of {kind}" if service.gpus else kind,
        "vLLM": service.vllm_version,
        "model at revision": f"{service.weights.repository} @ {service.weights.revision[:12]}",
        "unit": f"{service.unit}: {unit['active']}",
        "gate": f"differs: {why}" if why else "passed",
        "start": f"{record['ready_s']:.1f} s" if passed else "",
        "first answer": f"{record['first_answer_s']:.2f} s" if passed else "",
        "ok": why is None,
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


def histories(site: Any, inventory_file: Path) -> list[dict[str, Any]]:
    """What each host has served, newest first; a host that cannot be asked is a row that says so."""
    from fleet.connection import states

    found: list[dict[str, Any]] = []
    for name, seen in states(site, inventory_file).items():
        if seen is None:
            empty = dict.fromkeys(("generation", "release", "services", "revisions", "passed"), "")
            found.append({"host": name, **empty, "state": "cannot be reached", "missing": []})
        else:
            found.extend(history_rows(name, seen["history"]))
    return found


def differences(site: Any, inventory_file: Path) -> list[dict[str, Any]]:
    """What a roll-out would restart on each host, and why; one question to each, nothing changed."""
    from fleet.connection import states

    found = states(site, inventory_file)
    return [difference(site.plans[name], seen) for name, seen in found.items()]


def difference(plan: HostPlan, seen: Mapping[str, Any] | None) -> dict[str, Any]:
    """One host beside its plan. `services` names those that would be cut over, each with its reasons;
    `error` is set where the host could not be asked."""
    if seen is None:
        return {"host": plan.name, "summary": "cannot be reached", "services": {}, "error": True}
    stale = stale_services(plan, seen)
    planned = {service.name: service.document() for service in plan.services}
    services = {}
    for name in stale:
        if name not in planned:
            services[name] = ["not in the plan: stopped and removed"]
            continue
        applied = seen["applied"].get(name)
        reasons = list(changes(applied, planned[name]))
        reasons += [driver_reason(seen)] if driver_is_stale(seen) else []
        services[name] = reasons or [stale[name]]
    summary = (
        f"{', '.join(services)} would be cut over" if services else "no change to what it serves"
    )
    return {"host": plan.name, "summary": summary, "services": services, "error": False}
