"""What group data may not say, whatever it is about."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fleet.spec import HostSpec, Vllm, WheelFile

SECRET = "s3cret"
WITH_A_SECRET = f"https://user:{SECRET}@mirror.example/simple"


@pytest.mark.parametrize(
    "data",
    [
        {"mirrors": {"index": WITH_A_SECRET}},
        {"mirrors": {"index": f"https://{SECRET}@mirror.example/simple"}},
        {"mirrors": {"hub": WITH_A_SECRET}},
        {"mirrors": {"apt": {"nvidia": {"url": WITH_A_SECRET, "key": "key.asc"}}}},
        {"vllm": {"version": "0.33.0", "packages": [f"a @ {WITH_A_SECRET}/a.whl"]}},
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        HostSpec.model_validate({"vllm": {"version": "0.33.0"}, "services": []} | data)

    (finding,) = raised.value.errors()
    message = str(finding["ctx"]["error"])
    assert message.startswith("holds credentials, which would reach command lines and logs")
    assert "mirrors.credentials" in message
    assert SECRET not in message


def test_an_address_with_an_at_sign_elsewhere_is_no_secret() -> None:
    data = {"vllm": {"version": "0.33.0"}, "services": []}
    index = "https://mirror.example/@team/simple"

    assert HostSpec.model_validate({**data, "mirrors": {"index": index}}).mirrors.index == index


@pytest.mark.parametrize("channel", ["nightly", "source"])
@pytest.mark.parametrize(
    ("commit", "given"), [(None, "no commit"), ("main", "'main'"), ("cf3eacfe", "'cf3eacfe'")]
)
def test_b13_what_moves_is_pinned_by_a_commit(channel: str, commit: str | None, given: str) -> None:
    data = {"version": "0.33.0", "channel": channel} | ({"commit": commit} if commit else {})

    with pytest.raises(ValueError, match=f"channel {channel!r} with {given}: pin it, give commit"):
        Vllm.model_validate(data)


DIGITS = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"commit": "0" * 40}, "commit means nothing to channel 'stable'"),
        ({"precompiled": False}, "precompiled means nothing to channel 'stable' .source has it"),
        ({"channel": "wheel"}, "channel 'wheel' with no wheel: give"),
        ({"channel": "docker"}, "channel 'docker' with no image: pin it"),
        (
            {"channel": "docker", "image": "vllm/vllm-openai:v0.33.0"},
            "channel 'docker' with 'vllm/vllm-openai:v0.33.0': pin it, give image as name@sha256",
        ),
        (
            {"channel": "docker", "image": f"v@sha256:{DIGITS}", "packages": ["a==1"]},
            "packages means nothing to channel 'docker'",
        ),
        (
            {"channel": "source", "commit": "0" * 40, "max_jobs": 4},
            "max_jobs is for a full build; set precompiled to False",
        ),
        ({"deep_gemm": "main"}, "'main' is not a commit; pin it: give 40 hex digits of DeepGEMM's"),
    ],
)
def test_keys_of_another_channel_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vllm.model_validate({"version": "0.33.0", **data})


@pytest.mark.parametrize("url", ["/srv/vllm.whl", "https://mirror.example/vllm.tar.gz", "vllm.whl"])
def test_a_wheel_is_an_address_of_a_wheel(url: str) -> None:
    with pytest.raises(ValueError, match="is no address of a wheel"):
        WheelFile.model_validate({"url": url, "sha256": DIGITS})


@pytest.mark.parametrize(
    "url",
    ["file:///srv/vllm-1-py3-none-any.whl", "https://m.example/w/vllm-1+cu129-cp38-abi3-l.whl"],
)
def test_a_wheel_may_lie_on_a_mirror_or_on_the_hosts(url: str) -> None:
    assert WheelFile.model_validate({"url": url, "sha256": DIGITS}).url == url
