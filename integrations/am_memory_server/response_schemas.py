"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from typing import Literal

from pydantic import BaseModel, Field

from am_memory.events import Span
from am_memory.session.stats import Stats
from am_memory_server.message_schemas import MessageToolCall

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write, as in OpenAI's API: the token cannot be sampled."""


class PromptTokensDetails(BaseModel):
    """`cached_tokens` were not read again: they were in a kept cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of the prompt and of the answer."""

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
    """The answer as a message, which the client can send back in its next request.

    `reasoning_content` is the `<think>...</think>` that the answer opened with. It need not be sent back.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[MessageToolCall] | None = None


class TopLogprob(BaseModel):
    """A token and its log probability. `bytes` are UTF-8; a token may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A generated token, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token of the answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer to a chat request; there are as many as `n` asks for. The memory keeps the first one."""

    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class _Answer(BaseModel):
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    usage: Usage


class AnswerMemory(BaseModel):
    """The memory of a whole answer: an extension of OpenAI's API.

    Attributes:
        conversation: its name in `/v1/memory/sessions`.
        looked_up: the compacted spans that were exact for this answer because it looked for them. `score` is
            that of `Span`, in nats; a long `text` is shortened in the middle.
    """

    conversation: str
    stats: Stats
    looked_up: list[Span]


class ChatCompletion(_Answer):
    """The response to `POST /v1/chat/completions`."""

    id: str = Field(default_factory=lambda: new_id("chatcmpl"))
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    am_memory: AnswerMemory


class TextLogprobs(BaseModel):
    """Four lists with an entry for each generated token. `text_offset` counts characters of the completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """A completion of a prompt. `index` counts the completions of the first prompt, then those of the second one."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(_Answer):
    """The response to `POST /v1/completions`."""

    id: str = Field(default_factory=lambda: new_id("cmpl"))
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "am-memory"


class ModelList(BaseModel):
    """The served models; there is always one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """An error. `param` is the path of the problem in the request; `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response with an error status."""

    error: ErrorBody


def new_id(kind: str) -> str:
    """A new id in the form of OpenAI's API."""
    return f"{kind}-{uuid.uuid4().hex}"
