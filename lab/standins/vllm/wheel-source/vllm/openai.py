"""OpenAI's requests and answers as vLLM has them: validation, texts, shapes. No I/O."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import lab, text
from vllm.config import ServerConfig
from vllm.version import __version__, release

# Since 0.12 the field of a message is called as OpenAI calls it.
REASONING_FIELD_RENAMED = (0, 12)
DEFAULT_COMPLETION_TOKENS = 16
THINK, END_THINK = "<think>", "</think>"
WORDS_TO_CALL_BY = 4
NUMBERS = ("integer", "number")


class RequestError(Exception):
    """A request that is refused, with the status and body of the answer."""

    def __init__(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        """message, kind, param: fields of the error in the body."""
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, kind, param)


@dataclass
class Reply:
    """What will be answered to one choice.

    pieces: what the model generates, token by token
    finish_reason: "stop", "length" or "tool_calls"
    """

    pieces: list[str]
    finish_reason: str
    tool_call: dict[str, Any] | None = None


@dataclass
class Job:
    """A valid request, and the answers that it will get.

    chat: of /v1/chat/completions, not /v1/completions
    reply: the same for every choice
    """

    chat: bool
    stream: bool
    include_usage: bool
    prompt_tokens: int
    max_tokens: int
    choices: int
    reply: Reply
    model: str
    splits_reasoning: bool = False
    reasoning: str | None = None
    content: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    created: int = field(default_factory=lambda: int(time.time()))


def error_body(
    status: int, message: str, kind: str = "BadRequestError", param: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def validation_error(
    kind: str, where: str, message: str, given: str, **more: dict[str, str]
) -> RequestError:
    """What a body is answered that does not fit the request's model."""
    details = {"type": kind, "loc": f"body.{where}", "msg": message, "input": given, **more}
    return RequestError(
        400, f"1 validation error:\n  {details}", kind="Bad Request", param=f"body.{where}"
    )


def parse_body(content_type: str, body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises RequestError."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            400,
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
            kind="Bad Request",
        )
    try:
        parsed = json.loads(body)
    except ValueError as error:
        raise validation_error(
            "json_invalid",
            str(getattr(error, "pos", 0)),
            "JSON decode error",
            "<dict of 0 items>",
            ctx={"error": getattr(error, "msg", "invalid")},
        ) from None
    if not isinstance(parsed, dict):
        raise validation_error(
            "model_attributes_type", "", "Input should be a valid dictionary", str(parsed)[:50]
        )
    return parsed


def served_names(config: ServerConfig, behaviour: lab.Behaviour) -> list[str]:
    """The names that the server goes by."""
    if behaviour.mode == "wrong-model":
        return [behaviour.text or "Qwen/Qwen3-0.6B"]
    return config.names


