"""One conversation with a memory: text, messages and tokens in, text and logits out, all steps all-or-nothing.

Knows text, chat and sampling; leaves reading and compacting to its context.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from am_memory.engines.base import Message
from am_memory.errors import (
    InvalidInput,
    InvalidPolicy,
    OriginalLost,
    PromptTooLong,
    SessionDeleted,
    UnsupportedOperation,
    is_whole,
    require_whole,
)
from am_memory.events import CompactionReport
from am_memory.kv_cache.slots import Segment
from am_memory.policy import MemoryPolicy
from am_memory.recall.search import Span
from am_memory.session.chat_history import ChatHistory
from am_memory.session.context import Context
from am_memory.session.shared import Shared
from am_memory.storage.session_file import SavedSession, packed
from am_memory.storage.store import ANY
from am_memory.text.sampling import Sampler, Sampling
from am_memory.text.text_stream import TextStream

if TYPE_CHECKING:
    from am_memory.text.constraints import Constraint

Content = str | Sequence[int] | Sequence[Message]

NOT_TEXT = ("image", "input_image", "audio", "input_audio", "video", "file", "input_file", "document", "media")
"""How the names begin of parts of a message that are no text."""

CLOSING_SHARE = 0.25
"""Of the tokens of an answer: the last ones bring a constrained answer to its end."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, before temperature, cuts and constraints.

    Attributes:
        top: the likeliest tokens at its place and their log probabilities, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Something as a session is told it: its tokens; good for as long as the session stays as it was.

    Attributes:
        num_pinned: tokens that stay exact from then on; None: as before.
    """

    token_ids: list[int]
    num_pinned: int | None
    before: tuple[ChatHistory, int]
    after: ChatHistory


@dataclass(frozen=True)
class Packed:
    """A session as it is to be saved."""

    saved: SavedSession
    data: bytes


@dataclass(frozen=True)
class Piece:
    """Some generated text.

    Attributes:
        text: whole characters; may be empty while one is unfinished.
        token_ids: the tokens generated since the last piece.
        finish_reason: in the last piece, why it is the last: the model ended its turn, the limit was reached, or a
            stop text came or the constraint was complete.
        logprobs: of each of the tokens, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["eos", "length", "stop"] | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Stats:
    """The size of a session.

    Attributes:
        logical_tokens: tokens of the conversation.
        kv_tokens: physical size: exact tokens + mean compact slots per KV head.
        exact_tokens: exact ones among them.
        kv_bytes: what its keys, values and biases take in the device's memory, with spare capacity.
        exact_kv_bytes: what an uncompacted cache of the same conversation would take.
        num_compactions: made so far.
        num_segments: compact segments now.
        originals_bytes: what the exact entries of compacted tokens take in host memory or on disk, where the policy
            keeps them.
    """

    logical_tokens: int
    kv_tokens: float
    exact_tokens: int
    kv_bytes: int
    exact_kv_bytes: int
    num_compactions: int
    num_segments: int
    originals_bytes: int = 0


