"""A host's plan: placement, argv, environment, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from fleet.plan import Planner
from fleet.spec import HostSpec
from tests.unit.state import REVISION, plan_of, planned, service


def problems_of(*services: dict[str, Any], **changes: Any) -> str:
    plan, problems = planned(*services, **changes)
    assert plan is None
    return "\n".join(problems)


def test_argv_is_the_guides_command() -> None:
    argv = plan_of(service()).services[0].argv

    assert argv[0].endswith("/bin/vllm")
    assert argv[1] == "serve"
    assert argv[2].endswith(f"/MiniMaxAI/MiniMax-M2.5/{REVISION}")
    assert "--trust-remote-code" in argv
    assert "--enable-auto-tool-choice" in argv
    for pair in (
        ("--served-model-name", "MiniMaxAI/MiniMax-M2.5"),
        ("--tensor-parallel-size", "4"),
        ("--tool-call-parser", "minimax_m2"),
        ("--reasoning-parser", "minimax_m2_append_think"),
        ("--host", "127.0.0.1"),
        ("--port", "18000"),
    ):
        assert pair in pairwise(argv)


def test_tep8_is_the_guides_eight_gpu_command() -> None:
    argv = plan_of(service(recipe="tep8", gpus=list(range(8)))).services[0].argv

    assert "--enable-expert-parallel" in argv
    assert ("--tensor-parallel-size", "8") in pairwise(argv)


def test_m1_is_served_as_its_guide_does() -> None:
    m1 = service(model="MiniMaxAI/MiniMax-M1-40k", recipe="m1-tp8", gpus=list(range(8)))

    planned_m1 = plan_of(m1, vllm={"version": "0.9.2"}).services[0]

    assert planned_m1.argv[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
    assert ("--quantization", "experts_int8") in pairwise(planned_m1.argv)
    assert planned_m1.environment["VLLM_USE_V1"] == "0"
    assert "--shutdown-timeout" not in planned_m1.argv


def test_a_variable_that_newer_versions_do_not_know_is_left_out() -> None:
    m1 = service(model="MiniMaxAI/MiniMax-M1-40k", recipe="m1-tp8", gpus=list(range(8)))

    assert "VLLM_USE_V1" not in plan_of(m1, vllm={"version": "0.23.0"}).services[0].environment


def test_a_sites_arguments_override_the_recipes() -> None:
    args = {
        "reasoning-parser": "minimax_m2",
        "enable_auto_tool_choice": None,
        "compilation-config": {"cudagraph_mode": "PIECEWISE"},
    }

    argv = plan_of(service(args=args)).services[0].argv

    pairs = list(pairwise(argv))
    assert ("--reasoning-parser", "minimax_m2") in pairs
    assert argv.count("--reasoning-parser") == 1
    assert "--enable-auto-tool-choice" not in argv
    assert ("--compilation-config", '{"cudagraph_mode":"PIECEWISE"}') in pairs


def test_b9_more_ranks_than_gpus() -> None:
    message = problems_of(service(recipe="tep8"))

    assert "services[0].gpus: recipe 'tep8' runs 8 ranks on 4 GPUs" in message


def test_b9_one_gpu_for_two_services() -> None:
    message = problems_of(service(), service(name="other", port=8001, gpus=[3, 4, 5, 6]))

    assert "services[1].gpus: GPU 3 is used by 'm25' and 'other'; give each its own" in message


def test_b9_one_port_for_two_services() -> None:
    message = problems_of(service(), service(name="other", gpus=[4, 5, 6, 7]))

    assert "services[1].port: port 8000 is used by 'm25' (port) and 'other' (port)" in message
    assert "port 18000 is used by 'm25' (engine_port) and 'other' (engine_port)" in message


def test_b9_a_public_port_that_is_anothers_engine_port() -> None:
    message = problems_of(service(), service(name="other", gpus=[4, 5, 6, 7], port=18000))

    assert "port 18000 is used by 'm25' (engine_port) and 'other' (port)" in message


def test_b9_a_gpu_that_the_host_does_not_have() -> None:
    assert "GPU 8 of 8" in problems_of(service(gpus=[5, 6, 7, 8]))


def test_b10_pure_tp8_breaks_the_fp8_block_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from fleet import catalog, plan

    known = catalog.catalog()
    tp8 = known.recipes["tp4"].model_copy(update={"parallel": catalog.Parallel(tensor=8)})
    recipes = {**known.recipes, "tp8": tp8}
    monkeypatch.setattr(plan, "catalog", lambda: known.model_copy(update={"recipes": recipes}))

    message = problems_of(service(recipe="tp8", gpus=list(range(8))))

    assert message.endswith(
        "8 splits 1536 into 192, not a multiple of the FP8 block 128; use tp4, tep8 or dep8"
    )


def test_b19_a_model_that_this_vllm_no_longer_serves() -> None:
    m1 = service(model="MiniMaxAI/MiniMax-M1-40k", recipe="m1-tp8", gpus=list(range(8)))

    message = problems_of(m1, vllm={"version": "0.33.0"})

    assert "vllm.version: 0.33.0 does not serve MiniMaxAI/MiniMax-M1-40k" in message
    assert ">=0.9.2,<=0.23.0" in message


@pytest.mark.parametrize("flag", ["--port", "tensor_parallel_size", "api-key"])
def test_b17_a_managed_flag_names_the_key_to_use(flag: str) -> None:
    assert "is set by" in problems_of(service(args={flag: "1"}))


def test_b17_the_dev_mode_is_refused() -> None:
    assert "VLLM_SERVER_DEV_MODE" in problems_of(service(env={"VLLM_SERVER_DEV_MODE": "1"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "MiniMaxAI/MiniMax-M25"}, "did you mean 'MiniMaxAI/MiniMax-M2.5'?"),
        ({"recipe": "tp5"}, "'tp5' is no recipe"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    changes: dict[str, Any], message: str
) -> None:
    assert message in problems_of(service(**changes))


def test_the_stamp_changes_with_a_flag_and_only_then() -> None:
    first, again = plan_of(service()).services[0], plan_of(service()).services[0]
    changed = plan_of(service(max_model_len=131072)).services[0]

    assert first.stamp == again.stamp
    assert changed.stamp != first.stamp
    assert f"FLEET_STAMP={first.stamp}" in first.unit_text


def test_the_release_id_changes_with_what_goes_in() -> None:
    first = plan_of(service()).release
    other = plan_of(service(), vllm={"version": "0.33.0", "packages": ["ray==2.50.0"]}).release

    assert first.id != other.id
    assert other.requirements == ("vllm==0.33.0", "ray==2.50.0")


def test_a_nul_character_is_refused() -> None:
    assert "NUL" in problems_of(service(args={"chat-template": "a\0b"}))


def test_a_missing_api_key_is_refused() -> None:
    message = problems_of(service(api_key={"file": "secrets/api-key"}))

    assert "services[0].api_key: secrets/api-key is missing or empty on this machine" in message


def test_a_secret_is_in_its_own_file_and_nowhere_else() -> None:
    from fleet.spec import SecretReference

    data = service(api_key={"env": "KEY"})
    spec = HostSpec.model_validate(
        {"gpu": "h20-141", "gpu_count": 8, "vllm": {"version": "0.33.0"}, "services": [data]}
    )
    planner = Planner({}, {SecretReference(env="KEY"): "very-secret"}, {})
    plan = planner.plan("a", "h20", spec)

    assert plan is not None
    assert "very-secret" not in repr(plan)
    assert "very-secret" not in plan.services[0].unit_text
    (holder,) = (file for file in plan.services[0].files if "very-secret" in file.content)
    assert (holder.mode, holder.path.endswith("/secrets.env")) == ("600", True)
