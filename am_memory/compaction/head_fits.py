"""The fit of all heads of a compaction, in batches of heads that get about as many slots.

Turns the solver's padded tensors into ragged slots. Does not read the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from am_memory.compaction.plan import Plan
from am_memory.compaction.scoring import ScoredHead
from am_memory.errors import CompactionFailed
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.policy import MemoryPolicy
from am_memory.queries import Progress
from am_memory.solver import Block, ExactAttention, Fit, FitOptions, fit, output_error

LEAST_FILL, FREE_PADDING = 0.85, 8
"""A head joins a batch if it has this share of the slots of the batch's largest head, or only a few slots less."""
MAX_BATCH_HEADS = 32
"""A batch copies the reference queries of its heads into one tensor; this bounds its size."""
HELD_OUT_INTERVAL = 8
"""With a gate, every eighth query is held out of the fits. Keys are chosen by all queries."""
RIDGE = 1e-3
"""`MemoryPolicy.ridge` by default, where slots alone answer questions."""
BIAS_RIDGE = 1e-2
"""Pull of the biases toward 0: similar reference queries leave some biases undecided."""


@dataclass(frozen=True)
class BatchFit:
    """One batch of heads, fitted.

    Attributes:
        fit: the solver's result, padded to the head that has the most slots.
        slots: of each head, in the model's dtype and in the order of the tokens.
        held_out_error: (num_heads,) float32, output error on the held-out queries; None if none were held out.
    """

    fit: Fit
    slots: list[Slots]
    held_out_error: Tensor | None


@dataclass(frozen=True)
class HeadFits:
    """All heads of a compaction, fitted; nothing is swapped in yet.

    Attributes:
        plan: its newest segment has the slots that were fitted, which the gate may have raised.
        slots: by head, in the order of the layers and their heads.
        score_seconds, fit_seconds: wall time.
    """

    plan: Plan
    batches: tuple[BatchFit, ...]
    slots: dict[ScoredHead, Slots]
    score_seconds: float = 0.0
    fit_seconds: float = 0.0

    @classmethod
    def join(cls, plan: Plan, layers: Sequence[HeadFits], score_seconds: float, fit_seconds: float) -> HeadFits:
        """The fits of a whole compaction, from those of its layers."""
        batches = tuple(batch for fits in layers for batch in fits.batches)
        slots = {head: slots for fits in layers for head, slots in fits.slots.items()}
        return cls(plan, batches, slots, score_seconds, fit_seconds)

    def slots_by_layer(self, policy: MemoryPolicy) -> list[Slots]:
        """The slots of each layer, in the dtype that the policy keeps segments in."""
        return [
            Slots.stack([slots.quantised() if policy.segment_dtype == "int8" else slots for _, slots in of_layer])
            for _, of_layer in groupby(self.slots.items(), key=lambda item: item[0].layer)
        ]

    @property
    def mass_error(self) -> float:
        """Root mean square over all heads of `Fit.mass_error`."""
        return _rms([batch.fit.mass_error for batch in self.batches])

    @property
    def output_error(self) -> float:
        """Root mean square over all heads of `Fit.output_error`."""
        return _rms([batch.fit.output_error for batch in self.batches])

    @property
    def held_out_error(self) -> float | None:
        """Root mean square over all heads of the output error on held-out queries; None if none were held out."""
        errors = [batch.held_out_error for batch in self.batches if batch.held_out_error is not None]
        return _rms(errors) if errors else None

    @property
    def num_unbiased_heads(self) -> int:
        """KV heads whose biases could not be folded into their keys, and which therefore have none."""
        return sum(batch.fit.num_unbiased_heads for batch in self.batches)

    def passes(self, max_error: float | None) -> bool:
        """Whether the held-out error is within the gate; True where there is no gate."""
        return max_error is None or self.held_out_error is None or self.held_out_error <= max_error


def fit_all(heads: Sequence[ScoredHead], plan: Plan, policy: MemoryPolicy, progress: Progress) -> HeadFits:
    """Fit the slots that the plan gives to its newest segment.

    Args:
        progress: called with the stage "fit", counted in KV heads.
    """
    batches: list[BatchFit] = []
    slots: dict[ScoredHead, Slots] = {}
    for batch in batches_of_like_size(heads, plan.newest.num_slots):
        batches.append(fit_batch(batch, plan.newest, policy))
        slots.update(zip(batch, batches[-1].slots, strict=True))
        progress("fit", len(slots), len(heads))
    return HeadFits(plan, tuple(batches), {head: slots[head] for head in heads})


