"""Which release group data means, and what of it is refused without a host."""

from __future__ import annotations

from typing import Any

import pytest

from fleet.releases import vllm_release
from fleet.spec import HostSpec
from tests.unit.state import plan_of, planned, service

COMMIT = "403424d29e681455711006547540b62ff94d02df"
OTHER = "57a9d9c8224795330a07aaf984594668fb8c4f26"
FIX = "cf3eacfe58fa9e745c2854782ada884a9f992cf7"
DIGITS = "0123456789abcdef" * 4
NIGHTLY = {"channel": "nightly", "version": "0.33.0", "commit": COMMIT}
SOURCE = {**NIGHTLY, "channel": "source"}
WHEEL = {
    "channel": "wheel",
    "version": "0.33.0",
    "wheel": {"url": "https://a.example/w/vllm-0.33.0-cp38-abi3-l.whl", "sha256": DIGITS},
}


def problems_of(*services: dict[str, Any], **changes: Any) -> str:
    """What is refused, as one text."""
    return "\n".join(planned(*services, **changes)[1])


def release_of(vllm: dict[str, Any], patch: str = "", **site: Any) -> Any:
    spec = HostSpec.model_validate({"vllm": vllm, "services": [], **site})
    return vllm_release(spec, dict.fromkeys(spec.vllm.patches, patch))


