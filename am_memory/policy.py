"""When to compact, what, and to how many slots. Pure: sizes in, a plan out; touches no tensor and no model."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from am_memory.errors import BudgetTooSmall, CompactionFailed, InvalidInput, InvalidPolicy, problems
from am_memory.kv_cache.slots import Segment, resized
from am_memory.solver import HighestAttention, KeySelection, as_selection, parameters

if TYPE_CHECKING:
    import torch

SINK_TOKENS = 4
"""The first tokens of a text, on which models rest the attention that they need nowhere else."""
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 2048
"""Tokens in one forward pass; fewer do not fill a GPU. A policy does not say them, so that it is one on all devices."""
BOUNDARY_SLACK = 0.25
"""How much of a block may be left for the next one, so that it ends where the text has a boundary."""

Boundary = Callable[[int, int], int]
"""Where, from one position to another, both included, a block should end."""


class MemoryPolicy(BaseModel):
    """What a memory does when a context grows; frozen, typed, serialisable.

    Attributes:
        trigger_tokens: physical size (exact tokens + mean compact slots per head) that fires a compaction; a float is
            a fraction of the model's window.
        compact_fraction: how much of the cache, oldest first, a compaction covers.
        keep_ratio: slots kept for each compacted token, mean over heads.
        max_compact_tokens: bound on the mean slots per head of all segments together; older segments shrink to fit,
            to equal shares for each of their tokens. None: half of what a compaction covers.
        pinned: what stays exact for ever, at the start of the context: the first 4 tokens ("sinks"), the system
            prompt ("system"; the sinks where there is none), that and the first message ("first_message"), or a
            number of tokens.
        keep_recent: the last tokens, which no trigger compacts.
        reference_queries: the sample that a compaction is fitted on, any of "repeat" (one extra pass over the block),
            "self_study" (the model answers prompts about what it was told: a pass for each token of the longest answer)
            and "live" (queries that passed since, turned to later positions; free).
        self_study_tokens: how long these answers may be, all together.
        on_policy: each layer's slots are fitted to queries that come through the layers below as compacted. The block
            is repeated in one pass, however long, and layers are compacted as it goes through them; no layer is run
            twice, but where the budget is not uniform: it needs the scores of all layers, from a pass of their own.
            With reference_queries ("repeat",) alone; not with `max_error` or llama.cpp.
        tool_result_weight: how much it counts that a tool's result can be repeated, beside what people and the model
            say; 1 is as much. Slots and fits follow it.
        key_selection: "highest_attention", "omp", "omp_fast", or any `KeySelection`. It is written, and told from
            others, by its name and its fields (`am_memory.solver.parameters`).
        head_budget: "adaptive" (slots go where the scores are, over all layers and heads), "uniform", "calibrated"
            (scores are weighed by what a measurement on the model says that slots save, for models that one ships for)
            or the path of such a measurement, a .json file of `am-memory calibrate`; or "auto": calibrated where one
            ships, else adaptive where heads can differ in their slots, else as many for all heads as there are cells.
        recompaction: "segments" (each token is compacted once, from its exact entry) or "refit" (the oldest half as it
            is, compact entries too, again and again: arXiv:2602.16284, online AIME).
        originals: the exact entries of compacted tokens: "drop", or kept off the device, in "host" memory or on
            "disk", so that `Session.recall` can bring them back.
        segment_dtype: what keys and values of compact segments are kept in: "model", its own dtype, or "int8", with a
            scale for each channel of each segment and head, and decoded whenever they are attended to. Biases, and
            pinned and recalled entries, keep the model's; reported errors are those before rounding.
        max_error: the gate: an eighth of the reference queries is held out of the fits, and while the relative error of
            the attention output on them is above this, a new segment gets twice the slots, as far as
            `max_compact_tokens` leaves room. Where it does not, the compaction is made all the same, since the
            conversation could not go on, and `GateMissed` says so. It holds at birth: later, segments shrink. None: no
            gate, and nothing held out.
        summary_tokens: before a compaction the model sums up the block, in so many tokens at most, a forward pass for
            each. The summary takes the block's place and is what is compacted, to the slots that the block would get;
            where it is no longer than these, it stays whole, and where the model writes nothing, the block is compacted
            as ever (`CompactionReport.summary_tokens` says 0). What it leaves out is lost, unless there are
            `originals`: recall brings back the block. Not with recompaction "refit" or `max_error`. None: no summary.
        ahead_tokens: a compaction is begun when the physical size is so many tokens below the trigger, in a thread and,
            on a GPU, a stream of its own. Reading and decoding go on with the cache as it is; it is swapped in where
            they reach the trigger, and wait for it if they must: what comes out depends on the tokens alone, not on the
            clock. To be less than the smallest block that is compacted so. Takes the memory of one more exact tail; not
            on llama.cpp, nor where a RoPE changes with the length of the text. 0: decoding stands still meanwhile.
        min_slots: slots that every head gets of a new segment before any head gets more.
        fit: what is fitted beside the choice of keys; all but "bias_and_values" is for ablations.
        ridge: pull of the fitted values toward the originals, as a fraction of the mean diagonal. With 0.5 what follows
            is nearer to the full cache where a long text only goes on, and less is recalled of what is asked for.
        chunk_tokens: tokens read in one forward pass; None: what suits the device, 512 on a CPU and 2,048 on a GPU.

    Raises:
        InvalidPolicy: a value out of its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    trigger_tokens: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)] = 8192
    compact_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    keep_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_compact_tokens: Annotated[int, Field(gt=0)] | None = None
    pinned: Literal["sinks", "system", "first_message"] | Annotated[int, Field(ge=0)] = "system"
    keep_recent: Annotated[int, Field(ge=0)] = 64
    reference_queries: Annotated[tuple[Literal["repeat", "self_study", "live"], ...], Field(min_length=1)] = ("repeat",)
    self_study_tokens: Annotated[int, Field(gt=0)] = 512
    on_policy: bool = False
    tool_result_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    key_selection: Any = HighestAttention()
    head_budget: Literal["auto", "adaptive", "uniform", "calibrated"] | Annotated[str, Field(pattern=r"\.json$")] = (
        "auto"
    )
    recompaction: Literal["segments", "refit"] = "segments"
    originals: Literal["drop", "host", "disk"] = "drop"
    segment_dtype: Literal["model", "int8"] = "model"
    max_error: Annotated[float, Field(gt=0)] | None = None
    summary_tokens: Annotated[int, Field(gt=0)] | None = None
    ahead_tokens: Annotated[int, Field(ge=0)] = 0
    min_slots: Annotated[int, Field(gt=0)] = 1
    fit: Literal["bias_and_values", "bias", "values", "nothing"] = "bias_and_values"
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    chunk_tokens: Annotated[int, Field(gt=0)] | None = None

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidPolicy(problems(error.errors(), type(self).model_fields)) from error

    def with_changes(self, **changes: Any) -> MemoryPolicy:
        """The policy with some fields changed and checked; what was never set stays unset.

        Raises:
            InvalidPolicy: a value out of its range.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def chunk_tokens_on(self, device: torch.device) -> int:
        """Tokens read in one forward pass: what the policy says, or what suits the device."""
        return self.chunk_tokens or (CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS)

    @property
    def num_sinks(self) -> int:
        """Tokens that stay exact whatever the conversation; a system prompt or first message may pin more."""
        return self.pinned if isinstance(self.pinned, int) else SINK_TOKENS

    @field_validator("head_budget", mode="before")
    @classmethod
    def _path_as_text(cls, budget: object) -> object:
        return os.fspath(budget) if isinstance(budget, os.PathLike) else budget

    @field_validator("on_policy")
    @classmethod
    def _repeat_alone(cls, on_policy: bool, info: ValidationInfo) -> bool:
        if on_policy and info.data.get("reference_queries", ("repeat",)) != ("repeat",):
            raise ValueError('takes its queries from the repeat pass alone: set reference_queries to ("repeat",)')
        return on_policy

    @field_validator("max_error")
    @classmethod
    def _gate_off_policy(cls, max_error: float | None, info: ValidationInfo) -> float | None:
        if max_error is not None and info.data.get("on_policy"):
            raise ValueError("would fit layers twice that on_policy fits once: leave one of them out")
        return max_error

    @field_validator("key_selection")
    @classmethod
    def _named_selection(cls, selection: object) -> object:
        try:
            return as_selection(selection)
        except InvalidInput as error:
            raise ValueError(str(error)) from error

    @field_validator("summary_tokens")
    @classmethod
    def _summary_alone(cls, num_tokens: int | None, info: ValidationInfo) -> int | None:
        if num_tokens is not None and info.data.get("recompaction") == "refit":
            raise ValueError("recompaction 'refit' would sum up summaries: leave it at 'segments'")
        if num_tokens is not None and info.data.get("max_error") is not None:
            raise ValueError(
                "max_error would be held against the summary, not what was said: leave one of them at None"
            )
        return num_tokens

    @field_serializer("key_selection")
    def _selection_parameters(self, selection: KeySelection) -> str | dict[str, object]:
        return parameters(selection)


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on.

    Attributes:
        num_tokens: logical tokens in the cache.
        num_pinned: tokens at the start that stay exact.
        num_tail_tokens: exact tokens behind the segments, the pinned ones among them before the first compaction.
        segments: as they are.
        num_heads: KV heads of all compactable layers.
        reach_tokens: how far behind a token what it looks at may stand; None: what is compact cannot be moved.
    """

    num_tokens: int
    num_pinned: int
    num_tail_tokens: int
    segments: tuple[Segment, ...]
    num_heads: int
    reach_tokens: int | None = None

    @property
    def exact_start(self) -> int:
        """The first exact token that may be compacted."""
        return max(self.num_tokens - self.num_tail_tokens, self.num_pinned)

    @property
    def compact_slots(self) -> float:
        """Mean over heads."""
        return sum(segment.num_slots for segment in self.segments) / max(self.num_heads, 1)