def models(config: ServerConfig, names: Sequence[str]) -> dict[str, Any]:
    """The answer of /v1/models."""
    permission = {
        **{"object": "model_permission", "created": int(time.time())},
        **{"allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True},
        **{"allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False},
        **{"organization": "*", "group": None, "is_blocking": False},
    }
    return {
        "object": "list",
        "data": [
            {
                **{"id": name, "object": "model", "created": int(time.time())},
                **{"owned_by": "vllm", "root": config.model, "parent": None},
                "max_model_len": config.max_model_len,
                "permission": [{"id": f"modelperm-{secrets.token_hex(8)}", **permission}],
            }
            for name in names
        ],
    }


def check_model(request: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse a model that is not served. Raises RequestError."""
    wanted = request.get("model")
    if wanted and wanted not in names:
        raise RequestError(
            404,
            f"The model `{wanted}` does not exist. Valid aliases: {', '.join(names)}.",
            kind="NotFoundError",
            param="model",
        )


def plan_completion(request: dict[str, Any], config: ServerConfig, behaviour: lab.Behaviour) -> Job:
    """The job of a /v1/completions request. Raises RequestError."""
    names = served_names(config, behaviour)
    prompt = request.get("prompt")
    if not prompt:
        raise _bad("prompt", "Either prompt or prompt_embeds must be provided and non-empty.")
    check_model(request, names)
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if isinstance(prompts[0], int):
        counts, shown = [len(prompts)], ""
    else:
        counts = [len(text.tokenize(str(each))) for each in prompts]
        shown = str(prompts[0])
    max_tokens = _limit(request, config, max(counts), DEFAULT_COMPLETION_TOKENS)
    said = _said(" " + text.answer(shown), behaviour)
    return Job(
        chat=False,
        stream=bool(request.get("stream")),
        include_usage=_includes_usage(request),
        prompt_tokens=sum(counts),
        max_tokens=max_tokens,
        choices=len(counts) * _choices(request),
        reply=_cut(said, request, max_tokens),
        model=names[0],
    )


def plan_chat(request: dict[str, Any], config: ServerConfig, behaviour: lab.Behaviour) -> Job:
    """The job of a /v1/chat/completions request. Raises RequestError."""
    names = served_names(config, behaviour)
    messages = _messages(request)
    check_model(request, names)
    tool_call = _tool_call(request, messages, config)
    if not messages:
        raise RequestError(
            400,
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
        )
    count = text.prompt_tokens(messages)
    max_tokens = _limit(request, config, count, None)
    asked = text.message_text(messages[-1])
    # The prompt of M2 ends in <think>, so what the model says begins inside it.
    opening = "" if config.opens_thinking else THINK + "\n"
    thought = f"{opening}{text.reasoning(asked)}\n{END_THINK}\n\n"
    said = _said(thought + ("" if tool_call else text.answer(asked)), behaviour)
    reply = _cut(said, request, max_tokens)
    if tool_call and reply.finish_reason == "stop":
        reply.tool_call = tool_call
        reply.finish_reason = "tool_calls"
    return Job(
        chat=True,
        stream=bool(request.get("stream")),
        include_usage=_includes_usage(request),
        prompt_tokens=count,
        max_tokens=max_tokens,
        choices=_choices(request),
        reply=reply,
        model=names[0],
        splits_reasoning=_splits(config),
    )


def deltas(job: Job, config: ServerConfig, pieces: Iterator[str]) -> Iterator[dict[str, str]]:
    """Turn generated tokens into the parts of an answer, by the server's reasoning parser."""
    if job.chat and config.reasoning_parser == "minimax_m2_append_think":
        yield {"content": THINK}
    thinks = job.splits_reasoning
    for piece in pieces:
        if thinks and piece == END_THINK:
            thinks = False
        else:
            yield {reasoning_field() if thinks else "content": piece}


def reasoning_field() -> str:
    """The name of a message's field for what the model thought."""
    return "reasoning" if release() >= REASONING_FIELD_RENAMED else "reasoning_content"


def response(job: Job, message: dict[str, str]) -> dict[str, Any]:
    """The answer to a request that does not stream.

    message: the parts of the answer, joined by their fields
    """
    tokens = len(job.reply.pieces) * job.choices
    choices = []
    for index in range(job.choices):
        choice: dict[str, Any] = {"index": index}
        if job.chat:
            choice["message"] = _message(job, message)
        else:
            choice["text"] = message.get("content", "")
        choice |= {"logprobs": None, "finish_reason": job.reply.finish_reason}
        choices.append({**choice, "stop_reason": None, "token_ids": None})
    return {
        "id": _full_id(job),
        "object": "chat.completion" if job.chat else "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": f"vllm-{__version__}-00000000",
        "usage": {**_usage(job, tokens), "prompt_tokens_details": None},
        "kv_transfer_params": None,
    }


def chunks(job: Job, parts: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer, from the parts of the message."""
    if job.chat:
        yield _chunk(job, {"delta": {"role": "assistant", "content": ""}}, None)
    for part in parts:
        yield _chunk(job, {"delta": part} if job.chat else {"text": part["content"]}, None)
    last: dict[str, Any] = {"delta": {"content": ""}} if job.chat else {"text": ""}
    if job.reply.tool_call:
        last = {"delta": {"tool_calls": [{"index": 0, **job.reply.tool_call}]}}
    yield _chunk(job, last, job.reply.finish_reason)
    if job.include_usage:
        tokens = len(job.reply.pieces) * job.choices
        yield {**_chunk(job, {}, None), "choices": [], "usage": _usage(job, tokens)}


def _chunk(job: Job, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    # Choices of one request are the same, so each event carries all of them.
    choices = [
        {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        for index in range(job.choices)
    ]
    return {
        "id": _full_id(job),
        "object": "chat.completion.chunk" if job.chat else "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
    }


def _full_id(job: Job) -> str:
    return f"{'chatcmpl' if job.chat else 'cmpl'}-{job.id}"


def _usage(job: Job, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": job.prompt_tokens,
        "total_tokens": job.prompt_tokens + tokens,
        "completion_tokens": tokens,
    }


def _message(job: Job, parts: dict[str, str]) -> dict[str, Any]:
    content = parts.get("content")
    if content is not None and job.splits_reasoning:
        content = content.strip("\n")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content or (None if job.reply.tool_call or job.splits_reasoning else ""),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        reasoning_field(): (parts.get(reasoning_field()) or "").strip("\n") or None,
    }
    if job.reply.tool_call:
        message["tool_calls"] = [job.reply.tool_call]
    return message


def _bad(param: str, message: str, value: object = None) -> RequestError:
    shown = "" if value is None else f", value={value}"
    return RequestError(400, f"{message} (parameter={param}{shown})", param=param)


def _messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in request:
        raise validation_error(
            "missing", "messages", "Field required", f"<dict of {len(request)} items>"
        )
    messages = request["messages"]
    if not isinstance(messages, list):
        raise validation_error("list_type", "messages", "Input should be a valid list", "...")
    for position, message in enumerate(messages):
        where = f"messages.{position}"
        if not isinstance(message, dict) or "role" not in message:
            raise validation_error("missing", f"{where}.role", "Field required", str(message)[:50])
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise validation_error(
                "string_type", f"{where}.content", "Input should be a valid string", str(content)
            )
        for part in content if isinstance(content, list) else []:
            if part.get("type") not in {"text", "input_text"}:
                raise RequestError(400, f"{request.get('model', 'this')} is not a multimodal model")
    return messages


def _includes_usage(request: dict[str, Any]) -> bool:
    return bool((request.get("stream_options") or {}).get("include_usage"))


def _choices(request: dict[str, Any]) -> int:
    choices = request.get("n")
    if choices is not None and int(choices) < 1:
        raise RequestError(400, f"n must be at least 1, got {choices}.")
    return int(choices or 1)


def _limit(
    request: dict[str, Any], config: ServerConfig, prompt_tokens: int, default: int | None
) -> int:
    """How many tokens the answer may have. Raises RequestError."""
    window = config.max_model_len
    temperature = request.get("temperature")
    if temperature is not None and temperature < 0:
        raise _bad(
            "temperature",
            f"temperature must be non-negative, got {float(temperature)}.",
            float(temperature),
        )
    asked = request.get("max_completion_tokens", request.get("max_tokens"))
    if asked is not None and not isinstance(asked, int):
        raise validation_error(
            "int_parsing",
            "max_tokens",
            "Input should be a valid integer, unable to parse string as an integer",
            str(asked),
        )
    if asked is not None and asked > window:
        raise _bad(
            "max_tokens",
            f"max_tokens={asked} cannot be greater than max_model_len={window}. Please request "
            "fewer output tokens.",
            asked,
        )
    if asked is not None and asked < 1:
        raise _bad("max_tokens", f"max_tokens must be at least 1, got {asked}.", asked)
    if prompt_tokens >= window:
        raise _bad(
            "input_tokens",
            f"This model's maximum context length is {window} tokens. However, your prompt contains "
            f"at least {prompt_tokens} input tokens, which exceeds this limit even without any "
            "output tokens. Please reduce the length of the input prompt.",
            prompt_tokens,
        )
    left = window - prompt_tokens
    return min(left, asked or default or left)


def _said(sentence: str, behaviour: lab.Behaviour) -> str:
    return (behaviour.text or text.GARBAGE) if behaviour.mode == "garbage" else sentence


def _cut(said: str, request: dict[str, Any], max_tokens: int) -> Reply:
    """The tokens of an answer, as far as stop strings and limits let it go."""
    stops = request.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        said = said.partition(stop)[0]
    pieces = _pieces(said)
    endless = bool(request.get("ignore_eos"))
    wanted = max_tokens if endless else int(request.get("min_tokens") or 0)
    while pieces and len(pieces) < wanted:
        pieces += pieces[: wanted - len(pieces)]
    finish_reason = "length" if endless or len(pieces) > max_tokens else "stop"
    return Reply(pieces[:max_tokens], finish_reason)


def _pieces(said: str) -> list[str]:
    """Tokens; the marks of thinking are one each, as in the model's vocabulary."""
    parts = re.split(f"({re.escape(THINK)}|{re.escape(END_THINK)})", said)
    return [
        piece
        for part in parts
        for piece in ([part] if part in {THINK, END_THINK} else text.tokenize(part))
    ]


def _splits(config: ServerConfig) -> bool:
    return config.reasoning_parser not in {"", "minimax_m2_append_think"}


def _tool_call(
    request: dict[str, Any], messages: Sequence[dict[str, Any]], config: ServerConfig
) -> dict[str, Any] | None:
    """The call that the answer is to make, None for a plain answer. Raises RequestError."""
    tools = request.get("tools")
    choice = request.get("tool_choice", "auto" if tools else "none")
    if choice != "none" and not tools:
        raise _bad("tool_choice", "When using `tool_choice`, `tools` must be set.")
    functions = [tool["function"] for tool in tools or [] if "function" in tool]
    asked = text.message_text(messages[-1]) if messages else ""
    if choice == "auto":
        if not config.auto_tools:
            raise RequestError(
                400,
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to '
                "be set",
            )
        if messages and messages[-1].get("role") == "tool":
            return None
        functions = [function for function in functions if _is_meant(function, asked)]
    elif isinstance(choice, dict):
        name = choice.get("function", {}).get("name")
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise _bad(
                "tool_choice",
                "The tool specified in `tool_choice` does not match any of the specified `tools`",
            )
    if choice == "none" or not functions:
        return None
    called = {
        "name": functions[0]["name"],
        "arguments": json.dumps(_arguments(functions[0], asked)),
    }
    return {"id": f"chatcmpl-tool-{secrets.token_hex(8)}", "type": "function", "function": called}


def _is_meant(function: dict[str, Any], asked: str) -> bool:
    """Whether a question shares a word with a function's name."""
    words = {word.lower() for word in re.findall(r"[A-Za-z]+", asked)}
    named = re.findall(r"[a-z]+", function["name"].lower())
    return any(len(word) >= WORDS_TO_CALL_BY and word in words for word in named)


def _arguments(function: dict[str, Any], asked: str) -> dict[str, Any]:
    """Values for what the function requires: names from the question, if it has any."""
    schema = function.get("parameters") or {}
    capitalised = re.findall(r"\b[A-Z]\w+", asked)
    arguments: dict[str, Any] = {}
    for name in schema.get("required", schema.get("properties", {})):
        described = schema.get("properties", {}).get(name, {})
        if described.get("enum"):
            arguments[name] = described["enum"][0]
        elif described.get("type") in NUMBERS:
            arguments[name] = 1
        elif described.get("type") == "boolean":
            arguments[name] = True
        else:
            arguments[name] = capitalised[-1] if capitalised else name
    return arguments
