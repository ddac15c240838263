"""Models: fetched beside their place and verified, byte by byte; the long verb `weights`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import shutil
import subprocess
import time

import fleet_host as core

HUB_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3], max_workers=8)
"""
PROGRESS_EVERY_S = 5
FETCHES = 2
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def weights(request):
    """A model at a pinned revision: fetched beside its place, every hash checked, then renamed."""
    path = pathlib.Path(request["path"])
    locked = request["files"]
    named = locked and core.weights_digest({name: file[1] for name, file in locked.items()})
    if core.weights_complete(path, named):
        return
    partial = core.partial_of(request)
    partial.mkdir(parents=True, exist_ok=True)
    expected = hub_files(request)
    total = sum(file["size"] for file in expected.values())
    free = core.disk_state(path)["free_bytes"] + core.size_of(partial)
    if total > free:
        raise core.HostError(
            f"{request['repository']}: needs {total / 2**30:.1f} GiB at {path.parent}, "
            f"{free / 2**30:.1f} GiB free"
        )
    for attempt in range(1, FETCHES + 1):
        download(request, partial, total)
        bad = not_verified(request["repository"], partial, expected)
        if not bad:
            break
        for name in bad:
            explain_bad(partial / name, expected[name], last=attempt == FETCHES)
            (partial / name).unlink(missing_ok=True)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
    stamp = {"repository": request["repository"], "revision": request["revision"], "files": {}}
    for name, file in expected.items():
        status = os.stat(partial / name)
        stamp["files"][name] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": file["sha256"],
        }
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    core.write_atomically(partial / core.WEIGHTS_STAMP, json.dumps(stamp, indent=1))
    os.sync()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    core.say(f"{request['repository']}: {len(expected)} files verified, {total / 1e9:.2f} GB")


def hub_files(request):
    """Name to size and hashes of every file of the revision, as the hub states them."""
    url = f"{request['hub']}/api/models/{request['repository']}/revision/{request['revision']}?blobs=true"
    try:
        with core.open_url(url) as response:
            listed = dict(map(hub_file, json.load(response)["siblings"]))
    except (OSError, http.client.HTTPException, *core.ODD_JSON) as error:
        raise core.HostError(f"{url}: {core.reason(error)}") from error
    return listed if request["files"] is None else as_locked(request, listed)


def as_locked(request, listed):
    """The files with the hashes that are locked, whatever the hub says; refused where it has others."""
    locked = request["files"]
    for name in sorted({*listed, *locked}):
        if name not in locked:
            what = f"has a file {name}, which is not in the lock"
        elif name not in listed:
            what = f"has no {name}, which is in the lock"
        elif listed[name]["size"] != locked[name][0]:
            what = f"has {listed[name]['size']} bytes of {name}, and the lock {locked[name][0]}"
        elif listed[name]["sha256"] not in (None, locked[name][1]):
            what = f"names {listed[name]['sha256'][:12]}… of {name}, and the lock {locked[name][1][:12]}…"
        else:
            continue
        place = f"{request['repository']} at {request['revision'][:12]}"
        raise core.HostError(
            f"{place}: {request['hub']} {what}; a commit never changes: find out why"
        )
    return {
        name: {"size": size, "sha256": sha256, "blob": None}
        for name, (size, sha256) in locked.items()
    }


def hub_file(file):
    """Name of a file, with its size and hashes, as the hub states them. Raises ValueError."""
    name, lfs = file["rfilename"], file.get("lfs") or {}
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"refuses the file name {name!r}")
    blob = None if lfs else file.get("blobId")
    return name, {"size": file["size"], "sha256": lfs.get("sha256"), "blob": blob}


def download(request, partial, total):
    """Runs huggingface_hub in its own environment; it resumes what an earlier run left."""
    env = {
        **os.environ,
        "HF_ENDPOINT": request["hub"],
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ENABLE_HF_TRANSFER": "0",
    }
    program = [request["python"], "-c", HUB_DOWNLOAD]
    arguments = [request["repository"], request["revision"], str(partial)]
    began, before = time.monotonic(), core.size_of(partial)
    with (
        subprocess.Popen(
            program + arguments,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as fetch,
        concurrent.futures.ThreadPoolExecutor(1) as reader,
    ):
        output = reader.submit(fetch.stdout.read)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                fetch.wait(PROGRESS_EVERY_S)
                break
            have = core.size_of(partial)
            rate = max(1, have - before) / (time.monotonic() - began)
            left = max(0, total - have) / rate
            core.say(
                f"{request['repository']}: {have / 1e9:.1f} of {total / 1e9:.1f} GB, "
                f"{rate / 1e6:.0f} MB/s, {left / 60:.0f} min left"
            )
        words = output.result().strip().splitlines()
    if fetch.returncode:
        raise core.HostError(
            f"{request['repository']}: {words[-1] if words else 'download failed'}"
        )


HASHING_THREADS = min(4, os.cpu_count() or 1)
"""hashlib lets other threads run, and disks that hold such models outrun one core."""


def not_verified(repository, folder, expected):
    """Names of files that are not as the hub named them, in order; says how far hashing is."""
    began, total = time.monotonic(), sum(file["size"] for file in expected.values())
    with concurrent.futures.ThreadPoolExecutor(HASHING_THREADS) as pool:
        judged = {
            name: pool.submit(verified, folder / name, file) for name, file in expected.items()
        }
        while concurrent.futures.wait(judged.values(), timeout=PROGRESS_EVERY_S).not_done:
            size = sum(expected[name]["size"] for name, done in judged.items() if done.done())
            rate = size / (time.monotonic() - began)
            core.say(
                f"{repository}: {size / 1e9:.1f} of {total / 1e9:.1f} GB verified, "
                f"{rate / 1e6:.0f} MB/s"
            )
    return [name for name, done in judged.items() if not done.result()]


def verified(path, file):
    """Is the file the one that the hub named? Its SHA-256 goes into `file` for the stamp."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return False
    if size != file["size"]:
        return False
    if file["blob"] is not None:
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        content = path.read_bytes()
        blob.update(content)
        file["found"] = hashlib.sha256(content).hexdigest()
        if blob.hexdigest() != file["blob"]:
            return False
        file["sha256"] = file["found"]
        return True
    file["found"] = core.sha256_of(path)
    return file["found"] == file["sha256"]


def explain_bad(path, file, last):
    """Names a file that did not arrive as it is at the hub; the second time that is final."""
    if not path.exists():
        what = "is missing"
    else:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
        if pointer:
            what = f"is a Git LFS pointer of {size} bytes in place of {file['size']} bytes"
        elif size != file["size"]:
            what = f"has {size} bytes, not {file['size']}"
        else:
            what = f"is corrupt: its hash is {file['found'][:12]}…"
    if last:
        raise core.HostError(f"{path.name} {what}, twice; look at the source")
    core.say(f"{path.name} {what}; fetching it again")
