"""Query maps: from the keys of a text to the queries with which a model would repeat it.

A model that repeats a text looks for the token that comes next. So the query of a token depends on its own key and on
the next one, and before RoPE a linear map gives it. The maps are fitted once for each model, by least squares, on
texts of our own that the model reads and repeats (`am_memory.queries.trial`). Does not know how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, SessionLayer, in_chunks
from am_memory.queries.measured_files import MeasuredFile, MeasuredFiles
from am_memory.queries.measurement import Measurement, OnProgress, ignore_progress
from am_memory.queries.message_tokens import message_token_positions
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import REQUEST, repeat_queries, repeat_request
from am_memory.queries.total_mass import total_log_mass
from am_memory.queries.trial import digest, trial

RIDGE = 0.03
"""Pulls the maps toward 0, as a fraction of the mean variance of the features; from 0.001 to 0.1 it hardly matters."""
LEAST_SCALE = 1e-4
"""Least scale of a feature, as a fraction of the keys' root mean square: below it there is only rounding."""
MOST_TOKENS = 1024
"""Tokens of a text that are used, at most: a poor tokenizer makes far more of them than are needed."""


@dataclass(frozen=True, eq=False)
class QueryMap:
    """The map of one layer.

    Attributes:
        weight: (num_key_value_heads, 2 * head_dim + 1, num_key_value_groups * head_dim) in host memory, float16, or
            float32 where that overflows; for a token's key, the next token's key and a 1, both keys before RoPE.
        log_mass: (num_key_value_heads, num_key_value_groups) float32 in host memory: how much larger the log of a
            query's attention mass is in a repeat, where what was repeated gets attention too.
    """

    weight: Tensor
    log_mass: Tensor

    def suits(self, layer: SessionLayer) -> bool:
        """Whether this is a map for a layer of such heads."""
        if self.log_mass.dim() != 2 or not all(one.is_floating_point() for one in (self.weight, self.log_mass)):
            return False
        end = layer.start
        num_heads, _, head_dim = layer.exact_entries(end, end)[0].shape
        num_groups = self.log_mass.shape[-1]
        shapes = (num_heads, 2 * head_dim + 1, num_groups * head_dim), (num_heads, num_groups)
        tensors = self.weight, self.log_mass
        are_finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        return num_groups > 0 and tuple(tuple(tensor.shape) for tensor in tensors) == shapes and are_finite

    def queries(self, layer: SessionLayer, positions: Tensor, num_tokens: int, first: int) -> Tensor:
        """The queries of tokens that a layer holds exact, as if they were repeated.

        Args:
            positions: (num_queries,) int64 in host memory, where these tokens stand.
            num_tokens: of the cache.
            first: the position at which the repeat would begin.

        Returns:
            (num_key_value_heads, num_key_value_groups, num_queries, head_dim) in the model's dtype, after RoPE.
        """
        features = keys_of_pairs(layer, positions, num_tokens)
        weight = self.weight.to(features.device).float()
        (num_heads, num_groups), num_queries = self.log_mass.shape, len(positions)
        query = (features @ weight[:, :-1] + weight[:, -1:]).view(num_heads, num_queries, num_groups, -1)
        query = query.transpose(1, 2).flatten(1, 2)
        turned = layer.rotated(query, torch.arange(first, first + num_queries).repeat(num_groups))
        key, _ = layer.exact_entries(num_tokens, num_tokens)
        return turned.view(num_heads, num_groups, num_queries, -1).to(key.dtype)


def keys_of_pairs(layer: SessionLayer, positions: Tensor, num_tokens: int) -> Tensor:
    """The keys of tokens and of those behind them, before RoPE.

    The last token of all has none behind it, and stands for it itself.

    Args:
        positions, num_tokens: see `QueryMap.queries`.

    Returns:
        (num_key_value_heads, num_queries, 2 * head_dim) float32.
    """
    start, end = int(positions.min()), min(int(positions.max()) + 2, num_tokens)
    key, _ = layer.exact_entries(start, end)
    key = layer.rotated(key.float(), -torch.arange(start, end))
    where = positions - start
    pairs = key[:, where.to(key.device)], key[:, (where + 1).clamp_max(end - start - 1).to(key.device)]
    return torch.cat(pairs, dim=2)


def query_maps(engine: Engine, cache: SessionCache, on_progress: OnProgress = ignore_progress) -> list[QueryMap]:
    """The maps of an engine's model, one for each compactable layer: see `Measurement.of`.

    A measurement reads about 1,800 tokens twice.

    Args:
        engine: it must be able to rotate keys.
        cache: one of the engine's that has read a token.
        on_progress: called with (tokens read, tokens to read).
    """
    return measured().of(engine, cache, on_progress)


