"""Which releases a host needs, and what each is made of: from group data and the catalogue. Pure.

A release's id is a digest of all that goes in: another commit, patch or wheel is another release, built
beside the one that serves. From which mirror it comes makes no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from fleet import container
from fleet.catalog import Catalog, Runtime, catalog, holds
from fleet.plan import Release, digest
from fleet.spec import HostSpec, Vllm

COMMIT_DIGITS = 12
"""Of a commit, in a release's name."""


def vllm_release(spec: HostSpec, patches: Mapping[str, str]) -> Release:
    """The release of a host's vLLM. `patches` has texts by path on the control machine.

    A torch backend makes uv fetch torch from an index of its own, past the site's: where the site names
    an index, that one decides which torch there is.
    """
    vllm, runtime = spec.vllm, catalog().tools.runtime
    backend = None if spec.mirrors.index else vllm.torch_backend
    origin = _origin(vllm, runtime, patches)
    requirements = tuple(_requirements(vllm, runtime))
    parts = (vllm.channel, vllm.python, backend or "", *requirements)
    if vllm.overrides:
        parts = (*parts, "overrides", *vllm.overrides)
    plain = origin == {"kind": "index", "version": vllm.version}
    identity = digest(*parts) if plain else digest(*parts, json.dumps(origin, sort_keys=True))
    commit = f"-{vllm.commit[:COMMIT_DIGITS]}" if vllm.commit else ""
    name = f"vllm-{vllm.version}{commit}-{identity}"
    return Release(
        id=name,
        path=f"{spec.paths.releases}/{name}",
        requirements=requirements,
        python=vllm.python,
        torch_backend=backend,
        bytecode=True,
        check=("vllm", "--version"),
        modules=("vllm", "deep_gemm") if vllm.deep_gemm else ("vllm",),
        origin=origin,
        patches=tuple((path, patches.get(path, "")) for path in vllm.patches),
        overrides=tuple(vllm.overrides),
    )


def image_release(spec: HostSpec, patches: Mapping[str, str]) -> Release:
    """The release of a host's vLLM that is an image: the pinned one, or one that is built on it.

    What lies below `paths.releases` is its manifest alone; Docker has the image, by the release's tag.
    """
    vllm = spec.vllm
    registry, path, found = container.split(vllm.image or "")
    name = path if registry == container.HUB else f"{registry}/{path}"
    origin: dict[str, Any] = {
        "kind": "docker",
        "name": name,
        "sha256": found.removeprefix("sha256:"),
        "version": vllm.version,
    }
    if vllm.commit is not None:
        patched = {path: _sha256(patches.get(path, "")) for path in vllm.patches}
        origin |= {"commit": vllm.commit, "patches": patched}
    commit = f"-{vllm.commit[:COMMIT_DIGITS]}" if vllm.commit else ""
    release = f"vllm-{vllm.version}{commit}-{digest(json.dumps(origin, sort_keys=True))}"
    return Release(
        id=release,
        path=f"{spec.paths.releases}/{release}",
        requirements=(),
        python="python3",
        torch_backend=None,
        bytecode=False,
        check=("vllm", "--version"),
        modules=("vllm",),
        origin=origin,
        patches=tuple((path, patches.get(path, "")) for path in vllm.patches),
        image=container.tag(release),
    )


def hub_release(tools: Catalog, folder: str, python: str) -> Release:
    """huggingface_hub in an environment of its own, so that no vLLM decides its version.

    It is built on the Python that vLLM is: that of Enterprise Linux 9 is too old for either.
    """
    requirements = tuple(tools.tools.hub.requirements)
    name = f"hub-{digest(*requirements)}"
    return Release(
        id=name,
        path=f"{folder}/{name}",
        requirements=requirements,
        python=python,
        torch_backend=None,
        bytecode=False,
        check=("hf", "version"),
        modules=("huggingface_hub",),
        origin={"kind": "index"},
        patches=(),
    )


def _requirements(vllm: Vllm, runtime: Runtime) -> list[str]:
    """What uv is asked for; vLLM itself only where it comes from the index."""
    wanted = [f"vllm=={vllm.version}"] if vllm.channel == "stable" else []
    if vllm.channel in ("nightly", "source") and holds(runtime.triton_kernels.vllm, vllm.version):
        wanted.append(runtime.triton_kernels.requirement)
    return [*wanted, *vllm.packages]


def _origin(vllm: Vllm, runtime: Runtime, patches: Mapping[str, str]) -> dict[str, Any]:
    """Where vLLM comes from, whatever mirror that is reached by, and what is made of it."""
    origin: dict[str, Any] = {"kind": "index", "version": vllm.version}
    if vllm.channel == "wheel" and vllm.wheel is not None:
        name = vllm.wheel.url.rsplit("/", 1)[1]
        origin |= {"kind": "wheel", "name": name, "sha256": vllm.wheel.sha256}
    elif vllm.channel in ("nightly", "source"):
        origin |= {"kind": vllm.channel, "commit": vllm.commit, "variant": variant(vllm)}
    if vllm.channel == "source":
        origin |= {
            "precompiled": vllm.precompiled,
            "patches": {path: _sha256(patches.get(path, "")) for path in vllm.patches},
            # Where the build brings no library along although a wheel has it: the guides' first cure.
            "copy_libraries": vllm.precompiled
            and holds(runtime.copied_libraries.vllm, vllm.version),
        }
    if vllm.deep_gemm is not None:
        origin["deep_gemm"] = vllm.deep_gemm
    if vllm.kernels:
        origin["kernels"] = True
    return origin


def variant(vllm: Vllm) -> str:
    """Folder of the nightly index for another CUDA than its own: `cu129` for a version ending in that."""
    local = Version(vllm.version).local or ""
    return local if local.startswith(("cu", "cpu")) else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
