"""Asks many services the guides' question at once, and waits for the last answer.

    python -I asking.py < questions.json

questions: [{"url": of /v1/chat/completions, "body": JSON document}, ...]. Standard library only, so that
hardly more than the services' own time is measured.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TIMEOUT_S = 300


def ask(question: dict[str, Any]) -> None:
    """Read one answer; raises OSError where there is none."""
    request = urllib.request.Request(
        question["url"],
        data=json.dumps(question["body"]).encode(),
        headers={"Content-Type": "application/json"},
    )
    # A proxy of the environment is for the outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TIMEOUT_S) as response:
        response.read()


if __name__ == "__main__":
    questions = json.load(sys.stdin)
    with ThreadPoolExecutor(len(questions)) as pool:
        list(pool.map(ask, questions))