@dataclass(frozen=True)
class Plan:
    """One compaction: `segments` afterwards, the new one last; with `is_refit` it stands for all before it as well."""

    segments: tuple[Segment, ...]
    is_refit: bool = False

    @property
    def newest(self) -> Segment:
        return self.segments[-1]


def trigger_tokens(policy: MemoryPolicy, window_tokens: int, num_pinned: int) -> int:
    """The physical size that fires, in tokens.

    Raises:
        InvalidPolicy: this policy cannot go on for ever with this model and these pinned tokens.
        BudgetTooSmall: its compactions would leave a head fewer than `min_slots`.
    """
    trigger = policy.trigger_tokens
    tokens = trigger if isinstance(trigger, int) else int(trigger * window_tokens)
    if tokens > window_tokens:
        raise InvalidPolicy(
            f"trigger_tokens {tokens} is above the model's window of {window_tokens}: set it to {window_tokens} or less"
        )
    block = min_block_tokens(policy, tokens, num_pinned)
    if block < 1:
        raise InvalidPolicy(
            f"trigger_tokens {tokens} leaves nothing to compact: {num_pinned} tokens are pinned, {policy.keep_recent} "
            f"are kept as recent and up to {max_compact_tokens(policy, tokens)} are compact; raise trigger_tokens, or "
            "lower keep_recent, pinned or max_compact_tokens"
        )
    _check_floor(policy, block)
    if policy.ahead_tokens:
        _check_ahead(policy, tokens, num_pinned)
    bound = max_compact_tokens(policy, tokens)
    if bound < policy.min_slots:
        raise BudgetTooSmall(
            f"max_compact_tokens {bound} leaves {bound} slots per head; at least {policy.min_slots} are needed: raise "
            f"max_compact_tokens to {policy.min_slots}, or lower min_slots"
        )
    return tokens