def test_a_release_is_named_for_its_version_and_commit() -> None:
    assert release_of({"version": "0.33.0"}).id.startswith("vllm-0.33.0-")
    assert release_of(NIGHTLY).id.startswith("vllm-0.33.0-403424d29e68-")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"version": "0.33.0"}, NIGHTLY),
        (NIGHTLY, SOURCE),
        (NIGHTLY, NIGHTLY | {"commit": OTHER}),
        (NIGHTLY, NIGHTLY | {"version": "0.33.0+cu129"}),
        (SOURCE, SOURCE | {"precompiled": False}),
        (SOURCE, SOURCE | {"patches": ["a.patch"]}),
        (WHEEL, WHEEL | {"wheel": {**WHEEL["wheel"], "sha256": DIGITS[::-1]}}),  # type: ignore[dict-item]
        (NIGHTLY, NIGHTLY | {"kernels": True}),
        (NIGHTLY, NIGHTLY | {"packages": ["ray==2.50.0"]}),
        (NIGHTLY, NIGHTLY | {"python": "3.12"}),
        (
            {"version": "0.19.1", "deep_gemm": COMMIT},
            {"version": "0.19.1", "deep_gemm": OTHER},
        ),
    ],
)
def test_whatever_goes_in_makes_another_release(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert release_of(one).id != release_of(other).id


def test_another_text_of_a_patch_is_another_release() -> None:
    patched = SOURCE | {"patches": ["a.patch"]}

    assert release_of(patched, "one").id != release_of(patched, "two").id
    assert release_of(patched, "one").patches == (("a.patch", "one"),)


def test_where_it_is_fetched_from_makes_no_difference() -> None:
    moved = {"url": "https://b.example/x/vllm-0.33.0-cp38-abi3-l.whl", "sha256": DIGITS}
    mirrors = {
        "nightly": "https://b.example/n",
        "git": {"https://github.com/": "https://b.example"},
    }

    assert release_of(WHEEL).id == release_of(WHEEL | {"wheel": moved}).id
    assert release_of(SOURCE).id == release_of(SOURCE, mirrors=mirrors).id
    full = SOURCE | {"precompiled": False}
    assert release_of(full).id == release_of(full | {"max_jobs": 4}).id


def test_the_version_says_which_cuda_of_the_nightly_index() -> None:
    def variant(version: str) -> str:
        return str(release_of(NIGHTLY | {"version": version}).origin["variant"])

    assert variant("0.33.0") == ""
    assert variant("0.33.0+cu129") == "cu129"
    assert variant("0.33.0+site.1") == ""


def test_vllm_itself_is_asked_of_the_index_only_where_it_comes_from_there() -> None:
    assert release_of({"version": "0.33.0"}).requirements == ("vllm==0.33.0",)
    assert release_of(NIGHTLY | {"packages": ["ray==2.50.0"]}).requirements == ("ray==2.50.0",)
    assert release_of(WHEEL).requirements == ()


def test_old_builds_by_commit_bring_tritons_kernels() -> None:
    (old,) = release_of(NIGHTLY | {"version": "0.12.0"}).requirements

    assert old.startswith("triton-kernels @ git+https://github.com/triton-lang/triton.git@")
    assert release_of(NIGHTLY | {"version": "0.13.0"}).requirements == ()
    assert release_of({"version": "0.12.0"}).requirements == ("vllm==0.12.0",)


def test_the_copying_of_libraries_is_for_versions_that_have_a_library_of_that_name() -> None:
    def copies(version: str, **more: Any) -> Any:
        return release_of(SOURCE | {"version": version} | more).origin["copy_libraries"]

    assert copies("0.23.0") is True
    assert copies("0.24.0") is False
    assert copies("0.23.0", precompiled=False) is False


def test_what_the_host_is_told_has_the_sites_addresses() -> None:
    mirrors = {
        "nightly": "https://m.example/nightly/",
        "git": {"https://github.com/": "https://m.example/git/"},
        "python": "https://m.example/python",
        "extra_index": ["https://m.example/torch"],
    }
    host = plan_of(service(), vllm=WHEEL, mirrors=mirrors)

    addresses = host.release_request(host.release)["addresses"]

    assert addresses == {
        "extra_index": ["https://m.example/torch"],
        "nightly": "https://m.example/nightly",
        "python": "https://m.example/python",
        "git": {"https://github.com/": "https://m.example/git/"},
        "vllm": "https://github.com/vllm-project/vllm.git",
        "deep_gemm": "https://github.com/deepseek-ai/DeepGEMM.git",
        "wheel": "https://a.example/w/vllm-0.33.0-cp38-abi3-l.whl",
    }


@pytest.mark.parametrize("channel", ["nightly", "source"])
def test_a_build_from_before_the_fix_is_refused_for_models_that_need_it(channel: str) -> None:
    vllm = {"channel": channel, "version": "0.12.0", "commit": COMMIT}

    message = problems_of(service(), vllm=vllm)

    assert "vllm.commit: a build on the way to 0.12.0 may be older than commit cf3eacfe5" in message
    assert "guides 003 and 004" in message
    assert "0.13.0 or later" in message
    assert "cf3eacfe" not in problems_of(service(), vllm=vllm | {"commit": FIX})
    assert "cf3eacfe" not in problems_of(service(), vllm=vllm | {"version": "0.13.0"})


@pytest.mark.parametrize(
    ("vllm", "site", "message"),
    [
        (SOURCE | {"patches": ["no.patch"]}, {}, "vllm.patches[0]: no.patch is missing"),
        ({"version": "0.31.0", "kernels": True}, {}, "vllm.kernels: vLLM 0.31.0 has no download-"),
        (
            SOURCE | {"precompiled": False},
            {},
            "vllm.precompiled: False compiles CUDA; set cuda_too",
        ),
        (
            {"version": "0.19.1", "deep_gemm": COMMIT},
            {"cuda_toolkit": "12.6"},
            "vllm.deep_gemm: DeepGEMM is compiled by a CUDA toolkit of 12.8 or later; 12.6",
        ),
        (
            {"version": "0.19.1", "deep_gemm": COMMIT},
            {},
            "vllm.deep_gemm: DeepGEMM is compiled by a CUDA toolkit of 12.8 or later; none is decl",
        ),
        (
            {"version": "0.33.0", "deep_gemm": COMMIT},
            {"cuda_toolkit": "13.0"},
            "vllm.deep_gemm: vLLM 0.33.0 has DeepGEMM bundled; leave it out",
        ),
    ],
)
def test_what_a_way_of_installing_lacks_is_told(
    vllm: dict[str, Any], site: dict[str, Any], message: str
) -> None:
    assert message in problems_of(service(), vllm=vllm, **site)


def test_b18_deep_gemm_is_refused_before_hopper() -> None:
    message = problems_of(
        service(recipe="tp4-a100"),
        gpu="a100-80",
        vllm={"version": "0.19.1", "deep_gemm": COMMIT},
        cuda_toolkit="12.9",
    )

    assert "vllm.deep_gemm: DeepGEMM needs compute capability 9.0 (Hopper) or later" in message
    assert "has 8.0; leave it out" in message
