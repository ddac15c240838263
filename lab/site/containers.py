"""The site's registry, with an image of the stand-in vLLM for hosts that serve in containers.

`ensure` makes under the site's root

    registry/<name>/manifests/…   as the registry's API (version 2) serves them, by digest
    registry/<name>/blobs/…
    registry/images.json          name@sha256:… of each image, by what it is for

The image is one layer: Python, pip, a compiler and what these need of the hosts' base system, and the
stand-in vLLM, with the entrypoint that vLLM's own images have. The same inputs make the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lab import LabError
from lab.process import Progress, run
from lab.standins.vllm import build as standins

NAME = "vllm/vllm-openai"
VERSION = "0.33.0"
# From the hosts' base system, and from the packages that they install beyond it.
OF_BASE = ("ca-certificates", "coreutils", "dash", "gcc", "python3", "python3-dev", "sed", "tar")
OF_REPOSITORY = ("python3-pip", "python3-pkg-resources", "python3-setuptools", "python3-wheel")
# Docs, what is for other compilations than that of one small library, and Debian's word against pip.
LEFT_OUT = re.compile(
    r"/usr/share/(?!ca-certificates|python)|/var/|/usr/lib/python3[^/]*/(?:EXTERNALLY-MANAGED|test/)"
    r"|/.*/(?:lib[atlu]\w*san\.|lib\w*(?<!gcc)(?<!_nonshared)\.a$|lto1$|[\w-]*lto-dump|lib(?:python3.11|m)[-\w.]*\.a)"
)
MERGED = ("bin", "lib", "lib64", "sbin")
NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"
VLLM = (
    "#!/usr/bin/python3\nimport sys\nfrom vllm.entrypoints.cli.main import main\nsys.exit(main())\n"
)
CONFIG = {
    "Env": [
        "PATH=/usr/local/bin:/usr/bin:/usr/sbin",
        "CUDA_HOME=/usr/local/cuda",
        "PIP_ROOT_USER_ACTION=ignore",
    ],
    "Entrypoint": ["vllm", "serve"],
    "WorkingDir": "/vllm-workspace",
}
MEDIA = "application/vnd.docker.distribution.manifest.v2+json"
CREATED = "2026-01-01T00:00:00Z"
STAMP = ".inputs"

Entry = tuple[str, bytes | str | None, int]
"""A name in the layer; a file's content, a link's target or None for a folder; and a mode."""


def images(site_root: Path) -> dict[str, str]:
    """Each image by what it is for, as group data names it."""
    found: dict[str, str] = json.loads((site_root / "registry" / "images.json").read_text())
    return found


def ensure(site_root: Path, base: Path, progress: Progress) -> None:
    """Make the registry, or leave it if it is up to date.

    Needs the site's Debian packages, which lab.site.apt fetches. Raises LabError.
    """
    registry, inputs = site_root / "registry", _digest(*_inputs(site_root, base))
    stamp = registry / STAMP
    if stamp.exists() and stamp.read_text() == inputs:
        return
    progress("making an image with the stand-in vLLM")
    with tempfile.TemporaryDirectory(dir=site_root, prefix=".registry-") as scratch:
        new = Path(scratch) / "registry"
        image = _image(new, list(_entries(site_root, base)))
        (new / "images.json").write_text(json.dumps({"vllm": image}, indent=1) + "\n")
        (new / STAMP).write_text(inputs)
        new.chmod(0o755)
        shutil.rmtree(registry, ignore_errors=True)
        new.rename(registry)


def _digest(*inputs: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in inputs)).hexdigest()


def _inputs(site_root: Path, base: Path) -> Iterator[bytes]:
    yield Path(__file__).read_bytes()
    yield base.name.encode()
    yield from (deb.name.encode() for deb in _debs(site_root))
    yield standins.nearest_recording(VERSION).read_bytes()
    for file in sorted(standins.SOURCE.rglob("*.py")):
        yield file.read_bytes()


def _debs(site_root: Path) -> list[Path]:
    folder = site_root / "apt" / "debian"
    found = [next(folder.glob(f"{name}_*.deb"), None) for name in OF_REPOSITORY]
    if None in found:
        raise LabError(f"{folder}: lacks one of {', '.join(OF_REPOSITORY)}; build it first")
    return [deb for deb in found if deb is not None]


# ---------------------------------------------------------------------------------------- the image


def _image(registry: Path, entries: list[Entry]) -> str:
    """Write layer, configuration and manifest, each by its digest; the image's name with its own."""
    plain = _tar(entries)
    layer = gzip.compress(plain, compresslevel=1, mtime=0)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": CREATED,
        "config": CONFIG,
        "rootfs": {"type": "layers", "diff_ids": [_sha256(plain)]},
        "history": [{"created": CREATED, "created_by": "minimax-fleet lab"}],
    }
    said = json.dumps(config, sort_keys=True).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MEDIA,
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "size": len(said),
            "digest": _sha256(said),
        },
        "layers": [
            {
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "size": len(layer),
                "digest": _sha256(layer),
            }
        ],
    }
    told = json.dumps(manifest, sort_keys=True).encode()
    folder = registry / NAME
    for kind, content in (("blobs", layer), ("blobs", said), ("manifests", told)):
        path = folder / kind / _sha256(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return f"{NAME}@{_sha256(told)}"


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _tar(entries: Iterable[Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content, mode in entries:
            info = tarfile.TarInfo(name)
            info.mode = mode
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _entries(site_root: Path, base: Path) -> Iterator[Entry]:
    """All that the image holds, folders first where they are needed."""
    found: dict[str, tuple[bytes | str | None, int]] = {}
    with tempfile.TemporaryDirectory(dir=site_root, prefix=".image-") as scratch:
        for deb in _debs(site_root):
            run(["dpkg-deb", "--extract", deb, scratch])
        unpacked = (path for path in Path(scratch).rglob("*"))
        for root, paths in ((base, _files_of(base)), (Path(scratch), unpacked)):
            for path in paths:
                name = _name(path.relative_to(root))
                if not LEFT_OUT.match(f"/{name}") and (path.is_symlink() or path.is_file()):
                    found[name] = _read(path)
    found |= {name: (f"usr/{name}", 0o777) for name in MERGED}
    found |= dict(_vllm())
    found["usr/local/cuda/bin/nvcc"] = (NVCC.encode(), 0o755)
    found["etc/passwd"] = (b"root:x:0:0:root:/root:/bin/sh\n", 0o644)
    found["etc/group"] = (b"root:x:0:\n", 0o644)
    folders = {str(parent) for name in found for parent in Path(name).parents} | {
        *("dev", "proc", "root", "run", "sys", "tmp", "var/tmp", "var", "vllm-workspace")
    }
    for folder in sorted(folders):
        yield folder, None, 0o1777 if folder.endswith("tmp") else 0o755
    for name in sorted(found):
        content, mode = found[name]
        yield name, content, mode


def _name(path: Path) -> str:
    """A name below the root, where /bin and its like are links into /usr."""
    text = str(path)
    return f"usr/{text}" if path.parts[0] in MERGED and len(path.parts) > 1 else text


def _read(path: Path) -> tuple[bytes | str, int]:
    if path.is_symlink():
        return os.readlink(path), 0o777
    return path.read_bytes(), path.stat().st_mode & 0o777


def _files_of(base: Path) -> Iterator[Path]:
    """Files of packages of the base system, and of all that they need."""
    for package in sorted(_closure(base)):
        info = base / "var/lib/dpkg/info"
        lists = [*info.glob(f"{package}.list"), *info.glob(f"{package}:*.list")]
        for line in (line for file in lists for line in file.read_text().splitlines()):
            path = base / line.lstrip("/")
            # Inside the base, links lead to where they would in a host.
            if path.is_symlink() or path.is_file():
                yield path
    yield from (base / "etc/alternatives").glob("c*")
    yield base / "etc/ssl/certs/ca-certificates.crt"


def _closure(base: Path) -> set[str]:
    """OF_BASE with what it depends on, as far as the base has it."""
    known: dict[str, dict[str, str]] = {}
    provided: dict[str, str] = {}
    for block in (base / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", block, re.MULTILINE))
        if fields:
            known[fields["Package"]] = fields
            for name in _names(fields.get("Provides", "")):
                provided[name] = fields["Package"]
    found: set[str] = set()
    wanted = [name for name in OF_BASE if name in known]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found.add(name)
        for relation in ("Depends", "Pre-Depends"):
            names = _names(known[name].get(relation, ""))
            wanted += [there for one in names if (there := provided.get(one, one)) in known]
    return found


def _names(relations: str) -> list[str]:
    """Package names of a control field, alternatives among them."""
    return [re.split(r"[\s(:]", part.strip())[0] for part in re.split("[,|]", relations) if part]


def _vllm() -> Iterator[tuple[str, tuple[bytes | str | None, int]]]:
    """The stand-in as pip would have installed it."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = standins.build_wheel(Path(scratch), VERSION)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                place = f"usr/local/lib/python3.11/dist-packages/{name}"
                yield place, (archive.read(name), 0o644)
    yield "usr/local/bin/vllm", (VLLM.encode(), 0o755)
