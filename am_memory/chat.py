"""One chat completion: messages, tools and what is asked of the answer in; text and tool calls out, as they come.

What every chat API on `am_memory.threads` needs, in the form of OpenAI's API. Knows no web and no framework.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from am_memory.constraints import Constraint, json_schema
from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput
from am_memory.policy import MemoryPolicy
from am_memory.sampling import Sampling
from am_memory.session import Piece, Session, TokenLogprob
from am_memory.threads import Threads, Turn
from am_memory.tool_calls import (
    InvalidCall,
    ParsedCall,
    ToolCallStream,
    ToolFormat,
    answer_text,
    no_call_constraint,
    tool_call_constraint,
    tool_format,
)
from am_memory.tool_calls.prompt import tool_name

FinishReason = Literal["stop", "length", "tool_calls"]

MAX_TOKENS = 512
FINISH_REASONS: Mapping[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class ChatRequest:
    """What one call asks for.

    Attributes:
        messages: the whole conversation.
        tools: functions that the model may call.
        tool_choice: None or "auto" leaves it to the model, "none" forbids calls, "required" forces one; or the name of
            the tool to call. What is forced is guaranteed, by constrained decoding.
        response_format: as OpenAI's API has it; JSON is guaranteed, by constrained decoding.
        max_tokens: generated at most.
        sampling: None: the memory's.
        top_logprobs: None: no log probabilities; else how many likely tokens are given beside each chosen one.
        parallel_calls: a forced answer may be several calls.
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
    parallel_calls: bool = False
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

    Raises:
        InvalidInput: a choice that is none of the tools, a schema that cannot be enforced, an unknown form.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """

    def __init__(self, threads: Threads, request: ChatRequest) -> None:
        engine = threads.memory.engine
        self.request = request
        self.sampling = request.sampling or threads.memory.sampling
        format = tool_format(engine) if request.tools else None
        self.constraint = _constraint(engine, request, format)
        self.content = ""
        self.tool_calls: list[ToolCall] = []
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self._threads = threads
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
        request = self.request
        self._turn = self._threads.begin(
            request.messages, request.tools, thread=request.thread, owner=request.owner, policy=request.policy
        )
        yield from self._turn.read()

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
        self._num_compactions_read = self.session.stats.num_compactions
        pieces = self.session.generate(
            request.max_tokens, self.sampling, self.constraint, top_logprobs=request.top_logprobs
        )
        for piece in pieces:
            yield Delta(tuple(self._push(piece)), self._logprobs(piece))
            if piece.finish_reason is not None:
                left = () if self._format is None else (*self._calls.push(self._text.finish()), *self._calls.finish())
                parts = tuple(self._said(left))
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
        for part in parts:
            if isinstance(part, ParsedCall):
                call = ToolCall(len(self.tool_calls), part.name, part.arguments)
                self.tool_calls.append(call)
                yield call
            elif isinstance(part, InvalidCall) and not self.request.text_of_invalid_calls:
                yield part
            elif text := part.text if isinstance(part, InvalidCall) else part:
                self.content += text
                yield text

    def _logprobs(self, piece: Piece) -> tuple[TokenLogprob, ...]:
        """Of the tokens that are said: not of the one that ends the turn."""
        return () if piece.finish_reason == "eos" else piece.logprobs

    @property
    def usage(self) -> Usage:
        num_prompt = len(self.session.tokens) - self.num_tokens
        return Usage(num_prompt, self.num_tokens, self.turn.num_cached_tokens)

    @property
    def num_compactions(self) -> int:
        """Made while the answer was generated; those in reading the prompt are not counted."""
        return self.session.stats.num_compactions - self._num_compactions_read

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
        self.turn.keep(self.message)


def _constraint(engine: Engine, request: ChatRequest, format: ToolFormat | None) -> Constraint | None:
    """What was asked for, as a grammar; a forced call goes before the form of the answer.

    Args:
        format: of the model's calls; None where there are no tools.
    """
    tools = request.tools
    if request.tool_choice not in (None, "auto", "none"):
        name = None if request.tool_choice == "required" else request.tool_choice
        names = [tool_name(tool) for tool in tools]
        if format is None or name not in (None, *names):
            raise InvalidInput(
                f"tool_choice {request.tool_choice!r} is none of the tools: {', '.join(names) or 'there are none'}"
            )
        return tool_call_constraint(engine, tools, format, name=name, parallel=request.parallel_calls)
    match request.response_format:
        case None | {"type": "text"}:
            if format is None or request.tool_choice != "none":
                return None
            return no_call_constraint(engine, format)
        case {"type": "json_object"}:
            return json_schema(engine, {"type": "object"})
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return json_schema(engine, schema)
    raise InvalidInput(
        f"response_format {request.response_format!r}: give a type of text, json_object or json_schema with its schema"
    )
