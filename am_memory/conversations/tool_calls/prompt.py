"""Tools, calls and results in the form that a chat template takes; as text if it takes none."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile

from am_memory.conversations.tool_calls.formats import (
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    ToolFormat,
    template_format,
)
from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput
from am_memory.session.chat_history import IS_TOOL_RESULT, is_nested, require_levels

INSTRUCTIONS = """\
# Tools

You may call functions to help the user. These are the functions, one JSON object a line:
<tools>
{tools}
</tools>

To call one, answer with its name and its arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the-name", "arguments": {{"an-argument": "its value"}}}}
</tool_call>"""
"""Instructions for a model whose chat template knows no tools. The format is that of Hermes."""

MAX_NESTING = 64
"""Arguments nested more deeply than this go to the template as text, not as an object."""


def prepare(
    engine: Engine, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> tuple[list[dict[str, object]], list[dict[str, object]] | None]:
    """Convert messages and tools to what the model's chat template takes.

    A template that knows tools gets arguments as objects and content that is never None. If the template requires it,
    ids have nine letters and digits, or each message has one call. For any other template the tools go into the first
    system message, calls into the text of the answer, and results into messages of the user. A call whose arguments
    are not a JSON object stays in the text of the answer as it was written, so that the model sees its mistake.

    Args:
        messages: with the roles system, developer, user, assistant and tool.
        tools: functions that the model may call.

    Returns:
        messages and tools for `Engine.render`. The tools are None if the messages describe them.

    Raises:
        InvalidInput: a tool or a call without a name, content that is not text, or messages nested too deeply.
    """
    require_levels(messages, "messages")
    require_levels(tools or (), "tools")
    for tool in tools or ():
        tool_name(tool)
    tools = [without_strict(tool) for tool in tools or ()]
    prepared = [_normal(message) for message in messages]
    format = template_format(engine)
    if format is None:
        return _as_text(engine, prepared, tools), None
    prepared = [_answer_as_text(message, format) if _has_broken_call(message) else message for message in prepared]
    if format in (MISTRAL, MISTRAL_ARGS):
        prepared = [_with_short_ids(message) for message in prepared]
    if format is LLAMA3:
        prepared = list(_one_call_each(prepared))
    return prepared, [dict(tool) for tool in tools] if tools else None


def tool_name(tool: Tool) -> str:
    """The name of a tool.

    Raises:
        InvalidInput: it has none.
    """
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InvalidInput(f'{tool!r} is no tool: give {{"type": "function", "function": {{"name": ...}}}}')
    return name


def is_strict(tool: Tool) -> bool:
    """Whether the arguments of every call must follow the tool's schema, as in OpenAI's API."""
    function = tool.get("function")
    return isinstance(function, Mapping) and function.get("strict") is True


def without_strict(tool: Tool) -> Tool:
    """The tool as the model sees it: `strict` concerns the decoder alone."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or "strict" not in function:
        return tool
    return {**tool, "function": {name: value for name, value in function.items() if name != "strict"}}


def _normal(message: Message) -> dict[str, object]:
    """The message with arguments as objects, without an empty list of calls, and with text where we may add some."""
    normal = dict(message)
    calls = normal.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, Sequence):
            raise InvalidInput(f"tool_calls is {calls!r}: give a list of calls")
        normal["tool_calls"] = [_normal_call(call) for call in calls]
    if calls or normal.get("content") is None or normal.get("role") in ("system", "developer", "tool"):
        normal["content"] = _text(normal.get("content"))
    return normal


def _normal_call(call: object) -> dict[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidInput(
            f'{call!r} is no tool call: give {{"id": ..., "type": "function", "function": {{"name", "arguments"}}}}'
        )
    return {
        **call,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments_of(function.get("arguments"))},
    }


