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


def test_b11_weights_that_do_not_fit_name_what_does_with_the_sites_own_settings() -> None:
    message = problems_of(service(gpu_memory_utilization=0.6), gpu="h100-80")

    assert message == (
        "group_data/h20.py: services[0]: the weights of MiniMaxAI/MiniMax-M2.5 do not fit: 53.6 GiB a "
        "GPU and 6.0 GiB besides are needed, 47.8 GiB of 79.6 GiB are available at utilisation 0.6; "
        "gpu_memory_utilization of at least 0.9 or recipe 'tep8' on 8 GPUs fits"
    )
    plan_of(service(gpu_memory_utilization=0.9), gpu="h100-80")
    everything = service(gpu_memory_utilization=0.6, recipe="tep8", gpus=list(range(8)))
    plan_of(everything, gpu="h100-80")


def test_b11_a_recipe_is_not_offered_on_gpus_that_another_service_has() -> None:
    """L40S hold a quarter of the weights each, but not on four."""
    first, second = service(), service(name="other", port=8001, gpus=[4, 5, 6, 7])

    assert "recipe 'tep8' on 8 GPUs" in problems_of(first, gpu="l40s")
    message = problems_of(first, second, gpu="l40s")
    assert message.count("it needs more or larger GPUs") == 2
    assert "tep8" not in message


def test_b11_a_recipe_is_not_offered_that_would_be_refused() -> None:
    unknown = service(recipe="tp4-native", revision="0" * 40)

    message = problems_of(unknown, gpu="l40s")

    assert "recipe 'dep8'" not in message
    assert "'tep8'" not in message


@pytest.mark.parametrize(
    "model", ["MiniMaxAI/MiniMax-M1-40k", "MiniMaxAI/MiniMax-M2.5", "MiniMaxAI/MiniMax-M3-MXFP8"]
)
def test_b11_never_offers_what_is_there_already(model: str) -> None:
    card = catalog.catalog().models[model]
    version = card.oldest_vllm
    for name, recipe in catalog.catalog().recipes_of(model).items():
        data = service(
            model=model,
            revision=next(iter(card.remote_code.revisions)),
            recipe=name,
            gpus=list(range(recipe.parallel.ranks)),
            gpu_memory_utilization=0.5,
        )
        _, found = planned(data, gpu="h100-80", driver=None, vllm={"version": version})
        assert f"recipe {name!r} on" not in "\n".join(found)


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


@pytest.mark.parametrize("version", ["0.33.0+cu129", "0.19.1"])
def test_b18_a_wheel_for_cuda_12_runs_on_an_older_driver(version: str) -> None:
    plan_of(service(), driver={"version": "570.172.08"}, vllm={"version": version})


@pytest.mark.parametrize(
    ("version", "backend", "cuda"),
    [("0.33.0", "cu129", "13"), ("0.19.1", "cu130", "12"), ("0.19.1+cu118", "cu126", "11")],
)
def test_b18_a_torch_backend_of_another_cuda_than_the_wheels(
    version: str, backend: str, cuda: str
) -> None:
    """--torch-backend chooses torch; vLLM's own kernels are those of its wheel."""
    message = problems_of(service(), vllm={"version": version, "torch_backend": backend})

    assert f"vllm.torch_backend: {backend!r} is another CUDA than that of vLLM {version}" in message
    assert f"wheels, {cuda}; leave it out or write 'auto'" in message


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
        ({"recipe": "tq4"}, "'tq4' is no recipe of MiniMaxAI/MiniMax-M2.5; did you mean 'tp4'?"),
        ({"recipe": "tp4-responses-piecewise"}, "did you mean 'tp4-piecewise-responses'?"),
        (
            {"recipe": "tp8", "gpus": list(range(8))},
            "8 splits 1536 into 192, not a multiple of the FP8 block 128; use tp4, tep8, ",
        ),
        ({"recipe": "tp5"}, "5 does not divide 48 attention heads; use tp4, tep8, "),
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


@pytest.mark.parametrize("ready_timeout_s", [60, 3600])
def test_a_service_that_never_gets_ready_is_not_started_for_ever(ready_timeout_s: int) -> None:
    """systemd counts starts within an interval: all that it allows must fit, however late each ends."""
    gate = {"ready_timeout_s": ready_timeout_s}
    text = plan_of(service(gate=gate)).services[0].unit_text
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    longest_start_s = ready_timeout_s + int(values["RestartSec"])
    assert int(values["StartLimitBurst"]) * longest_start_s < int(values["StartLimitIntervalSec"])
    assert values["Restart"] == "always"


