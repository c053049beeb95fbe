"""Messages, tools and answer formats in the form of OpenAI's API. Checks values; knows no memory and no model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from am_memory_server.bodies import Body, Part


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse numbers that are read as infinite, such as 1e999."""
    json.dumps(schema, allow_nan=False)
    return schema


TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
"""Types of message parts, in any of OpenAI's APIs."""
FiniteSchema = Annotated[dict[str, Any], AfterValidator(_finite)]


def _only_text(content: Any) -> Any:
    """Join a list of text parts to one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise ValueError(f"a part of type {kind!r}: this model takes text only")
        texts.append(text)
    return "".join(texts)


Text = Annotated[str, BeforeValidator(_only_text)]


def _as_text(arguments: Any) -> Any:
    """Arguments as text: some clients send the JSON value itself."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class FunctionCall(Part):
    """The function that a message calls. `arguments` is JSON text."""

    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[str, BeforeValidator(_as_text)] = "{}"


class MessageToolCall(Part):
    """A tool call in an assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Part):
    """One message. `content` is a text or a list of text parts. Unknown names, which other servers add, are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None

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


class Function(Part):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: FiniteSchema | None = None
    strict: bool | None = None


class ChatTool(Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def as_tool(self) -> dict[str, Any]:
        """The tool as the memory takes it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(Part):
    """The name of a function."""

    name: str


class NamedTool(Part):
    """A `tool_choice` that forces a call of one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JSONSchema(Body):
    """The schema that the answer must follow."""

    name: str = "answer"
    description: str | None = None
    schema_: FiniteSchema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
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
