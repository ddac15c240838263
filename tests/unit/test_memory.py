"""Memory arithmetic, with the guides' own claims as its judge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleet.catalog import Claim, LoadedWeights, Measurement, Parallel, catalog
from fleet.memory import GIB, KV_DTYPE_BYTES, OVERHEAD_BYTES, Inputs, Memory, memory

M2 = "MiniMaxAI/MiniMax-M2.5"
M1 = "MiniMaxAI/MiniMax-M1-40k"


def held(
    model: str, kind: str, parallel: Parallel, *, utilisation: float = 0.9, **changes: int
) -> Memory:
    card = catalog().models[model]
    assert card.shape is not None
    assert card.loaded is not None
    inputs: dict[str, int] = {"max_model_len": card.context_tokens, "kv_element_bytes": 2} | changes
    return memory(
        Inputs(
            gpu_bytes=catalog().gpus[kind].memory_bytes,
            utilisation=utilisation,
            parallel=parallel,
            shape=card.shape,
            weights=card.loaded_as.get("experts_int8", card.loaded),
            context_tokens=card.context_tokens,
            **inputs,
        )
    )


CLAIMS = [
    pytest.param(model, claim, id=f"{model.split('/')[1]}-{claim.gpus}x{claim.gpu}")
    for claim in catalog().claims
    for model in claim.models
]


@pytest.mark.parametrize(("model", "claim"), CLAIMS)
def test_every_claim_of_the_guides_is_reached_within_a_fifth(model: str, claim: Claim) -> None:
    """One utilisation (vLLM's default when the guides were written) and one overhead for all."""
    recipe = catalog().recipes_of(model)[claim.recipe]

    found = held(model, claim.gpu, recipe.parallel)

    assert recipe.parallel.ranks == claim.gpus
    assert found.tokens == pytest.approx(claim.tokens, rel=0.2)


@pytest.mark.parametrize(
    "seen",
    catalog().measurements,
    ids=lambda seen: f"{seen.parallel.ranks}x{seen.gpu}-{seen.vllm}-{seen.kv_cache_dtype}",
)
def test_every_measured_capacity_is_met_within_a_fifth(seen: Measurement) -> None:
    """What vLLM itself reported, by the utilisation and KV type of that run; the same overhead."""
    found = held(
        seen.model,
        seen.gpu,
        seen.parallel,
        utilisation=seen.utilisation,
        kv_element_bytes=KV_DTYPE_BYTES[seen.kv_cache_dtype],
    )

    assert found.tokens == pytest.approx(seen.tokens, rel=0.2)


def test_m3s_ranks_hold_a_head_and_an_index_each() -> None:
    """45,312 bytes a token and rank at TP4 and at TP8: four KV heads, and an index on every rank."""
    four = held("MiniMaxAI/MiniMax-M3-MXFP8", "b200", Parallel(tensor=4))
    eight = held("MiniMaxAI/MiniMax-M3-MXFP8", "b200", Parallel(tensor=8))
    small = held(
        "MiniMaxAI/MiniMax-M3-MXFP8",
        "b200",
        Parallel(tensor=8),
        kv_element_bytes=1,
        index_element_bytes=1,
    )

    assert (four.token_bytes, eight.token_bytes, small.token_bytes) == (45_312, 45_312, 22_656)


def test_the_guides_four_claims_are_there() -> None:
    assert {
        (claim.models[0], claim.gpu, claim.gpus, claim.tokens) for claim in catalog().claims
    } == {
        (M2, "h20-96", 4, 400_000),
        (M2, "h20-141", 8, 3_000_000),
        (M1, "h800-80", 8, 2_000_000),
        (M1, "h20-96", 8, 5_000_000),
    }


def test_a_million_tokens_of_m2_take_the_guides_240_gb() -> None:
    found = held(M2, "h20-141", Parallel(tensor=8, expert=True))

    assert found.token_bytes * 8 == 253_952
    assert found.token_bytes * 8 * 1_000_000 / 1e9 == pytest.approx(240, rel=0.06)


def test_m2s_weights_are_the_guides_220_gb() -> None:
    found = held(M2, "h20-141", Parallel(tensor=4))

    assert found.weights_bytes * 4 / 1e9 == pytest.approx(220, rel=0.05)


def test_tensor_parallel_heads_are_repeated_beyond_the_kv_heads() -> None:
    eight = held(M2, "h20-141", Parallel(tensor=8, expert=True))
    sixteen = held(M2, "h20-141", Parallel(tensor=16, expert=True))

    assert sixteen.token_bytes == eight.token_bytes


def test_data_parallel_ranks_have_pools_of_their_own() -> None:
    """Attention is whole on each rank, experts are spread: less room for one sequence, none shared."""
    tensor = held(M2, "h200-141", Parallel(tensor=8, expert=True), utilisation=0.92)
    data = held(M2, "h200-141", Parallel(data=8, expert=True), utilisation=0.92)

    assert (tensor.pools, data.pools) == (1, 8)
    assert data.weights_bytes > tensor.weights_bytes
    assert data.pool_tokens == pytest.approx(390_000, rel=0.02)
    assert data.tokens == 8 * data.pool_tokens
    assert data.sequences == 8 * (data.kv_bytes // (196_608 * data.token_bytes)) > 0


def test_dep8_on_80_gib_cannot_hold_one_sequence_at_full_context() -> None:
    full = held(M2, "h100-80", Parallel(data=8, expert=True))
    quantised = held(M2, "h100-80", Parallel(data=8, expert=True), kv_element_bytes=1)

    assert not full.fits
    assert full.largest_max_model_len < 196_608
    assert full.sequences == 0
    assert quantised.fits


def test_fp8_halves_a_token() -> None:
    bf16 = held(M2, "h20-141", Parallel(tensor=4))
    fp8 = held(M2, "h20-141", Parallel(tensor=4), kv_element_bytes=1)

    assert fp8.token_bytes * 2 == bf16.token_bytes
    assert fp8.pool_tokens // 2 == bf16.pool_tokens


def test_linear_attention_keeps_a_state_for_each_sequence() -> None:
    found = held(M1, "h800-80", Parallel(tensor=8), max_model_len=1_000_000)

    assert found.state_bytes * 8 == 280 * (1 << 20)
    assert found.sequences == found.kv_bytes // (1_000_000 * found.token_bytes + found.state_bytes)


def test_the_largest_length_that_fits_really_is() -> None:
    found = held(M2, "h100-80", Parallel(data=8, expert=True))
    at_most = held(
        M2,
        "h100-80",
        Parallel(data=8, expert=True),
        max_model_len=found.largest_max_model_len,
    )
    beyond = held(
        M2,
        "h100-80",
        Parallel(data=8, expert=True),
        max_model_len=found.largest_max_model_len + 1,
    )

    assert at_most.fits
    assert not beyond.fits


def test_weights_that_do_not_fit_leave_no_tokens() -> None:
    found = held(M2, "h100-80", Parallel(tensor=2))

    assert found.kv_bytes < 0
    assert (found.pool_tokens, found.largest_max_model_len, found.sequences) == (0, 0, 0)
    assert not found.fits


def test_a_kv_cache_given_outright_is_not_more_than_there_is() -> None:
    given = held(M2, "h20-141", Parallel(tensor=4), kv_cache_bytes=10 * GIB)
    too_much = held(M2, "h20-141", Parallel(tensor=4), kv_cache_bytes=1000 * GIB)

    assert given.kv_bytes == 10 * GIB
    assert given.inputs.usable_bytes == given.inputs.gpu_bytes
    assert too_much.kv_bytes < 0
    assert not too_much.fits


def test_as_long_as_fits() -> None:
    whole = held(M2, "h100-80", Parallel(data=8, expert=True))
    auto = memory(replace(whole.inputs, max_model_len=None))

    assert auto.max_model_len == whole.largest_max_model_len
    assert auto.fits


def test_the_least_utilisation_really_is() -> None:
    least = held(M2, "h100-80", Parallel(tensor=4)).least_utilisation

    assert held(M2, "h100-80", Parallel(tensor=4), utilisation=least + 0.001).fits
    assert not held(M2, "h100-80", Parallel(tensor=4), utilisation=least - 0.001).fits


def test_pipeline_ranks_share_the_layers() -> None:
    found = held(M2, "h20-141", Parallel(tensor=4, pipeline=2))

    assert found.token_bytes == 31 * 2 * 256 * 2
    assert found.weights_bytes == pytest.approx(230.1e9 / 8, rel=0.001)


def test_a_latent_cache_is_whole_on_every_tensor_rank() -> None:
    shape = catalog().models[M2].shape
    assert shape is not None
    latent = shape.model_copy(update={"latent_dim": 576, "kv_heads": 1})
    inputs = Inputs(
        gpu_bytes=141 * GIB,
        utilisation=0.9,
        parallel=Parallel(tensor=8),
        shape=latent,
        weights=LoadedWeights(total_bytes=1),
        kv_element_bytes=2,
        max_model_len=1,
        context_tokens=196_608,
    )

    assert memory(inputs).token_bytes == 62 * 576 * 2
    assert inputs.overhead_bytes == OVERHEAD_BYTES
