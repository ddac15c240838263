"""Whatever group data says, the answer is a plan or one line for each thing that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fleet.cli import app
from fleet.errors import BAD_INPUT, Problem, SiteError
from fleet.inventory import load

SOUND: dict[str, Any] = {
    "gpu": "h20-141",
    "gpu_count": 8,
    "driver": {"version": "580.95.05"},
    "vllm": {"version": "0.33.0", "torch_backend": "auto", "packages": ["ray==2.50.0"]},
    "mirrors": {
        "apt": {"nvidia": {"url": "http://mirror.example/nvidia", "key": "keys/nvidia.asc"}},
        "index": "http://mirror.example/simple",
        "hub": "http://mirror.example/hub",
    },
    "services": [
        {
            "name": "m25",
            "model": "MiniMaxAI/MiniMax-M2.5",
            "revision": "f710177d938eff80b684d42c5aa84b382612f21f",
            "recipe": "tp4",
            "gpus": [0, 1, 2, 3],
            "port": 8000,
            "engine_port": 18000,
            "max_model_len": 65536,
            "gpu_memory_utilization": 0.9,
            "args": {
                "compilation-config": {"cudagraph_mode": "PIECEWISE"},
                "kv-cache-dtype": "fp8",
                "max-num-seqs": 64,
            },
            "env": {"VLLM_USE_DEEP_GEMM": "0"},
            "gate": {"expect": "Dodgers", "max_tokens": 64},
            "api_key": {"file": "keys/api"},
        }
    ],
    "rollout": {"batch": "10%"},
    "paths": {"models": "/srv/models"},
    "reviewed_revisions": [],
    "clock_tolerance_s": 30.0,
}

NUMBERS = st.integers() | st.floats()
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "",
        "0",
        "-1",
        "tp8",
        "dep8",
        "a100-80",
        "0.9.2",
        "9" * 400,
        "../..",
        "a b",
        "\0",
        "%s",
        "{}",
        "@",
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.binary(max_size=4)
VALUES = st.recursive(
    SCALARS | st.sets(st.integers(), max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS, inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)
KEYS = TEXTS | st.sampled_from(["prot", "Model", "gpu ", "__class__", "service", "max-model-len"])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in nested lists and dicts."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


PLACES = list(places(SOUND))


def changed(path: tuple[Any, ...], value: Any, kind: str, key: str) -> dict[str, Any]:
    """Sound data with one thing in it replaced, taken away, renamed or added."""
    data = copy.deepcopy(SOUND)
    holder: Any = data
    for part in path[:-1]:
        holder = holder[part]
    last = path[-1]
    if kind == "replace":
        holder[last] = value
    elif kind == "remove":
        del holder[last]
    elif isinstance(holder, dict):
        holder[key] = holder.pop(last) if kind == "rename" else value
    else:
        holder.append(value)
    return data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    for folder in ("inventories", "group_data", "keys"):
        (root / folder).mkdir()
    (root / "inventories" / "h20.py").write_text('h20 = ["a", "b"]\n')
    (root / "keys" / "nvidia.asc").write_text("key")
    (root / "keys" / "api").write_text("secret")
    return root


def write(site: Path, data: dict[str, Any]) -> None:
    constants = {"nan": float("nan"), "inf": float("inf")}
    lines = [f"{name} = {value!r}" for name, value in data.items() if name.isidentifier()]
    # repr() of nan and inf are names, which a person would write as float("nan").
    head = "".join(f'_{name} = float("{name}")\n{name} = _{name}\n' for name in constants)
    tail = "".join(f"del {name}\n" for name in constants)
    (site / "group_data" / "h20.py").write_text(head + "\n".join(lines) + "\n" + tail, "utf-8")


def problems(site: Path) -> tuple[Problem, ...]:
    """What is wrong with a site; nothing where it can be planned."""
    try:
        load(site / "inventories" / "h20.py", cwd=site)
    except SiteError as refused:
        return refused.problems or (Problem("", ""),)
    return ()


def test_the_sound_data_is_planned(site: Path) -> None:
    write(site, SOUND)

    assert list(load(site / "inventories" / "h20.py", cwd=site).plans) == ["a", "b"]


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    path=st.sampled_from(PLACES),
    value=VALUES,
    kind=st.sampled_from(["replace", "remove", "rename", "add"]),
    key=KEYS,
)
@example(path=("services", 0, "args"), value={"x": {1}}, kind="replace", key="")
@example(path=("services",), value=[], kind="replace", key="")
@example(path=("vllm", "version"), value="0.33.0\n", kind="replace", key="")
@example(path=("services", 0, "args", "max-num-seqs"), value=10**400, kind="replace", key="")
@example(path=("services", 0, "max_model_len"), value=10**400, kind="replace", key="")
@example(path=("gpu",), value={"name": "x", "memory_mib": 1}, kind="replace", key="")
def test_any_group_data_is_a_plan_or_one_line_for_each_fault(
    site: Path, path: tuple[Any, ...], value: Any, kind: str, key: str
) -> None:
    write(site, changed(path, value, kind, key))

    for problem in problems(site):
        assert problem.where.strip()
        assert problem.what.strip()
        assert "\n" not in str(problem)
        assert len(str(problem)) < 2000


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=80))
@example(text="gpu = h20")
@example(text="import os\nos._exit")
@example(text="raise SystemExit(0)")
@example(text="\0")
def test_any_text_as_group_data_is_refused_without_a_traceback(site: Path, text: str) -> None:
    (site / "group_data" / "h20.py").write_text(text, "utf-8", errors="surrogateescape")

    done = CliRunner().invoke(app, ["plan", str(site / "inventories" / "h20.py")])

    assert done.exit_code == BAD_INPUT
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "error: " in done.output


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=80))
@example(text="h20 = {'a': 1}")
@example(text="h20 = [('a', {'ssh_port': 'x'})]")
@example(text="h20 = ['']")
@example(text="h20 = [('a', {1: 2})]")
def test_any_text_as_inventory_is_refused_without_a_traceback(site: Path, text: str) -> None:
    write(site, SOUND)
    inventory = site / "inventories" / "other.py"
    inventory.write_text(text, "utf-8", errors="surrogateescape")

    done = CliRunner().invoke(app, ["plan", str(inventory)])

    assert done.exit_code == BAD_INPUT
    assert done.exception is None or isinstance(done.exception, SystemExit)
    inventory.unlink()


@settings(max_examples=40, deadline=None)
@given(words=st.lists(TEXTS, max_size=4))
def test_any_words_of_fit_are_answered_without_a_traceback(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["fit", *words])

    assert done.exception is None or isinstance(done.exception, SystemExit)
