"""The making of a compact text: read in a context of its own, and compacted whole.

A text is read behind the usual opening of the model's prompts: so the attention sinks are tokens of the opening, which
the text then leaves behind. It is compacted as a session is, in the end as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import uuid4

from am_memory.engines.base import Engine, Message, SessionLayer
from am_memory.errors import BudgetTooSmall, InvalidInput
from am_memory.kv_cache.slots import Slots
from am_memory.policy import MemoryPolicy
from am_memory.session import pages
from am_memory.session.appending import ids_or_messages
from am_memory.session.chat_history import ChatHistory, checked_tools, require_messages
from am_memory.session.compact_texts import require_mountable
from am_memory.session.context import Context
from am_memory.session.limits import require_token_ids
from am_memory.session.session import Session
from am_memory.session.shared import Shared
from am_memory.storage.compact_text import CompactText, TextCache

PREVIEW_TOKENS, PREVIEW_CHARS = 64, 160


@dataclass
class TextMaking:
    """A compact text in the making: `read` until nothing is left, `compact`, `keep`. Others may use the engine between.

    Attributes:
        context: a context of its own, with the tokens of the text; the last one ends it, and is never read.
        start: tokens of the opening.
    """

    shared: Shared
    name: str
    context: Context
    start: int

    @classmethod
    def of(
        cls,
        scratch: Session,
        name: str,
        content: str | Sequence[int] | Sequence[Message] | Session,
        tools: Sequence[Message] = (),
    ) -> TextMaking:
        """Begin to make a text; see `Memory.compact_text`.

        Args:
            scratch: a new session of the memory, under the policy for the text; it stays empty.
        """
        shared = scratch._shared
        require_mountable(shared.engine)
        if not isinstance(name, str) or not name:
            raise InvalidInput(f"{name!r} is no name for a compact text: give some characters")
        if isinstance(content, Session):
            return cls._of_session(shared, name, content)
        history, plain = _messages(shared.engine, content, tools)
        context = _new_context(shared, name, scratch.policy, history)
        opening, token_ids = _tokens(shared.engine, history, plain)
        if not token_ids:
            raise InvalidInput(f"empty text {content!r}: give at least one token")
        require_token_ids(shared.engine.info, token_ids)
        context.tokens = [*opening, *token_ids, token_ids[-1]]
        context.pin(len(opening))
        return cls(shared, name, context, len(opening))

    @classmethod
    def _of_session(cls, shared: Shared, name: str, session: Session) -> TextMaking:
        if session._shared is not shared:
            raise InvalidInput(f"session {session.name!r} belongs to another memory: give its messages, or its tokens")
        with shared.engine_lock:
            context = session._context.fork(name)
            context.background_compaction = None
        start = min(context.policy.num_sinks, context.num_pinned)  # a fork under another policy may have pinned fewer
        if len(context.tokens) <= start:
            raise InvalidInput(f"session {session.name!r} has {len(context.tokens)} tokens: append more first")
        context.tokens.append(context.tokens[-1])
        return cls(shared, name, context, start)

    def run(self) -> CompactText:
        """Read all of it, compact it as a whole, and keep it."""
        while self.read():
            pass
        return self.keep(self.compact())

    def read(self) -> int:
        """Read one chunk, and compact on the way; returns the number of tokens still to be read."""
        context = self.context
        with self.shared.engine_lock, context.transaction():
            context.read(min(context.num_readable, context.cache.num_tokens + context.chunk_tokens))
            return context.num_readable - context.cache.num_tokens

    def compact(self) -> TextCache:
        """Compact the text as a whole, once it is read."""
        with self.shared.engine_lock:
            return finished(self.context, self.name, self.start)

    def keep(self, text: TextCache) -> CompactText:
        """Keep the text under its name. This waits for the store, and needs no engine."""
        self.shared.texts.add(text)
        return text.about


def _new_context(shared: Shared, name: str, policy: MemoryPolicy, history: ChatHistory) -> Context:
    """A context for one text, under a policy without what only a conversation has."""
    sources = tuple(source for source in policy.reference_queries or () if source != "live") or ("repeat",)
    policy = policy.with_changes(reference_queries=sources, recall_tokens=0, ahead_tokens=0)
    cache, num_pinned = shared.engine.new_cache(), policy.num_sinks
    originals = shared.original_store
    return Context(name, shared.engine, policy, shared.notify, cache, originals, num_pinned=num_pinned, history=history)


def _messages(
    engine: Engine, content: str | Sequence[int] | Sequence[Message], tools: Sequence[Message]
) -> tuple[ChatHistory, str | list[int]]:
    """The messages of a text; and the text itself if it is no messages."""
    history = ChatHistory(tools=checked_tools(tools))
    if isinstance(content, str):
        if not (content and engine.has_chat_template):
            return history, content
        content = [{"role": "user", "content": content}]
    token_ids, messages = ids_or_messages(content)
    if not messages:
        return history, token_ids
    require_messages(engine, messages)
    return replace(history, messages=tuple(dict(message) for message in messages)), ""


def _tokens(engine: Engine, history: ChatHistory, content: str | Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens of the opening, and of the text."""
    if not history.messages:
        opening = engine.encode("", add_special=True) or engine.encode("\n")
        return opening, engine.encode(content) if isinstance(content, str) else list(content)
    _, token_ids = replace(history, messages=(), starts=()).with_messages(engine, history.messages, 0, ends_turn=False)
    opening = history.opening(engine)
    if opening and token_ids[: len(opening)] == opening:
        return opening, token_ids[len(opening) :]
    return engine.encode("\n"), token_ids


def finished(context: Context, name: str, start: int) -> TextCache:
    """Compact what a context has read, as a whole, and take it as a text.

    Args:
        context: holds all of its tokens but the last; not to be used afterwards.
        start: tokens before it are the opening, and are left out.

    Raises:
        CompactionFailed: out of memory, or a fit that is not finite.
    """
    pages.put_all_away(context)
    cache = context.cache
    if max(cache.tail_start, context.num_pinned) < cache.num_tokens:
        with suppress(BudgetTooSmall):  # so short an end stays exact
            context.compact(1.0)
    info, tokens = context.engine.info, tuple(context.tokens[: cache.num_tokens])
    layers = tuple(_slots(layer, start, cache.num_tokens) for layer in cache.compactable)
    preview = context.engine.decode(tokens[start : start + PREVIEW_TOKENS], skip_special=True)[:PREVIEW_CHARS]
    num_slots = sum(slots.num_slots for slots in layers) / cache.num_heads
    num_bytes = sum(tensor.nbytes for slots in layers for tensor in slots.tensors)
    about = CompactText(
        name=name, num_tokens=len(tokens) - start, num_slots=num_slots, num_bytes=num_bytes, preview=preview.strip()
    )
    fingerprints = info.fingerprint, info.tokenizer_fingerprint
    return TextCache(about, uuid4().hex, *fingerprints, tokens, start, cache.segments, layers, context.originals)


def _slots(layer: SessionLayer, start: int, end: int) -> Slots:
    """The slots of one layer for the tokens [start, end), in host memory; exact entries become slots."""
    exact_start = max(layer.start, start)
    exact = Slots.recalled(*layer.exact_entries(exact_start, end), exact_start)
    compact = [] if layer.slots is None else [layer.slots.where(layer.slots.positions >= start)]
    return Slots.concat([*compact, exact]).to("cpu")
