"""The guides' question asked at a service's public port, from the control machine."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import requests

from fleet.plan import ServicePlan

CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Answer:
    """An answer that matched, with the seconds it took."""

    text: str
    seconds: float


class NoAnswerError(Exception):
    """What was expected at the public port, and what came."""


def ask(service: ServicePlan, address: str) -> Answer:
    """The answer from `http://address:port`. Raises NoAnswerError with what was expected and what came."""
    url = f"http://{address}:{service.port}/v1/chat/completions"
    pattern, timeout_s = service.gate["expect"], service.gate["answer_timeout_s"]
    expected = f"{url}: expected an answer that matches /{pattern}/"
    headers = {"Authorization": f"Bearer {service.api_key}"} if service.api_key else {}
    began = time.monotonic()
    try:
        # The environment's proxies are for the outside world, not for the fleet's own addresses.
        with requests.Session() as session:
            session.trust_env = False
            response = session.post(
                url,
                json=service.gate["request"],
                headers=headers,
                timeout=(CONNECT_TIMEOUT_S, timeout_s),
            )
        text = answered(response.json()) if response.ok else ""
    except requests.Timeout as error:
        raise NoAnswerError(f"{expected} within {timeout_s} s, got none") from error
    except Exception as error:
        # Whatever a server answers: any other exception would end the run, and for every host.
        raise NoAnswerError(f"{expected}, got {type(error).__name__}: {error}") from error
    if not response.ok:
        raise NoAnswerError(f"{expected}, got HTTP {response.status_code}: {response.text[:200]}")
    if "\N{REPLACEMENT CHARACTER}" in text or not re.search(pattern, text):
        raise NoAnswerError(f"{expected}, got {text[:200]!r}")
    return Answer(text=text, seconds=time.monotonic() - began)


def answered(document: Any) -> str:
    """Text of a chat completion, reasoning and all. Raises whatever another shape leads to."""
    message = document["choices"][0]["message"]
    parts = (message.get(key) for key in ("reasoning", "reasoning_content", "content"))
    return " ".join(part for part in parts if part)
