"""One compaction: from a block of exact entries and reference queries to a new segment of slots.

    scores of every key  ->  a ranking of slots over all heads  ->  keys, bias and values of each head  ->  slots

Makes slots and touches nothing: whoever asked swaps them in. Knows no engine, and not when to compact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from am_memory.budgets import Calibration, adaptive_ranks, calibrated_ranks, shared_ranks, uniform_ranks
from am_memory.compaction.plan import Plan
from am_memory.engines.base import SessionCache, SessionLayer
from am_memory.errors import CompactionFailed, InvalidInput
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.policy import MemoryPolicy
from am_memory.queries import Progress, ReferenceQueries
from am_memory.solver import MAX_FOLD_ERROR, Block, ExactAttention, Fit, exact_attention, fit, output_error

# What makes a batch of heads: each has at least this share of the slots of the richest, or some slots less than it...
LEAST_FILL, FREE_PADDING = 0.85, 8
# ...and their reference queries, copied into one tensor, do not take too much.
MAX_GROUP_HEADS = 32
# Where there is a gate, every so many queries one is held out of the fits. Keys are chosen by all of them.
HELD_OUT_INTERVAL = 8
# Pull of the biases toward none: reference queries that look alike leave some of them undecided.
BIAS_RIDGE = 1e-2

MoreSlots = Callable[[Plan], Plan | None]
"""The same plan with more slots for its newest segment, or None where there are no more."""


@dataclass(frozen=True)
class Compaction:
    """A finished compaction, not yet swapped in.

    Attributes:
        plan: what was made; its newest segment may have more slots than was planned.
        slots: of the newest segment, in each compactable layer; `SessionCache.compacted` takes plan and slots.
        mass_error, output_error: root mean square over all heads of the fit's errors on the reference queries.
        held_out_error: the output error on queries that were held out of the fits; None where none were.
        num_unbiased_heads: KV heads that do without biases, as theirs cannot be folded into their keys.
        score_seconds, fit_seconds: wall time.
    """

    plan: Plan
    slots: list[Slots]
    mass_error: float
    output_error: float
    held_out_error: float | None
    num_unbiased_heads: int
    score_seconds: float
    fit_seconds: float

    @classmethod
    def of(
        cls, plan: Plan, fitted: Fitted, policy: MemoryPolicy, score_seconds: float, fit_seconds: float
    ) -> Compaction:
        """With the slots of all heads, and the errors of their fits."""
        fold_errors = [group.fold_error for group in fitted.fits if group.fold_error is not None]
        return cls(
            plan=plan,
            slots=fitted.by_layer(policy),
            mass_error=_rms([group.mass_error for group in fitted.fits]),
            output_error=_rms([group.output_error for group in fitted.fits]),
            held_out_error=fitted.held_out_error,
            num_unbiased_heads=sum(int((error > MAX_FOLD_ERROR).sum()) for error in fold_errors),
            score_seconds=score_seconds,
            fit_seconds=fit_seconds,
        )


def no_more_slots(plan: Plan) -> None:
    """A `MoreSlots` that never has any."""


def compact(
    cache: SessionCache,
    plan: Plan,
    queries: Sequence[ReferenceQueries],
    policy: MemoryPolicy,
    progress: Progress,
    more_slots: MoreSlots,
    calibration: Calibration | None = None,
) -> Compaction:
    """Make the slots that are to replace the plan's newest segment's entries (arXiv:2602.16284, sections 3 and 4).

    Args:
        cache: holds these entries; only looked at.
        queries: of each compactable layer.
        progress: told of the stages "score", counted in layers, and "fit", counted in KV heads.
        more_slots: the plan to try next while the held-out error is above the policy's `max_error`.
        calibration: of the model, where the policy's `head_budget` asks for one.

    Raises:
        CompactionFailed: out of memory, or a result that is not finite.
    """
    started = time.perf_counter()
    segment, layers = plan.newest, cache.compactable
    with failures(segment):
        entries = [Entries.of(layer, segment) for layer in layers]
        blocks = [held.block(layer, sample) for layer, held, sample in zip(layers, entries, queries, strict=True)]
        exacts = []
        for index, block in enumerate(blocks):
            exacts.append(exact_attention(block))
            progress("score", index + 1, len(blocks))
        scores = [exact.scores for exact in exacts]
        ranks = slot_ranks(scores, policy, calibration, is_shared=not cache.has_ragged_heads)
        scored = time.perf_counter()

        each_layer = zip(layers, blocks, exacts, entries, ranks, strict=True)
        heads = [head for index, of_layer in enumerate(each_layer) for head in heads_of(index, *of_layer)]
        fitted = fit_all(heads, plan, policy, progress)
        while not fitted.passes(policy.max_error) and (more := more_slots(plan)) is not None:
            plan = more
            fitted = fit_all(heads, plan, policy, progress)
        return Compaction.of(plan, fitted, policy, scored - started, time.perf_counter() - scored)


@dataclass(frozen=True)
class Entries:
    """What a layer holds for a segment's tokens: exact entries, and slots too where they are compacted again.

    Attributes:
        key, value: (num_key_value_heads, seq_len, head_dim).
        bias: (num_key_value_heads, seq_len), -inf where a head has no such entry; None where all are exact.
        positions: (num_key_value_heads, seq_len) int32, logical, in host memory.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    positions: Tensor

    @classmethod
    def of(cls, layer: SessionLayer, segment: Segment) -> Entries:
        """All entries of the segment's tokens, slots before exact ones."""
        key, value = layer.exact_entries(max(segment.start, layer.start), segment.end)
        positions = torch.arange(max(segment.start, layer.start), segment.end, dtype=torch.int32)
        exact = cls(key, value, None, positions.expand(key.shape[0], -1))
        return exact if segment.start >= layer.start else exact._after(layer.slots, segment)

    def block(self, layer: SessionLayer, queries: ReferenceQueries) -> Block:
        """What the solver takes, of all heads of the layer."""
        return Block(queries.query, self.key, self.value, float(layer.scaling or 0), queries.log_mass, self.bias)

    def _after(self, slots: Slots | None, segment: Segment) -> Entries:
        """These entries with a segment's slots before them, padded to the head that has the most."""
        assert slots is not None
        heads = [slots.head(head).within(segment.start, segment.end) for head in range(slots.num_heads)]

        def pad(pieces: list[Tensor], fill: float) -> Tensor:
            padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=fill)
            return padded.to(pieces[0].dtype)

        return Entries(
            torch.cat([pad([decoded(head.key) for head in heads], 0), self.key], dim=1),
            torch.cat([pad([decoded(head.value) for head in heads], 0), self.value], dim=1),
            torch.cat([pad([head.bias for head in heads], -torch.inf), self.key.new_zeros(self.key.shape[:2])], dim=1),
            torch.cat([pad([head.positions for head in heads], 0), self.positions], dim=1),
        )


