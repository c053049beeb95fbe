"""Looking back: what a text asks for among the compacted tokens becomes exact before the model answers.

A message is looked up when the model is about to answer it, and what the model writes every `WRITING_TOKENS` tokens.
Its own entries stay as they are: reading it once more beside the exact pages gains next to nothing (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from am_memory.errors import PromptTooLong, UnsupportedOperation
from am_memory.events import MemoryConsulted, SearchHeadsProgress, Span
from am_memory.queries import as_turn, message_token_positions, require_scaling, scratch
from am_memory.recall.paging import Page
from am_memory.recall.search import Sought, best_pages, span_scores
from am_memory.recall.search_heads import SearchHead, search_heads
from am_memory.recall.search_queries import MESSAGE_TOKENS, SearchQueries, read_on_scratch
from am_memory.session import pages
from am_memory.session.context import Context
from am_memory.session.recalling import recall_pages, with_originals
from am_memory.session.search_space import SearchSpace, can_search

WRITING_TOKENS = 64
"""The model's own text is looked up each time that it has grown by so many tokens."""
LEAST_SCORE = 1.0
"""Spans that get less attention than this from a text, in nats above the usual, are not recalled."""


def recall_for_answer(context: Context) -> tuple[Span, ...]:
    """Recall what the messages since the model's last answer ask for; returns what was found."""
    return _look(context, max(_last_words(context), context.num_readable - MESSAGE_TOKENS))


def recall_while_writing(context: Context) -> tuple[Span, ...]:
    """Recall what the last `WRITING_TOKENS` tokens look for; returns what was found."""
    return _look(context, max(context.num_readable - WRITING_TOKENS, 0))


def can_look(context: Context) -> bool:
    """Whether there is anything that may be recalled by itself."""
    if not context.recall_tokens or context.mounts.waiting(context.cache.num_tokens):
        return False
    of_texts = any(can_search(mounted.named) for mounted in context.mounts.mounted)
    return of_texts or (bool(context.originals) and bool(context.cache.segments))


def search(context: Context, text: str, top: int) -> list[Span]:
    """The compacted pages that a text is about, as if somebody said it now; the best first."""
    context.read_all()
    cache = context.cache
    token_ids = [*context.tokens[: cache.num_tokens], *context.tokens[-1:], *as_turn(context.engine, text)]
    try:
        read = read_on_scratch(
            context.engine, cache, _heads(context), token_ids[cache.num_tokens :], context.chunk_tokens
        )
    except PromptTooLong as error:
        raise UnsupportedOperation(
            f"session {context.name!r} cannot be searched: the model's search heads are measured on a chat of some 900 "
            f"tokens, and the text is read behind the conversation's {cache.num_tokens:,}, but {error}"
        ) from error
    space = SearchSpace.of(context, cache.num_tokens)
    scores = _scores(context, _sought(context, read, token_ids, cache.num_tokens), cache.num_tokens, space)
    pages = best_pages(context.engine, space.token_ids, space.segments, scores, max_pages=top)
    return sorted((space.span(context, page, scores) for page in pages), key=lambda span: -span.score)[:top]


def _look(context: Context, start: int) -> tuple[Span, ...]:
    """Recall what the tokens from `start` on look for; returns the spans of the event `MemoryConsulted`."""
    context.read_all()
    if not can_look(context):
        return ()
    sought = _looked_for(context, start)  # before a compaction: as the tokens were read
    pages.make_room(context)
    cache = context.cache
    space = SearchSpace.of(context, start)
    if not space.parts and start <= cache.segments[0].start:
        return ()  # nothing compacted stands before these tokens
    scores = _scores(context, sought, start, space)
    max_tokens = min(context.recall_tokens, int(context.trigger_tokens - context.tokens_at_rest) - 1)
    found = best_pages(
        context.engine,
        space.token_ids,
        space.segments,
        scores.masked_fill(~space.kept(len(scores)), -torch.inf),
        least_score=LEAST_SCORE,
        max_tokens=max_tokens,
    )
    found = [page for page in found if space.are_kept(page)]
    if not all(_is_exact(context, space.named(page)) for page in found):
        recall_pages(context, sorted(map(space.named, found)), max_tokens)
    context.original_store.adopt(())  # the keys that are compared take room as well
    spans = tuple(space.span(context, page, scores) for page in found if _is_exact(context, space.named(page)))
    if spans:
        context.notify(MemoryConsulted(context.name, len(context.tokens), spans, cache.kv_tokens))
    return spans


def _is_exact(context: Context, page: Page) -> bool:
    return any(page.is_within(*held.page) for held in context.recalled)


def _looked_for(context: Context, start: int) -> Sought:
    """The messages' tokens from `start` on, with the queries of the search heads.

    These were kept when the tokens were read, unless the engine hands out no queries then. In that case the tokens are
    read once more on scratch. Where the cache cannot go back, they are read as if they were said again, which finds
    less.
    """
    engine, cache, token_ids = context.engine, context.cache, context.tokens[: context.num_readable]
    kept, heads, chunk_tokens = context.recent_queries, _heads(context), context.chunk_tokens
    if kept is not None and kept.heads == tuple(heads) and kept.start <= start and kept.end == len(token_ids):
        return _sought(context, kept, token_ids, start)
    if start < cache.tail_start or not cache.is_croppable:
        token_ids, start = [*token_ids, *token_ids[start:]], len(token_ids)
        read = read_on_scratch(engine, cache, heads, token_ids[start:], chunk_tokens)
    else:
        with scratch(cache, back_to=start):
            read = read_on_scratch(engine, cache, heads, token_ids[start:], chunk_tokens)
    return _sought(context, read, token_ids, start)


def _sought(context: Context, read: SearchQueries, token_ids: Sequence[int], start: int) -> Sought:
    """The tokens of messages from `start` on, with their queries out of those that were read."""
    positions = message_token_positions(context.engine, token_ids, start, len(token_ids))
    return Sought([token_ids[position] for position in positions], read.at(positions))


def _heads(context: Context) -> Sequence[SearchHead]:
    """The search heads of the model. To measure them takes long, so this emits events."""

    def on_progress(done: int, total: int) -> None:
        context.notify(SearchHeadsProgress(context.name, done, total))

    return search_heads(context.engine, context.cache, on_progress).heads


def _scores(context: Context, sought: Sought, num_tokens: int, space: SearchSpace) -> Tensor:
    """The score of each span of the first `num_tokens` tokens, and of the mounted texts."""
    engine, cache = context.engine, context.cache
    require_scaling(engine, cache, context.tokens[-1])
    token_ids = context.tokens[:num_tokens]
    return with_originals(
        context, lambda: span_scores(engine, cache, context.originals, sought, token_ids, space.texts)
    )


def _last_words(context: Context) -> int:
    """Where the messages since the model's last answer, or since the system prompt, begin; without messages, 0."""
    history = context.history
    behind = zip(history.messages, history.starts[1:], strict=False)
    answered = max((end for message, end in behind if message["role"] == "assistant"), default=0)
    roles = (message["role"] for message in history.messages)
    num_system = sum(1 for _ in takewhile(lambda role: role in ("system", "developer"), roles))
    return max(answered, *history.starts[num_system : num_system + 1], 0)
