"""The size of a session, and how it is shown: one line in a terminal, a small table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

from am_memory.formatting import cache_bytes, counted, mebibytes
from am_memory.recall.search_index import index_bytes

if TYPE_CHECKING:
    from am_memory.compaction.record import CompactionRecord
    from am_memory.engines.base import SessionCache
    from am_memory.session.context import Context
    from am_memory.session.session import Session
    from am_memory.session.transaction import Before

SHOWN_SESSIONS = 20
"""Rows of sessions in a notebook's table."""


@dataclass(frozen=True, repr=False)
class Stats:
    """The size of a session.

    Attributes:
        logical_tokens: tokens of the conversation.
        kv_tokens: physical size: exact tokens plus the mean number of compact slots per KV head.
        exact_tokens: tokens whose keys and values are exact.
        kv_bytes: memory of keys, values and biases on the device, spare capacity included.
        exact_kv_bytes: memory that an uncompacted cache of the same conversation would take.
        num_compactions: compactions so far; each made a segment, or several of a long block.
        num_segments: compact segments now.
        num_refined: those of them that were refined since they were compacted.
        recalled_tokens: compacted tokens that are exact for the time being; not among `exact_tokens`.
        mounted_slots: slots per KV head of the mounted texts; part of `kv_tokens`.
        originals_bytes: memory of the exact entries of compacted tokens, on the host or on disk, where the policy
            keeps them, and of the keys by which they are searched, from the first search on.
        checkpoints_bytes: host memory of the checkpoints to which a sliding window or a recurrent state can go back.
    """

    logical_tokens: int
    kv_tokens: float
    exact_tokens: int
    kv_bytes: int
    exact_kv_bytes: int
    num_compactions: int
    num_segments: int
    originals_bytes: int = 0
    recalled_tokens: int = 0
    num_refined: int = 0
    mounted_slots: float = 0.0
    checkpoints_bytes: int = 0

    @property
    def evictable_bytes(self) -> int:
        """What evicting the cache frees: on the device, and its checkpoints on the host."""
        return self.kv_bytes + self.checkpoints_bytes

    def __str__(self) -> str:
        return (
            f"{counted(self.logical_tokens, 'token')} in {counted(round(self.kv_tokens), 'slot')}, "
            f"{counted(self.num_compactions, 'compaction')}"
        )

    def __repr__(self) -> str:
        return f"Stats({self}, {cache_bytes(self.kv_bytes, self.exact_kv_bytes, self.num_compactions)})"

    def _repr_html_(self) -> str:
        return html_table("Stats", table_rows(self))


def stats_of(context: Context) -> Stats:
    """The size of a context as the last finished step left it, whatever other threads do meanwhile."""
    while True:
        num_steps, before = context.num_steps, context.before_step
        if before is not None:
            cache = context.engine.new_cache()
            cache.restore(before.cache)
            return _measured(before, cache, before.num_tokens, before.records[: before.num_compactions])
        found = _measured(context, context.cache, len(context.tokens), context.records)
        if context.before_step is None and context.num_steps == num_steps:
            return found


def _measured(
    held: Context | Before, cache: SessionCache, num_tokens: int, records: Sequence[CompactionRecord]
) -> Stats:
    pages, refined = held.recalled, {(one.start, one.end) for record in records for one in record.refinements}
    off_device = sum(original.nbytes for original in held.originals) + index_bytes(held.originals)
    return Stats(
        logical_tokens=num_tokens,
        kv_tokens=cache.kv_tokens,
        exact_tokens=cache.num_exact_tokens,
        kv_bytes=cache.nbytes,
        exact_kv_bytes=cache.exact_nbytes,
        num_compactions=sum(not record.continues for record in records),
        num_segments=len(cache.segments),
        originals_bytes=off_device + sum(recalled.nbytes for recalled in pages),
        recalled_tokens=sum(recalled.page.num_tokens for recalled in pages),
        num_refined=sum((segment.start, segment.end) in refined for segment in cache.segments),
        mounted_slots=held.mounts.size,
        checkpoints_bytes=sum(checkpoint.nbytes for checkpoint in held.checkpoints),
    )


def table_rows(stats: Stats) -> dict[str, str]:
    """The size as the rows of a table."""
    rows = {
        "tokens": f"{stats.logical_tokens:,}",
        "slots": f"{stats.kv_tokens:,.0f}, {stats.exact_tokens:,} of them exact",
        "cache": cache_bytes(stats.kv_bytes, stats.exact_kv_bytes, stats.num_compactions),
        "compactions": f"{stats.num_compactions:,}, {counted(stats.num_segments, 'segment')} now",
    }
    if stats.num_refined:
        rows["refined"] = counted(stats.num_refined, "segment")
    if stats.mounted_slots:
        rows["mounted"] = f"{stats.mounted_slots:,.0f} slots"
    if stats.recalled_tokens:
        rows["recalled"] = counted(stats.recalled_tokens, "token")
    if stats.originals_bytes:
        rows["originals"] = mebibytes(stats.originals_bytes)
    return rows


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """A table of two columns for notebooks. Titles, names and values are escaped: a session's name may hold markup."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table><caption>{escape(title)}</caption>{body}</table>"


def sessions_table(model: str, sessions: Mapping[str, Session]) -> str:
    """The sizes of a memory's sessions as an HTML table."""
    shown = {name: str(session.stats) for name, session in islice(sessions.items(), SHOWN_SESSIONS)}
    if len(sessions) > len(shown):
        shown["..."] = f"{len(sessions) - len(shown):,} more"
    return html_table(f"Memory of {model}", shown)
