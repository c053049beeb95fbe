"""Reads tokens into caches whose heads have slots of their own. Knows no session and no compaction.

The caches are those of the transformers engine. llama.cpp holds the tokens of one pass alone, in as many cells.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from am_memory.engines.base import Capabilities, OnQuery, SessionCache
from am_memory.engines.branches import BranchLayer, TextBranches, begin
from am_memory.engines.llama_cpp.batch_kernel import MOST_CACHES, BatchKernel
from am_memory.engines.llama_cpp.context import CELLS_STEP, Context
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.engines.llama_cpp.own_attention import OnOutput, OwnAttention, in_float32
from am_memory.engines.llama_cpp.source import Source
from am_memory.engines.llama_cpp.token_kernel import TokenKernel
from am_memory.errors import EngineFailed, InvalidInput
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.kinds import FULL_ATTENTION, LayerKind

BATCH_TOKENS = 512
CAPABILITIES = Capabilities(
    has_ragged_heads=True,
    can_exchange_slots=True,
    can_hold_int8=True,
    can_compact_layerwise=True,
    can_read_in_parallel=True,
    can_rotate_keys=True,
    free_query_tokens=2,
)


class RaggedCache(KVCache):
    """The cache of one session, whose tokens llama.cpp reads."""

    read_by = "llama.cpp"


class RaggedReader:
    """Reads tokens into `RaggedCache`s, in any number of threads.

    Args:
        source: owner of the model.
        params: parameters of the contexts; some of them are set here.
        model: the tested model.
    """

    def __init__(self, source: Source, params: Any, model: CellModel) -> None:
        self._source, self._params, self._model = source, params, model
        window = LayerKind(window=model.window_tokens)
        self._kinds = [FULL_ATTENTION if shape in model.layers else window for shape in model.in_order]
        self._rotations = [shape.rotation.pairs for shape in model.in_order]
        self._idle: list[_Worker] = []
        self._batch_lock = threading.Lock()
        self._batch_kernel: BatchKernel | None = None
        self.capabilities = replace(CAPABILITIES, can_refine=not model.windows)

    def new_cache(self) -> RaggedCache:
        """An empty cache."""
        return RaggedCache(self._kinds, self._rotations)

    def read(self, cache: SessionCache, token_ids: Sequence[int], num_logits: int, on_query: OnQuery | None) -> Tensor:
        """Read tokens; see `Engine.forward`. A cache is as it was if anything is raised."""
        cache = _ours(cache)
        state = cache.state()
        with self._worker() as worker:
            try:
                return worker.read(cache, token_ids, num_logits, on_query)
            except BaseException:
                cache.restore(state)
                raise

    def branches(self, cache: SessionCache, beginnings: Sequence[Sequence[int]]) -> TextBranches | None:
        """Texts behind a cache, read as a batch; None for a model with sliding windows, which hold one text each."""
        if not isinstance(cache, RaggedCache) or self._model.windows or not cache.num_tokens:
            return None
        begun, logits = begin(lambda token_ids: self.read(cache, token_ids, 1, None), cache, beginnings)
        in_float = [[(key.float(), value.float()) for key, value in entries] for entries in begun]
        step = _SideBySide(self._source, self._params, len(beginnings)).step
        return TextBranches(list(map(in_float32, cache.compactable)), in_float, logits, step)

    @property
    def vocab_size(self) -> int:
        """The number of logits of a token."""
        return self._model.decoder.vocab_size

    @property
    def can_batch(self) -> bool:
        """Whether several caches can be read in one pass; sliding windows are read one by one."""
        return not self._model.windows

    def read_batch(
        self, caches: Sequence[SessionCache], token_ids: Sequence[int], on_query: Sequence[OnQuery | None]
    ) -> Tensor | None:
        """Read token i into cache i; see `Batching.forward_batch`. None if there are too many caches."""
        if len(caches) > MOST_CACHES:
            return None
        with self._batch_lock:
            if self._batch_kernel is None:
                self._batch_kernel = BatchKernel(self._source, self._params, self._model)
            return self._batch_kernel.read(list(map(_ours, caches)), token_ids, on_query)

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        """A worker that no other thread has."""
        worker = None
        with suppress(IndexError):
            worker = self._idle.pop()
        if worker is None:
            worker = _Worker(self._source, self._params, self._model)
        try:
            yield worker
        finally:
            self._idle.append(worker)

    @contextmanager
    def compared(self, on_output: OnOutput) -> Iterator[None]:
        """Compare each attention with llama.cpp's own while the body reads; see `OwnAttention.on_output`."""
        with self._worker() as worker:
            worker.compare_with(on_output)
        try:
            yield
        finally:
            worker.compare_with(None)


