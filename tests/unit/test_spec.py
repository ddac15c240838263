"""What group data may not say, whatever it is about."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fleet.spec import HostSpec, Vllm

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
    assert "~/.netrc" in message
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


def test_a_commit_is_not_for_stable() -> None:
    with pytest.raises(ValueError, match="commit is for the channels nightly and source"):
        Vllm.model_validate({"version": "0.33.0", "commit": "0" * 40})