class Session:
    """A conversation in bounded memory; made by `Memory.session`.

    Every call either succeeds or leaves the session as it was; `generate` does so token by token.
    """

    def __init__(self, shared: Shared, context: Context) -> None:
        self._shared = shared
        self._context = context
        self.engine = context.engine
        self.metadata: dict[str, Any] = {}
        """What the application wants to keep with the session, saved with it: anything that JSON can hold."""
        self.has_own_policy = False
        """Its policy was given to it, and not to the memory: it goes on under it wherever it is resumed."""
        self.saved_version: str | None = None
        """What is saved under its name, as far as it knows (see `Store.save`); nothing else is overwritten."""
        self._in_doubt: str | None = None
        """What its last save was to write: an interrupt may have come right behind that."""
        self._is_deleted = False

    @property
    def name(self) -> str:
        return self._context.name

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every token of the conversation."""
        return tuple(self._context.tokens)

    @property
    def messages(self) -> list[dict[str, object]]:
        """The chat messages so far, the model's own included; empty for a session of plain text."""
        return [dict(message) for message in self._context.history.messages]

    @property
    def message_starts(self) -> tuple[int, ...]:
        """For each message, how many tokens stand before it."""
        return self._context.history.starts

    @property
    def chunk_tokens(self) -> int:
        """Tokens that are read in one forward pass."""
        return self._context.chunk_tokens

    @property
    def policy(self) -> MemoryPolicy:
        """When and how it is compacted."""
        return self._context.policy

    @property
    def trigger_tokens(self) -> int:
        """The physical size that fires a compaction."""
        return self._context.trigger_tokens

    def rename(self, name: str) -> None:
        """Give it another name, for events and the store; under the same one it is what it was, deleted or not."""
        if name == self.name:
            return
        self._context.name = name
        self.saved_version, self._in_doubt, self._is_deleted = None, None, False

    def take_place_of(self, other: Session | None) -> None:
        """Be saved in place of what another one of the same name would be; None: of anything, or where nothing is."""
        self.saved_version, self._in_doubt = (other.saved_version, other._in_doubt) if other else (ANY, None)
        self._is_deleted = False

    def append(self, content: Content) -> int:
        """Add to the conversation and read it, compacting whenever the trigger is reached.

        Args:
            content: text as it stands, token ids, or chat messages ({"role": ..., "content": ...}).

        Returns:
            The number of tokens added.

        Raises:
            InvalidInput: empty, not one of these, or token ids outside the vocabulary.
            PromptTooLong: what the policy pins leaves no room below its trigger.
            CompactionFailed: a compaction on the way failed.
        """
        with self._shared.engine_lock, self._context.transaction():
            num_tokens = self._tell(self.encode(content))
            self._context.read(len(self._context.tokens) - 1)
        return num_tokens

    def tell(self, content: Content | Encoded) -> int:
        """`append`, but nothing is read yet: `read` does that bit by bit, or the next call that needs it.

        Returns:
            The number of tokens added.

        Raises:
            InvalidInput, PromptTooLong: as `append`.
            UnsupportedOperation: the session has changed since this was encoded.
        """
        with self._shared.engine_lock, self._context.transaction():
            return self._tell(content if isinstance(content, Encoded) else self.encode(content))

    def _tell(self, encoded: Encoded) -> int:
        if encoded.before != (self._context.history, len(self._context.tokens)):
            raise UnsupportedOperation(
                f"session {self.name!r} changed since this was encoded: encode it again, or fork the session"
            )
        self._context.history = encoded.after
        if encoded.num_pinned not in (None, self._context.num_pinned):
            self._pin(encoded.num_pinned)
        self._context.tokens.extend(encoded.token_ids)
        return len(encoded.token_ids)

    def read(self, max_tokens: int | None = None) -> int:
        """Read what was told and not read yet, up to `max_tokens` of it; returns how many tokens are left.

        The very last token is always left to `generate`, and not counted.

        Raises:
            InvalidInput: a limit that is no whole number, or below 0.
            CompactionFailed: a compaction on the way failed; nothing of this call was read.
        """
        if max_tokens is not None:
            require_whole(0, max_tokens=max_tokens)
        context, end = self._context, max(len(self._context.tokens) - 1, 0)
        with self._shared.engine_lock, self._context.transaction():
            context.read(end if max_tokens is None else min(end, context.cache.num_tokens + max_tokens))
        return max(end - context.cache.num_tokens, 0)

    def encode(self, content: Content) -> Encoded:
        """What `tell` is given, as tokens; the session stays as it is.

        That of a long text takes long, but it needs no device: another thread may do it while sessions go on.

        Raises:
            InvalidInput: as `append`.
        """
        after = history = self._context.history
        num_tokens = len(self._context.tokens)
        if isinstance(content, str):
            token_ids = self.engine.encode(content, add_special=not num_tokens) if content else []
        elif not isinstance(content, Sequence):
            raise InvalidInput(f"{type(content).__name__} cannot be appended: give text, token ids or chat messages")
        elif all(isinstance(item, int) for item in content):
            token_ids = _as_token_ids(content)
        elif any(isinstance(item, int) for item in content):
            raise InvalidInput("token ids and messages are mixed: append them one after the other")
        else:
            messages: Sequence[Message] = content  # type: ignore[assignment]
            _require_text(messages)
            after, token_ids = history.with_messages(self.engine, messages, num_tokens, ends_turn=self._ends_turn)
        if not token_ids:
            raise InvalidInput(f"empty input {content!r}: append at least one token")
        self._context.require_token_ids(token_ids)
        self._context.require_positions(num_tokens + len(token_ids))
        if after is history and history.messages:
            after = history.with_plain_text(self.engine.decode(token_ids, skip_special=True), num_tokens)
        return Encoded(token_ids, self._num_pinned(after), (history, num_tokens), after)

    def _num_pinned(self, history: ChatHistory) -> int | None:
        """How many tokens are to stay exact; None where a compaction has been made, which decided that."""
        if self._context.records:
            return None
        policy = self._context.policy
        if policy.pinned in ("system", "first_message"):
            return history.num_pinned_tokens(self.engine, policy.pinned) or policy.num_sinks
        return policy.num_sinks

    def _pin(self, num_pinned: int) -> None:
        policy = self._context.policy
        try:
            self._context.pin(num_pinned)
        except InvalidPolicy as error:
            raise PromptTooLong(
                f"the first {num_pinned} tokens are to stay exact (pinned={policy.pinned!r}), and no compaction can "
                f"make room beside them: raise trigger_tokens from {self.trigger_tokens}, or pin less ({error})"
            ) from error

    @property
    def _ends_turn(self) -> bool:
        tokens = self._context.tokens
        return bool(tokens) and tokens[-1] in self.engine.info.eos_token_ids

    def generate(
        self,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
        *,
        top_logprobs: int | None = None,
    ) -> Iterator[Piece]:
        """Let the model go on; what it generates becomes part of the conversation, token by token.

        Stopping to iterate keeps the tokens given out so far. After chat messages the model's answer is opened by the
        chat template; an answer that `max_new_tokens` cut off is continued by the next call.

        Args:
            max_new_tokens: at most so many.
            sampling: how tokens are chosen; None: as the model's own generation config says.
            constraint: what tokens may be chosen at all; the generation stops as soon as it is complete, and in the
                last quarter of `max_new_tokens` it is brought to an end. An answer that was cut off all the same goes
                on with the constraint that it began with.
            top_logprobs: give the log probability of each token, and of so many of the likeliest ones beside it; None:
                none at all.

        Raises:
            InvalidInput: an empty conversation, a complete answer with nothing said since, a limit below 1, a number
                of log probabilities below 0, or a constraint that is complete already.
        """
        require_whole(1, max_new_tokens=max_new_tokens)
        if top_logprobs is not None:
            require_whole(0, top_logprobs=top_logprobs)
        if constraint is not None and constraint.is_complete:
            raise InvalidInput("the constraint is complete, and allows nothing more: make a new one for each answer")
        self._require_tokens()
        return self._generate(max_new_tokens, sampling or self._shared.sampling, constraint, top_logprobs)

    def _generate(
        self, max_new_tokens: int, sampling: Sampling, constraint: Constraint | None, top_logprobs: int | None
    ) -> Iterator[Piece]:
        context, eos_token_ids = self._context, self.engine.info.eos_token_ids
        sampler = Sampler(sampling)
        stream = TextStream(lambda ids: self.engine.decode(ids, skip_special=True), sampling.stop)
        tokens, expected = context.tokens, len(context.tokens)
        constraints = () if constraint is None else (constraint,)
        for number in range(1, max_new_tokens + 1):
            with self._shared.engine_lock, context.transaction(*constraints):
                if number == 1:
                    tokens, expected = self._open_answer()
                    max_new_tokens = context.limit_new_tokens(max_new_tokens)
                if context.tokens is not tokens or len(tokens) != expected:
                    raise UnsupportedOperation(
                        f"session {self.name!r} changed while it was generating: finish one generation before the next "
                        "call, or fork the session"
                    )
                logits = expectation = context.next_logits()
                if constraint is not None:
                    logits = constraint.mask(logits, is_closing=number > max_new_tokens * (1 - CLOSING_SHARE))
                token_id = sampler.choose(logits, context.tokens)
                text = "" if token_id in eos_token_ids else stream.push(token_id)
                context.tokens.append(token_id)
                expected += 1
                if constraint is not None:
                    constraint.accept(token_id)
                is_stopped = stream.is_stopped or (constraint is not None and constraint.is_complete)
                finish_reason = self._finish_reason(token_id, is_stopped, number == max_new_tokens)
                if finish_reason is not None:
                    text += stream.finish()
                if context.history.is_answering:
                    context.history = context.history.with_answer_text(text)
            logprobs = () if top_logprobs is None else (_logprob(expectation, token_id, top_logprobs),)
            yield Piece(text, (token_id,), finish_reason, logprobs)
            if finish_reason is not None:
                return

    def _open_answer(self) -> tuple[list[int], int]:
        """Have the chat template open the model's answer; the conversation's tokens and their number afterwards."""
        context, tokens = self._context, self._context.tokens
        context.history, opening = context.history.with_answer_begun(
            self.engine, len(tokens), ends_turn=self._ends_turn
        )
        tokens.extend(opening)
        return tokens, len(tokens)

    def _finish_reason(self, token_id: int, is_stopped: bool, is_last: bool) -> Literal["eos", "length", "stop"] | None:
        if token_id in self.engine.info.eos_token_ids:
            return "eos"
        if is_stopped:
            return "stop"
        return "length" if is_last else None

    def logits(self, continuation: str | Sequence[int]) -> Tensor:
        """What the model expects at each token of a continuation that is not made part of the conversation.

        Returns:
            (num_tokens, vocab_size) float32; row i is the prediction of token i of the continuation.

        Raises:
            InvalidInput: an empty conversation, or a continuation that is empty, or neither text nor token ids.
        """
        self._require_tokens()
        if not isinstance(continuation, Sequence):
            raise InvalidInput(f"{type(continuation).__name__} is no continuation: give text or token ids")
        with self._shared.engine_lock, self._context.transaction():
            token_ids = (
                self.engine.encode(continuation) if isinstance(continuation, str) else _as_token_ids(continuation)
            )
            if not token_ids:
                raise InvalidInput("an empty continuation has no logits: give at least one token")
            self._context.require_token_ids(token_ids)
            self._context.require_positions(len(self._context.tokens) + len(token_ids) - 1)
            return self._context.scratch_logits(token_ids)

    def compact(self, fraction: float | None = None) -> CompactionReport:
        """Compact now, whatever the trigger says.

        Args:
            fraction: of the cache without its pinned tokens, oldest first; 1.0 is all of it; None: the policy's
                fraction, sparing its recent tokens, or the compaction that is under way (`ahead_tokens`).

        Raises:
            InvalidInput: a fraction outside (0, 1].
            CompactionFailed: nothing to compact, out of memory, or a fit that is not finite.
            BudgetTooSmall: the policy leaves a head too few slots for so few tokens.
        """
        is_share = isinstance(fraction, Real) and not isinstance(fraction, bool) and 0 < fraction <= 1
        if fraction is not None and not is_share:
            raise InvalidInput(f"fraction is {fraction!r}: it must be a number above 0, and at most 1")
        with self._shared.engine_lock, self._context.transaction():
            return self._context.compact(fraction)

    def search(self, text: str, top: int = 5, *, span_tokens: int = 32) -> list[Span]:
        """Find what a text is about among the compacted tokens, by the model's own attention to them.

        The text is read as if somebody said it now; the session is afterwards as it was, but that all it was told is
        read. Tokens are found by their originals where the policy keeps them, else by the slots that are left of them.

        Args:
            top: how many spans to give, the best first.
            span_tokens: about how long they are; they end where the text has a boundary.

        Raises:
            InvalidInput: an empty text or conversation, or a number below 1.
        """
        self._require_tokens()
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{text!r} is nothing to search for: give a question, or some words")
        require_whole(1, top=top, span_tokens=span_tokens)
        with self._shared.engine_lock, self._context.transaction():
            spans = self._context.search(text, span_tokens)
        return sorted(spans, key=lambda span: -span.score)[:top]

    def recall(self, span: Segment | Span | tuple[int, int]) -> list[Segment]:
        """Bring a span back exact, as it was before it was compacted; the policy must keep its originals.

        Whole segments come back, in all layers and heads, until a compaction or the trigger needs their room: then they
        go back to the slots that they had, the one recalled first before the others. Room for them is made by
        compacting what is exact, if there is none. What is read meanwhile sees them exact, so that a rebuild recalls
        them where they were recalled.

        Args:
            span: from one token to another, the second not included; one of `segments`; or what `search` found.

        Returns:
            The segments that are exact now and hold a token of the span; what was never compacted is in none.

        Raises:
            InvalidInput: no span, or one that is not in the conversation, or whose originals were not kept or are lost.
            PromptTooLong: it does not fit below the trigger.
        """
        start, end = _ends(span)
        if not 0 <= start < end <= len(self._context.tokens):
            raise InvalidInput(
                f"there is nothing to recall between tokens {start} and {end}: give a span within the "
                f"{len(self._context.tokens)} tokens of the session"
            )
        with self._shared.engine_lock, self._context.transaction():
            return self._context.recall(start, end)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The compact segments, oldest first."""
        return self._context.cache.segments

    @property
    def recalled(self) -> tuple[Segment, ...]:
        """The segments that are exact for now, the one recalled last at the end."""
        return tuple(each.segment for each in self._context.recalled)

    def rewind(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of the conversation.

        Exact tokens are simply dropped. Where a forgotten token lies in a compacted span, or a compaction has seen it
        (its queries are asked from behind all that was read), the rest is read again, with the compactions that were
        made by then: no trace is left of what is forgotten. That takes as long as reading it all did; `can_rewind` says
        where it is not so, and a fork made before goes back at once.

        Raises:
            InvalidInput: no whole number, fewer than 0 tokens, or more than there are.
        """
        if not is_whole(num_tokens) or not 0 <= num_tokens <= len(self._context.tokens):
            raise InvalidInput(
                f"cannot rewind to {num_tokens!r} tokens: the session has {len(self._context.tokens)}; give a whole "
                "number between 0 and that"
            )
        if num_tokens == len(self._context.tokens):
            return
        with self._shared.engine_lock, self._context.transaction():
            self._context.rewind(num_tokens)
            self._context.history = self._context.history.truncated(self.engine, self._context.tokens)

    def can_rewind(self, num_tokens: int) -> bool:
        """Whether `rewind(num_tokens)` reads nothing again, and leaves what reading just these tokens would leave.

        It also reads nothing again where a compaction was begun before they came and swapped in behind them
        (`ahead_tokens`); but then that compaction stays swapped in.
        """
        is_within = 0 <= num_tokens <= len(self._context.tokens)
        return is_within and self._context.can_truncate(num_tokens) and not self._context.compacted_after(num_tokens)

    def fork(self, name: str | None = None, *, policy: MemoryPolicy | None = None) -> Session:
        """A branch with the same content; memory is shared until the two differ.

        Args:
            name: of the branch in the memory; None: a scratch branch that the memory does not keep.
            policy: how the branch goes on; None: as this session.

        Raises:
            InvalidInput: there is a session of that name already.
        """
        with self._shared.engine_lock:
            branch = Session(self._shared, self._context.fork(name or f"{self.name} (scratch)", policy))
            branch.metadata = copy.deepcopy(self.metadata)
            branch.has_own_policy = policy is not None or self.has_own_policy
            if name is not None:
                self._shared.add(branch)
        return branch

    def give_up(self) -> None:
        """Stop a compaction that is under way (`ahead_tokens`); if the session goes on, it is begun anew."""
        with self._shared.engine_lock:
            self._context.cancel_background_compaction()

    def deleted(self) -> None:
        """Take note that the memory has forgotten it: what goes on with it is not saved any more under this name."""
        self._is_deleted = True

    @property
    def is_deleted(self) -> bool:
        """Whether the memory has forgotten it."""
        return self._is_deleted

    def save(self, *, overwrite: bool = False) -> None:
        """Write the session to the memory's store, whole or not at all.

        Args:
            overwrite: whatever lies there under its name, although it went on from something else.

        Raises:
            SessionChanged: somebody else has saved a session of this name since this one was read or saved.
            SessionDeleted: it was deleted meanwhile.
            StorageError: the memory has no store, or it cannot be written.
        """
        self.write(self.packed(), overwrite=overwrite)

    def packed(self) -> Packed:
        """The session as it is, to be saved by `write`; it may go on meanwhile.

        Raises:
            StorageError: a message holds what JSON cannot.
        """
        with self._shared.engine_lock:
            self._context.miss_originals()
            saved = self.snapshot()
            return Packed(saved, packed(saved))

    def write(self, what: Packed, *, overwrite: bool = False) -> None:
        """`save`, of the session as it was packed. Needs no device, and may take long.

        Raises:
            SessionChanged, SessionDeleted, StorageError: as `save`.
        """
        while True:
            with suppress(OriginalLost):
                self._write(what, overwrite)
                return
            what = self.packed()  # without those that are lost

    def _write(self, what: Packed, overwrite: bool) -> None:
        with self._shared.store_lock:
            store = self._shared.require_store()
            if self._is_deleted and not overwrite:
                raise SessionDeleted(
                    f"session {self.name!r} was deleted, so it is not saved: give it a name with Memory.keep(session, "
                    "NAME), or save it with overwrite=True, if it is to stay after all"
                )
            replaces, in_doubt = ANY if overwrite else self.saved_version, self._in_doubt
            self.saved_version = store.save(
                self.name,
                what.saved,
                replaces=replaces,
                in_doubt=in_doubt,
                on_version=self._may_be_saved_as,
                data=what.data,
            )

    def _may_be_saved_as(self, version: str) -> None:
        self._in_doubt = version

    def snapshot(self) -> SavedSession:
        """All that the session is, as it would be saved; by reference, for reading only."""
        context = self._context
        return SavedSession(
            fingerprint=self.engine.info.fingerprint,
            tokenizer_fingerprint=self.engine.info.tokenizer_fingerprint,
            template_fingerprint=self.engine.info.template_fingerprint,
            policy=context.policy.model_dump(mode="json"),
            has_own_policy=self.has_own_policy,
            tokens=tuple(context.tokens),
            records=tuple(context.records),
            messages=self._context.history.messages,
            message_starts=self._context.history.starts,
            is_answering=self._context.history.is_answering,
            tools=self._context.history.tools,
            metadata=self.metadata,
            num_pinned=context.num_pinned,
            state=context.state_at_rest,
            originals=context.originals,
            recalled=tuple(each.segment.start for each in context.recalled),
        )

    @property
    def stats(self) -> Stats:
        context, cache = self._context, self._context.cache
        return Stats(
            logical_tokens=len(context.tokens),
            kv_tokens=cache.kv_tokens,
            exact_tokens=cache.num_exact_tokens,
            kv_bytes=cache.nbytes,
            exact_kv_bytes=cache.exact_nbytes,
            num_compactions=len(context.records),
            num_segments=len(cache.segments),
            originals_bytes=context.off_device_bytes,
        )

    def _require_tokens(self) -> None:
        if not self._context.tokens:
            raise InvalidInput(f"session {self.name!r} is empty: append something before asking what follows")


