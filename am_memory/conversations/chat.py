"""One chat completion: messages, tools and what is asked of the answer in; text and tool calls out, as they come.

Serves every chat API, in the form of OpenAI's; built on `threads.py`. Knows no web server and no framework.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from am_memory.conversations.threads import Call, Found, Threads, Turn
from am_memory.conversations.tool_calls import (
    InvalidCall,
    ParsedCall,
    ToolCallStream,
    ToolFormat,
    answer_text,
    calls_or_json_constraint,
    calls_or_text_constraint,
    no_call_constraint,
    parameters,
    tool_call_constraint,
    tool_format,
)
from am_memory.conversations.tool_calls.prompt import tool_name
from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput
from am_memory.policy import MemoryPolicy
from am_memory.session.session import Piece, Session, TokenLogprob
from am_memory.text.constraints import Constraint, json_schema
from am_memory.text.json_schemas import Check, Unchecked
from am_memory.text.sampling import Sampling

FinishReason = Literal["stop", "length", "tool_calls"]

logger = logging.getLogger("am_memory")

MAX_TOKENS = 512
FINISH_REASONS: Mapping[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class ChatRequest:
    """What one call asks for.

    Attributes:
        messages: the whole conversation.
        tools: functions that the model may call. The arguments of one that is `strict`, as OpenAI's API has it, follow
            its schema whenever it is called; it is not told to the model.
        tool_choice: None or "auto" leaves it to the model, "none" forbids calls, "required" forces one; or the name of
            the tool to call. What is forced is guaranteed, by constrained decoding.
        response_format: as OpenAI's API has it; JSON is guaranteed, by constrained decoding.
        max_tokens: generated at most.
        sampling: None: the memory's.
        top_logprobs: None: no log probabilities; else how many likely tokens are given beside each chosen one.
        parallel_calls: True: a forced answer may be several calls; False: no answer is more than one; None: only what
            is forced is one.
        text_of_invalid_calls: what was meant as a call and is none is part of the text.
        thread: what the conversation belongs to, for events, eviction and deletion.
        owner: nothing is shared between the conversations of two owners.
        policy: None: the memory's.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    tool_choice: str | None = None
    response_format: Mapping[str, object] | None = None
    max_tokens: int = MAX_TOKENS
    sampling: Sampling | None = None
    top_logprobs: int | None = None
    parallel_calls: bool | None = None
    text_of_invalid_calls: bool = False
    thread: str = "default"
    owner: str = ""
    policy: MemoryPolicy | None = None


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes."""

    index: int
    name: str
    arguments: dict[str, object]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)

    def as_message(self) -> dict[str, object]:
        """As a message's `tool_calls` have it."""
        function = {"name": self.name, "arguments": self.arguments_json}
        return {"id": self.id, "type": "function", "function": function}


Part = str | ToolCall | InvalidCall


