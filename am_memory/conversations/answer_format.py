"""The form that a request asks of an answer: a grammar during decoding, and a check of the finished answer.

A grammar cannot express every keyword of JSON Schema (`Constraint.left_out`). The check covers those keywords.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import cast

from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.tool_calls import (
    InvalidCall,
    ParsedCall,
    ToolFormat,
    calls_or_json_constraint,
    calls_or_text_constraint,
    no_call_constraint,
    tool_call_constraint,
    tool_format,
    tool_parameters,
)
from am_memory.conversations.tool_calls.prompt import is_strict, tool_name
from am_memory.engines.base import Engine
from am_memory.errors import InvalidInput
from am_memory.text.constraints import Constraint, json_schema
from am_memory.text.json_schemas import SchemaCheck, Unchecked

logger = logging.getLogger("am_memory")


class AnswerFormat:
    """The form of one answer. Compiling its grammar may take long, and needs no device.

    Attributes:
        tool_format: how the model writes calls; None without tools.
        constraint: the grammar to decode with; None where the model is free.
        is_forced: the whole answer is calls or JSON, without room for reasoning.
        schema_error: how the finished answer violates its schema, or why it was not checked; None if it follows it.

    Raises:
        InvalidInput: `tool_choice` names no tool, a schema cannot be enforced, or `response_format` is unknown.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """

    def __init__(self, engine: Engine, request: ChatRequest) -> None:
        self.tool_format = tool_format(engine) if request.tools else None
        self._strict = {tool_name(tool) for tool in request.tools if is_strict(tool)}
        self._schema = _schema(request.response_format)
        self.constraint = self._constraint(engine, request)
        self._checks = self._make_checks(request)
        self.is_forced = request.forces_call or self._schema is not None
        self.schema_error: str | None = None

    def _constraint(self, engine: Engine, request: ChatRequest) -> Constraint | None:
        """The grammar of the answer. A forced call takes precedence over `response_format`."""
        tools, format, is_several = request.tools, self.tool_format, request.parallel_calls is not False
        if request.forces_call:
            return _forced_call(engine, request, format)
        if format is None:
            return None if self._schema is None else json_schema(engine, self._schema)
        if request.tool_choice == "none":
            return no_call_constraint(engine, format) if self._schema is None else json_schema(engine, self._schema)
        if self._schema is not None:
            return calls_or_json_constraint(engine, tools, format, self._schema, parallel=is_several)
        if self._strict or not is_several:
            return calls_or_text_constraint(engine, tools, format, strict=self._strict, parallel=is_several)
        return None

    def _make_checks(self, request: ChatRequest) -> dict[str | None, SchemaCheck]:
        """The checks that the grammar leaves open: of arguments by tool name, of the answer's own JSON under None."""
        if self.constraint is None or not self.constraint.left_out:
            return {}
        checked = [tool for tool in request.tools if request.forces_call or tool_name(tool) in self._strict]
        checks: dict[str | None, SchemaCheck] = {
            tool_name(tool): SchemaCheck(tool_parameters(tool)) for tool in checked
        }
        if self._schema is not None and not request.forces_call:
            checks[None] = SchemaCheck(self._schema)
        return checks

    def checked_call(self, call: ParsedCall) -> ParsedCall | InvalidCall:
        """The call, or an `InvalidCall` if its tool is strict and the arguments violate the schema."""
        check = self._checks.get(call.name)
        try:
            problem = None if check is None else check.problem_with(call.arguments)
        except Unchecked as error:
            self._report(f"the arguments of {call.name} are not checked: {error}")
            return call
        if problem is None:
            return call
        self._report(f"the arguments of {call.name} do not follow their schema: {problem}")
        if call.name not in self._strict:
            return call
        text = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return InvalidCall(text, f"the arguments do not follow their schema: {problem}")

    def check_content(self, content: str) -> None:
        """Check the text of a complete answer without calls."""
        if None not in self._checks:
            return
        try:
            problem = self._checks[None].problem_with(json.loads(content))
        except Unchecked as error:
            self._report(f"the answer is not checked: {error}")
            return
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem is not None:
            self._report(f"the answer does not follow its schema: {problem}")

    def _report(self, problem: str) -> None:
        self.schema_error = self.schema_error or problem
        logger.warning("%s", problem)


def _forced_call(engine: Engine, request: ChatRequest, format: ToolFormat | None) -> Constraint:
    name = None if request.tool_choice == "required" else request.tool_choice
    names = [tool_name(tool) for tool in request.tools]
    if format is None or name not in (None, *names):
        raise InvalidInput(
            f"tool_choice {request.tool_choice!r} is none of the tools: {', '.join(names) or 'there are none'}"
        )
    return tool_call_constraint(engine, request.tools, format, name=name, parallel=request.parallel_calls is True)


def _schema(response_format: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """The JSON schema of the answer; None for plain text.

    Raises:
        InvalidInput: an unknown format.
    """
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return cast("Mapping[str, object]", schema)
    raise InvalidInput(
        f"response_format {response_format!r}: give a type of text, json_object or json_schema with its schema"
    )
