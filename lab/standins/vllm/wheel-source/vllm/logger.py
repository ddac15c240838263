"""Log lines in vLLM's format, and its processes' names."""

from __future__ import annotations

import ctypes
import os
import sys
import time
import traceback
from pathlib import Path

PR_SET_NAME = 15

# Positions in /proc/self/stat after the command's name.
_ARG_START, _ARG_END = 45, 46

_process_name = "APIServer"


def log(level: str, where: str, message: str) -> None:
    """Write `message` with vLLM's prefix, which is on every line of it.

    where: the file and line that vLLM's own message comes from, such as "core.py:402"
    """
    stamp = time.strftime("%m-%d %H:%M:%S")
    prefix = f"({_process_name} pid={os.getpid()}) {level} {stamp} [{where}] "
    write("\n".join(prefix + line for line in message.split("\n")))


def log_exception(where: str, message: str, error: BaseException) -> None:
    """Log `message` and the traceback of `error`, as logging.exception does."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    log("ERROR", where, message + "\n" + "".join(lines).rstrip("\n"))


def write(text: str) -> None:
    """Write a line as it is, at once and in one piece."""
    # One call each: the lines of several processes and threads must not mix.
    os.write(sys.stdout.fileno(), (text + "\n").encode("utf-8", "replace"))


def name_process(name: str, title: str | None = None) -> None:
    """Use `name` in log lines; with `title`, show it in place of the command line, as in ps."""
    global _process_name  # noqa: PLW0603 - one name for the process is what is meant
    _process_name = name
    if title is None:
        return
    with_null = title.encode() + b"\0"
    ctypes.CDLL(None).prctl(PR_SET_NAME, ctypes.c_char_p(with_null), 0, 0, 0)
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    numbers = fields.rpartition(")")[2].split()
    start, end = int(numbers[_ARG_START]), int(numbers[_ARG_END])
    if 0 < start < start + len(with_null) <= end:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, with_null, len(with_null))
