"""Finding what a text is about among what was said before, by the model's own attention to it.

The text is read on scratch and its queries are taken. In a few heads some token of it looks straight at what it is
about; most heads look at what they always look at. So a span's score is the largest share of attention that a token of
the text spends on it, less what a text about nothing gives it anyhow, in the heads where that is the most. Of what was
tried this found the right span most often (docs/log.md). Knows no text and no session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_memory.cache import Slots
from am_memory.engines.base import Engine, SessionCache
from am_memory.originals import Original

TOP_HEADS = 0.05
"""Share of all query heads that a span's score is the mean of."""


@dataclass(frozen=True)
class Span:
    """The tokens [start, end) of a conversation.

    Attributes:
        score: share of attention that the text draws to them beyond any text, in the heads where it is the most.
        text: they as text.
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
        bias: (num_keys,), or None for zeros.
        positions: (num_keys,), logical, in host memory.
    """

    layer: int
    head: int
    key: Tensor
    bias: Tensor | None
    positions: Tensor


class Queries(NamedTuple):
    """What passed one layer."""

    query: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens, head_dim)
    log_mass: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens)


def taken_queries(engine: Engine, cache: SessionCache, token_ids: Sequence[int], chunk_tokens: int) -> list[Queries]:
    """Read tokens on scratch; their queries in each compactable layer. The cache is afterwards as it was."""
    passes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cache.compactable]
    state = cache.state()
    try:
        for start in range(0, len(token_ids), chunk_tokens):
            engine.forward(
                cache,
                token_ids[start : start + chunk_tokens],
                on_query=lambda index, query, log_mass: passes[index].append((query, log_mass)),
            )
    finally:
        cache.restore(state)
    return [Queries(*(torch.cat(parts, dim=2) for parts in zip(*layer, strict=True))) for layer in passes]


def held_keys(cache: SessionCache, originals: Sequence[Original]) -> Iterator[HeadKeys]:
    """Every key that stands for a token, once: originals where there are any, else slots, and the exact tail."""
    for original in originals:
        positions = torch.arange(original.start, original.end)
        for index, (key, _) in enumerate(original.layers()):
            for head in range(key.shape[0]):
                yield HeadKeys(index, head, key[head], None, positions)
    for index, layer in enumerate(cache.compactable):
        key, _ = layer.exact_entries(layer.start, cache.num_tokens)
        for head in range(key.shape[0]):
            yield HeadKeys(index, head, key[head], None, torch.arange(layer.start, cache.num_tokens))
            if layer.slots is not None:
                slots = _without(layer.slots.head(head), originals)
                yield HeadKeys(index, head, slots.key, slots.bias, slots.positions)


def _without(slots: Slots, originals: Sequence[Original]) -> Slots:
    """The slots of tokens that no original has."""
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
    """How much a text looks at each span.

    Args:
        text, neutral: queries of the text and of one about nothing, in each compactable layer.
        edges: the spans are between neighbours of these positions.

    Returns:
        (len(edges) - 1,) float32, each at most 1.
    """
    layers = [
        Queries(torch.cat([one.query, other.query], dim=2), torch.cat([one.log_mass, other.log_mass], dim=2))
        for one, other in zip(text, neutral, strict=True)
    ]
    scalings = [float(layer.scaling or 0) for layer in cache.compactable]
    shares = [layer.log_mass.new_zeros(*layer.log_mass.shape, len(edges) + 1) for layer in layers]
    boundaries = torch.tensor(edges)
    for keys in held_keys(cache, originals):
        query, log_mass = (of[keys.head] for of in layers[keys.layer])  # (groups, num_tokens, head_dim), (groups, ...)
        logits = query.float() @ keys.key.to(query.device).float().T * scalings[keys.layer]
        if keys.bias is not None:
            logits += keys.bias.to(logits.device).float()
        places = torch.searchsorted(boundaries, keys.positions.long(), right=True).to(logits.device)
        shares[keys.layer][keys.head].index_add_(2, places, (logits - log_mass[..., None]).exp_())
    drawn = torch.cat([_drawn(share, text[0].query.shape[2]) for share in shares])
    strongest = drawn.topk(max(1, round(TOP_HEADS * len(drawn))), dim=0).values
    return strongest.mean(dim=0)[1:-1]  # what lies before the first edge and behind the last is no span


def _drawn(share: Tensor, num_text_tokens: int) -> Tensor:
    """(query heads of a layer, places): the text's largest share of attention less the neutral text's."""
    peaks = [part.amax(dim=2) for part in (share[:, :, :num_text_tokens], share[:, :, num_text_tokens:])]
    return (peaks[0] - peaks[1]).flatten(0, 1)
