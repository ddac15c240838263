"""A host's plan: placement, argv, environment, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from fleet import catalog, planner
from fleet.planner import Planner, Texts
from fleet.spec import HostSpec
from tests.unit.state import REVISION, plan_of, planned, service

M1 = {
    "model": "MiniMaxAI/MiniMax-M1-40k",
    "revision": "2d1d1c2f00c97fc1245bfce7648649b76e0a8e6e",
    "recipe": "m1-tp8",
    "gpus": list(range(8)),
}


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
    m1 = service(**M1)

    planned_m1 = plan_of(m1, vllm={"version": "0.9.2"}).services[0]

    assert planned_m1.argv[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
    assert ("--quantization", "experts_int8") in pairwise(planned_m1.argv)
    assert planned_m1.environment["VLLM_USE_V1"] == "0"
    assert "--shutdown-timeout" not in planned_m1.argv


def test_a_variable_that_newer_versions_do_not_know_is_left_out() -> None:
    m1 = service(**M1)

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


def with_recipe(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A recipe `other` of the M2 family: tp4 with changes."""
    known = catalog.catalog()
    recipe = known.recipes["minimax-m2", "tp4"].model_copy(update=changes)
    recipes = {**known.recipes, ("minimax-m2", "other"): recipe}
    changed = known.model_copy(update={"recipes": recipes})
    monkeypatch.setattr(planner, "catalog", lambda: changed)


def test_b10_pure_tp8_breaks_the_fp8_block_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    with_recipe(monkeypatch, parallel=catalog.Parallel(tensor=8))

    message = problems_of(service(recipe="other", gpus=list(range(8))))

    assert message == (
        "group_data/h20.py: services[0].recipe: 8 splits 1536 into 192, not a multiple of the FP8 "
        "block 128; use tp4, tep8, tp4-native, tep4, dep8, tp4-hopper or tep8-hopper"
    )


def test_b10_data_parallelism_slices_experts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_recipe(monkeypatch, parallel=catalog.Parallel(data=8))

    assert "8 splits 1536 into 192" in problems_of(service(recipe="other", gpus=list(range(8))))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 5, "expert": True}, "5 does not divide 48 attention heads"),
        ({"tensor": 3, "expert": True}, "3 neither divides 8 KV heads nor is a multiple of them"),
        ({"data": 6, "expert": True}, "6 does not divide 256 experts"),
    ],
)
def test_b10_heads_and_experts_must_divide(
    monkeypatch: pytest.MonkeyPatch, parallel: dict[str, Any], message: str
) -> None:
    ranks = catalog.Parallel(**parallel)
    with_recipe(monkeypatch, parallel=ranks)

    found = problems_of(service(recipe="other", gpus=list(range(ranks.ranks))))

    assert f"{message}; use tp4, tep8" in found


def test_b11_one_sequence_that_does_not_fit_names_what_does() -> None:
    message = problems_of(service(recipe="dep8", gpus=list(range(8))), gpu="h100-80")

    assert message == (
        "group_data/h20.py: services[0]: does not fit: one sequence of 196608 tokens needs 46.5 GiB "
        "of KV cache a GPU, 36.1 GiB are available; max_model_len up to 152620 or recipe 'tep8' on 8 "
        "GPUs fits"
    )


def test_b11_what_is_named_as_fitting_does() -> None:
    plan = plan_of(service(recipe="dep8", gpus=list(range(8)), max_model_len=152620), gpu="h100-80")

    assert plan.services[0].memory is not None
    assert plan.services[0].memory.fits
    assert "does not fit" in problems_of(
        service(recipe="dep8", gpus=list(range(8)), max_model_len=152621), gpu="h100-80"
    )


def test_b11_weights_that_do_not_fit_name_a_recipe_that_does() -> None:
    message = problems_of(service(gpu_memory_utilization=0.6), gpu="h100-80")

    assert message == (
        "group_data/h20.py: services[0]: the weights of MiniMaxAI/MiniMax-M2.5 do not fit: 53.6 GiB a "
        "GPU and 6.0 GiB besides are needed, 47.8 GiB of 79.6 GiB are available at utilisation 0.6; "
        "recipe 'tep4' on 4 GPUs fits"
    )


