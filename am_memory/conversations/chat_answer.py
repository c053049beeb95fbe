"""One answer as it is generated: pieces of text in, parts of the answer out. `chat.py` runs it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

from am_memory.conversations.answer_format import AnswerFormat
from am_memory.conversations.branch_store import PendingCall
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.prompts import Prompt
from am_memory.conversations.reasoning import END_OF_THINK, THINK, Reasoning, ReasoningStream, is_reasoning
from am_memory.conversations.threads import Threads
from am_memory.conversations.tool_calls import InvalidCall, ParsedCall, ToolCallStream, answer_text
from am_memory.conversations.turn import ChatTurn
from am_memory.errors import InvalidInput
from am_memory.events import Span
from am_memory.formatting import shortened
from am_memory.session.generation import Generation, Piece, TokenLogprob
from am_memory.session.reading import PromptReading
from am_memory.session.session import Session
from am_memory.text.sampling import Sampling

ChatFinishReason = Literal["stop", "length", "tool_calls"]

MAX_SPAN_CHARS = 400
"""A longer text of a span is shortened in the middle, wherever a client gets it."""

OPENING_TOKENS = 16
"""The last tokens of a prompt, among which a template may have written `<think>`."""

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


Part = str | Reasoning | ToolCall | InvalidCall


@dataclass(frozen=True)
class Delta:
    """The part of the answer that one token adds. It is often empty, where text is held back.

    Attributes:
        finish_reason: why the answer has ended, in its last delta.
        looked_up: the compacted spans that were looked up just before this token; long texts are shortened.
        index: the number of the answer, where several are generated.
    """

    parts: tuple[Part, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: ChatFinishReason | None = None
    looked_up: tuple[Span, ...] = ()
    index: int = 0


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

    Attributes:
        index: its number, where the request asks for several answers.
        others: the further answers to the same prompt, which are not kept.

    Raises:
        InvalidInput: the messages, the tools, `tool_choice` or a schema cannot be used.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
        TextNotFound: there is no compact text of a name in `mounts`.
    """

    def __init__(self, threads: Threads, request: ChatRequest, call: PendingCall | None = None) -> None:
        engine = threads.memory.engine
        self.request = request
        self._threads = threads
        self._begin_answer(0)
        policy = request.policy or threads.memory.policy
        texts = [threads.memory.text(name) for name in request.mounts]
        settings = request.tools, policy, request.owner, texts, request.template_options
        self._prompt = Prompt.of(engine, request.messages, *settings)
        self._begun = self._first_words()
        self._prompt_before = Prompt.of(engine, request.messages[:-1], *settings) if self._begun else self._prompt
        self._saved = threads.find(self._prompt, call or threads.register_call(request.thread))
        self._turn: ChatTurn | None = None
        self.others: tuple[ChatAnswer, ...] = ()
        self.others = tuple(self._another(index) for index in range(1, request.num_answers))

    def _begin_answer(self, index: int) -> None:
        """Set what each of several answers has of its own."""
        engine, request = self._threads.memory.engine, self.request
        self.index, self.format = index, AnswerFormat(engine, request)
        self.content = self.reasoning = ""
        self.tool_calls: list[ToolCall] = []
        self.finish_reason: ChatFinishReason | None = None
        self.num_tokens = self._num_prompt_tokens = 0
        self._looked_up: dict[tuple[str | None, int, int], Span] = {}
        self._num_compactions_before: int | None = None
        self._sampling = numbered(request.sampling or self._threads.memory.sampling, index)
        self._generation: Generation | None = None
        self._splits = request.reasoning != "text" and not self.format.is_forced
        self._thoughts: ReasoningStream | None = None
        self._calls: ToolCallStream | None = None
        markers = [THINK, END_OF_THINK] if self._splits else []
        if self.format.tool_format is not None and request.tool_choice != "none":
            self._calls = ToolCallStream(self.format.tool_format)
            markers += self.format.tool_format.markers
        self._text = answer_text(engine, markers, self._sampling.stop) if self._calls or self._splits else None

    def _another(self, index: int) -> ChatAnswer:
        other = copy(self)
        other._begin_answer(index)
        return other

    def _first_words(self) -> str:
        """The beginning of the answer, where the request gives it."""
        request = self.request
        if not request.continues_last:
            return ""
        last, content = request.messages[-1], request.messages[-1].get("content")
        if last["role"] != "assistant" or not isinstance(content, str) or not content or len(request.messages) < 2:
            raise InvalidInput(
                "to continue the last message, let it be an assistant's with text, after another message"
            )
        if last.get("tool_calls") or self.format.constraint is not None:
            raise InvalidInput("an answer with tool calls or of a fixed format cannot be continued: ask for a new one")
        return content

    def begin(self) -> ChatTurn:
        """Go on from the branch that shares most with the conversation."""
        turn = self._threads.start(self._prompt, self._saved)
        if self._begun:
            turn.continues = turn.can_continue()
            if not turn.continues:
                turn = self._threads.start(self._prompt_before, self._saved)
                turn.begun = self._begun
        self._turn = turn
        return turn

    @property
    def turn(self) -> ChatTurn:
        assert self._turn is not None, "begin() comes first"
        return self._turn

    @property
    def session(self) -> Session:
        return self.turn.session

    @property
    def next_steps(self) -> tuple[PromptReading | Generation, ...]:
        """The reading of the prompt, then the generations; a `Batch` may make their next steps."""
        steps = [each._generation for each in (self, *self.others)] if self._generation else [self.turn.reading]
        return tuple(step for step in steps if step is not None and not step.is_finished)

    @property
    def own_steps(self) -> tuple[Generation, ...]:
        """The generation of this answer, unless it has ended."""
        return () if self._generation is None or self._generation.is_finished else (self._generation,)

    @property
    def is_ready(self) -> bool:
        """Whether `generate` goes on, or ends, at once."""
        return self._generation is not None and (self._generation.is_ready or self._generation.is_finished)

    def start_generating(self) -> None:
        """Begin the answers, which share the prompt: each but the first goes on in a fork. The prompt has been read."""
        if self.others:
            self.turn.read_rest()
        for other in self.others:
            other._turn = replace(self.turn, session=self.session.fork())
        for each in (self, *self.others):
            each._generation = each.session.generate(
                self.request.max_tokens, each._sampling, each.format.constraint, top_logprobs=self.request.top_logprobs
            )

    def generate(self) -> Iterator[Delta]:
        """Generate the answer, one delta for each token."""
        assert self._generation is not None, "start_generating() comes first"
        for piece in self._generation:
            if self.num_tokens == 0:  # this step has read the last token of the prompt, and none of the answer
                self._num_compactions_before = self.session.stats.num_compactions
                self._begin_reading(len(piece.token_ids))
            parts = [*self._push(piece)]
            if piece.finish_reason is not None:
                parts += self._finish(piece.finish_reason)
            # The token that ends the turn is not part of the answer.
            logprobs = () if piece.finish_reason == "eos" else piece.logprobs
            yield Delta(tuple(parts), logprobs, self.finish_reason, self._look_up(piece), self.index)

    def abandon(self) -> None:
        """Stop what goes on: the conversation is not kept."""
        for each in (*self.others, self):
            if each._generation is not None:
                each._generation.close()
        self.turn.abandon()

    def _begin_reading(self, num_tokens: int) -> None:
        """Note where the answer begins, which has `num_tokens` tokens so far, and whether it begins with reasoning."""
        tokens = self.session.tokens
        self._num_prompt_tokens = len(tokens) - num_tokens
        if self._splits:
            opening = tokens[max(self._num_prompt_tokens - OPENING_TOKENS, 0) : self._num_prompt_tokens]
            before = self._begun or self.session.engine.decode(opening).rstrip()
            # An answer that only speaks of <think> somewhere does not open with reasoning.
            opens = before.lstrip().startswith(THINK) if self._begun else before.endswith(THINK)
            self._thoughts = ReasoningStream(is_open=opens and is_reasoning(before))

    def _look_up(self, piece: Piece) -> tuple[Span, ...]:
        spans = tuple(as_shown(span) for span in piece.looked_up)
        self._looked_up |= {(span.mount, span.start, span.end): span for span in spans}
        return spans

    def _push(self, piece: Piece) -> Iterator[Part]:
        self.num_tokens += len(piece.token_ids)
        if self._text is None:
            yield from self._add([piece.text])
        else:
            yield from self._split("".join(map(self._text.push, piece.token_ids)))

    def _split(self, text: str, *, is_last: bool = False) -> Iterator[Part]:
        """The parts of the answer that are certain with some more text."""
        parts: list[Reasoning | str] = [text]
        if self._thoughts is not None:
            parts = [*self._thoughts.push(text), *(self._thoughts.finish() if is_last else ())]
        for part in parts:
            if isinstance(part, Reasoning):
                self.reasoning += part.text
                yield part
            else:
                yield from self._add([part] if self._calls is None else self._calls.push(part))
        if is_last and self._calls is not None:
            yield from self._add(self._calls.finish())

    def _finish(self, reason: str) -> Iterator[Part]:
        if self._text is not None:
            yield from self._split(self._text.finish(), is_last=True)
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
        """The tokens of all answers; the prompt counts once."""
        return TokenUsage(self._num_prompt_tokens, self.num_generated, self.turn.num_cached_tokens)

    @property
    def num_generated(self) -> int:
        """Tokens of all answers to the prompt."""
        return sum(each.num_tokens for each in (self, *self.others))

    @property
    def num_compactions(self) -> int:
        """Compactions since the whole prompt was read."""
        num_before = self._num_compactions_before
        return 0 if num_before is None else self.session.stats.num_compactions - num_before

    @property
    def forgets_reasoning(self) -> bool:
        """Whether the memory forgets the reasoning now. Between tool calls the model still needs it."""
        return self.request.reasoning == "drop" and bool(self.reasoning) and not self.tool_calls

    @property
    def message(self) -> dict[str, object]:
        """The answer as a message of the next call."""
        message: dict[str, object] = {"role": "assistant", "content": self._begun + self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_message() for call in self.tool_calls]
        return message


def numbered(sampling: Sampling, index: int) -> Sampling:
    """The sampling of one of several answers: with a seed, each answer has a seed of its own."""
    if sampling.seed is None or not index:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + index + 2**63) % 2**64 - 2**63})


def as_shown(span: Span) -> Span:
    """A span as clients get it: its score rounded, and a long text shortened in the middle."""
    return replace(span, score=round(span.score, 2), text=shortened(span.text, MAX_SPAN_CHARS))
