"""Search heads: the few query heads by which a model looks up what a text is about.

Most heads attend to the same places whatever they read, or to the next word of a text that they copy. A few find the
answer to a question. They are measured once for each model, on a chat of our own with known answers
(`am_memory.queries.trial`), and work in other conversations as well (docs/recall.md). Does not know how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.queries import as_turn, message_token_positions, queries_on_scratch
from am_memory.queries.measured_files import MeasuredFile, MeasuredFiles
from am_memory.queries.measurement import Measurement, OnProgress, ignore_progress
from am_memory.queries.trial import digest, trial

NUM_HEADS = 4
"""Search heads of a model: two find less, eight find no more (docs/log.md)."""
SPAN_TOKENS = 16
"""Tokens that a search scores as one."""
LEAST_SHARE = 1e-3
"""Added to shares of attention: a span is not found because it gets a little where it usually gets nothing."""
MAX_USUAL = 64
"""Usual queries that are kept for each head."""


class SearchHead(NamedTuple):
    """A query head: query `group` of KV head `head`, in compactable layer `layer`."""

    layer: int
    head: int
    group: int


@dataclass(frozen=True, eq=False)
class SearchHeads:
    """The search heads of one model, and the queries that they have in ordinary talk.

    Attributes:
        heads: the search heads.
        usual: (num_heads, num_queries, head_dim) float32 on the CPU, after RoPE: queries of texts that ask for nothing.
            A place that these also attend to is not what a text looks for.
        position: the position at which the usual queries stand.
    """

    heads: tuple[SearchHead, ...]
    usual: Tensor
    position: int

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of the keys that these heads attend to, each pair once."""
        return list(dict.fromkeys((layer, head) for layer, head, _ in self.heads))

    def suits(self, cache: SessionCache) -> bool:
        """Whether a cache has these heads; it must hold a token, be it exact or compact."""
        layers, end = cache.compactable, cache.num_tokens
        for layer, head, group in self.heads:
            if not 0 <= layer < len(layers) or group < 0:
                return False
            num_heads, _, head_dim = layers[layer].exact_entries(end, end)[0].shape
            if not 0 <= head < num_heads or head_dim != self.usual.shape[2]:
                return False
        return True


def ready_search_heads(engine: Engine, cache: SessionCache | None = None) -> SearchHeads | None:
    """The search heads of an engine's model, if nothing must be measured for them: see `Measurement.known`."""
    return measured().known(engine, cache)


def search_heads(
    engine: Engine, cache: SessionCache | None = None, on_progress: OnProgress = ignore_progress
) -> SearchHeads:
    """The search heads of an engine's model: see `Measurement.of`.

    A measurement reads about 2,000 tokens.

    Args:
        on_progress: called with (texts read, texts to read).
    """
    return measured().of(engine, cache, on_progress)