def slot_ranks(
    scores: Sequence[Tensor], policy: MemoryPolicy, calibration: Calibration | None = None, *, is_shared: bool = False
) -> tuple[Tensor, ...]:
    """When each head gets its k-th slot, ranked over the heads of all layers.

    Args:
        scores: of each layer, (num_key_value_heads, seq_len).
        is_shared: a slot is one of every head.

    Returns:
        Of each layer, (num_key_value_heads, seq_len) int64 in host memory; entry [h, k] is the rank of the k-th slot
        of head h.
    """
    longest = max(layer_scores.shape[1] for layer_scores in scores)
    together = torch.cat([torch.nn.functional.pad(each, (0, longest - each.shape[1])) for each in scores])
    match policy.head_budget:
        case _ if is_shared:
            ranks = shared_ranks(together)
        case "uniform":
            ranks = uniform_ranks(together, policy.experiments.min_slots)
        case _ if calibration is not None:
            ranks = calibrated_ranks(calibration, together, policy.experiments.min_slots)
        case _:
            ranks = adaptive_ranks(together, policy.experiments.min_slots)
    split = torch.split(ranks.cpu(), [each.shape[0] for each in scores])
    return tuple(layer_ranks[:, : each.shape[1]] for layer_ranks, each in zip(split, scores, strict=True))


@dataclass(frozen=True, eq=False)
class Head:
    """One KV head's part in a compaction.

    Attributes:
        layer: index among the compactable ones.
        block, exact: of this head alone.
        positions: (seq_len,) int32 in host memory, logical, of the block's keys.
        ranks: (seq_len,) int64 in host memory, of its first slot, second slot...
        rotations: of its layer, where biases are to be folded into the keys.
    """

    layer: int
    block: Block
    exact: ExactAttention
    positions: Tensor
    ranks: Tensor
    rotations: Tensor | None = None


def heads_of(
    index: int, layer: SessionLayer, block: Block, exact: ExactAttention, held: Entries, ranks: Tensor
) -> list[Head]:
    """The heads of one layer; `ranks` are the layer's, as `slot_ranks` gives them."""
    return [
        Head(index, block.head(head), exact.head(head), held.positions[head], ranks[head], layer.rotations)
        for head in range(block.num_heads)
    ]


@dataclass(frozen=True)
class Fitted:
    """Heads of a compaction, fitted.

    Attributes:
        fits: of each batch of heads.
        slots: of each head, in the order of the heads.
        held_out_error: RMS over heads of the output error on queries that were held out; None where none were.
    """

    fits: list[Fit]
    slots: dict[Head, Slots]
    held_out_error: float | None

    def by_layer(self, policy: MemoryPolicy) -> list[Slots]:
        """The slots of each layer, in the dtype in which the policy keeps segments."""
        return [
            Slots.stack([slots.quantised() if policy.segment_dtype == "int8" else slots for _, slots in of_layer])
            for _, of_layer in groupby(self.slots.items(), key=lambda item: item[0].layer)
        ]

    def passes(self, max_error: float | None) -> bool:
        """Whether the gate lets it through."""
        return max_error is None or self.held_out_error is None or self.held_out_error <= max_error