def test_b11_more_than_the_model_takes() -> None:
    assert problems_of(service(max_model_len=200_000)) == (
        "group_data/h20.py: services[0]: max_model_len 200000 is more than MiniMaxAI/MiniMax-M2.5 "
        "takes; set 196608 or less"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_b14_a_public_address_for_vllm_itself(host: str) -> None:
    message = problems_of(service(args={"host": host}))

    assert f"services[0].args: --host {host} exposes unauthenticated endpoints" in message


def test_b15_remote_code_at_a_revision_that_nobody_knows() -> None:
    message = problems_of(service(revision="0" * 40))

    assert message == (
        "group_data/h20.py: services[0].revision: --trust-remote-code runs Python of "
        "MiniMaxAI/MiniMax-M2.5, which is not in the catalogue at this revision; review it and name "
        "the commit in reviewed_revisions, or set args['trust-remote-code'] to None: vLLM needs none"
    )


@pytest.mark.parametrize(
    ("changes", "host"),
    [
        ({}, {"reviewed_revisions": ["0" * 40]}),
        ({"args": {"trust-remote-code": None}}, {}),
        ({"recipe": "tp4-native"}, {}),
    ],
)
def test_b15_ways_out(changes: dict[str, Any], host: dict[str, Any]) -> None:
    plan_of(service(revision="0" * 40, **changes), **host)


def test_b18_wheels_that_need_a_newer_driver() -> None:
    message = problems_of(service(), driver={"version": "570.172.08"})

    assert message == (
        "group_data/h20.py: driver.version: 570.172.08 is too old for vLLM 0.33.0, whose wheels are "
        "for CUDA 13 and need driver 580 or later; declare a 580 driver, or a vLLM that is built for "
        "CUDA 12 (its version ends in +cu129; up to 0.19 all are)"
    )


@pytest.mark.parametrize("vllm", [{"version": "0.33.0+cu129"}, {"version": "0.33.0"}])
def test_b18_by_the_wheels_own_cuda(vllm: dict[str, Any]) -> None:
    backend = {} if "+" in vllm["version"] else {"torch_backend": "cu129"}

    plan_of(service(), driver={"version": "570.172.08"}, vllm=vllm | backend)


def test_b18_deepgemm_before_hopper() -> None:
    message = problems_of(
        service(recipe="tp4-native", env={"VLLM_USE_DEEP_GEMM": "1"}), gpu="a100-80"
    )

    assert "services[0].env: VLLM_USE_DEEP_GEMM=1 needs compute capability 9.0" in message
    assert "NVIDIA A100-SXM4-80GB has 8.0; set it to 0" in message


def test_a_gpu_of_another_generation_than_the_recipes() -> None:
    message = problems_of(service(recipe="tp4-hopper"), gpu="b200")

    assert (
        "services[0].recipe: the recipe is for compute capability 9.0; NVIDIA B200 has 10.0; use tp4"
        in message
    )


def test_a_gpu_that_the_catalogue_lacks_can_be_described() -> None:
    described = {
        "name": "NVIDIA H20X",
        "memory_mib": 196_000,
        "compute_capability": "9.0",
        "nvswitch": True,
    }

    plan = plan_of(service(), gpu=described)

    assert plan.gpu is not None
    assert plan.gpu_name == "NVIDIA H20X"
    assert plan.services[0].memory is not None


@pytest.mark.parametrize("name", ["proxy", "job-release"])
def test_a_name_of_our_own_units_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is a name of our own units"):
        planned(service(name=name))


def test_b9_a_gpu_recipe_on_a_host_without_gpus() -> None:
    message = problems_of(service(gpus=[]), gpu=None, gpu_count=0, driver=None)

    assert "services[0].gpus: recipe 'tp4' wants 4 GPUs; declare gpu and gpu_count" in message


def test_a_recipe_for_processors_on_a_host_with_gpus() -> None:
    message = problems_of(service(recipe="cpu", gpus=[]))

    assert "'cpu' is for hosts without GPUs; NVIDIA H20-3e is declared" in message


def test_notes_say_what_a_person_should_know() -> None:
    notes = plan_of(service(**M1), vllm={"version": "0.23.0"}, gpu="h200-141").services[0].notes

    assert any("has 'm1-tp8' for h800-80 or h20-96, not for h200-141" in note for note in notes)
    assert any(note.startswith("max_model_len is the recipe's 4096; up to ") for note in notes)
    assert any(note.startswith("VLLM_USE_V1 of the recipe is left out") for note in notes)


def test_a_torch_backend_gives_way_to_the_sites_index() -> None:
    vllm = {"version": "0.33.0", "torch_backend": "auto"}
    free = plan_of(service(), vllm=vllm)
    mirrored = plan_of(service(), vllm=vllm, mirrors={"index": "http://mirror.example/simple"})

    assert free.release.torch_backend == "auto"
    assert mirrored.release.torch_backend is None
    assert mirrored.services[0].notes[0].startswith("torch_backend is left out")


def test_b19_a_model_that_this_vllm_no_longer_serves() -> None:
    m1 = service(**M1)

    message = problems_of(m1, vllm={"version": "0.33.0"})

    assert "vllm.version: 0.33.0 does not serve MiniMaxAI/MiniMax-M1-40k" in message
    assert "supported 0.9.2 to 0.23.0" in message


@pytest.mark.parametrize("flag", ["--port", "tensor_parallel_size", "api-key"])
def test_b17_a_managed_flag_names_the_key_to_use(flag: str) -> None:
    assert "is set by" in problems_of(service(args={flag: "1"}))


def test_b17_the_dev_mode_is_refused() -> None:
    assert "VLLM_SERVER_DEV_MODE" in problems_of(service(env={"VLLM_SERVER_DEV_MODE": "1"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "MiniMaxAI/MiniMax-M25"}, "did you mean 'MiniMaxAI/MiniMax-M2.5'?"),
        ({"recipe": "tp5"}, "'tp5' is no recipe of MiniMaxAI/MiniMax-M2.5; did you mean 'tp4'?"),
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
    planner = Planner({}, Texts({SecretReference(env="KEY"): "very-secret"}, {}, {}))
    plan = planner.plan("a", "h20", spec)

    assert plan is not None
    assert "very-secret" not in repr(plan)
    assert "very-secret" not in plan.services[0].unit_text
    (holder,) = (file for file in plan.services[0].files if "very-secret" in file.content)
    assert (holder.mode, holder.path.endswith("/secrets.env")) == ("600", True)