@pytest.mark.parametrize(
    "name",
    [
        *("--data-parallel-size=2", "--api-key=secret", "max-model-len=196608000", "kv=fp8"),
        *("a b", "", "-tp", "--", "a\nb", "attention-config."),
    ],
)
def test_b17_an_options_name_is_only_its_name(name: str) -> None:
    with pytest.raises(ValueError, match="is no option's name; write it and its value apart"):
        planned(service(args={name: True}))


@pytest.mark.parametrize(
    "flag",
    [
        *("nnodes", "headless", "data-parallel-size-local", "decode-context-parallel-size"),
        *("prefill_context_parallel_size", "tp", "uds", "enable-expert-parallel"),
    ],
)
def test_b17_what_spreads_an_engine_is_not_a_sites_to_set(flag: str) -> None:
    assert f"--{flag.replace('_', '-')} is set by" in problems_of(service(args={flag: 2}))


def test_b17_a_flag_file_is_refused() -> None:
    assert "--config hides flags" in problems_of(service(args={"config": "/etc/vllm.yaml"}))


@pytest.mark.parametrize("value", [None, False])
def test_what_is_taken_away_must_be_there(value: object) -> None:
    message = problems_of(service(args={"trust-remote-cod": value}))

    assert "--trust-remote-cod: the recipe has none to take away" in message
    assert "did you mean 'trust-remote-code'?" in message


def test_false_turns_off_what_is_on_by_itself() -> None:
    argv = plan_of(service(args={"enable-prefix-caching": False})).services[0].argv

    assert "--no-enable-prefix-caching" in argv


def test_an_option_of_several_values_gets_them_as_words() -> None:
    args = {"cudagraph-capture-sizes": [1, 2, 4], "middleware": ["a.b", "c.d"]}

    argv = plan_of(service(args=args)).services[0].argv

    start = argv.index("--cudagraph-capture-sizes")
    assert argv[start : start + 4] == ("--cudagraph-capture-sizes", "1", "2", "4")
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--middleware"] == ["a.b", "c.d"]


M3 = {
    "model": "MiniMaxAI/MiniMax-M3-MXFP8",
    "revision": "c5454eb03678d8710e54a4e0fc681b9f3b4a3dba",
    "recipe": "tp8-128k",
    "gpus": list(range(8)),
}


@pytest.mark.parametrize("value", [64, None])
def test_what_a_model_cannot_do_without_stays(value: int | None) -> None:
    message = problems_of(service(**M3, args={"block-size": value}))

    assert "--block-size 128 is mandatory: its sparse attention works in blocks of 128" in message


def test_an_index_in_fp8_counts_in_every_form() -> None:
    sizes = {
        plan_of(service(**M3, args=args)).services[0].memory.token_bytes  # type: ignore[union-attr]
        for args in (
            {"attention-config": {"indexer_kv_dtype": "fp8"}},
            {"attention-config": '{"indexer_kv_dtype": "fp8"}'},
            {"attention-config.indexer_kv_dtype": "fp8"},
        )
    }

    assert sizes == {30_720 + 57 * 128}


def test_an_unknown_kv_type_is_counted_and_not_passed_over() -> None:
    args = {"kv-cache-dtype": "int8_per_token_head"}

    assert "the weights of" in problems_of(service(args=args), gpu="l40s")
    notes = plan_of(service(args=args)).services[0].notes
    assert any("is counted as two bytes an element" in note for note in notes)


def test_a_kv_cache_that_is_more_than_there_is_room_for() -> None:
    message = problems_of(service(args={"kv-cache-memory-bytes": "500G"}))

    assert "kv-cache-memory-bytes 500.0 GiB is more than the " in message


def test_a_kv_cache_given_outright_looks_at_no_utilisation() -> None:
    args = {"kv-cache-memory-bytes": "40G"}

    held = plan_of(service(args=args, gpu_memory_utilization=0.3)).services[0].memory

    assert held is not None
    assert held.kv_bytes == 40 << 30


def test_sequences_at_once_are_no_more_than_are_served() -> None:
    args = {"max-num-seqs": 8}

    held = plan_of(service(args=args, max_model_len=4096)).services[0].memory

    assert held is not None
    assert held.sequences == 8


def test_what_memory_does_not_count_is_said() -> None:
    draft = {"speculative-config": {"method": "eagle3", "model": "x/y"}}

    notes = plan_of(service(args=draft)).services[0].notes

    assert "memory does not count the draft model's weights and cache" in notes


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("h200", "did you mean 'h200-141' or 'h200-141-nvl'?"),
        ("h20", "did you mean 'h20-96' or 'h20-141'?"),
        ("H20-3e", "did you mean 'h20-141'?"),
        ("h2O-96", "did you mean 'h20-96'?"),
    ],
)
def test_a_gpu_kind_is_found_by_the_name_that_people_use(word: str, hint: str) -> None:
    message = problems_of(service(), gpu=word)

    assert hint in message
    assert message.count("\n") == 0


