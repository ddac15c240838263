"""In which order hosts are cut over: one canary for each group, then batches across all groups."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil


def batch_size(batch: int | str, hosts: int) -> int:
    """Hosts in a batch: a count as it is, `"10%"` as that share of `hosts`, rounded up."""
    if isinstance(batch, int):
        return batch
    return max(1, ceil(hosts * int(batch.removesuffix("%")) / 100))


def waves(hosts: Sequence[tuple[str, str]], size: int) -> tuple[tuple[str, ...], ...]:
    """Waves of host names for `(host, group)` pairs in inventory order.

    The first host of each group is a wave of its own, one after another, so that a bad configuration
    of one group is met by one host and nothing else is touched. The rest follow, `size` at a time.
    """
    canaries: dict[str, str] = {}
    for name, group in hosts:
        canaries.setdefault(group, name)
    first = set(canaries.values())
    rest = [name for name, _ in hosts if name not in first]
    batches = [tuple(rest[start : start + size]) for start in range(0, len(rest), size)]
    return tuple((name,) for name in canaries.values()) + tuple(batches)
