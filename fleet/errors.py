"""What goes wrong in a site's input, in words for a person: where, what, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

BAD_INPUT = 2
"""Exit code: the input is wrong, and no host was contacted."""

EXPECTED_TYPES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
"""What pydantic wanted where a file has another type, in words for a person."""


@dataclass(frozen=True)
class Problem:
    """One fault in the input: `where` is a file and path, `what` names the fault and its cure."""

    where: str
    what: str

    def __str__(self) -> str:
        """One line, whatever the input holds."""
        return "".join(map(_shown, f"{self.where}: {self.what}"))


def _shown(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


class SiteError(Exception):
    """The input cannot be planned; carries every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'port'?` where something close is known, else nothing."""
    by_folded = {name.casefold(): name for name in known}
    close = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f"; did you mean {by_folded[close[0]]!r}?" if close else ""
