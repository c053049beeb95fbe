"""Search: find the compacted spans that a text is about, by the model's own attention.

The text is read on scratch, and its queries are compared with all compacted keys. In a few heads, one token of the text
attends directly to what the text is about; most heads attend to the same places whatever they read. So a span's score
compares the attention of the text with that of a neutral text: share * log(share / neutral share), the maximum over the
tokens of the text, averaged over the heads with the highest values. Of about fifty ways to combine attention, this one
found the right span on two models (docs/log.md). Knows no session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.queries import as_turn, queries_on_scratch
from am_memory.recall.originals import Original
from am_memory.text.boundaries import best_boundary

TOP_HEADS = 0.1
"""Fraction of the query heads whose values a span's score averages."""
NEUTRAL_TEXT = "Hello, how are you today?"
"""Attention that this text also gets says nothing about the search text."""
LEAST_SHARE = 1e-4
"""Added to both shares: a span that gets no attention otherwise is not found because it gets a little."""


@dataclass(frozen=True)
class Span:
    """The tokens [start, end) of a conversation.

    Attributes:
        score: how much more attention they get from the search text than from a neutral text, in nats.
        text: their text.
    """

    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True)
class HeadKeys:
    """Some keys of one KV head.

    Attributes:
        key: (num_keys, head_dim).
        bias: (num_keys,); None: all zero.
        positions: (num_keys,), logical positions, in host memory.
    """

    layer: int
    head: int
    key: Tensor
    bias: Tensor | None
    positions: Tensor


class Queries(NamedTuple):
    """The queries of a text at one layer, and the log of the attention mass that each spends on the whole cache."""

    query: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens, head_dim)
    log_mass: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens)


def search(
    engine: Engine,
    cache: SessionCache,
    token_ids: Sequence[int],
    originals: Sequence[Original],
    text: str,
    *,
    span_tokens: int,
    chunk_tokens: int,
) -> list[Span]:
    """All compacted tokens, in spans of about `span_tokens`, each with its score for a text.

    Args:
        cache: holds all tokens but the last; restored afterwards.
        token_ids: all tokens of the conversation.
        originals: tokens that have one are found by it, others by their slots.
        chunk_tokens: tokens read in one forward pass.
    """
    if not cache.segments:
        return []
    asked, neutral = (
        taken_queries(engine, cache, [token_ids[-1], *as_turn(engine, turn)], chunk_tokens)
        for turn in (text, NEUTRAL_TEXT)
    )
    edges = _edges(engine, token_ids, cache.segments, span_tokens)
    scores = span_scores(cache, originals, asked, neutral, edges).tolist()
    return [
        Span(start, end, score, engine.decode(token_ids[start:end]))
        for start, end, score in zip(edges, edges[1:], scores, strict=False)
    ]


def _edges(engine: Engine, token_ids: Sequence[int], segments: Sequence[Segment], span_tokens: int) -> list[int]:
    """The positions where spans begin, and the end of the last one: boundaries of the text and of segments."""
    edges = [segments[0].start]
    for segment in segments:
        while segment.end - edges[-1] > 1.5 * span_tokens:
            earliest, latest = (edges[-1] + max(int(share * span_tokens), 1) for share in (0.75, 1.25))
            edges.append(best_boundary(engine, token_ids, earliest, latest))
        edges.append(segment.end)
    return edges


def taken_queries(engine: Engine, cache: SessionCache, token_ids: Sequence[int], chunk_tokens: int) -> list[Queries]:
    """The queries of some tokens, read on scratch, in each compactable layer."""
    passes = queries_on_scratch(engine, cache, in_chunks(token_ids, chunk_tokens))
    return [Queries(*(torch.cat(parts, dim=2) for parts in zip(*layer, strict=True))) for layer in passes]


def held_keys(cache: SessionCache, originals: Sequence[Original]) -> Iterator[HeadKeys]:
    """The key of each compacted token, by layer and head: its original if there is one, else its slot."""
    for original in originals:
        positions = torch.arange(original.start, original.end)
        segments = (segment for segment in cache.segments if segment.start <= original.start < segment.end)
        shift = next((segment.shift for segment in segments), 0)
        for index, (layer, (key, _)) in enumerate(zip(cache.compactable, original.layers(), strict=True)):
            standing = layer.rotated(key, shift)
            for head in range(key.shape[0]):
                yield HeadKeys(index, head, standing[head], None, positions)
    for index, layer in enumerate(cache.compactable):
        if layer.slots is not None:
            for head in range(layer.slots.num_heads):
                slots = _without(layer.slots.head(head), originals)
                yield HeadKeys(index, head, decoded(slots.key), slots.bias, slots.positions)


def _without(slots: Slots, originals: Sequence[Original]) -> Slots:
    """The slots of tokens without an original."""
    is_left = torch.ones(len(slots.positions), dtype=torch.bool)
    for original in originals:
        is_left &= (slots.positions < original.start) | (slots.positions >= original.end)
    return slots.where(is_left)


def span_scores(
    cache: SessionCache,
    originals: Sequence[Original],
    text: Sequence[Queries],
    neutral: Sequence[Queries],
    edges: Sequence[int],
) -> Tensor:
    """The score of each span for a text.

    Args:
        text, neutral: queries of the text and of a neutral text, in each compactable layer.
        edges: positions; each span lies between two neighbouring ones.

    Returns:
        (len(edges) - 1,) float32, in nats.
    """
    num_text_tokens = text[0].query.shape[2]
    layers = [
        Queries(torch.cat([one.query, other.query], dim=2), torch.cat([one.log_mass, other.log_mass], dim=2))
        for one, other in zip(text, neutral, strict=True)
    ]
    scalings = [float(layer.scaling or 0) for layer in cache.compactable]
    shares = [layer.log_mass.new_zeros(*layer.log_mass.shape, len(edges) + 1) for layer in layers]
    boundaries = torch.tensor(edges)
    for keys in held_keys(cache, originals):
        query, log_mass = (tensor[keys.head] for tensor in layers[keys.layer])  # (groups, num_tokens, head_dim), ...
        logits = query.float() @ keys.key.to(query.device).float().T * scalings[keys.layer]
        if keys.bias is not None:
            logits += keys.bias.to(logits.device).float()
        places = torch.searchsorted(boundaries, keys.positions.long(), right=True).to(logits.device)
        shares[keys.layer][keys.head].index_add_(2, places, (logits - log_mass[..., None]).exp_())
    # The first and the last place are outside all spans.
    gains = torch.cat([_gains(share[..., 1:-1], num_text_tokens) for share in shares])
    return gains.topk(max(1, round(TOP_HEADS * len(gains))), dim=0).values.mean(dim=0)


def _gains(share: Tensor, num_text_tokens: int) -> Tensor:
    """The attention that each span gains over the neutral text, maximum over the text's tokens.

    Args:
        share: (num_key_value_heads, num_key_value_groups, num_tokens, num_spans), the text's tokens before the neutral.

    Returns:
        (num_query_heads, num_spans), in nats.
    """
    among_spans = share / share.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    text, neutral = among_spans[:, :, :num_text_tokens], among_spans[:, :, num_text_tokens:]
    usual = neutral.mean(dim=2, keepdim=True)
    return (text * ((text + LEAST_SHARE) / (usual + LEAST_SHARE)).log()).amax(dim=2).flatten(0, 1)
