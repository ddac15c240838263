"""Running other programs, with failures that a person can read."""

import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import LabError

# Told what is going on, one line at a time.
Progress = Callable[[str], None]

Argv = Sequence[str | Path]


def attempt(
    argv: Argv, *, stdin: str = "", timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is; its output is in the result.

    argv: program and arguments; no shell is involved
    stdin: text for its standard input
    timeout_s: seconds after which it is killed and LabError raised

    Raises LabError if it is missing or does not end in time.
    """
    words = [str(part) for part in argv]
    try:
        return subprocess.run(
            words, check=False, input=stdin, text=True, capture_output=True, timeout=timeout_s
        )
    except FileNotFoundError as error:
        raise LabError(f"{words[0]}: not installed; `lab up` installs what it needs") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{shlex.join(words)}` did not end within {timeout_s:g} s") from error


def run(argv: Argv, *, stdin: str = "") -> str:
    """Run a program that is to succeed and return what it wrote to standard output.

    Raises LabError, with the command and the last line that it wrote, if it fails or is missing.
    """
    done = attempt(argv, stdin=stdin)
    if done.returncode:
        raise failure(argv, done.returncode, done.stderr or done.stdout)
    return done.stdout


def follow(argv: Argv, line_written: Progress) -> None:
    """Run a program that is to succeed and pass on each line of its standard error as it comes.

    Raises LabError, with the command and its last error, if it fails.
    """
    said: list[str] = []
    with subprocess.Popen(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr or ():
            said.append(line)
            line_written(line.rstrip("\n"))
    if process.returncode:
        raise failure(argv, process.returncode, "".join(said))


def detach(argv: Argv, output: Path) -> None:
    """Start a program that outlives this one, in a session of its own.

    output: file that its standard output and error are appended to
    """
    with output.open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", *(str(part) for part in argv)],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def failure(argv: Argv, returncode: int, output: str) -> LabError:
    """The error for a program that failed: the command, its exit status, its last words."""
    words = [line.strip() for line in output.splitlines() if line.strip()]
    said = f": {words[-1]}" if words else ""
    command = shlex.join(str(part) for part in argv)
    return LabError(f"`{command}` failed with exit status {returncode}{said}")