def measure(engine: Engine, on_progress: OnProgress = ignore_progress) -> list[QueryMap]:
    """Fit the maps of all layers to the trial's chat and to its other passages, as the model repeats them."""
    longest = min(max((engine.info.window_tokens - len(repeat_request(engine))) // 2, 2), MOST_TOKENS)
    texts = [trial().encoded(engine)[:longest], engine.encode("\n\n".join(trial().passages))[:longest]]
    to_read, num_read, repeats = 2 * sum(map(len, texts)), 0, list[_Repeat]()
    for token_ids in texts:
        before = num_read

        def on_read(num_tokens: int, before: int = before) -> None:
            on_progress(before + num_tokens, to_read)

        repeats.append(_Repeat.of(engine, token_ids, on_read))
        num_read += 2 * len(token_ids)
    on_progress(to_read, to_read)
    return [_fitted([one.layer(index) for one in repeats]) for index in range(len(repeats[0].samples))]


class _Repeat(NamedTuple):
    """A text that a model has read and repeated."""

    cache: SessionCache  # holds the text
    positions: Tensor  # of the repeated tokens in it
    first: int  # where the repeat began
    samples: list[ReferenceQueries]  # the repeated tokens' queries, layer by layer

    @classmethod
    def of(cls, engine: Engine, token_ids: Sequence[int], on_read: Callable[[int], None]) -> _Repeat:
        num_tokens, cache = len(token_ids), engine.new_cache()
        for chunk in in_chunks(token_ids, engine.chunk_tokens):
            engine.forward(cache, chunk)
            on_read(cache.num_tokens)
        positions = message_token_positions(engine, token_ids, 0, num_tokens - 1)
        samples = repeat_queries(
            engine,
            cache,
            [token_ids[position] for position in positions],
            chunk_tokens=engine.chunk_tokens,
            on_progress=lambda done, total: on_read(num_tokens + done),
        )
        return cls(cache, torch.tensor(positions), num_tokens + len(repeat_request(engine)), samples)

    def layer(self, index: int) -> LayerRepeat:
        layer, sample = self.cache.compactable[index], self.samples[index]
        return LayerRepeat(layer, self.cache.num_tokens, self.positions, self.first, sample)


class LayerRepeat(NamedTuple):
    """A text that a model has read and repeated, in one layer.

    Attributes:
        layer: holds the text, `num_tokens` tokens.
        positions: (num_tokens_repeated,) int64 in host memory, of the repeated tokens.
        first: where the repeat began.
        sample: the queries of the repeated tokens.
    """

    layer: SessionLayer
    num_tokens: int
    positions: Tensor
    first: int
    sample: ReferenceQueries

    @property
    def num_groups(self) -> int:
        return self.sample.query.shape[1] // len(self.positions)

    def keys(self) -> Tensor:
        """What a map is given: see `keys_of_pairs`."""
        return keys_of_pairs(self.layer, self.positions, self.num_tokens)

    def queries(self) -> Tensor:
        """What it should give: (num_heads, len(positions), num_groups * head_dim) float32, before RoPE."""
        query, num_queries = self.sample.query.float(), len(self.positions)
        later = torch.arange(self.first, self.first + num_queries).repeat(self.num_groups)
        turned = self.layer.rotated(query, -later).view(len(query), self.num_groups, num_queries, -1)
        return turned.transpose(1, 2).flatten(2)

    def more_mass(self) -> Tensor:
        """The part of the queries' log mass that is not on the text: (num_heads, num_groups, len(positions))."""
        more = self.sample.log_mass - total_log_mass(self.layer, self.num_tokens, self.sample.query)
        return more.view(len(more), self.num_groups, -1)


def _fitted(repeats: Sequence[LayerRepeat]) -> QueryMap:
    """Fit the map of one layer: ridge regression on features of mean 0 and variance 1."""
    given = torch.cat([one.keys() for one in repeats], dim=1).cpu().double()
    wanted = torch.cat([one.queries() for one in repeats], dim=1).cpu().double()
    given_mean, wanted_mean = given.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
    least = LEAST_SCALE * given.square().mean((1, 2), keepdim=True).sqrt()
    scale = given.std(1, keepdim=True).maximum(least).clamp_min(torch.finfo(torch.float32).tiny)
    features, num_queries = (given - given_mean) / scale, given.shape[1]
    gram = features.mT @ features / num_queries
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    weight = torch.linalg.solve(gram, features.mT @ (wanted - wanted_mean) / num_queries) / scale.mT
    weight = torch.cat([weight, wanted_mean - given_mean @ weight], dim=1)
    more_mass = torch.cat([one.more_mass() for one in repeats], dim=2).mean(dim=2)
    small = weight.half()
    return QueryMap(small if bool(small.isfinite().all()) else weight.float(), more_mass.cpu())


@cache
def measured() -> Measurement[list[QueryMap]]:
    """The query maps of all models."""
    measured_with = digest(REQUEST, RIDGE, MOST_TOKENS, trial().chat, trial().passages)
    return Measurement(
        MeasuredFiles("query_maps", measured_with, Path(str(resources.files(__package__))) / "measured"),
        measure=measure,
        packed=packed,
        unpacked=_unpacked,
        suits=_suit,
    )


def packed(maps: Sequence[QueryMap]) -> MeasuredFile:
    """Query maps as their file has them."""
    tensors = {f"weight.{i}": one.weight.contiguous() for i, one in enumerate(maps)}
    return MeasuredFile(tensors | {f"log_mass.{i}": one.log_mass for i, one in enumerate(maps)}, {})


def _unpacked(content: MeasuredFile) -> list[QueryMap]:
    tensors = content.tensors
    return [QueryMap(tensors[f"weight.{i}"], tensors[f"log_mass.{i}"]) for i in range(len(tensors) // 2)]


def _suit(maps: Sequence[QueryMap], cache: SessionCache) -> bool:
    return len(maps) == len(cache.compactable) and all(map(QueryMap.suits, maps, cache.compactable))
