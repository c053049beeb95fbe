"""One conversation with a memory: text, messages and tokens in, text and logits out.

The methods stand in the order of a session's life: append, generate, compact, look back, branch, save. Each is one
step that succeeds or changes nothing. `context.py` reads and compacts, `generation.py` writes an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from am_memory.compaction.requirements import require_refinable
from am_memory.errors import InvalidInput, is_whole, require_kind, require_whole
from am_memory.events import CompactionReport, SegmentRefined, Span
from am_memory.kv_cache.slots import Segment
from am_memory.policy import MemoryPolicy
from am_memory.queries import logits_on_scratch
from am_memory.recall.paging import Page
from am_memory.session import lookup, mounting, picture, rebuild, recalling, refining
from am_memory.session.appending import Content, checked_token_ids, encode, extend
from am_memory.session.compact_texts import require_mountable
from am_memory.session.context import Context
from am_memory.session.generation import Generation
from am_memory.session.limits import require_positions, require_token_ids
from am_memory.session.mounts import Mount
from am_memory.session.resuming import check_text
from am_memory.session.saving import SavedCopy, pack, write
from am_memory.session.shared import Shared
from am_memory.session.stats import Stats, html_table, stats_of, table_rows
from am_memory.storage.compact_text import TextCache
from am_memory.text.sampling import Sampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from am_memory.text.constraints import Constraint


class Session:
    """A conversation in bounded memory; `Memory.session` makes it.

    Every call either succeeds or leaves the session as it was; `generate` does so token by token.

    Attributes:
        engine: runs the model.
        metadata: what the application keeps with the session. It is saved with it, so JSON must be able to hold it.
    """

    def __init__(self, shared: Shared, context: Context, *, has_own_policy: bool = False) -> None:
        self.engine = shared.engine
        self.metadata: dict[str, Any] = {}
        self._shared = shared
        self._context = context
        self._has_own_policy = has_own_policy  # it was given to the session, which keeps it wherever it is resumed
        self._saved_copy = SavedCopy()

    def __repr__(self) -> str:
        return f"Session({self.name!r}, {self.stats})"

    def _repr_html_(self) -> str:
        return html_table(f"Session {self.name!r}", table_rows(self.stats))

    @property
    def name(self) -> str:
        """Its name in the memory, in events and in the store."""
        return self._context.name

    @property
    def policy(self) -> MemoryPolicy:
        """When and how it is compacted."""
        return self._context.policy

    @property
    def trigger_tokens(self) -> int:
        """The size, in tokens and slots, that the cache never exceeds: a compaction is made before it would."""
        return self._context.trigger_tokens

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every token of the conversation, compacted or not."""
        return tuple(self._context.tokens)

    @property
    def messages(self) -> list[dict[str, object]]:
        """The chat messages so far, the model's own included; empty for a session of plain text."""
        return [dict(message) for message in self._context.history.messages]

    @property
    def message_starts(self) -> tuple[int, ...]:
        """For each message, the number of tokens before it."""
        return self._context.history.starts

    @property
    def stats(self) -> Stats:
        """How large it is now; while another thread works on it, how large it was before that step."""
        return stats_of(self._context)

    def plot(self) -> Figure:
        """A matplotlib figure of the slots that each part of the conversation has; UnsupportedOperation without it."""
        return picture.draw(self._context)

    def append(self, content: Content, *, read_now: bool = True) -> int:
        """Add to the conversation and read it, compacting whenever the trigger is reached.

        Args:
            content: text as it stands, token ids, or chat messages ({"role": ..., "content": ...}).
            read_now: False: leave it to the next call that needs it. `Memory.generate_many` reads it in parts, between
                the tokens of other sessions.

        Returns:
            The number of tokens added.

        Raises:
            InvalidInput: empty content, content of another kind, or token ids outside the vocabulary.
            PromptTooLong: the policy's pinned tokens leave no room below its trigger.
            CompactionFailed: a compaction on the way failed.
        """
        with self._shared.engine_lock, self._context.transaction():
            num_tokens = extend(self._context, encode(self, content))
            if read_now:
                self._context.read_all()
        return num_tokens

    def generate(
        self,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
        *,
        top_logprobs: int | None = None,
    ) -> Generation:
        """Let the model continue; its tokens become part of the conversation one by one.

        A caller that stops iterating keeps the tokens given out so far. After chat messages the chat template opens
        the model's answer. The next call continues an answer that `max_new_tokens` cut off.

        Args:
            max_new_tokens: at most this many.
            sampling: how tokens are chosen; None: as the model's own generation config says.
            constraint: which tokens may be chosen. Generation stops as soon as it is complete; the last quarter of
                `max_new_tokens` steers it to its end. An answer that was cut off goes on with the same constraint.
            top_logprobs: return each token's log probability, and this many of the likeliest tokens beside it; None:
                no log probabilities.

        Raises:
            InvalidInput: an empty conversation; a complete answer without a new message after it; `max_new_tokens`
                below 1; `top_logprobs` below 0; a `sampling` of another kind; a constraint that is complete already.
        """
        require_whole(1, max_new_tokens=max_new_tokens)
        require_kind(Sampling, sampling=sampling)
        if top_logprobs is not None:
            require_whole(0, top_logprobs=top_logprobs)
        if constraint is not None and constraint.is_complete:
            raise InvalidInput("the constraint is complete, and allows nothing more: make a new one for each answer")
        self._require_tokens()
        sampling = sampling or self._shared.sampling
        return Generation(self._shared, self._context, max_new_tokens, sampling, constraint, top_logprobs)

    def logits(self, continuation: str | Sequence[int]) -> Tensor:
        """The model's predictions at each token of a continuation, which does not become part of the conversation.

        Returns:
            (num_tokens, vocab_size) float32; row i predicts token i of the continuation.

        Raises:
            InvalidInput: an empty conversation, or a continuation that is empty, or neither text nor token ids.
        """
        self._require_tokens()
        if not isinstance(continuation, Sequence):
            raise InvalidInput(f"{type(continuation).__name__} cannot be a continuation: give text or token ids")
        if isinstance(continuation, str):
            token_ids = self.engine.encode(continuation)
        else:
            token_ids = checked_token_ids(continuation)
        if not token_ids:
            raise InvalidInput("an empty continuation has no logits: give at least one token")
        with self._shared.engine_lock, self._context.transaction():
            require_token_ids(self.engine.info, token_ids)
            require_positions(self.engine.info, len(self._context.tokens) + len(token_ids) - 1)
            context = self._context
            context.read_all()
            ids = [context.tokens[-1], *token_ids[:-1]]
            return logits_on_scratch(self.engine, context.cache, ids, context.chunk_tokens)

    def compact(self, fraction: float | None = None) -> CompactionReport:
        """Compact now, whether or not the trigger is reached.

        Args:
            fraction: share of the cache to compact, pinned tokens not counted, oldest first; 1.0 is all of it. None:
                the policy's fraction without its recent tokens, or the background compaction (`ahead_tokens`) if one
                is running.

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

    def refine(self) -> list[SegmentRefined]:
        """Give compact segments better slots, as many as they have; for a time when nobody waits.

        Each segment is fitted again to its exact entries, with `MemoryPolicy.refine_queries`, if it was fitted to other
        queries, or has shrunk by a quarter since then. Segments whose originals are not kept stay as they are. A
        compaction that runs in the background is swapped in first.

        Each segment is a step of its own: an interrupt keeps those that are done. `MemoryPolicy(refine="idle")` does
        the same in a thread, while no session works.

        Returns:
            What was refined, in this order; those with the fewest slots for their tokens come first.

        Raises:
            UnsupportedOperation: the model has sliding windows or recurrent states, or its heads share their cells.
            CompactionFailed: out of memory, or a fit that is not finite.
        """
        require_refinable(self._context.engine.capabilities)
        refined: list[SegmentRefined] = []
        while True:
            with self._shared.engine_lock, self._context.transaction():
                done = refining.refine_next(self._context)
            if done is None:
                return refined
            refined.append(done)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The compact segments, oldest first."""
        return self._context.cache.segments

    def search(self, text: str, top: int = 5) -> list[Span]:
        """Find the compacted tokens that a text is about, by the model's own attention to them.

        The text is read as if somebody said it now, and then forgotten. Scores use the exact keys where the policy
        keeps originals, else the slots that are left.

        Args:
            text: a question, or some words.
            top: number of spans to return, the best first; each is about 50 tokens, or more where several join.

        Raises:
            InvalidInput: an empty text or conversation, or a number below 1.
            UnsupportedOperation: the model has too few positions to read the text, or to measure its search heads.
        """
        self._require_tokens()
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{text!r} is nothing to search for: give a question, or some words")
        require_whole(1, top=top)
        with self._shared.engine_lock, self._context.transaction():
            return lookup.search(self._context, text, top)

    def recall(self, span: Page | Segment | Span | tuple[int, int]) -> list[Page]:
        """Make the compacted tokens of a span exact again, as they were before; the policy must keep originals.

        The model recalls by itself what a message asks for (`MemoryPolicy.recall_tokens`); this is for spans that the
        application chooses. They stay exact until other recalls or the trigger need their room; then they return to
        their slots, the first recalled first. If there is no room for them, exact tokens are compacted. Tokens that are
        read meanwhile attend to the exact entries, so a rebuild recalls the same pages at the same place.

        Args:
            span: a result of `search`, one of `segments`, or (start, end) in tokens, the end not included.

        Returns:
            The pages that are exact now and hold a token of the span; tokens never compacted are in none.

        Raises:
            InvalidInput: not a span, a span outside the conversation, or one whose originals were not kept or are
                lost.
            PromptTooLong: it does not fit below the trigger.
        """
        start, end = recalling.ends_of(span)
        with self._shared.engine_lock, self._context.transaction():
            if isinstance(span, Span) and span.mount is not None:
                return recalling.recall_of_text(self._context, span.mount, start, end)
            return recalling.recall_of_tokens(self._context, start, end)

    @property
    def recalled(self) -> tuple[Page, ...]:
        """The pages of the conversation that are exact for now, the last recalled at the end."""
        return tuple(held.page for held in self._context.recalled if held.page.start >= 0)

    def mount(self, text: str | TextCache) -> None:
        """Let the model see a compact text from now on, beside what was said; `Memory.compact_text` makes it.

        The text ends where the conversation stands now. Tokens and positions of the conversation do not change, and
        several texts mounted at one point stand in parallel. A mounted text takes room below the trigger, which no
        compaction frees; other tokens are compacted to make it. The session keeps the text, in its saved file as well.
        In a new session the text is seen once the attention sinks are read.

        Args:
            text: its name, or what `Memory.text` has read already.

        Raises:
            TextNotFound: there is no compact text of that name.
            InvalidInput: a text of that name is mounted already.
            PromptTooLong: it does not fit below the trigger.
            UnsupportedOperation: the engine cannot mount texts.
            StorageError: the text cannot be read, or another model has read it.
        """
        require_mountable(self.engine)
        text = self._shared.texts.get(text) if isinstance(text, str | None) else text
        require_kind(TextCache, text=text)
        with self._shared.engine_lock, self._context.transaction():
            check_text(text, self.engine.info, self._shared.cache_of_one_token)
            mounting.mount(self._context, text)

    def unmount(self, name: str) -> None:
        """Take a mounted text away: tokens read from now on do not see it.

        Raises:
            InvalidInput: no text of that name is mounted.
        """
        with self._shared.engine_lock, self._context.transaction():
            mounting.unmount(self._context, name)

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """The compact texts that are mounted, in the order in which they were."""
        return self._context.mounts.shown([held.page for held in self._context.recalled])

    def fork(self, name: str | None = None, *, policy: MemoryPolicy | None = None) -> Session:
        """A branch with the same content; the two share memory until they differ.

        Args:
            name: the branch's name in the memory; None: a scratch branch, which the memory does not keep.
            policy: the branch's policy from now on; None: this session's.

        Raises:
            InvalidInput: there is a session of that name already.
        """
        with self._shared.engine_lock:
            context = self._context.fork(name or f"{self.name} (scratch)", policy)
            branch = Session(self._shared, context, has_own_policy=policy is not None or self._has_own_policy)
            branch.metadata = copy.deepcopy(self.metadata)
            if name is not None:
                self._shared.add(branch)
        return branch

    def rewind(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of the conversation.

        Exact tokens are simply dropped. Sliding windows and recurrent states go back to where one of the last messages
        or answers began, and the tokens from there on are read again. If a forgotten token is compacted, or an earlier
        compaction was fitted while it was there, all remaining tokens are read again and compacted as they were then;
        nothing forgotten leaves a trace. That takes as long as the first reading. `can_rewind` says when it is not
        needed; a fork made earlier goes back at once. Pages that were recalled at just this point, for an answer that
        is forgotten, stay exact: the same message would look them up again.

        Raises:
            InvalidInput: not a whole number, below 0, or above the number of tokens.
        """
        if not is_whole(num_tokens) or not 0 <= num_tokens <= len(self._context.tokens):
            raise InvalidInput(
                f"cannot rewind to {num_tokens!r} tokens: the session has {len(self._context.tokens)}; give a whole "
                "number between 0 and that"
            )
        if num_tokens == len(self._context.tokens):
            return
        with self._shared.engine_lock, self._context.transaction():
            rebuild.rewind(self._context, num_tokens)
            self._context.history = self._context.history.truncated(self.engine, self._context.tokens)

    def can_rewind(self, num_tokens: int) -> bool:
        """Whether `rewind(num_tokens)` leaves what reading only these tokens would leave, without reading them again.

        Where a sliding window or a recurrent state has to go back, a few of them are read again.

        Pages that were recalled at just this point do not count: `rewind` keeps them.
        A background compaction (`ahead_tokens`) may begin within these tokens and be swapped in after them. `rewind`
        then reads nothing again, but keeps that compaction, so the answer is False.
        """
        context = self._context
        if not 0 <= num_tokens <= len(context.tokens):
            return False
        return rebuild.can_truncate(context, num_tokens) and not rebuild.compacted_after(context, num_tokens)

    def save(self, *, overwrite: bool = False) -> None:
        """Write the session to the memory's store, whole or not at all.

        Args:
            overwrite: replace the saved session of that name, even if this one did not go on from it.

        Raises:
            SessionChanged: another session was saved under this name since this one was read or saved.
            SessionDeleted: the session was deleted meanwhile.
            StorageError: the memory has no store, or the store cannot be written to.
        """
        write(self, pack(self), overwrite=overwrite)

    def _require_tokens(self) -> None:
        if not self._context.tokens:
            raise InvalidInput(f"session {self.name!r} is empty: append something before asking what follows")
