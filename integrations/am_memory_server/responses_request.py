"""The body of `POST /v1/responses`, and its items as chat messages. Checks values; knows no memory and no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from am_memory_server.bodies import Body, Part, few_names, without_nulls
from am_memory_server.message_schemas import FiniteSchema, JSONSchema, Text
from am_memory_server.request_schemas import (
    MAX_MOUNTS,
    PLAIN_WORD,
    ChatCompletionRequest,
    Sampled,
    TemplateOptions,
    TokenCount,
    not_too_many,
)

Message = dict[str, Any]
ItemType = Literal["message", "function_call", "function_call_output", "reasoning"]
SHARED = (
    *("model", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "logit_bias", "user", "metadata", "parallel_tool_calls", "enable_thinking"),
    *("chat_template_kwargs", "mounts"),
)
"""Fields that mean the same in both APIs."""


class ReasoningText(Part):
    """A part of earlier reasoning."""

    text: str = ""


class InputItem(Part):
    """One item of the input: a message, a call, the result of a call, or reasoning that comes back."""

    type: ItemType = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Any = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = "{}"
    output: Text | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> InputItem:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name"),
            "function_call_output": ("call_id", "output"),
        }.get(self.type, ())
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"an item of type {self.type} needs {' and '.join(missing)}")
        return self


class MessageItem(Part):
    """The content of a message: a text, or a list of text parts."""

    content: Text


class FunctionTool(Part):
    """A function that the model may call. The tools that OpenAI itself runs are not here."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: FiniteSchema | None = None
    strict: bool | None = None

    def as_chat_tool(self) -> dict[str, Any]:
        """The tool as chat completions have it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedFunctionTool(Part):
    """A `tool_choice` that forces a call of one function."""

    type: Literal["function"] = "function"
    name: str


class TextFormat(JSONSchema):
    """The `ResponseFormat` of chat completions, with the fields of its schema beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and "schema_" not in self.model_fields_set:
            raise ValueError("type json_schema needs a schema")
        return self

    def as_chat_format(self) -> dict[str, Any]:
        """The format as chat completions have it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": self.model_dump(exclude={"type"}, by_alias=True)}


class TextOptions(Body):
    """The form of the answer. `verbosity` is accepted and ignored."""

    format: TextFormat = TextFormat()
    verbosity: str | None = None


class ReasoningOptions(Body):
    """How much the model reasons, where its template knows that. `summary` is accepted and ignored."""

    effort: Annotated[str, Field(pattern=PLAIN_WORD)] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ConversationName(Part):
    """The conversation, by its id."""

    id: str


class ResponsesRequest(Sampled):
    """The body of `POST /v1/responses`."""

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), BeforeValidator(not_too_many)]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationName | None = None
    max_output_tokens: TokenCount | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    store: bool = True
    metadata: Annotated[dict[str, str], BeforeValidator(few_names), BeforeValidator(without_nulls)] = Field(
        default_factory=dict
    )
    background: Literal[False] = False
    # As in chat completions.
    chat_template_kwargs: TemplateOptions = Field(default_factory=dict)
    enable_thinking: bool | None = None
    mounts: Annotated[list[str], Field(max_length=MAX_MOUNTS)] = Field(default_factory=list)
    # Accepted and ignored: they concern OpenAI's own service.
    include: list[str] = Field(default_factory=list)
    truncation: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None

    @property
    def messages(self) -> list[Message]:
        """The input as chat messages."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else as_messages(self.input)

    @property
    def conversation_name(self) -> str | None:
        """The name of the conversation, if the request has one."""
        return self.conversation.id if isinstance(self.conversation, ConversationName) else self.conversation

    def as_chat(self, earlier: Sequence[Mapping[str, Any]]) -> ChatCompletionRequest:
        """The same request as one for a chat completion.

        Args:
            earlier: the messages before the input.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunctionTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        shared = self.model_dump(include={*SHARED}, exclude_unset=True)
        return ChatCompletionRequest.model_validate(
            {
                **shared,
                "messages": [*system, *earlier, *self.messages],
                "max_tokens": self.max_output_tokens,
                "tools": [tool.as_chat_tool() for tool in self.tools],
                "tool_choice": choice if self.tools else None,
                "response_format": self.text.format.as_chat_format(),
                "reasoning_effort": self.reasoning.effort,
            }
        )


def as_messages(items: Iterable[InputItem]) -> list[Message]:
    """Items as chat messages: the reasoning, the text and the calls of one answer are one message."""
    messages: list[Message] = []
    answer: Message | None = None  # the message that further items of the same answer go into
    for item in items:
        if item.type == "function_call_output":
            answer = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif item.type == "message" and item.role != "assistant":
            answer = None
            messages.append({"role": item.role, "content": MessageItem(content=item.content).content})
        else:
            if answer is None or not _continues(answer, item):
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _add_to(answer, item)
    return messages


def _continues(answer: Message, item: InputItem) -> bool:
    """Whether an item belongs to the same answer as those before it."""
    if item.type == "function_call":
        return True
    is_fresh = not answer["content"] and "tool_calls" not in answer
    return is_fresh and (item.type == "message" or "reasoning_content" not in answer)


def _add_to(answer: Message, item: InputItem) -> None:
    match item.type:
        case "function_call":
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            answer.setdefault("tool_calls", []).append(call)
        case "message":
            answer["content"] = MessageItem(content=item.content).content
        case "reasoning":
            parts = item.content if isinstance(item.content, list) else []
            answer["reasoning_content"] = "".join(ReasoningText.model_validate(part).text for part in parts)
