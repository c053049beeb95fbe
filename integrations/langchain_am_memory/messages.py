"""LangChain's messages as dicts of OpenAI's API, which the memory takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, ToolMessage

from am_memory.errors import InvalidInput
from am_memory.session.appending import MEDIA_PARTS

ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}


def to_openai(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The messages as dicts: role and content, and for tools tool_calls, tool_call_id and name.

    Raises:
        InvalidInput: content that is not text, or a message of an unknown type.
    """
    return [_to_openai(message, position) for position, message in enumerate(messages)]


def _to_openai(message: BaseMessage, position: int) -> dict[str, Any]:
    role = message.role if isinstance(message, ChatMessage) else ROLES.get(message.type.removesuffix("MessageChunk"))
    role = role or ROLES.get(message.type.removesuffix("MessageChunk").lower())
    if role is None:
        raise InvalidInput(f"message {position} is of type {message.type!r}: give system, human, ai or tool messages")
    fields: dict[str, Any] = {"role": role, "content": _text(message.content, position)}
    if isinstance(message, AIMessage) and (calls := _calls(message)):
        fields["tool_calls"] = calls
    if isinstance(message, ToolMessage):
        fields["tool_call_id"] = message.tool_call_id
    if isinstance(message, (ToolMessage, FunctionMessage)) and message.name:
        fields["name"] = message.name
    return fields


def _calls(message: AIMessage) -> list[dict[str, Any]]:
    """The valid calls, then the invalid ones with their arguments as written.

    An invalid call without a name is left out. Our own answers have such calls; their text is in the thread already.
    """
    valid = [(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"]) for call in message.tool_calls]
    invalid = [(call["name"], call["args"] or "", call["id"]) for call in message.invalid_tool_calls if call["name"]]
    return [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments, call_id in (*valid, *invalid)
    ]


def _text(content: Any, position: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif isinstance(kind := block.get("type"), str) and kind.startswith(MEDIA_PARTS):
            raise InvalidInput(f"message {position} holds a block of type {kind!r}: this model takes text only")
        elif kind in ("text", "text-plain"):
            texts.append(str(block.get("text", "")))
        elif kind == "json":  # what a tool may return
            texts.append(json.dumps(block.get("json"), ensure_ascii=False))
    return "".join(texts)
