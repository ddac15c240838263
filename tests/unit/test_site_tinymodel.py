"""The tiny model's chat template gives the prompts that the model is trained on."""

from collections.abc import Mapping

import jinja2

from lab.tinymodel import build

SYSTEM, QUESTION = "You are a helpful assistant.", "Who won the world series in 2020?"
PROMPT = f"]~!b[]~b]system\n{SYSTEM}[e~[\n]~b]user\n{QUESTION}[e~[\n]~b]ai\n<think>\n"


def render(*messages: Mapping[str, object]) -> str:
    template = jinja2.Environment(autoescape=False).from_string(build.CHAT_TEMPLATE.read_text())
    return template.render(messages=messages, add_generation_prompt=True)


def test_the_guides_request_has_its_texts_in_parts() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    user = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}

    assert render(system, user) == PROMPT


def test_plain_texts_say_the_same() -> None:
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}

    assert render(system, user) == PROMPT


def test_without_a_system_message_there_is_the_usual_one() -> None:
    assert render({"role": "user", "content": QUESTION}) == PROMPT


def test_earlier_turns_stay() -> None:
    prompt = render(
        {"role": "user", "content": "ping"},
        {"role": "assistant", "content": "pong"},
        {"role": "user", "content": "ping"},
    )

    assert prompt.endswith(
        "]~b]user\nping[e~[\n]~b]ai\npong[e~[\n]~b]user\nping[e~[\n]~b]ai\n<think>\n"
    )