def max_compact_tokens(policy: MemoryPolicy, trigger: int) -> int:
    """The bound on all segments together, in mean slots per head."""
    if policy.max_compact_tokens is not None:
        return policy.max_compact_tokens
    return max(int(trigger * policy.compact_fraction / 2), 1)


def min_block_tokens(policy: MemoryPolicy, trigger: int, num_pinned: int, ahead_tokens: int = 0) -> int:
    """Exact tokens that a compaction covers at least, begun so far below the trigger with segments at their bound."""
    compact, size = max_compact_tokens(policy, trigger), trigger - ahead_tokens
    # It is due when there is no room for one more token, so that the cache may be almost a token below that size.
    covered = math.floor(policy.compact_fraction * (size - 1 - num_pinned)) + 1 - compact
    return min(covered, size - num_pinned - compact - policy.keep_recent)


def most_at_once(policy: MemoryPolicy, trigger: int, num_pinned: int) -> int:
    """The most tokens that can be read in one pass wherever the cache stands: a compaction that is begun so far below
    the trigger covers no fewer, and leaves no head without its floor of slots."""

    def is_too_much(num_tokens: int) -> bool:
        block = min_block_tokens(policy, trigger, num_pinned, policy.ahead_tokens + num_tokens)
        return block < max(num_tokens, _floor_tokens(policy))

    return max(bisect_left(range(trigger), True, key=is_too_much) - 1, 1)  # the more tokens, the smaller the block


def _check_ahead(policy: MemoryPolicy, trigger: int, num_pinned: int) -> None:
    ahead_tokens = policy.ahead_tokens
    block = min_block_tokens(policy, trigger, num_pinned, ahead_tokens)
    if ahead_tokens >= block:
        less = range(min(ahead_tokens, trigger), -1, -1)
        possible = next(each for each in less if each < min_block_tokens(policy, trigger, num_pinned, each))
        raise InvalidPolicy(
            f"ahead_tokens {ahead_tokens} is not below the {max(block, 0)} tokens that a compaction covers at least if "
            f"it is begun so far below the trigger of {trigger}: lower it to {possible}, or raise trigger_tokens"
        )
    _check_floor(policy, block)


def _floor_tokens(policy: MemoryPolicy) -> int:
    """The smallest block in which each head gets its floor of slots."""
    return math.ceil(policy.min_slots / policy.keep_ratio)


