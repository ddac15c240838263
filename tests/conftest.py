"""Property tests try the same examples every time, so that a red run is of the change at hand.

`HYPOTHESIS=search pytest tests/unit` tries others each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS", "steady"))
