"""What clients send and get, in the form of OpenAI's API. Checks values; knows no memory and no model."""

from __future__ import annotations

import json
import time
import uuid
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

MAX_CONVERSATION_CHARS = 200
CONVERSATION_KEYS = ("conversation_id", "thread_id", "session_id", "chat_id")
"""Of `metadata`, in this order."""

TokenCount = Annotated[int, Field(ge=1, lt=2**31)]


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with no number that is beyond all numbers, as 1e999 is read."""
    json.dumps(schema, allow_nan=False)
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_finite)]


MAX_NAMES = 100


def _few(values: Any) -> Any:
    """What has few names, if it has any: of each that is wrong an error would be kept, which is larger than it."""
    if isinstance(values, dict) and len(values) > MAX_NAMES:
        raise ValueError(f"it has {len(values)} names: give {MAX_NAMES} at most")
    return values


MAX_MESSAGES = 20_000
MAX_NAME_CHARS = 100
"""Of an unknown name, when it is told, and compared to those that there are."""
UNKNOWN_NAME = "unknown_name"
"""The type of an error within an object, whose `name` says where."""


def _not_too_many(messages: Any) -> Any:
    """Said before any of them is looked at."""
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        raise ValueError(f"there are {len(messages)} messages: send {MAX_MESSAGES} at most, and the oldest ones as one")
    return messages


class StrictBody(BaseModel):
    """What is not known is refused by name, as OpenAI's API does."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_known_names(cls, body: Any) -> Any:
        if isinstance(body, dict):
            known = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
            if strange := [str(name)[:MAX_NAME_CHARS] for name in _few(body) if name not in known]:
                told = {"told": unknown(strange, known), "name": strange[0]}
                raise PydanticCustomError(UNKNOWN_NAME, "there is no {told}", told)
        return body


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


# Messages


def _only_text(content: Any) -> Any:
    """A list of text parts as one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise ValueError(f"a part of type {kind!r}: this model takes text alone")
        texts.append(text)
    return "".join(texts)


Text = Annotated[str, BeforeValidator(_only_text)]


def _as_written(arguments: Any) -> Any:
    """Arguments are a text, whatever it says; some programs send the value itself."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class FunctionCall(_Part):
    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[str, BeforeValidator(_as_written)] = "{}"


class MessageToolCall(_Part):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Part):
    """One message; `content` is a text, or a list of text parts. What other servers put into answers is left out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message has tool_calls")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs the tool_call_id of the call that it answers")
        return self

    def as_message(self) -> dict[str, Any]:
        """As the memory takes it."""
        return {"content": "", **self.model_dump(exclude_none=True)}


# Tools and forms


class Function(_Part):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(_Part):
    type: Literal["function"]
    function: Function

    def as_tool(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(_Part):
    name: str


class NamedTool(_Part):
    type: Literal["function"] = "function"
    function: NamedFunction


class _Options(StrictBody):
    """What only we read: a name that is not known would be lost in silence."""

    model_config = ConfigDict(populate_by_name=True)


class JSONSchema(_Options):
    name: str = "answer"
    description: str | None = None
    schema_: Schema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Options):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema, with a name and a schema")
        return self

    def as_format(self) -> dict[str, Any]:
        if self.json_schema is None:
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"schema": self.json_schema.schema_}}


class StreamOptions(_Options):
    """`include_memory` is ours: chunks without choices tell what happens in the memory."""

    include_usage: bool = False
    include_memory: bool = False
    include_obfuscation: bool = False


# Requests


class _Sampled(StrictBody):
    """What both kinds of completions take."""

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
    # Taken where they ask for what is done anyway.
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0), BeforeValidator(_few)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    def sampling(self) -> dict[str, Any]:
        """What of `Sampling` is asked for."""
        names = ("seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**asked, "stop": tuple(self.stop)} if self.stop else asked

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(_Sampled):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, fail_fast=True, max_length=MAX_MESSAGES), BeforeValidator(_not_too_many)
    ]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    # For OpenAI's own service; they change nothing here.
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def choice(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice

    @property
    def conversation_hint(self) -> str | None:
        """What the client calls the conversation, if it says so here."""
        named = (self.metadata or {}).get
        return next((found for key in CONVERSATION_KEYS if (found := named(key))), self.user) or None


class CompletionRequest(_Sampled):
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
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


# Answers


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[MessageToolCall] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class _Answer(BaseModel):
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    usage: Usage


class ChatCompletion(_Answer):
    id: str = Field(default_factory=lambda: new_id("chatcmpl"))
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(_Answer):
    id: str = Field(default_factory=lambda: new_id("cmpl"))
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "am-memory"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
