"""One token's forward pass as a CUDA graph: a GPU runs its thousand kernels faster than Python can launch them.

A graph is captured for one cache, and replayed while the cache has the same slots and tail buffers. Its kernels read
what changes with each token from the device's memory: the token's id, its position, and where to write in the tail.
Steps of several tokens, and passes whose queries are wanted, use no graph. Knows no policy and no compaction.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from am_memory.engines.transformers import support
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer

PATIENCE = 4
"""Tokens that a cache reads one by one, with the same slots, before a graph is captured. A capture costs two passes."""
SPARE_TOKENS = 128
"""Room in the tails when a graph is captured. Once it is full, the tails grow and another graph is captured."""
MAX_CACHES = 16
"""The most caches that have a graph at the same time."""

Forward = Callable[[KVCache, Tensor, Tensor], Tensor]
"""Takes a cache, a token id and its position, (1, 1) int64 on the device; returns logits, (1, vocab_size) float32."""
Replay = Callable[[], object]
Layers = Sequence[CompactableLayer]
"""All layers of a cache."""
logger = logging.getLogger("am_memory")
_lock = threading.Lock()
"""Graphs share their inputs and their memory, and torch captures one graph at a time."""


class TokenGraphs:
    """The graphs of a model: one for each cache that reads token by token.

    Args:
        forward: the pass to capture; nothing in it may wait for the device.
        device: a CUDA device.

    Attributes:
        is_off: a capture failed, and no other is tried.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward = forward
        self.device = device
        self._inputs = torch.zeros(3, dtype=torch.int64, device=device)  # id, position, write position
        self._graphs: weakref.WeakKeyDictionary[object, _CacheGraph] = weakref.WeakKeyDictionary()  # by first layer
        self._captured = Recorder(device)
        self.is_off = False

    def read(self, cache: KVCache, token_id: int) -> Tensor | None:
        """Read a token into a cache with its graph, capturing it first if needed.

        Returns:
            Logits, (1, vocab_size) float32. None: nothing was read, and the token needs an ordinary pass.
        """
        if self.is_off:
            return None
        with _lock:
            try:
                return self._read(cache, token_id)
            except RuntimeError as error:
                self.is_off = True
                logger.warning("tokens are read without CUDA graphs from now on: %s", error)
                return None

    def _read(self, cache: KVCache, token_id: int) -> Tensor | None:
        layers = cache.compactable
        graph = self._graphs.get(layers[0])
        if graph is None or not graph.has_slots_of(layers):
            graph = self._graphs[layers[0]] = _CacheGraph(layers)
            if len(self._graphs) > MAX_CACHES:
                del self._graphs[next(iter(self._graphs))]
        graph.num_seen += 1
        if graph.num_seen < PATIENCE or not (cache.is_whole and self._captured.is_possible):
            return None
        if not (has_graph := graph.has_tails_of(layers)):
            for layer in layers:
                layer.reserve(SPARE_TOKENS)
        inputs = torch.tensor([token_id, cache.num_tokens, layers[0].length])
        self._inputs.copy_(inputs, non_blocking=True)
        if not graph.is_warm:  # a first launch compiles kernels, which no capture allows
            logits, graph.is_warm = self._pass(cache, layers), True
        else:
            if not has_graph:
                graph.capture(layers, self._captured, lambda: self._pass(cache, layers))
            logits = graph.replayed()
        for layer in layers:
            layer.length += 1
        return logits

    def _pass(self, cache: KVCache, layers: Layers) -> Tensor:
        token_id, position, write_position = self._inputs[:, None].unbind()
        for layer in layers:
            layer.write_position = write_position
        try:
            return self._forward(cache, token_id[None], position[None])
        finally:
            for layer in layers:
                layer.write_position = None


class _CacheGraph:
    """The graph of one cache, if it has one yet. It keeps no tensor alive that the cache drops."""

    def __init__(self, layers: Layers) -> None:
        self.num_seen, self.is_warm = 0, False
        self._slots = [_reference(layer.slots) for layer in layers]
        self._tails: list[Callable[[], object]] = []
        self._replay: Replay | None = None
        self._logits = torch.empty(0)

    def has_slots_of(self, layers: Layers) -> bool:
        return all(slots() is layer.slots for slots, layer in zip(self._slots, layers, strict=True))

    def has_tails_of(self, layers: Layers) -> bool:
        """Whether it was captured with these buffers, and there is room in them."""
        return bool(self._tails) and all(
            tail() is layer.buffer and layer.room > 0 for tail, layer in zip(self._tails, layers, strict=True)
        )

    def capture(self, layers: Layers, captured: Recorder, run: Callable[[], Tensor]) -> None:
        self._tails, self._replay = [], None
        self._replay, self._logits = captured(run)
        self._tails = [_reference(layer.buffer) for layer in layers]

    def replayed(self) -> Tensor:
        assert self._replay is not None
        self._replay()
        return self._logits.clone()  # each replay writes there


def _reference(of: object) -> Callable[[], object]:
    """A weak reference, or one to None."""
    return (lambda: None) if of is None else weakref.ref(of)