def batches_of_like_size(heads: Sequence[ScoredHead], num_slots: int) -> Iterator[tuple[ScoredHead, ...]]:
    """Split heads into batches whose blocks have one shape, and which waste little on padding.

    Args:
        heads: of any layers.
        num_slots: over all heads; a head has as many as its ranks allow.
    """
    counts = torch.stack([(head.ranks < num_slots).sum() for head in heads]).tolist()

    def shape(head: ScoredHead) -> tuple[object, ...]:
        block = head.block
        return (block.seq_len, block.num_queries, block.head_dim, block.value_dim, block.scaling)

    remaining = sorted(zip(heads, counts, strict=True), key=lambda pair: (shape(pair[0]), -pair[1]))
    while remaining:
        (first, largest), size = remaining[0], 0
        for head, count in remaining[:MAX_BATCH_HEADS]:
            if shape(head) != shape(first) or count < LEAST_FILL * largest - FREE_PADDING:
                break
            size += 1
        yield tuple(head for head, _ in remaining[:size])
        remaining = remaining[size:]


def fit_batch(heads: Sequence[ScoredHead], segment: Segment, policy: MemoryPolicy) -> BatchFit:
    """Choose and fit the slots of some heads, whose blocks have one shape.

    Raises:
        CompactionFailed: the result is not finite in the model's dtype.
    """
    block, exact = Block.stack([head.block for head in heads]), ExactAttention.stack([head.exact for head in heads])
    ranks = torch.stack([head.ranks for head in heads])
    num_slots = (ranks < segment.num_slots).sum(dim=1).to(block.key.device).minimum(block.num_keys)
    indices = policy.key_selection(block, exact.scores, num_slots)
    rotations = [head.rotations for head in heads if head.rotations is not None]
    fitted_on, held_out = _split_queries(block, policy)
    batch_fit = fit(
        block if fitted_on is None else block.queries(fitted_on),
        indices,
        num_slots,
        _options(policy),
        rotations=torch.stack(rotations) if rotations else None,
        exact=exact if fitted_on is None else exact.queries(fitted_on),
    )
    held_out_error = None
    if held_out is not None:
        held_out_error = output_error(block.queries(held_out), batch_fit, exact.queries(held_out))
    slots = _ragged(heads, batch_fit, indices.cpu(), num_slots.tolist(), segment)
    return BatchFit(batch_fit, slots, held_out_error)


def _options(policy: MemoryPolicy) -> FitOptions:
    return FitOptions(
        bias_ridge=BIAS_RIDGE,
        ridge=RIDGE if policy.ridge is None else policy.ridge,
        fit_bias=policy.experiments.fit in ("bias_and_values", "bias"),
        fit_values=policy.experiments.fit in ("bias_and_values", "values"),
        relative_mass=False,
    )


def _split_queries(block: Block, policy: MemoryPolicy) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Indices (int64) of the queries to fit on, and of those held out; None twice if all are to be fitted on."""
    if policy.max_error is None or block.num_queries < HELD_OUT_INTERVAL:
        return None, None
    every = torch.arange(block.num_queries, device=block.key.device)
    is_held_out = every % HELD_OUT_INTERVAL == HELD_OUT_INTERVAL - 1
    return every[~is_held_out], every[is_held_out]


def _ragged(
    heads: Sequence[ScoredHead], batch_fit: Fit, indices: Tensor, counts: Sequence[int], segment: Segment
) -> list[Slots]:
    """Each head's slots without padding, in the model's dtype and in the order of the tokens.

    Args:
        indices: (B, t) int64 in host memory, the kept keys of each head, the most important first.
        counts: the number of slots of each head.
    """
    dtype = heads[0].block.key.dtype
    key, value, bias = (tensor.to(dtype) for tensor in (batch_fit.key, batch_fit.value, batch_fit.bias))
    if not (key.isfinite().all() & value.isfinite().all() & (bias < torch.inf).all()):  # padding has a bias of -inf
        raise CompactionFailed(
            f"the fit of tokens {segment.start} to {segment.end} is not finite in {key.dtype}; nothing was changed: "
            "load the model in bfloat16 or float32, or raise policy.ridge"
        )
    slots = []
    for index, (head, count) in enumerate(zip(heads, counts, strict=True)):
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
    return slots


def _rms(errors: Sequence[Tensor]) -> float:
    return float(torch.cat(list(errors)).square().mean().sqrt())
