"""The keys that a search compares: those of the search heads, of all originals, in a few large tensors.

Original entries may lie on disk; the keys of a few heads are a small part of them, and stay in host memory. Runs of
originals are joined once and used again by later searches, of forks too, so that a search costs a few matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from am_memory.engines.base import Engine
from am_memory.kv_cache.slots import Segment
from am_memory.recall.originals import Original
from am_memory.recall.search_heads import SPAN_TOKENS, SearchHeads
from am_memory.recall.words import word_numbers

RUN_TOKENS = 2**14
"""Runs end at multiples of this position, so that originals that are lost change no other run."""
ROUGH_TOKENS = 4
"""So many neighbouring keys are one, their mean, in a first look at a long history."""


class Masses(NamedTuple):
    """The attention mass that queries spend on some spans: `sums * exp(scale)`.

    Attributes:
        where: the spans, as a slice or (num_spans,) int64, each once.
        sums: (num_queries, num_spans).
        scale: (num_queries, 1) float32.
    """

    where: slice | Tensor
    sums: Tensor
    scale: Tensor

    @property
    def log_total(self) -> Tensor:
        """(num_queries, 1) float32."""
        return self.sums.float().sum(dim=1, keepdim=True).log() + self.scale


def shares_of(parts: Sequence[Masses], weights: Tensor, num_spans: int) -> Tensor:
    """The share of each span in all attention, as means over queries: (num_means, num_spans) float32.

    Args:
        parts: two parts may hold keys of the same span.
        weights: (num_means, num_queries), the weight of each query in each mean.
    """
    shares = torch.zeros(len(weights), num_spans)
    if not parts:
        return shares
    total = torch.stack([part.log_total for part in parts]).logsumexp(dim=0)
    for part in parts:
        shares[:, part.where] += (weights * (part.scale - total).exp().T) @ part.sums.float()
    return shares


class Spans(NamedTuple):
    """The keys of consecutive spans, for one KV head.

    Attributes:
        keys: (num_spans, keys_per_span, head_dim).
        bias: (num_spans, keys_per_span) float32, added to the scores: -inf where there is no key.
    """

    keys: Tensor
    bias: Tensor

    def masses(self, query: Tensor, where: slice | Tensor) -> Masses:
        """The attention mass that queries spend on each span.

        Args:
            query: (num_queries, head_dim) float32, multiplied by the scale of the scores.
            where: the spans' places in the conversation.
        """
        logits = query @ self.keys.flatten(0, 1).float().T
        logits += self.bias.flatten()
        scale = logits.amax(dim=1, keepdim=True)
        return Masses(where, logits.sub_(scale).exp_().view(len(query), *self.bias.shape).sum(dim=2), scale)

    def at(self, indices: Tensor) -> Spans:
        """Some of the spans."""
        return Spans(self.keys[indices], self.bias[indices])

    def rough(self) -> Spans:
        """The same spans, with the mean of each `ROUGH_TOKENS` keys instead of these."""
        shape = len(self.bias), -1, ROUGH_TOKENS  # of each span its means, and their keys
        weights = self.bias.exp().view(shape)
        counts = weights.sum(dim=2)
        sums = (self.keys.view(*shape, self.keys.shape[-1]).float() * weights[..., None]).sum(dim=2)
        return Spans((sums / counts.clamp_min(1)[..., None]).to(self.keys.dtype), counts.log())

    @classmethod
    def of(cls, key: Tensor, start: int) -> Spans:
        """The spans of consecutive keys.

        Args:
            key: (num_keys, head_dim).
            start: the logical position of the first one; spans begin at multiples of `SPAN_TOKENS`.
        """
        before = start % SPAN_TOKENS
        behind = -(before + len(key)) % SPAN_TOKENS
        bias = torch.zeros(before + len(key) + behind)
        bias[:before], bias[before + len(key) :] = -torch.inf, -torch.inf
        padded = torch.nn.functional.pad(key, (0, 0, before, behind))
        return cls(padded.view(-1, SPAN_TOKENS, key.shape[1]), bias.view(-1, SPAN_TOKENS))


class Usual(NamedTuple):
    """The attention of the usual queries of one search head on a run.

    Attributes:
        masses: on each of its spans.
        rough_loss: how much less mass the rough keys get, in nats: the exponential of a mean is below the mean of
            exponentials. The text's queries lose as much, to a tenth of a nat. None: no search was rough so far.
    """

    masses: Masses
    rough_loss: float | None = None


@dataclass(eq=False)
class Run:
    """The keys of consecutive originals, all with the same shift.

    Attributes:
        spans: for each KV head of the search heads, at the positions at which the keys were written.
        start, end: the logical tokens [start, end).
        members: the originals.
    """

    spans: list[Spans]
    start: int
    end: int
    members: tuple[ReferenceType[Original], ...] = ()
    _rough: dict[int, Spans] = field(default_factory=dict)
    _usual: dict[int, Usual] = field(default_factory=dict)
    _distance: int = 0
    _words: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Host memory that it takes, with what searches keep with it."""
        spans = [*self.spans, *self._rough.values()]
        masses = [tensor for one in self._usual.values() for tensor in (one.masses.sums, one.masses.scale)]
        words = [] if self._words is None else [self._words]
        return sum(tensor.nbytes for tensor in (*(part for each in spans for part in each), *masses, *words))

    @property
    def where(self) -> slice:
        """The spans that it holds, the first and the last perhaps in part."""
        return slice(self.start // SPAN_TOKENS, -(-self.end // SPAN_TOKENS))

    def key(self, kv_head: int) -> Tensor:
        """(num_tokens, head_dim)."""
        first = self.start % SPAN_TOKENS
        return self.spans[kv_head].keys.flatten(0, 1)[first : first + self.end - self.start]

    def words(self, engine: Engine, token_ids: Sequence[int]) -> Tensor:
        """The words of its tokens, (num_tokens,) int64, see `word_numbers`; later calls give the same.

        Args:
            token_ids: of the tokens from position 0 on.
        """
        if self._words is None:
            self._words = word_numbers(engine, token_ids[self.start : self.end])
        return self._words

    def until(self, end: int) -> Run:
        """The run without its tokens from `end` on."""
        if end >= self.end:
            return self
        keys = (self.key(kv_head)[: end - self.start] for kv_head in range(len(self.spans)))
        return Run([Spans.of(key, self.start) for key in keys], self.start, end)

    def rough(self, kv_head: int) -> Spans:
        """Its spans for a first look."""
        if kv_head not in self._rough:
            self._rough[kv_head] = self.spans[kv_head].rough()
        return self._rough[kv_head]

    def usual(self, index: int, distance: int) -> Usual | None:
        """Those of search head `index`, if they were kept at this distance."""
        return self._usual.get(index) if distance == self._distance else None

    def keep_usual(self, index: int, distance: int, usual: Usual) -> None:
        """Keep what `usual` gives, in place of those at another distance."""
        if distance != self._distance:
            self._usual, self._distance = {}, distance
        self._usual[index] = usual


def usual_distance(distance: int) -> int:
    """The distance at which the usual queries stand from a run: the next power of two.

    So the masses of a run are computed a few times in the life of a conversation, whatever was searched before.
    """
    return 1 << max(distance - 1, 0).bit_length()


_keys: WeakKeyDictionary[Original, list[Tensor]] = WeakKeyDictionary()
_runs: WeakKeyDictionary[Original, Run] = WeakKeyDictionary()  # of each of its members


def index_bytes(originals: Iterable[Original]) -> int:
    """Host memory of the keys by which these originals are searched; it is taken at the first search."""
    held = {_runs[original] for original in originals if original in _runs}
    return sum(run.nbytes for run in held)


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
    known, start = _runs.get(members[0]), members[0].start
    if known is None or known.members != references:
        parts = [_keys_of(found, original) for original in members]
        spans = [Spans.of(torch.cat(of_head), start) for of_head in zip(*parts, strict=True)]
        known = Run(spans, start, members[-1].end, references)
        for original in members:  # views: nothing is held twice, and nothing read again if the run changes
            part = slice(original.start - start, original.end - start)
            _keys[original], _runs[original] = [known.key(kv_head)[part] for kv_head in range(len(spans))], known
    return known


def _keys_of(found: SearchHeads, original: Original) -> list[Tensor]:
    if original not in _keys:
        _keys[original] = original.keys(found.kv_heads)
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


def masses_of_slots(query: Tensor, key: Tensor, bias: Tensor, positions: Tensor) -> Masses:
    """The attention mass that queries spend on the spans in which a head has some slots.

    Args:
        query: (num_queries, head_dim) float32, multiplied by the scale of the scores.
        key: (num_slots, head_dim); at least one.
        bias: (num_slots,) float32.
        positions: (num_slots,) int64, logical.
    """
    spans, indices = (positions // SPAN_TOKENS).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    logits = query @ key.float().T + bias
    scale = logits.amax(dim=1, keepdim=True)
    sums = torch.zeros(len(query), len(spans)).index_add_(1, indices, (logits - scale).exp_())
    return Masses(spans, sums, scale)
