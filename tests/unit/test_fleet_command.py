"""The `fleet` command: plans, fits and the catalogue, for a person and for a program."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from fleet.catalog import catalog
from fleet.cli import app
from fleet.errors import BAD_INPUT
from fleet.inventory import load

ROOT = Path(__file__).resolve().parents[2]
H20 = str(ROOT / "inventories" / "h20.py")


def fleet(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def said(*words: str) -> str:
    done = fleet(*words)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_plan_shows_memory_and_context() -> None:
    text = said("plan", H20)

    assert "53.6 GiB weights + 6.0 GiB overhead + 69.6 GiB KV cache of 140.4 GiB a GPU" in text
    assert "1,176,940 KV tokens; sequences up to 196,608, 5 of them at once" in text


def test_the_worked_example_of_the_docs_is_what_a_plan_prints() -> None:
    page = (ROOT / "docs" / "memory.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith(("    memory", "    context"))]

    assert shown
    for line in shown:
        assert line in said("plan", H20)


def test_hosts_that_are_alike_are_shown_once() -> None:
    text = said("plan", H20)
    names = list(load(Path(H20), cwd=ROOT).plans)

    assert len(names) > 1
    assert f"{', '.join(names)} ({len(names)} hosts, h20)" in text
    assert text.count("m25-a.service") == 1


def test_a_limited_plan_has_that_host_only() -> None:
    first, second = list(load(Path(H20), cwd=ROOT).plans)[:2]

    text = said("plan", H20, "--limit", first)

    assert first in text
    assert second not in text


def test_what_is_printed_can_be_pasted_into_a_shell() -> None:
    text = said("plan", H20)
    begin = text.index("HF_HUB_OFFLINE=1")
    lines = []
    for line in text[begin:].splitlines():
        lines.append(line)
        if not line.endswith("\\"):
            break
    # As a shell does: a backslash at a line's end joins it with the next.
    words = shlex.split("\n".join(lines).replace("\\\n", " "))

    service = next(iter(load(Path(H20), cwd=ROOT).plans.values())).services[0]
    assert words[-len(service.argv) :] == list(service.argv)
    assert set(words[: -len(service.argv)]) == {
        f"{name}={value}" for name, value in service.environment.items()
    }


def test_a_plan_as_json_has_every_figure() -> None:
    hosts = json.loads(said("plan", H20, "--json"))

    service = hosts[0]["services"][0]
    assert service["argv"][0].endswith("/bin/vllm")
    assert service["memory"]["kv_tokens"] == 1_176_940
    assert service["memory"]["fits"] is True
    assert service["memory"]["overhead_bytes"] == 6 << 30


def test_a_claim_of_a_guide_is_shown_beside_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site(tmp_path, gpu="h20-96")
    monkeypatch.chdir(tmp_path)

    text = said("plan", "inventories/h20.py")

    assert "400,000 tokens; " in text
    assert "% of it" in text


def site(root: Path, **changes: Any) -> None:
    data: dict[str, Any] = {
        "gpu": "h20-141",
        "gpu_count": 8,
        "vllm": {"version": "0.33.0"},
        "services": [
            {
                "name": "m25",
                "model": "MiniMaxAI/MiniMax-M2.5",
                "revision": "f710177d938eff80b684d42c5aa84b382612f21f",
                "recipe": "tp4",
                "gpus": [0, 1, 2, 3],
                "port": 8000,
            }
        ],
    } | changes
    (root / "inventories").mkdir()
    (root / "group_data").mkdir()
    (root / "inventories" / "h20.py").write_text('h20 = ["a"]\n')
    text = "\n".join(f"{name} = {value!r}" for name, value in data.items())
    (root / "group_data" / "h20.py").write_text(text)


def test_fit_names_every_kind_and_says_what_does_not_fit() -> None:
    text = said("fit", "m2.5")

    for kind in catalog().gpus:
        assert kind in text
    assert "the recipe is for compute capability 9.0" in text
    assert "does not start" in text


def test_fit_of_one_kind_as_json() -> None:
    rows = json.loads(said("fit", "MiniMax-M2.5", "--kind", "h20-96", "--gpus", "4", "--json"))

    assert {row["gpu"] for row in rows} == {"h20-96"}
    assert max(row["gpus"] for row in rows) == 4
    tp4 = next(row for row in rows if row["recipe"] == "tp4")
    assert tp4["memory"]["fits"] is True


def test_fit_with_shorter_sequences_fits_where_full_ones_do_not() -> None:
    words = ("fit", "m2.5", "--kind", "h100-80", "--json")

    def dep8(*more: str) -> Any:
        rows = json.loads(said(*words, *more))
        return next(row for row in rows if row["recipe"] == "dep8")["memory"]

    assert not dep8()["fits"]
    assert dep8("--max-model-len", "65536")["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "m2.6"), "model 'm2.6' is not in the catalogue; did you mean 'm2.7'?"),
        (("fit", "m2.5", "--kind", "h2O-96"), "did you mean 'h20-96'?"),
        (("fit", "m1-40k", "--vllm", "0.33.0"), "supported 0.9.2 to 0.23.0"),
        (("fit", "m2.5", "--vllm", "new"), "is no version; write for example 0.33.0"),
    ],
)
def test_what_fit_cannot_answer_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = fleet(*words)

    assert done.exit_code == BAD_INPUT
    assert message in done.output
    assert done.output.count("\n") == 1


def test_the_picture_is_xml_with_a_bar_for_each_way_to_place_it(tmp_path: Path) -> None:
    target = tmp_path / "fit.svg"

    said("fit", "m2.5", "--kind", "h20-141", "--svg", str(target))

    root = ElementTree.parse(target).getroot()
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    bars = [element for element in root.iter() if element.tag.endswith("rect")]
    assert "tp4 (TP4)" in words
    assert "dep8 (DP8+EP)" in words
    assert len(bars) > 4


def test_the_catalogue_lists_models_recipes_and_kinds() -> None:
    text = said("catalogue")

    for name in (*catalog().models, *catalog().gpus):
        assert name in text
    for (_, name), recipe in catalog().recipes.items():
        assert recipe.base is not None or name in text


def test_the_catalogue_as_json_has_every_source() -> None:
    document = json.loads(said("catalogue", "--json"))

    tp4 = next(row for row in document["recipes"] if row["name"] == "tp4")
    assert tp4["args"]["reasoning-parser"]["source"] == "guide-m2.5"
    assert document["gpus"]["h20-141"]["memory_mib"] == 143771


def test_contradictions_are_printed_with_their_reasons() -> None:
    rows = json.loads(said("catalogue", "--contradictions", "--json"))

    assert len(rows) == len(catalog().contradictions)
    assert all(row["reason"] and row["truth"] for row in rows)
    assert "VLLM_USE_V1=0" in said("catalogue", "--contradictions")
