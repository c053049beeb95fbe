"""A summary in the place of a block: the model writes it, it takes the block's positions, and it is compacted instead.

    exact block  ->  the model writes a summary  ->  its entries at the block's last positions  ->  a compaction

This is how arXiv:2602.16284 reaches 200x: a summary first, Attention Matching second. The entries are taken as they
were read, with the block in view, and rotated back to the block's positions. Knows no policy.
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

    Sliding windows and recurrent states cannot go back to `end`. With these the summary is of all that the cache holds.

    Args:
        cache: restored afterwards, whatever happens.
        end: of the block; in the exact tail, or behind it.
        max_tokens: the summary ends with the model's turn, or with this many tokens.
        on_progress: called with (tokens written, `max_tokens`), and with `max_tokens` twice at the end.
    """
    prompt = as_turn(engine, PROMPT)
    reader = _up_to(cache, end)
    answer = greedy_answer(engine, reader, prompt, max_tokens, lambda written: on_progress(written, max_tokens))
    on_progress(max_tokens, max_tokens)
    return Summary(tuple(prompt), tuple(answer))


def replace_by_summary(
    engine: Engine, cache: SessionCache, summary: Summary, block: Segment, num_pinned: int, *, chunk_tokens: int
) -> SessionCache:
    """Another cache, in which a summary's entries take the place of a block, at the block's last positions.

    Args:
        cache: holds the block exact; restored afterwards, whatever happens.
        block: at least as long as the summary.
        num_pinned: tokens at the start that stay exact.
        chunk_tokens: tokens in one forward pass.
    """
    reader, conversation = _up_to(cache, block.end), (*summary.prompt, *summary.answer)
    read_at = reader.num_tokens + len(summary.prompt)
    for chunk in in_chunks(conversation, chunk_tokens):
        engine.forward(reader, chunk)
    start, slots = block.end - len(summary.answer), []
    for layer in reader.compactable:
        key, value = layer.exact_entries(read_at, read_at + len(summary.answer))
        slots.append(Slots.recalled(layer.rotated(key, start - read_at), value, start))
    branch = cache.fork()
    branch.restore(cache.compacted([*cache.segments, block], slots, num_pinned))
    return branch


def _up_to(cache: SessionCache, end: int) -> SessionCache:
    """A branch without the tokens behind `end`, if they can be dropped."""
    branch = cache.fork()
    if branch.is_croppable:
        branch.truncate(end)
    return branch
