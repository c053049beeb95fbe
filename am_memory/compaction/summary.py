"""A summary in the place of a block: what the model writes about it stands for it, and is what is compacted.

    block, exact  ->  the model sums it up  ->  the summary's entries at the block's last positions  ->  a compaction

That is how arXiv:2602.16284 comes to 200x: text first, entries then. These are taken as they were read, with the block
in view, and turned back as one. Knows not when a summary is wanted, and not how compactions are made.
"""

from __future__ import annotations

from collections.abc import Callable

from am_memory.compaction.record import Summary
from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.queries import as_turn, greedy_answer

PROMPT = (
    "Sum up what has been said so far, in short sentences, with every name, number, date, place and decision exactly "
    "as it was told."
)


def write_summary(
    engine: Engine, cache: SessionCache, end: int, *, max_tokens: int, on_progress: Callable[[int, int], None]
) -> Summary:
    """Let the model sum up the tokens before `end`, greedily.

    Where layers have sliding windows, that is all that the cache holds: they cannot go back to `end`.

    Args:
        cache: afterwards as it was, whatever happens.
        end: of the block; in the exact tail, or behind it.
        max_tokens: the summary ends with its turn, or with these.
        on_progress: called with (tokens that are written, or not needed; max_tokens).
    """
    prompt = as_turn(engine, PROMPT)
    reader = _up_to(cache, end)
    answer = greedy_answer(engine, reader, prompt, max_tokens, lambda written: on_progress(written, max_tokens))
    on_progress(max_tokens, max_tokens)
    return Summary(tuple(prompt), tuple(answer))


def stand_in(
    engine: Engine, cache: SessionCache, summary: Summary, block: Segment, num_pinned: int, *, chunk_tokens: int
) -> SessionCache:
    """Another cache, in which a summary's entries stand for a block, at its last positions.

    Args:
        cache: holds the block exact; afterwards as it was, whatever happens.
        block: at least as long as the summary.
        num_pinned: tokens at the start that stay exact.
        chunk_tokens: read at once.
    """
    reader, conversation = _up_to(cache, block.end), (*summary.prompt, *summary.answer)
    read_at = reader.num_tokens + len(summary.prompt)
    for chunk in in_chunks(conversation, chunk_tokens):
        engine.forward(reader, chunk)
    stand_at, slots = block.end - len(summary.answer), []
    for layer in reader.compactable:
        key, value = layer.exact_entries(read_at, read_at + len(summary.answer))
        slots.append(Slots.recalled(layer.turned(key, stand_at - read_at), value, stand_at))
    branch = cache.fork()
    branch.restore(cache.compacted([*cache.segments, block], slots, num_pinned))
    return branch


def _up_to(cache: SessionCache, end: int) -> SessionCache:
    """A branch without what comes behind `end`, where it can be dropped."""
    branch = cache.fork()
    if branch.is_croppable:
        branch.truncate(end)
    return branch
