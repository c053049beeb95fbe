"""The formats in which models write tool calls, and the one that a chat template writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput


@dataclass(frozen=True)
class ToolFormat:
    """One way to write the tool calls of an answer: begin, call, separator, call..., end.

    Attributes:
        name: for display.
        before_name, before_arguments, after_arguments: the text around the name and the arguments of a call.
        begin, separator, end: the text around the calls.
        markers: texts that are never part of the answer's content. The first marker opens one or several calls.
        closing: the marker that ends a call; "" if there is none.
        is_name_quoted: the name is a JSON string.
        is_bare: a call is a JSON object, which may come without any marker.
    """

    name: str
    before_name: str
    before_arguments: str
    after_arguments: str = "}"
    begin: str = ""
    separator: str = "\n"
    end: str = ""
    markers: tuple[str, ...] = ()
    closing: str = ""
    is_name_quoted: bool = True
    is_bare: bool = False

    @property
    def opening(self) -> str:
        return self.markers[0] if self.markers else ""

    def written_name(self, name: str) -> str:
        return json.dumps(name, ensure_ascii=False) if self.is_name_quoted else name

    def write(self, calls: Iterable[tuple[str, Mapping[str, object] | str]]) -> str:
        """Calls of (name, arguments) as text. Arguments that are a string are written unchanged."""
        written = (
            f"{self.before_name}{self.written_name(name)}{self.before_arguments}"
            f"{arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}"
            f"{self.after_arguments}"
            for name, arguments in calls
        )
        return f"{self.begin}{self.separator.join(written)}{self.end}"


HERMES = ToolFormat(
    "hermes",
    '<tool_call>\n{"name": ',
    ', "arguments": ',
    "}\n</tool_call>",
    markers=("<tool_call>", "</tool_call>"),
    closing="</tool_call>",
)
LLAMA3 = ToolFormat(
    "llama3", '{"name": ', ', "parameters": ', separator="; ", markers=("<|python_tag|>",), is_bare=True
)
MISTRAL = ToolFormat(
    "mistral",
    '{"name": ',
    ', "arguments": ',
    begin="[TOOL_CALLS][",
    separator=", ",
    end="]",
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
)
MISTRAL_ARGS = ToolFormat(
    "mistral_args",
    "[TOOL_CALLS]",
    "[ARGS]",
    "",
    separator="",
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    is_name_quoted=False,
)
JSON = ToolFormat("json", '{"name": ', ', "arguments": ', is_bare=True)

_CALL_ID = "probe0000"  # some templates only take ids of nine letters and digits
_TOOL: Tool = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "?", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {"id": _CALL_ID, "type": "function", "function": {"name": "probe_call", "arguments": {"x": 1}}}
_CONVERSATION: tuple[Message, ...] = (
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": _CALL_ID, "name": "probe_call", "content": "probe_result"},
)
_WRITTEN: tuple[tuple[str, ToolFormat], ...] = (
    (r'<tool_call>\s*\{"name": "probe_call", "arguments": \{"x": 1\}\}\s*</tool_call>', HERMES),
    (r'\[TOOL_CALLS\]\s*\[\{[^{]*"name": "probe_call"', MISTRAL),
    (r'\[TOOL_CALLS\]\s*probe_call(\[CALL_ID\]\w*)?\[ARGS\]\s*\{"x": 1\}', MISTRAL_ARGS),
    (r'(?<!\[)\{"name": "probe_call", "parameters": \{"x": 1\}\}', LLAMA3),
    (r'(?<!\[)\{"name": "probe_call", "arguments": \{"x": 1\}\}', JSON),
)


def tool_format(engine: Engine) -> ToolFormat:
    """The format in which the engine's model writes its calls.

    It is the format that the chat template writes. For any other template it is that of Hermes, and `prepare` adds
    instructions to the messages.
    """
    return template_format(engine) or HERMES


def template_format(engine: Engine) -> ToolFormat | None:
    """The format that the chat template writes; None if the template leaves out tools, calls or results."""
    if not engine.has_chat_template:
        return None
    try:
        with_tools = engine.render(_CONVERSATION[:1], tools=[_TOOL])
        written = engine.render(_CONVERSATION, tools=[_TOOL])
    except InvalidInput:
        return None
    if "probe_tool" not in with_tools or "probe_result" not in written:
        return None
    return next((format for pattern, format in _WRITTEN if re.search(pattern, written)), None)