def measure(engine: Engine, on_progress: OnProgress = ignore_progress) -> SearchHeads:
    """Find the heads whose attention to the answers of the trial's questions rises most above all other places.

    Args:
        on_progress: see `search_heads`.
    """
    asked_of, cache, chunk_tokens = trial(), engine.new_cache(), engine.chunk_tokens
    token_ids = asked_of.encoded(engine)
    places = asked_of.places(engine, token_ids)
    for chunk in in_chunks(token_ids, chunk_tokens):
        engine.forward(cache, chunk)

    num_texts = 1 + len(asked_of.ordinary) + len(asked_of.questions)
    on_progress(1, num_texts)

    def queries(number: int, text: str) -> list[Tensor]:
        """For each layer (kv_heads, groups, num_tokens, head_dim), of the tokens that belong to messages."""
        asked = [*token_ids, *as_turn(engine, text)]
        where = torch.tensor(message_token_positions(engine, asked, len(token_ids), len(asked))) - len(token_ids)
        passes = queries_on_scratch(engine, cache, in_chunks(asked[len(token_ids) :], chunk_tokens))
        on_progress(number, num_texts)
        return [torch.cat([query for query, _ in layer], dim=2).cpu()[:, :, where] for layer in passes]

    def shares(text: list[Tensor]) -> Tensor:
        """(num_query_heads, num_spans): the share of each span, mean over the text's tokens; layer by layer."""
        layers = zip(text, cache.compactable, strict=True)
        return torch.cat([_span_shares(query, layer.exact_entries(0, len(token_ids))[0], layer.scaling or 0)
                          for query, layer in layers])  # fmt: skip

    ordinary = [queries(number, text) for number, text in enumerate(asked_of.ordinary, start=2)]
    usual = torch.stack([shares(text) for text in ordinary]).mean(dim=0)
    asked = enumerate(zip(asked_of.questions, places, strict=True), start=2 + len(ordinary))
    found = [
        _log_share_of_answer(lift(shares(queries(number, question)), usual), place)
        for number, ((question, _), place) in asked
    ]
    best = torch.stack(found).mean(dim=0).topk(min(NUM_HEADS, len(usual))).indices.tolist()
    every = [
        SearchHead(layer, head, group)
        for layer, query in enumerate(ordinary[0])
        for head in range(query.shape[0])
        for group in range(query.shape[1])
    ]
    heads = tuple(every[index] for index in best)
    kept = torch.stack([torch.cat([text[layer][head, group] for text in ordinary]) for layer, head, group in heads])
    step = -(-kept.shape[1] // MAX_USUAL)
    return SearchHeads(heads, kept[:, ::step].half().float(), len(token_ids))


def lift(share: Tensor, usual: Tensor) -> Tensor:
    """The log of how much more attention spans get than usual, in nats."""
    return ((share + LEAST_SHARE) / (usual + LEAST_SHARE)).log()


def _span_shares(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(num_query_heads, num_spans) float32 on the CPU.

    Args:
        query: (kv_heads, groups, num_tokens, head_dim).
        key: (kv_heads, seq_len, head_dim).
    """
    logits = torch.einsum("hgtd,hnd->hgtn", query.float(), key.float()).mul_(scaling)
    logits[..., :SPAN_TOKENS] = -torch.inf  # the attention sinks
    share = logits.softmax(dim=-1).mean(dim=2).flatten(0, 1)
    padded = torch.nn.functional.pad(share, (0, -share.shape[1] % SPAN_TOKENS))
    return padded.view(len(padded), -1, SPAN_TOKENS).sum(dim=2).cpu()


def _log_share_of_answer(lifts: Tensor, place: tuple[int, int]) -> Tensor:
    """(num_query_heads,) float32: the log of the answer's share of all spans' rises in attention.

    Args:
        lifts: (num_query_heads, num_spans), in nats.
        place: the tokens of the answer; a neighbouring span counts as well, since a page holds both.
    """
    first, last = place[0] // SPAN_TOKENS, (place[1] - 1) // SPAN_TOKENS
    return lifts[:, max(first - 1, 0) : last + 2].amax(dim=1) - lifts.logsumexp(dim=1)


@cache
def measured() -> Measurement[SearchHeads]:
    """The search heads of all models. Another trial, or spans of another length, may find other heads."""
    measured_with = digest(SPAN_TOKENS, NUM_HEADS, trial().chat, trial().questions, trial().ordinary)
    return Measurement(
        MeasuredFiles("search_heads", measured_with, Path(str(resources.files(__package__))) / "measured"),
        measure=measure,
        packed=packed,
        unpacked=_unpacked,
        suits=SearchHeads.suits,
    )


def packed(found: SearchHeads) -> MeasuredFile:
    """Search heads as their file has them."""
    tensors = {"heads": torch.tensor(found.heads), "usual": found.usual.half().contiguous()}
    return MeasuredFile(tensors, {"position": str(found.position)})


def _unpacked(content: MeasuredFile) -> SearchHeads | None:
    tensors, notes = content
    heads, usual, position = tensors["heads"].tolist(), tensors["usual"].float(), int(notes["position"])
    if usual.dim() != 3 or len(usual) != len(heads) or not bool(usual.isfinite().all()):
        return None
    return SearchHeads(tuple(SearchHead(*row) for row in heads), usual, position)
