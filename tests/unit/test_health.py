"""The question at the public port: whatever comes is an answer or one line, and never another error."""

from __future__ import annotations

import json

import pytest
import requests

from fleet.health import NoAnswerError, ask
from tests.unit.state import plan_of, service

SERVICE = plan_of(service()).services[0]


def answers(monkeypatch: pytest.MonkeyPatch, body: bytes, status: int = 200) -> None:
    """From now on the public port answers so."""
    response = requests.Response()
    response.status_code = status
    response._content = body
    monkeypatch.setattr(requests.Session, "post", lambda *_, **__: response)


def test_a_sensible_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    message = {"content": "The Dodgers.", "reasoning": None}
    answers(monkeypatch, json.dumps({"choices": [{"message": message}]}).encode())

    assert ask(SERVICE, "192.0.2.11").text == "The Dodgers."


@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        b"[]",
        b"null",
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": []}]}',
        b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_an_odd_answer_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    answers(monkeypatch, body)

    with pytest.raises(
        NoAnswerError, match="expected an answer that matches /Dodgers/, got"
    ) as told:
        ask(SERVICE, "192.0.2.11")
    assert len(str(told.value).splitlines()) == 1


def test_an_error_of_the_server_is_told_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, b"no such model", 404)

    with pytest.raises(NoAnswerError, match="got HTTP 404: no such model"):
        ask(SERVICE, "192.0.2.11")
