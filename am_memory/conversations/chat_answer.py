"""One answer as it is generated: pieces of text in, parts of the answer out. `chat.py` runs it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from am_memory.conversations.answer_format import AnswerFormat
from am_memory.conversations.branch_store import PendingCall
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.prompts import Prompt
from am_memory.conversations.threads import Threads
from am_memory.conversations.tool_calls import InvalidCall, ParsedCall, ToolCallStream, answer_text
from am_memory.conversations.turn import ChatTurn
from am_memory.events import Span
from am_memory.formatting import shortened
from am_memory.session.generation import Generation, Piece, TokenLogprob
from am_memory.session.session import Session

ChatFinishReason = Literal["stop", "length", "tool_calls"]

MAX_SPAN_CHARS = 400
"""A longer text of a span is shortened in the middle, wherever a client gets it."""

FINISH_REASONS: Mapping[str, ChatFinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


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
        """The call as an item of a message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments_json}
        return {"id": self.id, "type": "function", "function": function}


Part = str | ToolCall | InvalidCall


@dataclass(frozen=True)
class Delta:
    """The part of the answer that one token adds. It is often empty, where text is held back.

    Attributes:
        finish_reason: why the answer has ended, in its last delta.
        looked_up: the compacted spans that were looked up just before this token; long texts are shortened.
    """

    parts: tuple[Part, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: ChatFinishReason | None = None
    looked_up: tuple[Span, ...] = ()


@dataclass(frozen=True)
class TokenUsage:
    """Tokens of one call. `cached_tokens` are those of the prompt that were not read again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class ChatAnswer:
    """One answer, and its figures. `answer_chat` generates it.

    Making it needs no device, but may take long: it compiles the grammar and looks for saved branches in the store.

    Args:
        call: a call that `threads.register_call` has registered already; None: it is registered here.

    Raises:
        InvalidInput: the messages, the tools, `tool_choice` or a schema cannot be used.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
        TextNotFound: there is no compact text of a name in `mounts`.
    """

    def __init__(self, threads: Threads, request: ChatRequest, call: PendingCall | None = None) -> None:
        engine = threads.memory.engine
        self.request = request
        self.format = AnswerFormat(engine, request)
        self.content = ""
        self.tool_calls: list[ToolCall] = []
        self.finish_reason: ChatFinishReason | None = None
        self.num_tokens = 0
        self._looked_up: dict[tuple[str | None, int, int], Span] = {}
        self._sampling = request.sampling or threads.memory.sampling
        self._num_compactions_before: int | None = None
        self._threads = threads
        policy = request.policy or threads.memory.policy
        texts = [threads.memory.text(name) for name in request.mounts]
        self._prompt = Prompt.of(engine, request.messages, request.tools, policy, request.owner, texts)
        self._saved = threads.find(self._prompt, call or threads.register_call(request.thread))
        self._turn: ChatTurn | None = None
        self._generation: Generation | None = None
        self._calls: ToolCallStream | None = None
        if self.format.tool_format is not None and request.tool_choice != "none":
            self._calls = ToolCallStream(self.format.tool_format)
            self._text = answer_text(engine, self.format.tool_format, self._sampling.stop)

    def begin(self) -> ChatTurn:
        """Go on from the branch that shares most with the conversation."""
        self._turn = self._threads.start(self._prompt, self._saved)
        return self._turn

    @property
    def turn(self) -> ChatTurn:
        assert self._turn is not None, "begin() comes first"
        return self._turn

    @property
    def session(self) -> Session:
        return self.turn.session

    @property
    def next_piece(self) -> Generation | None:
        """What `generate` goes on with; a `Batch` may make its next piece together with others'. None: nothing."""
        generation = self._generation
        return None if generation is None or generation.is_finished else generation

    def generate(self) -> Iterator[Delta]:
        """Generate the answer, one delta for each token. The prompt has been read."""
        request = self.request
        self._generation = self.session.generate(
            request.max_tokens, self._sampling, self.format.constraint, top_logprobs=request.top_logprobs
        )
        for piece in self._generation:
            if self.num_tokens == 0:  # this step has read the last token of the prompt, and none of the answer
                self._num_compactions_before = self.session.stats.num_compactions
            parts = [*self._push(piece)]
            if piece.finish_reason is not None:
                parts += self._finish(piece.finish_reason)
            # The token that ends the turn is not part of the answer.
            logprobs = () if piece.finish_reason == "eos" else piece.logprobs
            yield Delta(tuple(parts), logprobs, self.finish_reason, self._look_up(piece))

    def _look_up(self, piece: Piece) -> tuple[Span, ...]:
        spans = tuple(as_shown(span) for span in piece.looked_up)
        self._looked_up |= {(span.mount, span.start, span.end): span for span in spans}
        return spans

    def _push(self, piece: Piece) -> Iterator[Part]:
        self.num_tokens += len(piece.token_ids)
        if self._calls is None:
            yield from self._add([piece.text])
        else:
            text = "".join(self._text.push(token_id) for token_id in piece.token_ids)
            yield from self._add(self._calls.push(text))

    def _finish(self, reason: str) -> Iterator[Part]:
        if self._calls is not None:
            yield from self._add([*self._calls.push(self._text.finish()), *self._calls.finish()])
        if reason != "length" and not self.tool_calls:
            self.format.check_content(self.content)
        self.finish_reason = "tool_calls" if self.tool_calls else FINISH_REASONS[reason]

    def _add(self, events: Sequence[str | ParsedCall | InvalidCall]) -> Iterator[Part]:
        for event in events:
            part = self.format.checked_call(event) if isinstance(event, ParsedCall) else event
            if isinstance(part, ParsedCall):
                call = ToolCall(len(self.tool_calls), part.name, part.arguments)
                self.tool_calls.append(call)
                yield call
            elif isinstance(part, InvalidCall) and not self.request.text_of_invalid_calls:
                yield part
            elif self.format.constraint is not None and self.tool_calls:
                continue  # a grammar allows no text after a call: this is the start of another call that was cut off
            elif text := part.text if isinstance(part, InvalidCall) else part:
                self.content += text
                yield text

    @property
    def looked_up(self) -> list[Span]:
        """The compacted spans that were looked up for this answer, each once; long texts are shortened."""
        return [*self._looked_up.values()]

    @property
    def schema_error(self) -> str | None:
        """How the answer violates its schema, or why it was not checked; None if it follows it."""
        return self.format.schema_error

    @property
    def usage(self) -> TokenUsage:
        num_prompt = len(self.session.tokens) - self.num_tokens
        return TokenUsage(num_prompt, self.num_tokens, self.turn.num_cached_tokens)

    @property
    def num_compactions(self) -> int:
        """Compactions since the whole prompt was read."""
        num_before = self._num_compactions_before
        return 0 if num_before is None else self.session.stats.num_compactions - num_before

    @property
    def message(self) -> dict[str, object]:
        """The answer as a message of the next call."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_message() for call in self.tool_calls]
        return message


def as_shown(span: Span) -> Span:
    """A span as clients get it: its score rounded, and a long text shortened in the middle."""
    return replace(span, score=round(span.score, 2), text=shortened(span.text, MAX_SPAN_CHARS))