def _check_floor(policy: MemoryPolicy, block_tokens: int) -> None:
    if block_tokens * policy.keep_ratio < min(policy.min_slots, block_tokens):
        raise BudgetTooSmall(
            f"keep_ratio {policy.keep_ratio} of {block_tokens} tokens leaves {block_tokens * policy.keep_ratio:.1f} "
            f"slots per head; at least {policy.min_slots} are needed: raise keep_ratio to "
            f"{min(policy.min_slots, block_tokens) / block_tokens:.3f}, compact more tokens at once, or lower min_slots"
        )


def plan(
    policy: MemoryPolicy,
    sizes: Sizes,
    trigger: int,
    fraction: float | None = None,
    boundary: Boundary = lambda earliest, latest: latest,
) -> Plan:
    """What a compaction does now.

    Args:
        fraction: of the cache without its pinned tokens, oldest first; None: the policy's, sparing the recent tokens
            and ending where the text has a boundary.
        boundary: where among the positions from one to another, both included, the block should end.

    Raises:
        CompactionFailed: there is no exact token to compact.
        BudgetTooSmall: a head would get fewer than `min_slots`.
    """
    available = sizes.num_tokens - sizes.exact_start
    if fraction is None:
        share, spared = policy.compact_fraction, policy.keep_recent
    else:
        share, spared = fraction, 0
    covered = math.ceil(share * (available + sizes.compact_slots) - sizes.compact_slots)
    end = sizes.exact_start + min(covered, available - spared)
    if end <= sizes.exact_start:
        raise CompactionFailed(
            f"nothing to compact: {max(available, 0)} exact tokens after {sizes.num_pinned} pinned ones, "
            f"{spared} of them recent, {sizes.compact_slots:.0f} compact slots; read more first, or raise the fraction"
        )
    is_refit = policy.recompaction == "refit"
    start = sizes.num_pinned if is_refit else sizes.exact_start
    if fraction is None:
        least = max(math.ceil((1 - BOUNDARY_SLACK) * (end - sizes.exact_start)), _floor_tokens(policy))
        end = boundary(min(sizes.exact_start + least, end), end)
    older = () if is_refit else sizes.segments
    _check_floor(policy, end - start)
    # What is refit stays where it stands, moved up before or not, and so do the pinned tokens.
    shift = sizes.segments[0].shift if is_refit and sizes.segments else 0
    newest = Segment(start, end, round(policy.keep_ratio * (end - start) * sizes.num_heads), shift)
    bound = max_compact_tokens(policy, trigger) * sizes.num_heads
    segments = shrink([*older, newest], bound)
    floor = min(policy.min_slots * sizes.num_heads, newest.num_slots)
    if segments[-1].num_slots < floor:  # so long a conversation that an equal share is too little to begin with
        segments = [*shrink(older, bound - floor), resized(newest, floor)]
    return Plan(tuple(within_reach(segments, sizes, trigger)), is_refit)


def within_reach(segments: Sequence[Segment], sizes: Sizes, trigger: int) -> list[Segment]:
    """Those moved up to half the reach that would else get out of it before the next compaction.

    A segment moves as it is, so that old ones come to stand at the same positions; pinned tokens go with the oldest.

    Args:
        segments: after a compaction, the new one last, which stays.
    """
    reach, newest = sizes.reach_tokens, segments[-1]
    if reach is None:
        return list(segments)
    num_slots = sum(segment.num_slots for segment in segments) / sizes.num_heads
    num_exact = sizes.num_pinned + sizes.num_tokens - newest.end
    next_tokens = sizes.num_tokens + trigger - num_exact - num_slots

    def moved(segment: Segment, first: int) -> Segment:
        if next_tokens - first - segment.shift <= reach:
            return segment
        shift = min(sizes.num_tokens - reach // 2 - segment.start, newest.start - segment.end)
        return replace(segment, shift=max(shift, segment.shift))

    firsts = [0, *(segment.start for segment in segments[1:])]
    return [*map(moved, segments[:-1], firsts), newest]


def richer(policy: MemoryPolicy, trigger: int, num_heads: int, plan: Plan) -> Plan | None:
    """The same plan with twice the slots for its newest segment, or what the bound leaves; None where that is none."""
    newest, older = plan.newest, plan.segments[:-1]
    room = max_compact_tokens(policy, trigger) * num_heads - sum(segment.num_slots for segment in older)
    num_slots = min(2 * newest.num_slots, newest.num_tokens * num_heads, room)
    if num_slots <= newest.num_slots:
        return None
    return replace(plan, segments=(*older, replace(newest, num_slots=num_slots)))


def shrink(segments: Sequence[Segment], max_slots: int) -> list[Segment]:
    """Cut the richest segments, by slots for each token, to one level, so that all fit into `max_slots`."""
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
