"""Tool calls that a model has to make, or may not make: grammars of its own format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from am_memory.constraints import Constraint, json_rule, json_schema, lark
from am_memory.engines.base import Engine, Tool
from am_memory.errors import InvalidInput
from am_memory.tool_calls.formats import ToolFormat
from am_memory.tool_calls.parsing import CALL_KEYS
from am_memory.tool_calls.prompt import tool_name

BARE_OPENING = rf'/\{{\s*"({"|".join(CALL_KEYS)})"/'
"""How a call without markers begins, as a pattern of llguidance's grammars."""

MAX_PARALLEL_CALLS = 16
"""A small model that may always call once more never comes to an end."""


def tool_call_constraint(
    engine: Engine, tools: Sequence[Tool], format: ToolFormat, *, name: str | None = None, parallel: bool = False
) -> Constraint:
    """An answer that is one call of one of the tools, with arguments of its schema, and nothing else.

    Where a marker of the format is one token of the vocabulary, the answer has that token. A special one is missing
    from `Piece.text`: give `parse` the text that `answer_text` makes of `Piece.token_ids`, which is right for every
    vocabulary. An answer that was not cut off then parses into valid calls.

    Args:
        name: of the tool to call; None: any of them.
        parallel: one call or several.

    Raises:
        InvalidInput: no such tool, or parameters that llguidance does not take.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    chosen = [tool for tool in tools if name is None or tool_name(tool) == name]
    if not chosen:
        raise InvalidInput(f"no tool {name!r} to call among {[*map(tool_name, tools)]}: give one of them")
    begin, separator, end = (_literal(engine, format, text) for text in (format.begin, format.separator, format.end))
    more = f"({separator} call){{0,{MAX_PARALLEL_CALLS - 1}}}" if parallel else ""
    rules = [f"start: {begin} call {more} {end}", f"call: {' | '.join(f'call_{i}' for i in range(len(chosen)))}"]
    for number, tool in enumerate(chosen):
        before = _literal(engine, format, f"{format.before_name}{_name(tool, format)}{format.before_arguments}")
        after = _literal(engine, format, format.after_arguments)
        rules.append(f"call_{number}: {before} arguments_{number} {after}")
        rules.append(f"arguments_{number}: {json_rule(_parameters(tool))}")
    try:
        return lark(engine, "\n".join(rules), is_json=True)
    except InvalidInput as error:
        blamed = _blamed(engine, chosen)
        if blamed is None:
            raise
        raise blamed from error


def no_call_constraint(engine: Engine, format: ToolFormat) -> Constraint:
    """An answer of at least one character in which `parse` finds no call.

    Raises:
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    openings = [*map(json.dumps, format.markers), *([BARE_OPENING] if format.is_bare else [])]
    return lark(engine, "start: TEXT\nTEXT: /.+/s" + "".join(f" & ~(/.*/s {each} /.*/s)" for each in openings))


def _blamed(engine: Engine, tools: Sequence[Tool]) -> InvalidInput | None:
    """The error of the first tool whose parameters alone are refused."""
    for tool in tools:
        try:
            json_schema(engine, _parameters(tool))
        except InvalidInput as error:
            return InvalidInput(f"the parameters of {tool_name(tool)} cannot be enforced: {error}")
    return None


def _name(tool: Tool, format: ToolFormat) -> str:
    name = tool_name(tool)
    if not format.is_name_quoted and not re.fullmatch(r"[^\s\[\]{}]+", name):
        raise InvalidInput(f"the tool name {name!r} cannot be told from what follows it: use letters, digits, _ and -")
    return format.written_name(name)


def _parameters(tool: Tool) -> Mapping[str, object]:
    """The schema of a tool's arguments, which are always one object."""
    function: Mapping[str, object] = tool["function"]  # type: ignore[assignment]  # as tool_name() found it
    schema = function.get("parameters") or {"properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InvalidInput(f"the parameters of {tool_name(tool)} are {schema!r}: give the JSON schema of an object")
    return {**schema, "type": "object"}


def _literal(engine: Engine, format: ToolFormat, text: str) -> str:
    """The text in a rule of a grammar, with markers by their token ids where they have one."""
    pieces = re.split(f"({'|'.join(map(re.escape, format.markers))})", text) if format.markers else [text]
    return " ".join(
        _marker(engine, piece) if piece in format.markers else json.dumps(piece) for piece in pieces if piece
    )


def _marker(engine: Engine, marker: str) -> str:
    token_ids = engine.encode(marker)
    return f"<[{token_ids[0]}]>" if len(token_ids) == 1 else json.dumps(marker)