class Recorder:
    """Captures functions as graphs, all in one stream and one memory pool: no two of the graphs may run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # torch frees the pool with the last of its graphs.
        self._keeps_pool = self(lambda: torch.zeros(1, device=device))

    @property
    def is_possible(self) -> bool:
        """Whether the current stream is the default one; the memory of the graphs is safe in one stream only."""
        return bool(torch.cuda.current_stream(self._device) == torch.cuda.default_stream(self._device))

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Capture `run`; returns the replay and the tensor that each replay writes. Nothing has run yet."""
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[self._stream.device_index]
        before = generator.clone_state()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            try:
                # "thread_local": other threads may use the device meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = run()
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                generator.graphsafe_set_state(before)  # else torch believes that it is still being captured
                raise
        return graph.replay, result


def token_graphs(model: PreTrainedModel, forward: Forward, new_cache: Callable[[], KVCache]) -> TokenGraphs | None:
    """The graphs of a model, after a test on a few tokens; None if the model cannot have any, and the log says why."""
    name, token_ids = type(model).__name__, support.probe_ids(model)
    if not can_have_graphs(model, new_cache()):
        return None
    try:
        # Without compiled layers, which would be compiled for this pass.
        with torch.compiler.set_stance("force_eager"), _NoWaiting():  # type: ignore[no-untyped-call]
            forward(new_cache(), token_ids[:1, None], torch.zeros_like(token_ids[:1, None]))
    except _Waits as operation:
        logger.info("%s waits for the device (%s): it has no CUDA graphs", name, operation)
        return None
    graphs = TokenGraphs(forward, model.device)
    error = _error(graphs, forward, (new_cache(), new_cache()), token_ids.tolist())
    if error > support.LOGITS_TOLERANCE.get(model.dtype, 1e-3):
        graphs.is_off = True
        logger.warning("%s computes something else as a CUDA graph (error %.2g)", name, error)
    return None if graphs.is_off else graphs


def shortcut(model: PreTrainedModel, graphs: TokenGraphs, cache_argument: str) -> Callable[..., Any]:
    """The model's `forward` for `generate()` of transformers, which reads single tokens with graphs.

    Args:
        cache_argument: the name of `forward`'s cache argument.
    """
    forward, dtype = model.forward, model.dtype

    @functools.wraps(forward)
    def by_graph(*args: Any, **kwargs: Any) -> Any:
        asked = {**dict(zip(["input_ids"], args, strict=False)), **kwargs}
        cache = asked.pop(cache_argument, None)
        if len(args) <= 1 and isinstance(cache, KVCache) and _is_next_token(cache, **asked):
            logits = graphs.read(cache, int(asked["input_ids"]))
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits[None].to(dtype), **{cache_argument: cache})  # type: ignore[arg-type]
        return forward(*args, **kwargs)

    return by_graph


def _is_next_token(
    cache: KVCache,
    *,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int = 0,
    return_dict: bool | None = None,
    **others: Any,
) -> bool:
    """Whether a watched cache reads one token, for its logits alone; the watcher has checked the mask."""
    return (
        cache.before_forward is not None
        and not others
        and return_dict is not False
        and not torch.is_grad_enabled()
        and all(layer.query_sink is None for layer in cache.compactable)
        and input_ids is not None
        and input_ids.shape == (1, 1)
        and (position_ids is None or bool((position_ids == cache.num_tokens).all()))
    )


class _Waits(Exception):
    """An operation makes the host wait for its result."""


class _NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises for operations that would break a capture; a broken capture leaves torch's allocator in a bad state."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_index_by_number = func is torch.ops.aten.index.Tensor and all(
            index is None or index.dtype in (torch.int64, torch.int32) for index in args[1]
        )
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if waits and not is_index_by_number:
            raise _Waits(str(func))
        return func(*args, **(kwargs or {}))


def can_have_graphs(model: PreTrainedModel, cache: KVCache) -> bool:
    """Whether a model can have graphs.

    Not with sliding windows, whose entries move at each token, nor with recurrent states, which are copied. Not on
    several devices, which wait for each other, nor with capped scores or latents, for which there is no kernel.
    """
    is_on_one = {parameter.device for parameter in model.parameters()} == {model.device}
    is_capped = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    has_kernel = not is_capped and not any(kind.has_latents for kind in cache.kinds)
    return model.device.type == "cuda" and is_on_one and has_kernel and cache.is_all_compactable


def _error(graphs: TokenGraphs, forward: Forward, caches: tuple[KVCache, KVCache], token_ids: Sequence[int]) -> float:
    """The largest RMS error of logits from graphs, relative to their standard deviation."""
    by_itself, by_graph = caches
    error = 0.0
    for inputs in enumerate(token_ids):
        position, token_id = torch.tensor(inputs).to(graphs.device)[:, None, None]
        expected = forward(by_itself, token_id, position)
        actual = graphs.read(by_graph, inputs[1])
        if actual is None:
            forward(by_graph, token_id, position)
        else:
            error = max(error, support.relative_rms(actual, expected))
    return error
