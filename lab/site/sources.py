"""What is built by commit: a git repository of the stand-in's sources, and an index of nightly builds.

`ensure` makes under the site's root

    git/vllm-project/vllm.git     a bare repository, to be fetched over plain HTTP
    nightly/<commit>/vllm/        the page of each commit's wheel, as vLLM's own index of builds has them
    nightly/commits.json          the commits by what they are for

The commits are the same wherever the sources are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import paths
from lab.process import Progress, run
from lab.standins.vllm import build as standins

TREE = standins.HERE / "source-tree"
REPOSITORY = Path("git", "vllm-project", "vllm.git")
WHO = "minimax-fleet lab <lab@minimax-fleet.invalid>"
WHEN = "2026-01-01T00:00:00Z"
SHORT = 9
STAMP = ".inputs"


@dataclass(frozen=True)
class Commit:
    """A state of the sources.

    name: what it is for
    version: what it is on the way to; its options are those of the nearest recorded release
    forgets_library: its build takes no library out of the wheel that it is given
    """

    name: str
    version: str
    forgets_library: bool = False


COMMITS = (Commit("old", "0.23.0", forgets_library=True), Commit("new", "0.33.1"))


def commits(site_root: Path = paths.SITE_ROOT) -> dict[str, str]:
    """40-hex commit by the name of what it is for."""
    text = (site_root / "nightly" / "commits.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found


def ensure(site_root: Path, progress: Progress) -> None:
    """Make the repository and the index of builds, or leave them if they are up to date.

    Raises LabError if git or the compiler fails.
    """
    stamp = site_root / "nightly" / STAMP
    inputs = _inputs()
    if stamp.exists() and stamp.read_text() == inputs:
        return
    progress("making the sources of the stand-in vLLM and their nightly builds")
    with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=".sources-") as name:
        scratch = Path(name)
        found = _repository(scratch)
        library = _library(scratch)
        nightly = scratch / "nightly"
        for commit in COMMITS:
            _publish(nightly, commit, found[commit.name], library)
        (nightly / "commits.json").write_text(json.dumps(found, indent=1) + "\n")
        (nightly / STAMP).write_text(inputs)
        for folder in (REPOSITORY, Path("nightly")):
            shutil.rmtree(site_root / folder, ignore_errors=True)
            (site_root / folder).parent.mkdir(parents=True, exist_ok=True)
            (scratch / folder).rename(site_root / folder)


def _repository(scratch: Path) -> dict[str, str]:
    """A bare repository under `scratch` with all COMMITS on its branch main; their ids by name."""
    tree, bare = scratch / "tree", scratch / REPOSITORY
    run(["git", "init", "--quiet", "--initial-branch=main", tree])
    found = {}
    for commit in COMMITS:
        for entry in tree.iterdir():
            if entry.name != ".git":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(TREE, tree, dirs_exist_ok=True)
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(standins.SOURCE, tree, dirs_exist_ok=True, ignore=unwanted)
        options = standins.nearest_recording(commit.version).read_bytes()
        (tree / "vllm" / "options.json").write_bytes(options)
        if commit.forgets_library:
            (tree / "forgets-library").touch()
        _git(tree, "add", "--all", "--force")
        _git(tree, "commit", "--quiet", f"--message=vLLM on the way to {commit.version}")
        found[commit.name] = _git(tree, "rev-parse", "HEAD").strip()
    bare.parent.mkdir(parents=True)
    run(["git", "clone", "--quiet", "--bare", tree, bare])
    # What a server of plain files has to have ready.
    _git(bare, "update-server-info")
    return found


def _git(folder: Path, *arguments: str) -> str:
    name, _, address = WHO.partition(" <")
    who = {"NAME": name, "EMAIL": address.rstrip(">"), "DATE": WHEN}
    settings = [
        f"GIT_{role}_{key}={value}"
        for role in ("AUTHOR", "COMMITTER")
        for key, value in who.items()
    ]
    own = ["env", *settings, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null"]
    return run([*own, "git", "-C", folder, *arguments])


def _library(scratch: Path) -> bytes:
    """The library, compiled by this machine for the hosts, which run the same Python."""
    flags = run(["python3-config", "--includes"]).split()
    library = scratch / "_C.abi3.so"
    run(["gcc", "-shared", "-fPIC", "-O1", *flags, TREE / "csrc" / "ops.c", "-o", library])
    return library.read_bytes()


def _publish(nightly: Path, commit: Commit, sha: str, library: bytes) -> None:
    folder = nightly / sha
    version = f"{commit.version}.dev7+g{sha[:SHORT]}"
    wheel = standins.build_wheel(
        folder, version, tag=f"cp38-abi3-linux_{os.uname().machine}", library=library
    )
    page = folder / "vllm" / "index.html"
    page.parent.mkdir()
    link = wheel.name.replace("+", "%2B")
    page.write_text(
        f'<!DOCTYPE html>\n<html><body>\n<a href="../{link}">{wheel.name}</a><br/>\n</body></html>\n'
    )


def _inputs() -> str:
    """A digest of all that decides what is made."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    folders = (TREE, standins.SOURCE)
    sources = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    for file in sorted(file for file in sources if "__pycache__" not in file.parts):
        digest.update(str(file.relative_to(standins.HERE)).encode())
        digest.update(file.read_bytes())
    for commit in COMMITS:
        digest.update(standins.nearest_recording(commit.version).read_bytes())
    digest.update(Path(standins.__file__).read_bytes())
    return digest.hexdigest()
