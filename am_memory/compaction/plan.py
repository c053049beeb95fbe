"""The plan of a compaction: which tokens it covers, and how many slots each segment has afterwards.

Pure arithmetic on sizes: knows no tensor, no model and no text.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from am_memory.engines.base import Capabilities, Engine
from am_memory.errors import BudgetTooSmall, CompactionFailed, InvalidPolicy
from am_memory.kv_cache.slots import Segment, resized, tail_start
from am_memory.policy import MemoryPolicy, QuerySource

LONGEST_SEGMENT = 512
"""A block of more tokens becomes several segments: the time of a fit grows faster than its tokens (docs/log.md)."""

BOUNDARY_SLACK = 0.25
"""The part of a block that may be left for the next one, so that the block ends at a boundary of the text."""

SMALL_RECALL_TOKENS = 256
"""Room for recalled pages at small triggers, that of five of them, as long as it is at most a quarter."""

RIDGE_BESIDE_PAGES = 0.5
"""`MemoryPolicy.ridge` by default, where pages are recalled."""

LEAST_RECALL_TOKENS = 64
"""By default, less room than this is none; a policy may ask for less."""

Boundary = Callable[[int, int], int]
"""Called with (earliest, latest), both included; returns the position at which a block should end."""


@dataclass(frozen=True)
class CacheSizes:
    """The sizes that a plan depends on.

    Attributes:
        num_tokens: logical tokens in the cache.
        num_pinned: tokens at the start that stay exact.
        segments: before the compaction.
        num_heads: KV heads of all compactable layers.
        window_tokens: the model's context window; segments that would leave it are shifted. None: compact keys cannot
            be moved.
        recall_tokens: room for recalled pages, which tokens that are read may take.
    """

    num_tokens: int
    num_pinned: int
    segments: tuple[Segment, ...]
    num_heads: int
    window_tokens: int | None = None
    recall_tokens: int = 0

    @property
    def exact_start(self) -> int:
        """The first exact token that may be compacted."""
        return max(tail_start(self.segments), self.num_pinned)

    @property
    def compact_slots(self) -> float:
        """Compact slots per head, as the mean over all heads."""
        return sum(segment.num_slots for segment in self.segments) / max(self.num_heads, 1)

    @property
    def kept_share(self) -> float:
        """Compact slots per compacted token; 1 before anything was compacted."""
        num_tokens = sum(segment.num_tokens for segment in self.segments)
        return self.compact_slots / num_tokens if num_tokens else 1.0


@dataclass(frozen=True)
class Plan:
    """One compaction.

    Attributes:
        segments: after the compaction, the new one last.
        is_refit: the new segment replaces all older ones as well.
    """

    segments: tuple[Segment, ...]
    is_refit: bool = False

    @property
    def newest(self) -> Segment:
        return self.segments[-1]


def trigger_in_tokens(policy: MemoryPolicy, window_tokens: int) -> int:
    """Size of the cache at which a compaction is due, in tokens.

    Args:
        window_tokens: the model's context window.

    Raises:
        InvalidPolicy: the trigger is above the window.
    """
    tokens = _trigger(policy, window_tokens)
    if tokens > window_tokens:
        raise InvalidPolicy(
            f"trigger_tokens {tokens} is above the model's window of {window_tokens}: set it to {window_tokens} or less"
        )
    return tokens


def _trigger(policy: MemoryPolicy, window_tokens: int) -> int:
    trigger = policy.trigger_tokens
    return trigger if isinstance(trigger, int) else int(trigger * window_tokens)


def originals_place(policy: MemoryPolicy, can: Capabilities) -> Literal["drop", "host", "disk"]:
    """Where an engine's originals are kept under a policy."""
    if policy.originals == "auto":
        return "host" if can.can_exchange_slots else "drop"
    return policy.originals


def can_recall(policy: MemoryPolicy, can: Capabilities) -> bool:
    """Whether a policy lets an engine recall pages by itself."""
    return policy.recall_tokens != 0 and originals_place(policy, can) != "drop"


