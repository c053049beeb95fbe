"""Tool calls as text: shown to a model, enforced by a grammar, and parsed from its answers.

Messages and tools are dicts as in OpenAI's chat completions. Knows no session and no framework.
"""

from am_memory.conversations.tool_calls.forced import (
    calls_or_json_constraint,
    calls_or_text_constraint,
    no_call_constraint,
    tool_call_constraint,
    tool_parameters,
)
from am_memory.conversations.tool_calls.formats import ToolFormat, tool_format
from am_memory.conversations.tool_calls.parsing import (
    InvalidCall,
    ParsedAnswer,
    ParsedCall,
    ToolCallStream,
    answer_text,
    parse,
)
from am_memory.conversations.tool_calls.prompt import arguments_of, prepare

__all__ = [
    "InvalidCall",
    "ParsedAnswer",
    "ParsedCall",
    "ToolCallStream",
    "ToolFormat",
    "answer_text",
    "arguments_of",
    "calls_or_json_constraint",
    "calls_or_text_constraint",
    "no_call_constraint",
    "parse",
    "prepare",
    "tool_call_constraint",
    "tool_format",
    "tool_parameters",
]