def fit_all(heads: Sequence[Head], plan: Plan, policy: MemoryPolicy, progress: Progress) -> Fitted:
    """Fit the slots that the plan gives its newest segment, in batches of heads of like size."""
    fits: list[Fit] = []
    slots: dict[Head, Slots] = {}
    held_out: list[Tensor] = []
    for group in groups_of_like_size(heads, plan.newest.num_slots):
        group_fit, group_slots, error = fit_heads(group, plan.newest, policy)
        fits.append(group_fit)
        slots.update(zip(group, group_slots, strict=True))
        held_out += [] if error is None else [error]
        progress("fit", len(slots), len(heads))
    return Fitted(fits, {head: slots[head] for head in heads}, _rms(held_out) if held_out else None)


def groups_of_like_size(heads: Sequence[Head], num_slots: int) -> Iterator[tuple[Head, ...]]:
    """Heads of any layer that are fitted as one batch: their blocks have one shape, and little of it is padding.

    Args:
        heads: all.
        num_slots: what they share.
    """
    counts = torch.stack([(head.ranks < num_slots).sum() for head in heads]).tolist()

    def shape(head: Head) -> tuple[object, ...]:
        return (head.block.seq_len, head.block.num_queries, head.block.head_dim, head.block.scaling)

    remaining = sorted(zip(heads, counts, strict=True), key=lambda pair: (shape(pair[0]), -pair[1]))
    while remaining:
        (first, largest), size = remaining[0], 0
        for head, count in remaining[:MAX_GROUP_HEADS]:
            if shape(head) != shape(first) or count < LEAST_FILL * largest - FREE_PADDING:
                break
            size += 1
        yield tuple(head for head, _ in remaining[:size])
        remaining = remaining[size:]


def fit_heads(group: Sequence[Head], segment: Segment, policy: MemoryPolicy) -> tuple[Fit, list[Slots], Tensor | None]:
    """Choose and fit the slots of some heads, as one batch.

    Returns:
        The fit; each head's slots in the model's dtype, in the order of the tokens; and the output error of each head
        on queries that were held out of the fit, (number of heads,) float32, or None where none were.
    """
    block, exact = Block.stack([head.block for head in group]), ExactAttention.stack([head.exact for head in group])
    ranks = torch.stack([head.ranks for head in group])
    rotations = [head.rotations for head in group if head.rotations is not None]
    num_slots = (ranks < segment.num_slots).sum(dim=1).to(block.key.device).minimum(block.num_keys)
    indices = policy.key_selection(block, exact.scores, num_slots)
    every = torch.arange(block.num_queries, device=block.key.device)
    is_gated = policy.max_error is not None and block.num_queries >= HELD_OUT_INTERVAL
    is_held_out = (every % HELD_OUT_INTERVAL == HELD_OUT_INTERVAL - 1) & is_gated
    group_fit = fit(
        block.queries(every[~is_held_out]) if is_gated else block,
        indices,
        num_slots,
        bias_ridge=BIAS_RIDGE,
        ridge=policy.ridge,
        fit_bias=policy.experiments.fit in ("bias_and_values", "bias"),
        fit_values=policy.experiments.fit in ("bias_and_values", "values"),
        rotations=torch.stack(rotations) if rotations else None,
        relative_mass=False,
        exact=exact.queries(every[~is_held_out]) if is_gated else exact,
    )
    held_out_error = None
    if is_gated:
        held_out = every[is_held_out]
        held_out_error = output_error(block.queries(held_out), group_fit, exact.queries(held_out))
    dtype = block.key.dtype
    key, value, bias = (of.to(dtype) for of in (group_fit.key, group_fit.value, group_fit.bias))
    is_finite = key.isfinite().all() & value.isfinite().all() & (bias < torch.inf).all()
    if not is_finite:
        raise CompactionFailed(
            f"the fit of tokens {segment.start} to {segment.end} is not finite in {dtype}; nothing was changed: load "
            "the model in bfloat16 or float32, or raise policy.ridge"
        )
    slots, indices = [], indices.cpu()
    for index, (head, count) in enumerate(zip(group, num_slots.tolist(), strict=True)):
        by_position = indices[index, :count].argsort()
        where = index, by_position.to(key.device)
        slots.append(
            Slots(
                key=key[where],
                value=value[where],
                bias=bias[where],
                positions=head.positions[indices[index, by_position]],
                ranks=head.ranks[by_position].int(),
                cu_slots=(0, count),
            )
        )
    return group_fit, slots, held_out_error


@contextmanager
def failures(segment: Segment) -> Iterator[None]:
    """What can go wrong in a compaction, as an error of ours: out of memory on any device, keys that are not finite."""
    try:
        yield
    except InvalidInput as error:
        raise CompactionFailed(
            f"tokens {segment.start} to {segment.end} cannot be compacted: {error}; nothing was changed"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise CompactionFailed(
            f"out of memory while compacting {segment.num_tokens} tokens; nothing was changed: lower trigger_tokens or "
            "compact_fraction, so that fewer are compacted at once"
        ) from error


def _rms(errors: Sequence[Tensor]) -> float:
    return float(torch.cat(list(errors)).square().mean().sqrt())