def test_an_older_vllm_than_its_publishers_name_is_told() -> None:
    m27 = service(
        model="MiniMaxAI/MiniMax-M2.7", revision="d494266a4affc0d2995ba1fa35c8481cbd84294b"
    )

    notes = plan_of(m27, vllm={"version": "0.19.1"}).services[0].notes

    assert "vLLM's recipe for M2.7 asks for vLLM >=0.20.0" in notes
    assert any("non-commercial" in note for note in notes)


def test_garbled_answers_are_told_of_before_0_13() -> None:
    notes = plan_of(service(), vllm={"version": "0.11.2"}).services[0].notes

    assert any(note.startswith("answers may be garbled before 0.13.0") for note in notes)


def test_flags_are_judged_whatever_else_is_wrong() -> None:
    message = problems_of(
        service(recipe="dep8", gpus=list(range(8)), args={"max-num-sqs": 8}), gpu="h100-80"
    )

    assert "does not fit" in message
    assert "--max-num-sqs" in message


def test_a_missing_number_of_gpus_is_one_thing() -> None:
    message = problems_of(service(), gpu_count=0)

    assert "services[0].gpus: gpu_count is not set; say how many GPUs the host has" in message


def test_the_api_servers_options_are_its_own() -> None:
    message = problems_of(service(**M1, args={"api-server-count": 2}), vllm={"version": "0.9.2"})

    assert "--api-server-count" in message


def test_b17_another_name_of_a_managed_option() -> None:
    message = problems_of(service(args={"device-memory-utilization": 0.5}))

    assert "--device-memory-utilization is set by 'gpu_memory_utilization'" in message


def test_fp4_weights_on_a_gpu_without_fp4() -> None:
    data = service(
        model="nvidia/MiniMax-M2.5-NVFP4",
        revision="b6220d658389629b9d507d4b2bb314f41fea7898",
        recipe="nvfp4-tp4",
    )

    assert "this checkpoint (nvfp4) needs compute capability 10.0; NVIDIA H200 has 9.0" in (
        problems_of(data, gpu="h200-141")
    )


RECIPE_FILE = """
meta: {title: Test}
model:
  model_id: MODEL
  min_vllm_version: "0.20.0"
  architecture: moe
  parameter_count: "671B"
  active_parameters: "37B"
  context_length: 163840
variants:
  default: {precision: fp8, vram_minimum_gb: 805}
compatible_strategies: [single_node_tp]
"""


def from_file(model: str, gpu: str) -> tuple[Any, str]:
    return from_text(RECIPE_FILE.replace("MODEL", model), gpu)


def from_text(text: str, gpu: str) -> tuple[Any, str]:
    data = {
        "gpu": gpu,
        "gpu_count": 8,
        "vllm": {"version": "0.33.0"},
        "services": [service(model="recipes/x.yaml", recipe="single_node_tp", gpus=list(range(8)))],
    }
    planner_ = Planner({}, Texts({}, {}, {"recipes/x.yaml": text}))
    plan = planner_.plan("a", "h20", HostSpec.model_validate(data))
    return plan, "\n".join(map(str, planner_.problems))


def test_a_recipe_files_weights_alone_can_be_too_much() -> None:
    _, message = from_file("org/Big", "l40s")
    plan, none = from_file("org/Big", "h200-141")

    assert "the weights of org/Big do not fit: about 671 GB on 8 GPUs" in message
    assert none == ""
    assert "memory is unknown: give model_config_file" in plan.services[0].notes


def test_a_recipe_file_of_a_model_that_the_catalogue_has_takes_its_figures() -> None:
    plan, message = from_file("MiniMaxAI/MiniMax-M3-MXFP8", "b300")

    assert message == ""
    assert plan.services[0].memory is not None


@pytest.mark.parametrize("share", ["lots", "nan", "inf", "95"])
def test_a_recipe_files_utilisation_that_is_no_share(share: str) -> None:
    text = RECIPE_FILE.replace("MODEL", "org/Big").replace(
        "  context_length: 163840",
        f'  context_length: 163840\n  base_args: ["--gpu-memory-utilization", "{share}"]',
    )

    _, message = from_text(text, "h200-141")

    assert "services[0].args: --gpu-memory-utilization " in message
    assert share in message
    assert "is not in (0, 1]" in message
