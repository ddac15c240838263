"""Wheels of the stand-in, one for each version of vLLM that it is to be."""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "wheel-source"
OPTIONS = HERE.parent.parent.parent / "fleet" / "options"

# A wheel's files carry no time of their own, so that the same source makes the same wheel.
EPOCH = (1980, 1, 1, 0, 0, 0)
FILE_MODE = 0o100644

METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: A stand-in for vLLM, for the lab of minimax-fleet: no model, no GPU
License: Apache-2.0
Requires-Python: >=3.10
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: minimax-fleet lab
Root-Is-Purelib: {pure}
Tag: {tag}
"""
ENTRY_POINTS = """\
[console_scripts]
vllm = vllm.entrypoints.cli.main:main
"""


def build_wheels(dest: Path, versions: Sequence[str]) -> list[Path]:
    """Write a wheel for each of `versions` into `dest`, and return their paths.

    Each has the options that were recorded from the real release of its version, or of the nearest
    one that was (scripts/record_vllm_options.py). The same source makes the same bytes.
    """
    dest.mkdir(parents=True, exist_ok=True)
    return [build_wheel(dest, version) for version in versions]


def nearest_recording(version: str) -> Path:
    """The recorded options of a version, or of that which is nearest to it."""
    wanted = _release(version)

    def distance(path: Path) -> tuple[int, ...]:
        release = _release(path.stem.removeprefix("vllm-"))
        return tuple(abs(a - b) for a, b in zip(release, wanted, strict=True))

    return min(sorted(OPTIONS.glob("vllm-*.json")), key=distance)


def build_wheel(
    dest: Path, version: str, *, tag: str = "py3-none-any", library: bytes | None = None
) -> Path:
    """Write one wheel. `library` is a compiled vllm._C, for which `tag` has to name a platform."""
    dest.mkdir(parents=True, exist_ok=True)
    info = f"vllm-{version}.dist-info"
    files = {
        path.relative_to(SOURCE).as_posix(): path.read_bytes()
        for path in sorted(SOURCE.rglob("*.py"))
    }
    files["vllm/VERSION"] = f"{version}\n".encode()
    if library is not None:
        files["vllm/_C.abi3.so"] = library
    files["vllm/options.json"] = nearest_recording(version).read_bytes()
    files[f"{info}/METADATA"] = METADATA.format(version=version).encode()
    files[f"{info}/WHEEL"] = WHEEL.format(pure=str(library is None).lower(), tag=tag).encode()
    files[f"{info}/entry_points.txt"] = ENTRY_POINTS.encode()
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    wheel = dest / f"vllm-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = FILE_MODE << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _release(version: str) -> tuple[int, int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    major, minor, patch = [*numbers, 0, 0, 0][:3]
    return major, minor, patch
