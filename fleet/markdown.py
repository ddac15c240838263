"""The catalogue as Markdown, for docs/catalogue.md: models, recipes with every flag's source, GPU kinds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from fleet.catalog import Catalog, ModelCard, Recipe, Setting
from fleet.placement import service_memory
from fleet.spec import Argument

MODEL_COLUMNS = (
    *("model", "weights", "quantisation", "context", "vLLM", "compute capability from"),
    *("parsers: tool / reasoning", "licence"),
)


def catalogue(known: Catalog) -> str:
    """All tables of the page."""
    return "\n".join(
        [
            "## Models\n",
            *_table(
                MODEL_COLUMNS,
                (_model(name, card) for name, card in known.models.items()),
            ),
            "## Recipes\n",
            "Each variation is also a recipe of its own: `tp4-piecewise`, `tp4-piecewise-responses`.\n",
            *_table(
                ("recipe", "ranks", "models", "named for", "what it is", "variations"),
                _recipes(known),
            ),
            "### Flags and variables, and where each is from\n",
            *_table(
                ("recipe", "flag or variable", "value", "source", "vLLM", "why"), _settings(known)
            ),
            "### Sources\n",
            *_table(
                ("name", "what it is"),
                (
                    (f"`{name}`", f"[{source.title}]({source.url})" if source.url else source.title)
                    for name, source in known.sources.items()
                ),
            ),
            "## GPU kinds\n",
            *_table(
                (
                    "kind",
                    "nvidia-smi's name",
                    "MiB",
                    "compute capability",
                    "NVSwitch",
                    "FP8",
                    "FP4",
                ),
                (
                    (
                        f"`{name}`",
                        kind.name,
                        str(kind.memory_mib),
                        kind.compute_capability,
                        *("yes" if has else "no" for has in (kind.nvswitch, kind.fp8, kind.fp4)),
                    )
                    for name, kind in known.gpus.items()
                ),
            ),
            "## Where guides and vLLM disagree\n",
            *_table(
                ("topic", "said", "by", "what the catalogue holds", "because"),
                (
                    (row.topic, row.said, ", ".join(row.sources), row.truth, row.reason)
                    for row in known.contradictions
                ),
            ),
        ]
    )


CLAIMS_UTILISATION = 0.9
"""vLLM's default when the guides were written."""


def claims(known: Catalog) -> str:
    """What the guides say that hardware holds, beside what is worked out."""
    rows = []
    for claim in known.claims:
        recipe = known.recipes_of(claim.models[0])[claim.recipe]
        card = known.models[claim.models[0]]
        arguments = {
            **recipe.arguments(card.oldest_vllm),
            "gpu-memory-utilization": CLAIMS_UTILISATION,
        }
        held = service_memory(
            card, recipe.parallel, known.gpus[claim.gpu], arguments, card.oldest_vllm
        )
        assert held is not None, claim
        models = ", ".join(model.split("/")[1] for model in claim.models)
        gpus = f"{claim.gpus} × {claim.gpu}"
        rows.append((models, gpus, f"`{claim.recipe}`", *_compared(claim.tokens, held.tokens)))
    head = ("models", "GPUs", "recipe", "the guide's tokens", "worked out", "ratio")
    return "\n".join(_table(head, rows))


def measurements(known: Catalog) -> str:
    """What vLLM reported on real hardware, beside what is worked out."""
    rows = []
    for seen in known.measurements:
        arguments: dict[str, Argument] = {
            "gpu-memory-utilization": seen.utilisation,
            "kv-cache-dtype": seen.kv_cache_dtype,
        }
        held = service_memory(
            known.models[seen.model], seen.parallel, known.gpus[seen.gpu], arguments, seen.vllm
        )
        assert held is not None, seen
        url, _, where = seen.source.partition(" ")
        where = where.strip("()").split("/")[-1]
        rows.append(
            (
                seen.model.split("/")[1],
                f"{seen.parallel.ranks} × {seen.gpu}",
                f"{seen.parallel}, KV {seen.kv_cache_dtype}, {seen.utilisation:g}",
                seen.vllm,
                *_compared(seen.tokens, held.tokens),
                f"[{where}]({url})",
            )
        )
    head = ("model", "GPUs", "how", "vLLM", "reported", "worked out", "ratio", "source")
    return "\n".join(_table(head, rows))


def _compared(theirs: int, ours: int) -> tuple[str, str, str]:
    return f"{theirs:,}", f"{ours:,}", f"{ours / theirs:.2f}"


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    titles = list(head)
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _model(name: str, card: ModelCard) -> tuple[str, ...]:
    weights = f"{card.weights_bytes / 1e9:.1f} GB" if card.weights_bytes else "unknown"
    parsers = (", ".join(card.parsers.tool), ", ".join(card.parsers.reasoning))
    return (
        f"`{name}`",
        weights,
        card.quantisation,
        f"{card.context_tokens:,}",
        card.vllm_range,
        card.compute_capability,
        " / ".join(words or "–" for words in parsers),
        card.licence or "unknown",
    )


def _recipes(known: Catalog) -> Iterator[tuple[str, ...]]:
    for (family, name), recipe in known.recipes.items():
        if recipe.base is None:
            models = recipe.models or [
                model for model, card in known.models.items() if card.family == family
            ]
            yield (
                f"`{name}`",
                str(recipe.parallel),
                ", ".join(model.split("/")[1] for model in models),
                ", ".join(recipe.kinds) or "–",
                recipe.title,
                ", ".join(f"`{more}`" for more in known.variations(family, name)) or "–",
            )


def _settings(known: Catalog) -> Iterator[tuple[str, ...]]:
    for (family, name), recipe in known.recipes.items():
        base = known.recipes[family, recipe.base] if recipe.base else None
        yield from _own_settings(name, recipe, base)


def _own_settings(name: str, recipe: Recipe, base: Recipe | None) -> Iterator[tuple[str, ...]]:
    """A recipe's flags; of a variation of one step, those that it changes; of more, none."""
    if base is not None and name.count("-") > str(recipe.base).count("-") + 1:
        return
    before = {} if base is None else base.args | base.env
    for flag, setting in (recipe.args | recipe.env).items():
        if before.get(flag) != setting:
            shown = f"`--{flag}`" if flag in recipe.args else f"`{flag}`"
            versions, why = setting.vllm or "all", setting.why or ""
            yield f"`{name}`", shown, _value(setting), setting.source, versions, why


def _value(setting: Setting) -> str:
    if setting.value is True:
        return "–"
    if isinstance(setting.value, (dict, list)):
        return f"`{json.dumps(setting.value)}`"
    return f"`{setting.value}`"
