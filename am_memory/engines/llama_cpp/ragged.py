"""Reads tokens into caches whose heads have slots of their own. Knows no session and no compaction.

The caches are those of the transformers engine. llama.cpp holds the tokens of one batch alone, in as many cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from am_memory.engines.base import Capabilities, OnQuery, SessionCache
from am_memory.engines.llama_cpp.context import Context
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.engines.llama_cpp.own_attention import OnOutput, OwnAttention
from am_memory.engines.llama_cpp.token_kernel import TokenKernel
from am_memory.errors import EngineFailed, InvalidInput
from am_memory.kv_cache.cache import KVCache

BATCH_TOKENS = 512
CAPABILITIES = Capabilities(
    has_ragged_heads=True,
    can_exchange_slots=True,
    can_hold_int8=True,
    can_compact_layerwise=True,
    can_rotate_keys=True,
)


class RaggedCache(KVCache):
    """The cache of one session, whose tokens llama.cpp reads."""


class RaggedReader:
    """Reads tokens into `RaggedCache`s.

    Args:
        source: owner of the model handle `source.model`.
        params: parameters of the contexts; some of them are set here.
        model: the tested model.
    """

    def __init__(self, source: Any, params: Any, model: CellModel) -> None:
        self._windows = [None if shape in model.layers else model.window_tokens for shape in model.in_order]
        self._rotations = [shape.rotation.pairs for shape in model.in_order]
        self.capabilities = replace(CAPABILITIES, can_refine=not model.windows)
        self._attention = OwnAttention()
        self._context = Context(source, params, self._attention.pointer, BATCH_TOKENS)
        self._context.open(iter([BATCH_TOKENS]))
        self._kernel: TokenKernel | None = None
        if not model.windows:
            self._kernel = TokenKernel(source, params, model)

    def new_cache(self) -> RaggedCache:
        """An empty cache."""
        return RaggedCache(self._windows, self._rotations)

    def read(self, cache: SessionCache, token_ids: Sequence[int], num_logits: int, on_query: OnQuery | None) -> Tensor:
        """Read tokens; see `Engine.forward`. A cache is as it was if anything is raised."""
        if not isinstance(cache, RaggedCache):
            raise InvalidInput(f"a {type(cache).__name__} is another engine's cache: make one with new_cache()")
        if len(token_ids) == 1 and self._kernel is not None and on_query is None and cache.num_tokens:
            return self._kernel.read(cache, token_ids[0])[:num_logits]
        state, rows = cache.state(), []
        try:
            with _queries_to(on_query, cache, is_whole=len(token_ids) <= BATCH_TOKENS):
                for start in range(0, len(token_ids), BATCH_TOKENS):
                    chunk = token_ids[start : start + BATCH_TOKENS]
                    wanted = min(max(num_logits - (len(token_ids) - start - len(chunk)), 0), len(chunk))
                    self._read(cache, chunk, wanted)
                    if wanted:
                        rows.append(self._context.logits(wanted))
        except BaseException:
            cache.restore(state)
            raise
        return torch.cat(rows) if rows else torch.empty(0, self._context.vocab_size)

    @contextmanager
    def compared(self, on_output: OnOutput) -> Iterator[None]:
        """Compare each attention with llama.cpp's own while the body reads; see `OwnAttention.on_output`."""
        parts: list[OwnAttention | TokenKernel] = (
            [self._attention] if self._kernel is None else [self._attention, self._kernel]
        )
        for part in parts:
            part.on_output = on_output
        try:
            yield
        finally:
            for part in parts:
                part.on_output = None

    def _read(self, cache: KVCache, token_ids: Sequence[int], num_logits: int) -> None:
        position = cache.num_tokens
        self._context.clear()
        with self._attention.over(cache):
            status = self._context.decode(token_ids, position, num_logits)
            if status and self._attention.error is None:
                raise EngineFailed(
                    f"llama.cpp could not read {len(token_ids)} tokens at position {position} (status {status}); "
                    "nothing was changed"
                )


@contextmanager
def _queries_to(on_query: OnQuery | None, cache: KVCache, *, is_whole: bool) -> Iterator[None]:
    """Hand the queries of a pass to `on_query`: layer by layer, or all at the end if the pass takes several batches."""
    if on_query is None:
        yield
        return
    layers = cache.compactable
    taken: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for index, layer in enumerate(layers):
        layer.query_sink = partial(on_query, index) if is_whole else lambda *pair, of=taken[index]: of.append(pair)
    try:
        yield
    finally:
        for layer in layers:
            layer.query_sink = None
    for index, parts in enumerate(taken):
        if parts:
            query, log_mass = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
            on_query(index, query, log_mass)
