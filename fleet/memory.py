"""Does it fit: weights, KV cache and sequences of a service, in bytes and tokens.

docs/memory.md explains the arithmetic by an example. It rests on what is declared (GPU kind, recipe,
utilisation) and on one assumption, OVERHEAD_BYTES; nothing is fitted to a case.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleet.catalog import LoadedWeights, Parallel, Shape

GIB = 1 << 30

OVERHEAD_BYTES = 6 * GIB
"""What a GPU holds besides weights and KV cache while it serves: CUDA context, NCCL's buffers, CUDA
graphs, and activations of the largest batch. An assumption, the same for every model and kind; what vLLM
reported on the machines of the catalogue's measurements implies 5.2 to 7.7 GiB. With it the arithmetic
comes within 20 % of each capacity that the guides state, and of each that was measured
(tests/unit/test_memory.py)."""

KV_DTYPE_BYTES = {
    "auto": 2,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "fp8_inc": 1,
    "float32": 4,
}
"""Bytes of one element by --kv-cache-dtype; `auto` is the model's own type, which is bf16 here. For any
other two bytes are counted, which is more than it takes."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a service's memory is worked out from. Sizes in bytes, `utilisation` in (0, 1].

    `kv_cache_bytes` is --kv-cache-memory-bytes: KV cache per GPU given outright, for which vLLM looks at
    no utilisation. `max_model_len` is the longest sequence asked for, None for as long as fits (`auto`),
    `context_tokens` the longest that the model takes, `max_sequences` --max-num-seqs of one pool.
    """

    gpu_bytes: int
    utilisation: float
    parallel: Parallel
    shape: Shape
    weights: LoadedWeights
    kv_element_bytes: int
    index_element_bytes: int = 2
    max_model_len: int | None
    context_tokens: int
    max_sequences: int | None = None
    kv_cache_bytes: int | None = None
    overhead_bytes: int = OVERHEAD_BYTES

    @property
    def usable_bytes(self) -> int:
        """What vLLM may take of one GPU."""
        if self.kv_cache_bytes is not None:
            return self.gpu_bytes
        return int(self.gpu_bytes * self.utilisation)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a service's GPUs hold. Bytes are per GPU; a pool is the KV cache of one data-parallel rank,
    and a sequence lives in one pool."""

    inputs: Inputs
    weights_bytes: int
    kv_bytes: int
    """KV cache; negative where the weights alone are too much."""
    token_bytes: int
    """KV cache of one token."""
    state_bytes: int
    """Kept for each sequence, however long."""
    pools: int
    pool_tokens: int
    max_model_len: int
    """Longest sequence that is served: what was asked for, or as long as fits."""
    largest_max_model_len: int
    """The longest sequence that a pool holds and the model takes; 0 where none fits."""
    sequences: int
    """Sequences of max_model_len tokens that all pools hold and serve together at one time."""

    @property
    def tokens(self) -> int:
        """KV tokens of all pools."""
        return self.pool_tokens * self.pools

    @property
    def fits(self) -> bool:
        """Whether vLLM starts: it refuses when one sequence of max_model_len has no room."""
        return self.largest_max_model_len >= self.max_model_len > 0

    @property
    def needed_kv_bytes(self) -> int:
        """KV cache per GPU that one sequence of max_model_len takes."""
        return self.max_model_len * self.token_bytes + self.state_bytes

    @property
    def least_utilisation(self) -> float:
        """The share of a GPU from which on one sequence of max_model_len has room."""
        needed = self.weights_bytes + self.inputs.overhead_bytes + self.needed_kv_bytes
        return needed / self.inputs.gpu_bytes


def memory(inputs: Inputs) -> Memory:
    """Works out what the GPUs of one service hold.

    Layers are spread over pipeline ranks, heads and dense weights over tensor ranks. Routed experts are
    spread over tensor and data ranks alike, with expert parallelism (whole experts) and without it
    (slices): vLLM flattens both for its fused experts. KV heads are repeated where there are more
    tensor ranks than heads; a latent or index cache is the same on every tensor rank.
    """
    parallel, shape, weights = inputs.parallel, inputs.shape, inputs.weights
    group = parallel.tensor * parallel.pipeline
    dense = weights.total_bytes - weights.expert_bytes
    weights_bytes = _share(dense, group) + _share(weights.expert_bytes, parallel.ranks)
    heads = 1 if shape.latent_dim else max(1, shape.kv_heads // parallel.tensor)
    kept = _share(shape.attention_layers, parallel.pipeline) * heads * shape.kv_elements
    index = _share(shape.index_layers, parallel.pipeline) * shape.index_dim
    token_bytes = kept * inputs.kv_element_bytes + index * inputs.index_element_bytes
    state_bytes = _share(shape.state_bytes, group)
    kv_bytes = inputs.usable_bytes - weights_bytes - inputs.overhead_bytes
    if inputs.kv_cache_bytes is not None:
        # More than there is would be found out when it is allocated, minutes after the start.
        enough = kv_bytes >= inputs.kv_cache_bytes
        kv_bytes = inputs.kv_cache_bytes if enough else kv_bytes - inputs.kv_cache_bytes
    room = max(0, kv_bytes)
    longest = min(max(0, room - state_bytes) // token_bytes, inputs.context_tokens)
    served = longest if inputs.max_model_len is None else inputs.max_model_len
    sequences = room // (max(served, 1) * token_bytes + state_bytes)
    if inputs.max_sequences is not None:
        sequences = min(sequences, inputs.max_sequences)
    return Memory(
        inputs=inputs,
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        token_bytes=token_bytes,
        state_bytes=state_bytes,
        pools=parallel.data,
        pool_tokens=room // token_bytes,
        max_model_len=served,
        largest_max_model_len=longest,
        sequences=sequences * parallel.data,
    )


def _share(whole: int, parts: int) -> int:
    """The largest of equal parts."""
    return -(-whole // parts)


def gib(size_bytes: int) -> str:
    """`46.5 GiB`."""
    return f"{size_bytes / GIB:.1f} GiB"
