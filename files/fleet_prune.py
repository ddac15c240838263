"""What nothing needs any more: releases, leftovers of killed builds, uv's cache; the long verb `prune`."""

from __future__ import annotations

import os
import pathlib
import shutil

import fleet_host as core


def prune(request):
    """Removes what `spare` finds, and says what that freed."""
    found = core.spare(request)
    freed = 0
    for entry in found["remove"]:
        remove(pathlib.Path(entry["path"]))
        core.say(f"removed {os.path.basename(entry['path'])}: {gib(entry['bytes'])}")
        freed += entry["bytes"]
    for path in found["archives"]:
        shutil.rmtree(path, ignore_errors=True)
    if found["archives"]:
        core.say(f"removed wheels of uv's cache: {gib(found['archive_bytes'])}")
        freed += found["archive_bytes"]
        clean_cache(request)
    core.remove_stages([path for path in map(pathlib.Path, found["files"]) if path.is_dir()])
    for path in map(pathlib.Path, found["files"]):
        path.unlink(missing_ok=True)
    if found["files"]:
        core.say(f"removed {len(found['files'])} staged units and configurations")
    core.say(f"freed {gib(freed)}")


def remove(folder):
    """A killed removal must leave nothing that looks complete: the folder loses its name first."""
    if folder.name.startswith("."):
        shutil.rmtree(folder)
        return
    core.forget_image(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial)


def clean_cache(request):
    """uv's own index of its cache follows; what is left of it is what uv calls unused."""
    if os.access(request["uv"], os.X_OK):
        cache = str(pathlib.Path(request["releases"]) / ".cache")
        env = {"UV_CACHE_DIR": cache, "UV_NO_CONFIG": "1", "UV_NO_PROGRESS": "1"}
        core.run(request["uv"], "cache", "prune", env=env)


def gib(size):
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB"