def _ours(cache: SessionCache) -> RaggedCache:
    if not isinstance(cache, RaggedCache):
        raise InvalidInput(f"a {type(cache).__name__} is another engine's cache: make one with new_cache()")
    return cache


class _Worker:
    """The contexts of one thread: one for passes over several tokens, and one for single tokens."""

    def __init__(self, source: Source, params: Any, model: CellModel) -> None:
        self._source, self._params = source, params
        self._attention = OwnAttention()
        self._context = self._new_context(BATCH_TOKENS)
        self._kernel = TokenKernel(source, params, model)

    def _new_context(self, num_tokens: int) -> Context:
        context = Context(self._source, self._params, self._attention.pointer, num_tokens)
        context.open(iter([num_tokens]))
        return context

    def compare_with(self, on_output: OnOutput | None) -> None:
        """See `OwnAttention.on_output`."""
        self._attention.on_output = self._kernel.on_output = on_output

    def read(self, cache: KVCache, token_ids: Sequence[int], num_logits: int, on_query: OnQuery | None) -> Tensor:
        """Read tokens; see `Engine.forward`."""
        if len(token_ids) == 1 and on_query is None and cache.num_tokens:
            return self._kernel.read(cache, token_ids[0])[:num_logits]
        if on_query is None:
            rows = []
            for start in range(0, len(token_ids), BATCH_TOKENS):
                chunk = token_ids[start : start + BATCH_TOKENS]
                wanted = min(max(num_logits - (len(token_ids) - start - len(chunk)), 0), len(chunk))
                rows.append(self._pass(cache, chunk, wanted))
            return torch.cat(rows)
        layers = cache.compactable
        for index, layer in enumerate(layers):
            layer.query_sink = partial(on_query, index)
        try:
            return self._pass(cache, token_ids, num_logits)
        finally:
            for layer in layers:
                layer.query_sink = None

    def _pass(self, cache: KVCache, token_ids: Sequence[int], num_logits: int) -> Tensor:
        """Read tokens in one pass."""
        if len(token_ids) > self._context.batch_tokens:
            self._context = self._new_context(-(-len(token_ids) // BATCH_TOKENS) * BATCH_TOKENS)
        position = cache.num_tokens
        self._context.clear()
        with self._attention.over(cache.with_keys):
            status = self._context.decode(token_ids, position, num_logits)
            if status and self._attention.error is None:
                raise EngineFailed(
                    f"llama.cpp could not read {len(token_ids)} tokens at position {position} (status {status}); "
                    "nothing was changed"
                )
        return self._context.logits(num_logits) if num_logits else torch.empty(0, self._context.vocab_size)


class _SideBySide:
    """A context that reads one token of each of several texts."""

    def __init__(self, source: Source, params: Any, num_texts: int) -> None:
        self._attention = OwnAttention()
        self._context = Context(source, params, self._attention.pointer, num_texts, num_texts)
        self._context.open(iter([CELLS_STEP]))

    def step(self, token_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Read token ids (num_texts, 1) at positions (num_texts, 1); returns logits (num_texts, vocab_size)."""
        self._context.clear()
        with torch.no_grad(), self._attention.over(cast("Sequence[BranchLayer]", cache.layers)):
            status = self._context.decode_side_by_side(token_ids.flatten().tolist(), positions.flatten().tolist())
            if status and self._attention.error is None:
                raise EngineFailed(f"llama.cpp could not read a token of {len(token_ids)} texts (status {status})")
        return self._context.logits(len(token_ids))
