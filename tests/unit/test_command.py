"""Quoting for systemd and for a shell."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fleet.command import environment_file, flag, shell, systemd_assignment, systemd_word


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("--port", "--port"),
        ("/opt/fleet/releases/a-1.0+cpu", "/opt/fleet/releases/a-1.0+cpu"),
        ("", '""'),
        ("two words", '"two words"'),
        ("100%", '"100%%"'),
        ("$HOME", '"$$HOME"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("it's", '"it\'s"'),
        ("back\\slash", '"back\\\\slash"'),
        ("line\nbreak", '"line\\nbreak"'),
        ("bell\x07", '"bell\\x07"'),
        ("🚀", '"🚀"'),
        ('{"a":"b"}', '"{\\"a\\":\\"b\\"}"'),
        (";", '";"'),
    ],
)
def test_b20_a_word_of_exec_start(word: str, quoted: str) -> None:
    assert systemd_word(word) == quoted


def test_b20_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        systemd_word("a\0b")


def test_environment_doubles_percent_but_not_dollar() -> None:
    assert systemd_assignment("A", "50% of $B") == '"A=50%% of $B"'


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ("--flag-name",)),
        (False, ()),
        (None, ()),
        (3, ("--flag-name", "3")),
        (0.5, ("--flag-name", "0.5")),
        ({"a": [1, "ü"]}, ("--flag-name", '{"a":[1,"ü"]}')),
    ],
)
def test_a_flag(value: object, words: tuple[str, ...]) -> None:
    assert flag("--flag_name", value, "0.33.0") == words  # type: ignore[arg-type]


def test_an_environment_file_cannot_be_broken_out_of() -> None:
    assert environment_file({"K": 'a"b\\c$d`e'}) == 'K="a\\"b\\\\c\\$d\\`e"\n'
    with pytest.raises(ValueError, match="control character"):
        environment_file({"K": "a\nB=c"})


def test_what_is_printed_can_be_pasted() -> None:
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['A']]))"
    words = ("serve", "/m", "--json", '{"a": "it\'s 100% $HOME"}', "--bare")

    text = shell((sys.executable, "-c", program, *words), {"A": "b c"})
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)

    assert json.loads(done.stdout) == [list(words), "b c"]


@pytest.mark.parametrize(
    "word",
    ["plain", "a b", "it's", "100% $HOME", "line1\nline2", "tab\there", "a\rb\x07c", "🚀\n'\\"],
)
def test_a_pasted_word_is_the_same_word(word: str) -> None:
    """By bash itself; a terminal would not even show a control character."""
    text = shell(["printf", "%s", word], {})
    assert word.isprintable() or word not in text

    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True)

    assert done.stdout.decode() == word
