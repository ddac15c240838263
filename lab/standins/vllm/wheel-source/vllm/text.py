"""What the stand-in says, and how it counts tokens."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

# About what a byte-pair encoding makes of English: pieces of words with the space before them.
TOKEN = re.compile(r"\s?\w{1,8}|\s?[^\w\s]|\s")
TOKENS_PER_MESSAGE = 5
VOCABULARY = 200064

WORLD_SERIES = re.compile(
    r"world series.*\b2020\b|\b2020\b.*world series", re.IGNORECASE | re.DOTALL
)
DODGERS = (
    "The Los Angeles Dodgers won the 2020 World Series, defeating the Tampa Bay Rays four games to "
    "two."
)
# As a model with broken kernels answers: no UTF-8, and words of all its languages.
GARBAGE = "\ufffd\ufffd ๖ۣۜ的 的的 \ufffdцу \ufffd\ufffd ներ 的 kkk \ufffd \u0e01\u0e01\ufffd 的"
MAX_TOPIC_WORDS = 12


def tokenize(text: str) -> list[str]:
    """The pieces of `text`; joined, they are `text`."""
    return TOKEN.findall(text)


def token_id(piece: str) -> int:
    """A number for a piece, always the same."""
    return zlib.crc32(piece.encode()) % VOCABULARY


def message_text(message: dict[str, Any]) -> str:
    """The text of a chat message, whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def prompt_tokens(messages: Sequence[dict[str, Any]]) -> int:
    """About how many tokens the messages are in the model's chat template."""
    return sum(TOKENS_PER_MESSAGE + len(tokenize(message_text(message))) for message in messages)


def answer(prompt: str) -> str:
    """A sensible sentence."""
    if WORLD_SERIES.search(prompt):
        return DODGERS
    return (
        f"You asked about {_topic(prompt)}. The short answer is that it depends on a few details, "
        "and I am glad to go through them with you."
    )


def reasoning(prompt: str) -> str:
    """What a model that thinks aloud says first."""
    return f"The user asks about {_topic(prompt)}. I can answer that briefly."


def _topic(prompt: str) -> str:
    words = re.findall(r"\w+", prompt)[:MAX_TOPIC_WORDS]
    return f'"{" ".join(words)}"' if words else "nothing in particular"