def completed(policy: MemoryPolicy, engine: Engine) -> MemoryPolicy:
    """The policy with the reference queries and the ridge that it leaves open.

    Beside pages, questions do not depend on the slots alone: queries are predicted, which is fast, and ridge is large.
    Both follow from the policy and the model alone, so that a compaction can be repeated: what a context pins, or
    mounts, does not count.
    """
    info = engine.info
    trigger_tokens = _trigger(policy, info.window_tokens)
    recalls = info.max_tokens is None and bool(
        recall_tokens(policy, engine.capabilities, trigger_tokens, policy.num_sinks)
    )
    predicts = recalls and engine.capabilities.can_rotate_keys
    sources: tuple[QuerySource, ...] = ("predicted",) if predicts else ("repeat",)
    ridge = RIDGE_BESIDE_PAGES if recalls else None
    return policy.with_changes(
        reference_queries=policy.reference_queries or sources, ridge=ridge if policy.ridge is None else policy.ridge
    )


def recall_tokens(policy: MemoryPolicy, can: Capabilities, trigger_tokens: int, num_pinned: int) -> int:
    """The room below the trigger that is kept free for recalled pages, in tokens.

    By default it is halved until it leaves a compaction at least half of the block that it would have without it.
    """
    if not can_recall(policy, can):
        return 0
    if policy.recall_tokens is not None:
        return policy.recall_tokens
    room = max(trigger_tokens // 8, min(SMALL_RECALL_TOKENS, trigger_tokens // 4))
    most = min_block_tokens(policy, trigger_tokens, num_pinned)
    while room >= LEAST_RECALL_TOKENS:
        with suppress(InvalidPolicy, BudgetTooSmall):
            require_progress(policy, trigger_tokens - room, num_pinned)
            if 2 * min_block_tokens(policy, trigger_tokens - room, num_pinned) >= most:
                return room
        room //= 2
    return 0


def require_progress(policy: MemoryPolicy, trigger_tokens: int, num_pinned: int, recall_tokens: int = 0) -> None:
    """Check that each compaction makes room for the next tokens, however long the conversation gets.

    Args:
        trigger_tokens: the trigger, without the room for recalled pages.
        num_pinned: tokens at the start that no compaction covers.
        recall_tokens: that room, for the error.

    Raises:
        InvalidPolicy: at some point there would be nothing to compact.
        BudgetTooSmall: a compaction would leave a head fewer than `min_slots`.
    """
    block = min_block_tokens(policy, trigger_tokens, num_pinned)
    if block < 1:
        raise InvalidPolicy(
            f"trigger_tokens {trigger_tokens + recall_tokens} leaves nothing to compact: {num_pinned} tokens are "
            f"pinned, {policy.keep_recent} are kept as recent, {recall_tokens} are kept free for recall and up to "
            f"{max_compact_tokens(policy, trigger_tokens)} are compact; raise trigger_tokens, or lower keep_recent, "
            "pinned, recall_tokens or max_compact_tokens"
        )
    _check_floor(policy, block)
    if policy.ahead_tokens:
        _check_ahead(policy, trigger_tokens, num_pinned, recall_tokens)
    bound, min_slots = max_compact_tokens(policy, trigger_tokens), policy.experiments.min_slots
    if bound < min_slots:
        raise BudgetTooSmall(
            f"max_compact_tokens {bound} leaves {bound} slots per head; at least {min_slots} are needed: raise "
            f"max_compact_tokens to {min_slots}, or lower experiments.min_slots"
        )


def max_compact_tokens(policy: MemoryPolicy, trigger_tokens: int) -> int:
    """The bound on all segments together, in slots per head (mean)."""
    if policy.max_compact_tokens is not None:
        return policy.max_compact_tokens
    return max(int(trigger_tokens * policy.compact_fraction / 2), 1)


def min_block_tokens(policy: MemoryPolicy, trigger_tokens: int, num_pinned: int, ahead_tokens: int = 0) -> int:
    """The fewest exact tokens that a compaction covers, which is when the segments are at their bound.

    Args:
        ahead_tokens: how far below the trigger the compaction begins.
    """
    compact, size = max_compact_tokens(policy, trigger_tokens), trigger_tokens - ahead_tokens
    # A compaction is due when one more token would not fit, so the cache may be almost a token smaller than that.
    covered = math.floor(policy.compact_fraction * (size - 1 - num_pinned)) + 1 - compact
    return min(covered, size - num_pinned - compact - policy.keep_recent)


def most_at_once(policy: MemoryPolicy, trigger_tokens: int, num_pinned: int) -> int:
    """The most tokens that one pass can read at any time: a compaction can always make room for them.

    A compaction that begins this far below the trigger covers at least as many tokens, and gives each head `min_slots`.
    """

    def is_too_much(num_tokens: int) -> bool:
        block = min_block_tokens(policy, trigger_tokens, num_pinned, policy.ahead_tokens + num_tokens)
        return block < max(num_tokens, _floor_tokens(policy))

    return max(bisect_left(range(trigger_tokens), True, key=is_too_much) - 1, 1)  # more tokens, smaller block


def _check_ahead(policy: MemoryPolicy, trigger_tokens: int, num_pinned: int, recall_tokens: int) -> None:
    ahead_tokens = policy.ahead_tokens
    block = min_block_tokens(policy, trigger_tokens, num_pinned, ahead_tokens)
    if ahead_tokens >= block:
        possible = next(
            ahead
            for ahead in range(min(ahead_tokens, trigger_tokens), -1, -1)
            if ahead < min_block_tokens(policy, trigger_tokens, num_pinned, ahead)
        )
        raise InvalidPolicy(
            f"ahead_tokens {ahead_tokens} must be below the {max(block, 0)} tokens that a compaction covers at least "
            f"if it begins that far below the trigger of {trigger_tokens + recall_tokens}, {recall_tokens} of which "
            f"are kept free for recall: lower it to {possible}, or recall_tokens, or raise trigger_tokens"
        )
    _check_floor(policy, block)


def _floor_tokens(policy: MemoryPolicy) -> int:
    """The smallest block in which each head gets `min_slots`."""
    return math.ceil(policy.experiments.min_slots / policy.keep_ratio)


def _check_floor(policy: MemoryPolicy, block_tokens: int) -> None:
    min_slots = policy.experiments.min_slots
    if block_tokens * policy.keep_ratio < min(min_slots, block_tokens):
        raise BudgetTooSmall(
            f"keep_ratio {policy.keep_ratio} of {block_tokens} tokens leaves {block_tokens * policy.keep_ratio:.1f} "
            f"slots per head; at least {min_slots} are needed: raise keep_ratio to "
            f"{min(min_slots, block_tokens) / block_tokens:.3f}, compact more tokens at once, or lower "
            "experiments.min_slots"
        )


def segment_ends(
    policy: MemoryPolicy,
    sizes: CacheSizes,
    fraction: float | None = None,
    boundary: Boundary = lambda earliest, latest: latest,
) -> list[int]:
    """Choose the block that the next compaction covers, and where each of its segments ends.

    Args:
        fraction: the part of the cache to compact, oldest first, without the pinned tokens. None: the policy's
            fraction; the recent tokens are then spared, and the block ends at a boundary of the text.
        boundary: returns where a block or a segment should end.

    Raises:
        CompactionFailed: there is no exact token to compact.
    """
    start, available = sizes.exact_start, sizes.num_tokens - sizes.exact_start
    if fraction is None:
        share, spared = policy.compact_fraction, policy.keep_recent
    else:
        share, spared = fraction, 0
    covered = math.ceil(share * (available + sizes.compact_slots) - sizes.compact_slots)
    end = start + min(covered, available - spared)
    if end <= start:
        raise CompactionFailed(
            f"nothing to compact: {max(available, 0)} exact tokens after {sizes.num_pinned} pinned ones, "
            f"{spared} of them recent, {sizes.compact_slots:.0f} compact slots; read more first, or raise the fraction"
        )
    if fraction is None:
        least = max(math.ceil((1 - BOUNDARY_SLACK) * (end - start)), _floor_tokens(policy))
        end = boundary(min(start + least, end), end)
    num_segments = _num_segments(policy, end - start)
    tokens = (end - start) / num_segments
    inner = (start + round(tokens * number) for number in range(1, num_segments))
    return [*(boundary(latest - int(BOUNDARY_SLACK * tokens), latest) for latest in inner), end]


def _num_segments(policy: MemoryPolicy, block_tokens: int) -> int:
    """How many segments a block becomes: one where a text about it, a gate or weights of messages concern all of it."""
    is_written_about = policy.experiments.summary_tokens is not None or "self_study" in (policy.reference_queries or ())
    is_refit, is_gated = policy.experiments.recompaction == "refit", policy.max_error is not None
    if is_written_about or is_refit or is_gated or policy.tool_result_weight < 1:
        return 1
    return max(min(math.ceil(block_tokens / LONGEST_SEGMENT), block_tokens // (2 * _floor_tokens(policy))), 1)


def plan_segment(policy: MemoryPolicy, sizes: CacheSizes, trigger_tokens: int, ends: Sequence[int]) -> Plan:
    """Plan the compaction of the oldest exact tokens to one segment.

    Args:
        trigger_tokens: the trigger without the room for recalled pages, in tokens.
        ends: of the segment, and of those that follow at once and for which room is left; see `segment_ends`.

    Raises:
        BudgetTooSmall: a head would get fewer than `min_slots`.
    """
    is_refit = policy.experiments.recompaction == "refit"
    start, end = sizes.num_pinned if is_refit else sizes.exact_start, ends[0]
    older = () if is_refit else sizes.segments
    _check_floor(policy, end - start)
    # A refit does not move keys: neither those of the segment, nor the pinned ones.
    shift = sizes.segments[0].shift if is_refit and sizes.segments else 0
    keep_ratio = 0.0 if policy.experiments.fit == "no_slots" else policy.keep_ratio
    newest, *later = (
        Segment(first, last, round(keep_ratio * (last - first) * sizes.num_heads), shift)
        for first, last in pairwise([start, *ends])
    )
    bound = max_compact_tokens(policy, trigger_tokens) * sizes.num_heads
    segments = shrink([*older, newest, *later], bound)[: len(older) + 1]
    floor = min(policy.experiments.min_slots * sizes.num_heads, newest.num_slots)
    if segments[-1].num_slots < floor:  # after a very long conversation an equal share is below min_slots
        segments = [*shrink(older, bound - floor), resized(newest, floor)]
    return Plan(tuple(shift_into_window(segments, sizes, trigger_tokens)), is_refit)


def plan_block(policy: MemoryPolicy, sizes: CacheSizes, trigger_tokens: int, ends: Sequence[int]) -> list[Plan]:
    """Plan the compaction of a block, a plan for each of its segments; see `plan_segment`."""
    plans: list[Plan] = []
    for number in range(len(ends)):
        plans.append(plan_segment(policy, sizes, trigger_tokens, ends[number:]))
        sizes = replace(sizes, segments=plans[-1].segments)
    return plans


def shift_into_window(segments: Sequence[Segment], sizes: CacheSizes, trigger_tokens: int) -> list[Segment]:
    """Shift segments that would leave the context window before the next compaction; they land half a window back.

    A segment moves as a whole, so that several old ones may share positions. Pinned tokens move with the oldest one.

    Args:
        segments: after the compaction, the new one last; the new one is never moved.
        trigger_tokens: the trigger without the room for recalled pages, in tokens.
    """
    window, newest = sizes.window_tokens, segments[-1]
    if window is None:
        return list(segments)
    num_slots = sum(segment.num_slots for segment in segments) / sizes.num_heads
    num_exact = sizes.num_pinned + sizes.num_tokens - newest.end
    next_tokens = sizes.num_tokens + trigger_tokens + sizes.recall_tokens - num_exact - num_slots

    def moved(segment: Segment, first: int) -> Segment:
        if next_tokens - first - segment.shift <= window:
            return segment
        shift = min(sizes.num_tokens - window // 2 - segment.start, newest.start - segment.end)
        return replace(segment, shift=max(shift, segment.shift))

    firsts = [0, *(segment.start for segment in segments[1:])]
    return [*map(moved, segments[:-1], firsts), newest]


def with_more_slots(policy: MemoryPolicy, trigger_tokens: int, num_heads: int, plan: Plan) -> Plan | None:
    """The plan with twice the slots for its newest segment, as far as the bound allows; None if it allows no more."""
    newest, older = plan.newest, plan.segments[:-1]
    room = max_compact_tokens(policy, trigger_tokens) * num_heads - sum(segment.num_slots for segment in older)
    num_slots = min(2 * newest.num_slots, newest.num_tokens * num_heads, room)
    if num_slots <= newest.num_slots:
        return None
    return replace(plan, segments=(*older, replace(newest, num_slots=num_slots)))


def shrink(segments: Sequence[Segment], max_slots: int) -> list[Segment]:
    """Cut the segments with the most slots per token down to one level, so that all fit into `max_slots`."""
    if sum(segment.num_slots for segment in segments) <= max_slots:
        return list(segments)
    poorest_first = sorted(segments, key=lambda segment: segment.num_slots / segment.num_tokens)
    slots_left, tokens_left = max_slots, sum(segment.num_tokens for segment in segments)
    level = 0.0
    for segment in poorest_first:
        level = slots_left / tokens_left
        if segment.num_slots > level * segment.num_tokens:
            break
        slots_left -= segment.num_slots
        tokens_left -= segment.num_tokens
    return [resized(segment, int(level * segment.num_tokens)) for segment in segments]
