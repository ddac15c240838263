"""What the lab tests are at, said while they are: some take minutes, and pytest prints a dot at their end."""

from __future__ import annotations

import time

import pytest

_config: pytest.Config | None = None
_began = time.monotonic()


def use(config: pytest.Config) -> None:
    """From now on lines go to this session's terminal."""
    global _config  # noqa: PLW0603 - one session in a process
    _config = config


def say(line: str) -> None:
    """A line on the terminal, past what pytest captures, with the seconds since the session began."""
    capture = _config and _config.pluginmanager.getplugin("capturemanager")
    text = f"\n  {time.monotonic() - _began:5.0f} s  {line}"
    if capture:
        with capture.global_and_fixture_disabled():
            print(text, end="", flush=True)
    else:
        print(text, end="", flush=True)
