"""Environment variables that vLLM reads, as far as their names go."""

from __future__ import annotations

import os

from vllm.arguments import RECORDED
from vllm.logger import log
from vllm.version import release

# Earlier releases said nothing of variables that they did not know.
WARNS_SINCE = (0, 14)


def warn_of_unknown() -> None:
    """Log a warning for each variable that looks like vLLM's and is not one of this version's."""
    if release() < WARNS_SINCE:
        return
    known = set(RECORDED["env"])
    for name in sorted(os.environ):
        if name.startswith("VLLM_") and name not in known:
            log(
                "WARNING",
                "interface.py:1457",
                f"Unknown vLLM environment variable detected: {name}",
            )
