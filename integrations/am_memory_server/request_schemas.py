"""Requests in the form of OpenAI's API. Checks values; knows no memory and no model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, field_validator, model_validator

from am_memory.engines.templates import is_template_option
from am_memory.text.sampling import MAX_BIASES, MAX_STOP_CHARS, MAX_STOPS
from am_memory_server.bodies import Body, few_names, without_nulls
from am_memory_server.message_schemas import ChatMessage, ChatTool, NamedTool, ResponseFormat

CONVERSATION_KEYS = ("conversation_id", "thread_id", "session_id", "chat_id")
"""Keys of `metadata` that name the conversation; the first one found counts."""
MAX_MESSAGES = 20_000
MAX_MOUNTS = 32
MAX_CHOICES = 16
"""Answers to one prompt."""
SAMPLING = (
    *("seed", "temperature", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias"),
)
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
PLAIN_WORD = r"^[\w.:+-]{1,64}$"
"""No control token and no markup: a template may write it where only the template may write."""
TemplateValue = StrictBool | int | float | Annotated[str, Field(pattern=PLAIN_WORD)] | None


def not_too_many(messages: Any) -> Any:
    """Refuse too many messages before any of them is validated."""
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        raise ValueError(
            f"there are {len(messages)} messages: send {MAX_MESSAGES} at most, for example with the oldest ones merged"
        )
    return messages


def _require_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse variables that are not the chat template's own."""
    for name in options:
        if not is_template_option(name):
            raise ValueError(f"{name[:100]!r} cannot be set here: give variables of the model's chat template")
    return options


TemplateOptions = Annotated[dict[str, TemplateValue], BeforeValidator(few_names), AfterValidator(_require_options)]
"""Variables of the model's chat template."""


def _few_biases(biases: Any) -> Any:
    """Refuse many biases before any of them is validated."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"it has {len(biases)} tokens: give {MAX_BIASES} at most")
    return without_nulls(biases)


def _all_tokens(top_k: Any) -> Any:
    """-1 and 0 keep all tokens, as in vLLM."""
    return None if top_k in (-1, 0) and not isinstance(top_k, bool) else top_k


class StreamOptions(Body):
    """`include_memory` is an extension: chunks without choices report events and the size of the memory."""

    include_usage: bool = False
    include_memory: bool = False
    include_obfuscation: bool = False


class Sampled(Body):
    """Parameters of chat completions and of plain completions."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)
    ] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_all_tokens)] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    user: str | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_few_biases)] = Field(
        default_factory=dict
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        stop = [stop] if isinstance(stop, str) else stop
        return [text for text in stop if text != ""] if isinstance(stop, list) else stop

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that the request sets."""
        asked = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if "top_k" in self.model_fields_set:
            asked["top_k"] = self.top_k
        return {**asked, "stop": tuple(self.stop)} if self.stop else asked

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(Sampled):
    """The body of `POST /v1/chat/completions`.

    `mounts` is an extension: ids of compact texts that the conversation begins with.
    """

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, fail_fast=True, max_length=MAX_MESSAGES), BeforeValidator(not_too_many)
    ]
    n: NumChoices = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[ChatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(few_names), BeforeValidator(without_nulls)] | None = None
    mounts: Annotated[list[str], Field(max_length=MAX_MOUNTS)] = Field(default_factory=list)  # an extension
    # As vLLM has them.
    chat_template_kwargs: TemplateOptions = Field(default_factory=dict)
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    # Reasoning: for the templates that know it.
    enable_thinking: bool | None = None
    reasoning_effort: Annotated[str, Field(pattern=PLAIN_WORD)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    # Accepted and ignored: they concern OpenAI's own service.
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _has_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _opens_an_answer(self) -> ChatCompletionRequest:
        if (
            self.add_generation_prompt is self.continue_final_message
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("add_generation_prompt must be the opposite of continue_final_message: leave it out")
        return self

    @property
    def template_options(self) -> dict[str, Any]:
        """The variables of the chat template that the request sets."""
        effort, thinks = self.reasoning_effort, self.enable_thinking
        if thinks is None and effort == "none":
            thinks = False
        options: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if thinks is not None:  # templates call it by one of two names
            options |= {"enable_thinking": thinks, "thinking": thinks}
        return {**options, **self.chat_template_kwargs}

    @property
    def choice(self) -> str | None:
        """`tool_choice` as one word: a mode, or the name of a function."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice

    @property
    def conversation_hint(self) -> str | None:
        """The name of the conversation in `metadata` or `user`, if there is one."""
        named = (self.metadata or {}).get
        return next((found for key in CONVERSATION_KEYS if (found := named(key))), self.user) or None


class CompletionRequest(Sampled):
    """The body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, max_length=16, fail_fast=True)]
    )
    n: NumChoices = None
    best_of: NumChoices = None
    max_tokens: TokenCount | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _has_choices(self) -> CompletionRequest:
        if self.num_candidates < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}, and n is {self.n}: let best_of be at least n")
        if self.stream and self.num_candidates > (self.n or 1):
            raise ValueError("the best of several completions is known at their end: leave out best_of, or stream")
        return self

    @property
    def num_candidates(self) -> int:
        """How many completions of each prompt are generated."""
        return self.best_of or self.n or 1

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
