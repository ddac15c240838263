"""Makes all that the site host serves: `ensure`, the only thing that `lab up` has to call.

Also by itself, to see what it does and how long that takes:

    python -m lab.site.build
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Display
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from lab import LabError, base, paths, topology
from lab.process import Progress
from lab.site import apt, containers, hub, index, sources
from lab.tinymodel import build as tinymodel


def ensure(progress: Progress | None = None) -> None:
    """Make what is missing under SITE_ROOT or out of date; about a second if nothing is.

    progress: told, in a line for a person, what is being done; None shows it on standard error, in
        place on a terminal

    Raises LabError if something cannot be fetched or made.
    """
    if progress is None:
        with _shown() as shown:
            ensure(shown)
        return
    paths.SITE_ROOT.mkdir(parents=True, exist_ok=True)
    with _alone(progress):
        with ThreadPoolExecutor() as pool:
            parts = [
                pool.submit(_ensure_apt, progress),
                pool.submit(_ensure_python_and_models, progress),
            ]
        for part in parts:
            part.result()


def _ensure_apt(progress: Progress) -> None:
    """The apt repositories, which hold what the hosts' base system lacks."""
    system = base.ensure(progress)
    apt.ensure(paths.SITE_ROOT, system, progress)
    containers.ensure(paths.SITE_ROOT, system, progress)


def _ensure_python_and_models(progress: Progress) -> None:
    """The package index, what is trained with its packages, and the hub that serves that."""
    with_cpu_host = any(host.group == "cpu" for host in topology.hosts())
    index.ensure(paths.SITE_ROOT, progress, cpu_builds=with_cpu_host)
    sources.ensure(paths.SITE_ROOT, progress)
    tiny_model = tinymodel.ensure(paths.SITE_ROOT / "files", progress) if with_cpu_host else None
    hub.ensure(paths.SITE_ROOT, progress, tiny_model=tiny_model)


@contextmanager
def _alone(progress: Progress) -> Iterator[None]:
    """Wait until no other process builds the site."""
    with (paths.CACHE / "site.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that builds the lab's site")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _shown() -> Iterator[Callable[[str], None]]:
    """A progress that is shown: the last line with a clock on a terminal, else line by line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Display(*columns, console=console, transient=True) as display:
        task = display.add_task("the lab's site", total=None)
        yield lambda line: display.update(task, description=line)


def main() -> int:
    """Make the site; returns the exit status."""
    began = time.monotonic()
    try:
        ensure()
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(f"{paths.SITE_ROOT}: up to date after {time.monotonic() - began:.1f} s\n")
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
