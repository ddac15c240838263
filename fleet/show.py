"""Plans, fits and the catalogue for a person: Rich tables and text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleet import command
from fleet.catalog import Catalog, ModelCard
from fleet.inventory import Site
from fleet.lock import Change, Lock
from fleet.memory import Memory, gib
from fleet.placement import Fit
from fleet.plan import HostPlan, ServicePlan


def site(planned: Site) -> Iterator[RenderableType]:
    """Every host's services, a summary of each group, and the order of cut-over.

    Hosts one after another that are alike but for their names are shown once, under all their names.
    """
    plans = list(planned.plans.values())
    for _, alike in groupby(plans, key=lambda plan: id(plan.services)):
        yield from _hosts(list(alike))
    yield _summary(plans)
    yield Text.assemble(("Order of cut-over", "bold"), ": ", _order(planned))
    for note in planned.notes:
        yield Text.assemble(("note", "yellow"), f": {note}")


def _order(planned: Site) -> str:
    return " → ".join(", ".join(wave) for wave in planned.waves(planned.plans))


def _hosts(plans: Sequence[HostPlan]) -> Iterator[RenderableType]:
    plan = plans[0]
    hardware = f"{plan.spec.gpu_count} × {plan.gpu.name}" if plan.gpu else "CPU"
    driver = f", driver {plan.spec.driver.version}" if plan.spec.driver else ""
    names = ", ".join(host.name for host in plans)
    count = f"{len(plans)} hosts, " if len(plans) > 1 else ""
    yield Text.assemble((names, "bold"), f" ({count}{plan.group}): {hardware}{driver}")
    yield Text(f"  release  {plan.release.id}")
    if plan.spec.cuda_toolkit:
        yield Text(f"  toolkit  CUDA {plan.spec.cuda_toolkit}")
    if plan.exporter:
        yield Text(f"  metrics  {plan.exporter.listen}")
    for service in plan.services:
        yield Text("")
        yield Text.assemble("  ", (service.name, "bold"))
        for label, value in _facts(service):
            yield Text(f"    {label:<8} {value}")
        for note in service.notes:
            yield Text.assemble("    ", ("note", "yellow"), f"     {note}")
        text = command.shell(service.argv, service.environment)
        yield Text("    " + text.replace("\n", "\n    "))
    yield Text("")


def _facts(service: ServicePlan) -> Iterator[tuple[str, str]]:
    yield "model", f"{service.model} at {service.weights.revision}"
    if service.weights.repository != service.model:
        yield "weights", service.weights.repository
    yield "recipe", service.recipe
    yield "GPUs", ", ".join(map(str, service.gpus)) or "none"
    yield "ports", f"{service.port} public, {service.engine_port} on loopback"
    yield "unit", f"{service.unit} ({service.stamp})"
    held = service.memory
    if held is not None:
        yield "memory", _memory(held)
        yield "context", _context(held)
        for claim in service.claims:
            share = held.tokens / claim.tokens
            yield "guide", f"{claim.tokens:,} tokens; {held.tokens:,} here, {share:.0%} of it"


def _memory(held: Memory) -> str:
    inputs = held.inputs
    return (
        f"{gib(held.weights_bytes)} weights + {gib(inputs.overhead_bytes)} overhead + "
        f"{gib(held.kv_bytes)} KV cache of {gib(inputs.gpu_bytes)} a GPU at utilisation "
        f"{inputs.utilisation:g}"
    )


def _context(held: Memory) -> str:
    asked = held.max_model_len
    pools = f" in {held.pools} pools of {held.pool_tokens:,}" if held.pools > 1 else ""
    return (
        f"{held.tokens:,} KV tokens{pools}; sequences up to {asked:,}, "
        f"{held.sequences} of them at once; largest max_model_len {held.largest_max_model_len:,}"
    )


def _summary(plans: Iterable[HostPlan]) -> Table:
    table = Table(
        *("group", "hosts", "service", "model", "recipe", "KV tokens", "longest", "at once"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    hosts = Counter((plan.group, *map(_row, plan.services)) for plan in plans)
    for (group, *services), count in hosts.items():
        for row in services:
            table.add_row(str(group), str(count), *row)
    return table


def _row(service: ServicePlan) -> tuple[str, ...]:
    held = service.memory
    if held is None:
        return service.name, service.model, service.recipe, "unknown", "", ""
    return (
        *(service.name, service.model, service.recipe),
        *(f"{held.tokens:,}", f"{held.max_model_len:,}", str(held.sequences)),
    )


FIT_COLUMNS = {
    "recipe": 22,
    "ranks": 12,
    "weights": 10,
    "KV cache": 10,
    "KV tokens": 11,
    "longest": 10,
    "at once": 8,
    "": 60,
}
"""Titles and widths, the same below every heading."""


def fits(found: Mapping[str, Sequence[Fit]], *, everything: bool) -> RenderableType:
    """A table for each GPU kind; kinds that hold the same share one. Variations of a recipe that hold
    the same are shown as one, unless `everything` is asked for."""
    alike: dict[tuple[Fit, ...], list[str]] = {}
    for kind, rows in found.items():
        alike.setdefault(tuple(replace(row, reasons=()) for row in rows), []).append(kind)
    parts: list[RenderableType] = []
    for kinds in alike.values():
        parts += [Text(""), Text(", ".join(kinds), style="bold")]
        parts.append(_fit_table(found[kinds[0]], everything=everything))
    note = (
        "weights and KV cache per GPU; longest: the largest max_model_len that fits; at once: sequences "
        "of the full length that all pools hold; (+n): variations that hold the same, shown by --all"
    )
    return Group(*parts, Text(f"\n{note}"))


def _fit_table(rows: Sequence[Fit], *, everything: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, width in FIT_COLUMNS.items():
        right = title not in ("recipe", "ranks", "")
        table.add_column(title, min_width=width, justify="right" if right else "left", no_wrap=True)
    shown: dict[object, list[Fit]] = {}
    for fit in rows:
        key = (fit.recipe.parallel, fit.memory, fit.reasons)
        shown.setdefault(fit.recipe_name if everything else key, []).append(fit)
    for alike in shown.values():
        table.add_row(*_fit_cells(alike), style=None if alike[0].fits else "dim")
    return table


def _fit_cells(alike: Sequence[Fit]) -> tuple[str, ...]:
    fit = alike[0]
    more = f" (+{len(alike) - 1})" if len(alike) > 1 else ""
    name = (f"{fit.recipe_name}{more}", str(fit.recipe.parallel))
    held = fit.memory
    if held is None:
        why = fit.reasons[0] if fit.reasons else "memory is unknown"
        return (*name, "", "", "", "", "", why)
    if not held.largest_max_model_len:
        return (*name, gib(held.weights_bytes), "", "", "", "", "the weights do not fit")
    return (
        *name,
        gib(held.weights_bytes),
        gib(held.kv_bytes),
        f"{held.tokens:,}",
        f"{held.largest_max_model_len:,}",
        str(held.sequences),
        "" if held.fits else f"does not start without max_model_len {held.largest_max_model_len}",
    )


def catalogue(known: Catalog) -> Iterator[RenderableType]:
    """Models, recipes and GPU kinds."""
    models = Table(
        *("model", "weights", "quantisation", "context", "vLLM", "GPU from", "licence"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, card in known.models.items():
        models.add_row(name, *_card(card))
    yield models
    recipes = Table(
        *("recipe", "family", "ranks", "named for", "title", "source", "variations"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for (family, name), recipe in known.recipes.items():
        if recipe.base is None:
            more = ", ".join(known.variations(family, name))
            kinds, ranks = ", ".join(recipe.kinds), str(recipe.parallel)
            recipes.add_row(name, family, ranks, kinds, recipe.title, recipe.source, more)
    yield recipes
    gpus = Table(
        *("GPU kind", "name", "memory", "compute capability", "NVSwitch", "FP8", "FP4"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, kind in known.gpus.items():
        answers = ["yes" if answer else "no" for answer in (kind.nvswitch, kind.fp8, kind.fp4)]
        memory = f"{kind.memory_mib} MiB"
        gpus.add_row(name, kind.name, memory, kind.compute_capability, *answers)
    yield gpus


def _card(card: ModelCard) -> tuple[str, ...]:
    weights = f"{card.weights_bytes / 1e9:.0f} GB" if card.weights_bytes else "unknown"
    return (
        weights,
        card.quantisation,
        f"{card.context_tokens:,}",
        card.vllm_range,
        card.compute_capability,
        card.licence or "unknown",
    )


def contradictions(known: Catalog) -> RenderableType:
    """Where the guides disagree with one another or with today's vLLM."""
    table = Table(
        "topic", "said", "by", "what holds", "because", box=box.SIMPLE_HEAD, show_lines=True
    )
    for row in known.contradictions:
        table.add_row(row.topic, row.said, ", ".join(row.sources), row.truth, row.reason)
    return table


def lock_summary(lock: Lock) -> str:
    """How much a lock pins, in a line."""
    packages = sum(len(release.packages) for release in lock.releases)
    files = sum(len(model.files) for model in lock.models)
    counts = {
        "release": len(lock.releases),
        "package": packages,
        "model": len(lock.models),
        "file": files,
    }
    said = [f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items()]
    return f"{said[0]} of {said[1]}, {said[2]} of {said[3]}"


def lock_changes(changes: Sequence[Change]) -> RenderableType:
    """What a new lock pins otherwise than the one before it."""
    table = Table("of", "package", "before", "after", box=box.SIMPLE_HEAD, pad_edge=False)
    for change in changes:
        table.add_row(change.of, change.what, change.before or "", change.after or "")
    return table


def differences(found: Sequence[Mapping[str, object]]) -> RenderableType:
    """What would be cut over, host by host, and why; see fleet.status.differences."""
    lines = []
    for row in found:
        lines.append(Text.assemble((str(row["host"]), "bold"), f": {row['summary']}"))
        services = row["services"]
        assert isinstance(services, dict)
        for name, why in services.items():
            lines += [Text(f"  {name}: {line}") for line in why]
    return Group(*lines)
