"""Requests in the form of OpenAI's API. Checks values; knows no memory and no model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from am_memory.errors import unknown
from am_memory.text.sampling import MAX_STOP_CHARS, MAX_STOPS

CONVERSATION_KEYS = ("conversation_id", "thread_id", "session_id", "chat_id")
"""Keys of `metadata` that name the conversation; the first one found counts."""
MAX_MESSAGES = 20_000
MAX_MOUNTS = 32
MAX_NAMES = 100
"""Names in one object of a request."""
MAX_NAME_CHARS = 100
"""Characters of an unknown name that are compared with the known names and shown."""
UNKNOWN_NAME = "unknown_name"
"""Type of the validation error for an unknown name; its context has the `name`."""

TokenCount = Annotated[int, Field(ge=1, lt=2**31)]


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse numbers that are read as infinite, such as 1e999."""
    json.dumps(schema, allow_nan=False)
    return schema


FiniteSchema = Annotated[dict[str, Any], AfterValidator(_finite)]


def _few(values: Any) -> Any:
    """Refuse an object with many names: pydantic would keep a large error for each wrong one."""
    if isinstance(values, dict) and len(values) > MAX_NAMES:
        raise ValueError(f"it has {len(values)} names: give {MAX_NAMES} at most")
    return values


def _not_too_many(messages: Any) -> Any:
    """Refuse too many messages before any of them is validated."""
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        raise ValueError(
            f"there are {len(messages)} messages: send {MAX_MESSAGES} at most, for example with the oldest ones merged"
        )
    return messages


class StrictBody(BaseModel):
    """An object that refuses unknown names, as OpenAI's API does, and suggests the nearest known one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_known_names(cls, body: Any) -> Any:
        if isinstance(body, dict):
            known = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
            if strange := [str(name)[:MAX_NAME_CHARS] for name in _few(body) if name not in known]:
                context = {"unknown": unknown(strange, known), "name": strange[0]}
                raise PydanticCustomError(UNKNOWN_NAME, "there is no {unknown}", context)
        return body


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


# Messages


def _only_text(content: Any) -> Any:
    """Join a list of text parts to one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise ValueError(f"a part of type {kind!r}: this model takes text only")
        texts.append(text)
    return "".join(texts)


Text = Annotated[str, BeforeValidator(_only_text)]


def _as_text(arguments: Any) -> Any:
    """Arguments as text: some clients send the JSON value itself."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class FunctionCall(_Part):
    """The function that a message calls. `arguments` is JSON text."""

    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[str, BeforeValidator(_as_text)] = "{}"


class MessageToolCall(_Part):
    """A tool call in an assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Part):
    """One message. `content` is a text or a list of text parts. Unknown names, which other servers add, are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message can have tool_calls")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs the tool_call_id of its call")
        return self

    def as_message(self) -> dict[str, Any]:
        """The message as the memory takes it."""
        return {"content": "", **self.model_dump(exclude_none=True)}


# Tools and answer formats


class Function(_Part):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: FiniteSchema | None = None
    strict: bool | None = None


class ChatTool(_Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def as_tool(self) -> dict[str, Any]:
        """The tool as the memory takes it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(_Part):
    """The name of a function."""

    name: str


class NamedTool(_Part):
    """A `tool_choice` that forces a call of one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class _Options(StrictBody):
    """An object whose names can be given by their aliases, too."""

    model_config = ConfigDict(populate_by_name=True)


class JSONSchema(_Options):
    """The schema that the answer must follow."""

    name: str = "answer"
    description: str | None = None
    schema_: FiniteSchema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Options):
    """The format of the answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema, with a name and a schema")
        return self

    def as_format(self) -> dict[str, Any]:
        """The format as the memory takes it."""
        if self.json_schema is None:
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"schema": self.json_schema.schema_}}


class StreamOptions(_Options):
    """`include_memory` is an extension: chunks without choices report events and the size of the memory."""

    include_usage: bool = False
    include_memory: bool = False
    include_obfuscation: bool = False


# Requests


class _Sampled(StrictBody):
    """Parameters of chat completions and of plain completions."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    user: str | None = None
    # Accepted with the values that change nothing.
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0), BeforeValidator(_few)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that the request sets."""
        names = ("seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**asked, "stop": tuple(self.stop)} if self.stop else asked

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(_Sampled):
    """The body of `POST /v1/chat/completions`.

    `mounts` is an extension: ids of compact texts that the conversation begins with.
    """

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, fail_fast=True, max_length=MAX_MESSAGES), BeforeValidator(_not_too_many)
    ]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[ChatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    mounts: Annotated[list[str], Field(max_length=MAX_MOUNTS)] = []  # an extension
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    # Accepted and ignored: they concern OpenAI's own service.
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _has_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def choice(self) -> str | None:
        """`tool_choice` as one word: a mode, or the name of a function."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice

    @property
    def conversation_hint(self) -> str | None:
        """The name of the conversation in `metadata` or `user`, if there is one."""
        named = (self.metadata or {}).get
        return next((found for key in CONVERSATION_KEYS if (found := named(key))), self.user) or None


class CompletionRequest(_Sampled):
    """The body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, max_length=16, fail_fast=True)]
    )
    max_tokens: TokenCount | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