@dataclass(frozen=True)
class Delta:
    """What one step added to the answer; often nothing, where text is held back."""

    parts: tuple[Part, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one call; `cached_tokens` are those of the prompt that were not read in it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class ChatAnswer:
    """One answer, made by `read`, `generate` and `keep`, in this order; each step of the first two is short.

    A conversation that is not kept leaves nothing behind.

    Args:
        call: of the request's thread, where it was called for before; None: it is called for now.

    Attributes:
        schema_error: what in a complete answer does not follow the schema that it was asked to; only a keyword that no
            grammar holds (`Constraint.left_out`) can be missed; or why it is not checked.

    Raises:
        InvalidInput: a choice that is none of the tools, a schema that cannot be enforced, an unknown form.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """

    def __init__(self, threads: Threads, request: ChatRequest, call: Call | None = None) -> None:
        engine = threads.memory.engine
        self.request = request
        self.sampling = request.sampling or threads.memory.sampling
        format = tool_format(engine) if request.tools else None
        self._strict = {tool_name(tool) for tool in request.tools if _is_strict(tool)}
        self.constraint = _constraint(engine, request, format, self._strict)
        self._checks = self._make_checks()
        self.schema_error: str | None = None
        self.content = ""
        self.tool_calls: list[ToolCall] = []
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self._num_compactions_read: int | None = None
        self._threads = threads
        self._call = call or threads.called(request.thread)
        self._found: Found | None = None
        self._turn: Turn | None = None
        self._format = None if request.tool_choice == "none" else format
        if self._format is not None:
            self._calls = ToolCallStream(self._format)
            self._text = answer_text(engine, self._format, self.sampling.stop)

    def read(self) -> Iterator[int]:
        """Find what is known of the conversation, and read the rest; gives the number of tokens still to be read.

        After an error it may be tried again.

        Raises:
            InvalidInput: messages that the model's chat template does not take.
            PromptTooLong: what the policy pins leaves no room for anything else.
            CompactionFailed: a compaction on the way failed.
        """
        if self._turn is None:
            self.find()
            self.start()
            self.encode()
        yield from self.turn.read()

    # What `read` does first, in parts: those that need no device may be done by another thread while sessions go on

    def find(self) -> None:
        """Look at the conversation, and get from the store what it may go on from. Needs no device."""
        request = self.request
        self._found = self._threads.find(
            request.messages,
            [as_told(tool) for tool in request.tools],
            thread=request.thread,
            owner=request.owner,
            policy=request.policy,
            call=self._call,
        )

    def start(self) -> None:
        """Go on from what is known of the conversation."""
        assert self._found is not None, "find() comes first"
        self._turn, self._found = self._threads.start(self._found), None

    def encode(self) -> None:
        """What has still to be read, as tokens. Needs no device, and may take long."""
        self.turn.encode()

    @property
    def turn(self) -> Turn:
        assert self._turn is not None, "read() comes first"
        return self._turn

    @property
    def session(self) -> Session:
        return self.turn.session

    def generate(self) -> Iterator[Delta]:
        """The answer as it comes, a step for each token, and one for what was held back."""
        request = self.request
        pieces = self.session.generate(
            request.max_tokens, self.sampling, self.constraint, top_logprobs=request.top_logprobs
        )
        for piece in pieces:
            if self.num_tokens == 0:  # the first step has read the last of the prompt, and nothing of the answer
                self._num_compactions_read = self.session.stats.num_compactions
            yield Delta(tuple(self._push(piece)), self._logprobs(piece))
            if piece.finish_reason is not None:
                left = () if self._format is None else (*self._calls.push(self._text.finish()), *self._calls.finish())
                parts = tuple(self._said(left))
                self._check_content(piece.finish_reason)
                self.finish_reason = "tool_calls" if self.tool_calls else FINISH_REASONS[piece.finish_reason]
                if parts:
                    yield Delta(parts)

    def _push(self, piece: Piece) -> Iterator[Part]:
        self.num_tokens += len(piece.token_ids)
        if self._format is None:
            yield from self._said([piece.text])
        else:
            text = "".join(self._text.push(token_id) for token_id in piece.token_ids)
            yield from self._said(self._calls.push(text))

    def _said(self, parts: Sequence[str | ParsedCall | InvalidCall]) -> Iterator[Part]:
        for said in parts:
            part = self._checked(said) if isinstance(said, ParsedCall) else said
            if isinstance(part, ParsedCall):
                call = ToolCall(len(self.tool_calls), part.name, part.arguments)
                self.tool_calls.append(call)
                yield call
            elif isinstance(part, InvalidCall) and not self.request.text_of_invalid_calls:
                yield part
            elif self.constraint is not None and self.tool_calls:
                continue  # behind a call a grammar leaves no text: this is the beginning of another, cut off
            elif text := part.text if isinstance(part, InvalidCall) else part:
                self.content += text
                yield text

    def _make_checks(self) -> dict[str | None, Check]:
        """What the answer is to be checked for: arguments by the names of tools, and its own form under None."""
        if self.constraint is None or not self.constraint.left_out:
            return {}
        request = self.request
        is_forced = request.tool_choice not in (None, "auto", "none")
        checked = [tool for tool in request.tools if is_forced or tool_name(tool) in self._strict]
        checks: dict[str | None, Check] = {tool_name(tool): Check(parameters(tool)) for tool in checked}
        if not is_forced and (schema := _schema(request.response_format)) is not None:
            checks[None] = Check(schema)
        return checks

    def _checked(self, call: ParsedCall) -> ParsedCall | InvalidCall:
        """The call; where it is strict and does not follow its schema, none that can be made."""
        check = self._checks.get(call.name)
        try:
            problem = None if check is None else check.problem_with(call.arguments)
        except Unchecked as error:
            self._miss(f"the arguments of {call.name} are not checked: {error}")
            return call
        if problem is None:
            return call
        self._miss(f"the arguments of {call.name} do not follow their schema: {problem}")
        if call.name not in self._strict:
            return call
        text = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return InvalidCall(text, f"the arguments do not follow their schema: {problem}")

    def _check_content(self, finish_reason: str) -> None:
        """Of a whole answer in a form."""
        if None not in self._checks or self.tool_calls or finish_reason == "length":
            return
        try:
            problem = self._checks[None].problem_with(json.loads(self.content))
        except Unchecked as error:
            self._miss(f"the answer is not checked: {error}")
            return
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem is not None:
            self._miss(f"the answer does not follow its schema: {problem}")

    def _miss(self, problem: str) -> None:
        self.schema_error = self.schema_error or problem
        logger.warning("%s", problem)

    def _logprobs(self, piece: Piece) -> tuple[TokenLogprob, ...]:
        """Of the tokens that are said: not of the one that ends the turn."""
        return () if piece.finish_reason == "eos" else piece.logprobs

    @property
    def usage(self) -> Usage:
        num_prompt = len(self.session.tokens) - self.num_tokens
        return Usage(num_prompt, self.num_tokens, self.turn.num_cached_tokens)

    @property
    def num_compactions(self) -> int:
        """Made behind the whole prompt, as the model read its own answer; those in reading the prompt do not count."""
        num_read = self._num_compactions_read
        return 0 if num_read is None else self.session.stats.num_compactions - num_read

    @property
    def message(self) -> dict[str, object]:
        """The answer as the next call will bring it back."""
        said: dict[str, object] = {"role": "assistant", "content": self.content}
        return {**said, "tool_calls": [call.as_message() for call in self.tool_calls]} if self.tool_calls else said

    def keep(self) -> None:
        """Keep the conversation with this answer.

        Raises:
            StorageError: it cannot be saved; it is kept in memory all the same.
        """
        self.take()
        self.save()

    def take(self) -> None:
        """`keep` it in memory, and pack what is to be saved."""
        self.turn.take(self.message)

    def save(self) -> None:
        """Save what was taken. Needs no device, and may take long.

        Raises:
            StorageError: it cannot be saved; it is kept in memory all the same.
        """
        self.turn.save()


def _is_strict(tool: Tool) -> bool:
    function = tool.get("function")
    return isinstance(function, Mapping) and function.get("strict") is True


def as_told(tool: Tool) -> Tool:
    """The tool as the model is told of it."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or "strict" not in function:
        return tool
    return {**tool, "function": {name: value for name, value in function.items() if name != "strict"}}


def _constraint(
    engine: Engine, request: ChatRequest, format: ToolFormat | None, strict: Collection[str]
) -> Constraint | None:
    """What was asked for, as a grammar; a forced call goes before the form of the answer.

    Args:
        format: of the model's calls; None where there are no tools.
        strict: the names of tools whose arguments follow their schemas.
    """
    tools, is_several = request.tools, request.parallel_calls is not False
    if request.tool_choice not in (None, "auto", "none"):
        name = None if request.tool_choice == "required" else request.tool_choice
        names = [tool_name(tool) for tool in tools]
        if format is None or name not in (None, *names):
            raise InvalidInput(
                f"tool_choice {request.tool_choice!r} is none of the tools: {', '.join(names) or 'there are none'}"
            )
        return tool_call_constraint(engine, tools, format, name=name, parallel=request.parallel_calls is True)
    may_call = format is not None and request.tool_choice != "none"
    schema = _schema(request.response_format)
    if schema is not None:
        if format is None or not may_call:
            return json_schema(engine, schema)
        return calls_or_json_constraint(engine, tools, format, schema, parallel=is_several)
    if format is None:
        return None
    if not may_call:
        return no_call_constraint(engine, format)
    if strict or not is_several:
        return calls_or_text_constraint(engine, tools, format, strict=strict, parallel=is_several)
    return None


def _schema(response_format: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """That of an answer that is to be JSON.

    Raises:
        InvalidInput: a form that there is not.
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