def _require_text(messages: Sequence[Message]) -> None:
    """Raise InvalidInput for messages with parts that are no text: a template writes a mark for them, and no more."""
    for message in messages:
        parts = message.get("content") if isinstance(message, Mapping) else None
        for part in parts if isinstance(parts, list | tuple) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind.startswith(NOT_TEXT):
                raise InvalidInput(f"a message holds a part of type {kind!r}, and a memory text alone: say it in words")


def _as_token_ids(given: Sequence[Any]) -> list[Any]:
    """Token ids as they are given, to be checked against the vocabulary; True and False would pass for 1 and 0."""
    for position, token_id in enumerate(given):
        if isinstance(token_id, bool):
            raise InvalidInput(f"{token_id} at position {position} is no token id: give whole numbers, or text")
    return list(given)


def _ends(span: object) -> tuple[int, int]:
    """The first token of a span, and the one behind its last."""
    ends = (span.start, span.end) if isinstance(span, Segment | Span) else span
    if not (isinstance(ends, tuple) and len(ends) == 2 and all(map(is_whole, ends))):
        raise InvalidInput(
            f"{span!r} is no span: give one of `segments`, what `search` found, or (start, end) in tokens"
        )
    return ends


def _logprob(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Of one token, by (vocab_size,) logits."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