def arguments_of(written: object) -> dict[str, object] | str:
    """A call's arguments as an object; as text, unchanged, if they are not a JSON object."""
    arguments = written or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):  # not JSON, or nested more deeply than can be read
            arguments = None
    if isinstance(arguments, Mapping) and not _has_half_characters(arguments):
        as_object = dict(arguments)
        if isinstance(written, Mapping) or not is_nested(as_object, MAX_NESTING):
            return as_object
    text = written if isinstance(written, str) else json.dumps(written, default=str, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair as JSON writes it


def _has_half_characters(arguments: Mapping[str, object]) -> bool:
    """Whether a string holds half of a surrogate pair, which JSON can write and no tokenizer can encode."""
    try:
        json.dumps(arguments, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except RecursionError:  # nested too deeply, which rendering reports
        return False
    return False


def _has_broken_call(message: Message) -> bool:
    return any(isinstance(call["function"]["arguments"], str) for call in _calls(message))


def _text(content: object) -> str:
    """The text of a message's content, which is a string, None, or a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise InvalidInput(f"{content!r} is not text: a message beside tools has text, or a list of text parts")
    return "".join(strings)


def _calls(message: Message) -> list[dict[str, dict[str, object]]]:
    calls: list[dict[str, dict[str, object]]] = message.get("tool_calls", [])  # type: ignore[assignment]  # as _normal
    return calls


def _with_short_ids(message: dict[str, object]) -> dict[str, object]:
    """The message with ids of nine letters and digits, which match between a call and its result."""
    if "tool_call_id" in message:
        message = {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    if calls := _calls(message):
        message = {**message, "tool_calls": [{**call, "id": _short_id(call.get("id"))} for call in calls]}
    return message


def _short_id(id: object) -> str:
    text = str(id)
    return text if re.fullmatch("[a-zA-Z0-9]{9}", text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _one_call_each(messages: Sequence[dict[str, object]]) -> Iterator[dict[str, object]]:
    """The messages with one call each: several calls become several messages, each followed by its result."""
    results: dict[object, dict[str, object]] = {}
    for position, message in enumerate(messages):
        calls = _calls(message)
        if len(calls) < 2:
            if message.get("tool_call_id") not in results or message["role"] != "tool":
                yield message
            continue
        ids = {call.get("id") for call in calls}
        later = (messages[index] for index in range(position + 1, len(messages)))
        following = takewhile(lambda other: other.get("role") == "tool", later)
        results = {other["tool_call_id"]: other for other in following if other.get("tool_call_id") in ids}
        for number, call in enumerate(calls):
            yield {**message, "content": "" if number else message["content"], "tool_calls": [call]}
            if result := results.get(call.get("id")):
                yield result


def _as_text(engine: Engine, messages: Sequence[dict[str, object]], tools: Sequence[Tool]) -> list[dict[str, object]]:
    """The messages for a template that knows no tools: everything is text."""
    texts: list[dict[str, object]] = []
    for role, group in groupby(messages, key=lambda message: message.get("role")):
        if role == "tool":
            responses = (f"<tool_response>\n{message['content']}\n</tool_response>" for message in group)
            texts.append({"role": "user", "content": "\n".join(responses), IS_TOOL_RESULT: True})
        else:
            texts.extend(_answer_as_text(message, HERMES) for message in group)
    if not tools:
        return texts
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return _instructed(engine, texts, INSTRUCTIONS.format(tools=lines))


def _answer_as_text(message: dict[str, object], format: ToolFormat) -> dict[str, object]:
    if not (calls := _calls(message)):
        return message
    functions = [call["function"] for call in calls]
    text = format.write((str(function["name"]), function["arguments"]) for function in functions)  # type: ignore[misc]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": f"{message['content']}\n{text}" if message["content"] else text}


def _instructed(engine: Engine, messages: list[dict[str, object]], instructions: str) -> list[dict[str, object]]:
    """The messages with instructions after the system prompt; in the user's first message if there can be none."""
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer"):
        text = f"{first['content']}\n\n{instructions}" if first["content"] else instructions
        return [{**first, "content": text}, *messages[1:]]
    if _takes_system(engine) or first.get("role") != "user":
        return [{"role": "system", "content": instructions}, *messages]
    return [{**first, "content": f"{instructions}\n\n{_text(first['content'])}"}, *messages[1:]]


def _takes_system(engine: Engine) -> bool:
    if not engine.has_chat_template:
        return True
    try:
        return "probe" in engine.render([{"role": "system", "content": "probe"}, {"role": "user", "content": "?"}])
    except InvalidInput:
        return False
