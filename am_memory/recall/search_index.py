"""The keys that a search compares: those of the search heads, of all originals, in a few large tensors.

Original entries may lie on disk; the keys of four heads take a hundredth of them, and stay in host memory. Runs of
originals are joined once and used again by later searches, of forks too, so that a search costs a few matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from am_memory.kv_cache.slots import Segment
from am_memory.recall.originals import Original
from am_memory.recall.search_heads import SPAN_TOKENS, SearchHeads

RUN_TOKENS = 2**14
"""Runs end at multiples of this position, so that originals that are lost change no other run."""


class SpanMass(NamedTuple):
    """The log of the attention mass that queries spend on the spans from `first` on: (num_queries, num_spans)."""

    first: int
    mass: Tensor


@dataclass(eq=False)
class Run:
    """The keys of consecutive originals, all with the same shift.

    Attributes:
        keys: for each search head (num_tokens, head_dim), in the model's dtype, at the positions they were written at.
        start: the logical position of the first one.
        members: the originals.
    """

    keys: list[Tensor]
    start: int
    members: tuple[ReferenceType[Original], ...]

    def __post_init__(self) -> None:
        self._usual: dict[int, SpanMass] = {}
        self._kept_for = 0, 0

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[0]

    def usual_mass(self, index: int, distance: int, num_tokens: int) -> SpanMass | None:
        """The mass of the usual queries of search head `index` on the first tokens, if it was kept at this distance."""
        return self._usual.get(index) if (distance, num_tokens) == self._kept_for else None

    def keep_usual(self, index: int, distance: int, num_tokens: int, mass: SpanMass) -> None:
        """Keep the mass that `usual_mass` gives, in place of what was kept at another distance."""
        if (distance, num_tokens) != self._kept_for:
            self._usual, self._kept_for = {}, (distance, num_tokens)
        self._usual[index] = mass


def usual_distance(distance: int) -> int:
    """The distance at which the usual queries stand from a run: the next power of two.

    So the mass of a run is computed a few times in the life of a conversation, and does not depend on earlier searches.
    """
    return 1 << max(distance - 1, 0).bit_length()


_keys: WeakKeyDictionary[Original, list[Tensor]] = WeakKeyDictionary()
_runs: WeakKeyDictionary[Original, Run] = WeakKeyDictionary()


def runs(found: SearchHeads, originals: Sequence[Original], segments: Sequence[Segment]) -> Iterator[tuple[Run, int]]:
    """All originals that can be read, run by run, each with the shift of its segments.

    Raises:
        OriginalLost: an original turned out to be lost.
    """
    placed = groupby(_with_shifts(originals, segments), key=lambda entry: (entry[0].start // RUN_TOKENS, entry[1]))
    for (_, shift), group in placed:
        for members in _consecutive([original for original, _ in group]):
            yield _run(found, members), shift


def _run(found: SearchHeads, members: Sequence[Original]) -> Run:
    references = tuple(map(ref, members))
    known = _runs.get(members[0])
    if known is None or known.members != references:
        parts = [_keys_of(found, original) for original in members]
        keys = [torch.cat(of_head) for of_head in zip(*parts, strict=True)]
        known = _runs[members[0]] = Run(keys, members[0].start, references)
        for original in members:  # views: nothing is held twice, and nothing read again if the run changes
            where = slice(original.start - members[0].start, original.end - members[0].start)
            _keys[original] = [key[where] for key in keys]
    return known


def _keys_of(found: SearchHeads, original: Original) -> list[Tensor]:
    if original not in _keys:
        entries = original.layers()
        _keys[original] = [entries[layer][0][head].clone() for layer, head, _ in found.heads]
    return _keys[original]


def _consecutive(originals: Sequence[Original]) -> Iterator[list[Original]]:
    """The originals in lists without a gap."""
    members: list[Original] = []
    for original in originals:
        if members and members[-1].end != original.start:
            yield members
            members = []
        members.append(original)
    if members:
        yield members


def _with_shifts(originals: Sequence[Original], segments: Sequence[Segment]) -> Iterator[tuple[Original, int]]:
    """Each original that can be read, with the shift of its segment."""
    ordered = iter(segments)
    segment = next(ordered, None)
    for original in originals:
        while segment is not None and segment.end <= original.start:
            segment = next(ordered, None)
        if segment is not None and original.lost is None:
            yield original, segment.shift


def span_mass(query: Tensor, key: Tensor, bias: Tensor | None, positions: Tensor, scaling: float) -> SpanMass:
    """The mass that queries spend on the spans of some keys.

    Args:
        query: (num_queries, head_dim) float32.
        key: (num_keys, head_dim).
        bias: (num_keys,); None: all zero.
        positions: (num_keys,) int64, logical.
    """
    logits = (query @ key.float().T).mul_(scaling)
    if bias is not None:
        logits += bias
    spans = positions // SPAN_TOKENS
    first, last = int(spans.min()), int(spans.max()) + 1
    top = logits.amax(dim=1, keepdim=True)
    sums = torch.zeros(len(query), last - first).index_add_(1, spans - first, (logits - top).exp_())
    return SpanMass(first, sums.log_() + top)
