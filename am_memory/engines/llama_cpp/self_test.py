"""Tests at start, on a few tokens, that this llama.cpp does with this model what the engine relies on.

- A state that is parsed and packed again has the same bytes.
- Queries and keys from the graph give the same attention as the kernel.
- The keys of the state are those of the graph.
- Queries change with their position by a rotation.
- A state without one of its cells can be restored, and tokens can be read behind it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from am_memory.engines.llama_cpp.capture import Attention
from am_memory.engines.llama_cpp.decoder import CellSequence, Decoder
from am_memory.engines.llama_cpp.library import VERSION, library
from am_memory.engines.llama_cpp.model import CellModel, LayerShape
from am_memory.engines.llama_cpp.ragged import RaggedReader
from am_memory.engines.llama_cpp.rotation import MeasuredRotation, measured_rotations
from am_memory.engines.llama_cpp.state import Column, SequenceState
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.cache import CacheState, KVCache
from am_memory.kv_cache.slots import Segment, Slots

NUM_TOKENS = 8
LEFT_OUT = 3
TEST_TOLERANCE = 2e-2
"""Largest RMS error of attention outputs and logits, relative to their RMS; everything is in 16 bits or less."""
LOGITS_TOLERANCE = 0.25
"""The same for logits behind another attention: between layers llama.cpp rounds to 8 bits, which makes more of it."""
HEAVY = -1e4
"""A bias that no score outweighs."""


def tested_model(decoder: Decoder, model: Any, num_layers: int) -> CellModel:
    """Run the tests; returns what caches need to know about the model.

    Args:
        model: the model of llama.cpp.

    Raises:
        UnsupportedModel: a test failed.
    """
    token_ids = _token_ids(decoder.vocab_size)
    captured: list[Attention] = []
    outputs: list[tuple[Tensor, Tensor]] = []

    def take(_: int, attention: Attention) -> None:
        captured.append(attention)
        outputs.append((attention.expected(), attention.actual()))

    sequence = CellSequence()
    decoder.read(sequence, token_ids, 0, 0, 0, take)
    state = decoder.take(sequence, NUM_TOKENS)
    blob = sequence.blob
    assert blob is not None
    _require(np.array_equal(blob, state.pack()), "a state that was read and rebuilt is not the same bytes")
    num_windows = 0 if state.window is None else len(state.window.keys)
    _require(
        len(captured) == len(state.keys) + num_windows == num_layers,
        f"{len(captured)} attentions, {len(state.keys)} and {num_windows} layers",
    )
    _require(len(state.keys) > 0, "it has only layers with a sliding window: its cache is bounded already")
    rotations = measured_rotations(decoder, model, token_ids[0])
    in_order: list[LayerShape] = []
    shapes: list[LayerShape] = []
    windows: list[LayerShape] = []
    taken = []
    for number, (attention, (expected, actual)) in enumerate(zip(captured, outputs, strict=True)):
        error = _relative_rms(actual, expected)
        _require(error < TEST_TOLERANCE, f"layer {number}: attention from queries and keys is off by {error:.2g}")
        if len(shapes) < len(state.keys) and _is_key(state.keys[len(shapes)], attention):
            shapes.append(_shape(attention, state, len(shapes), rotations[number]))
            in_order.append(shapes[-1])
            taken.append(number)
        else:
            is_window = state.window is not None and _is_key(state.window.keys[len(windows)], attention)
            _require(is_window, f"layer {number}: the state's keys are not the graph's {tuple(attention.key.shape)}")
            assert state.window is not None
            windows.append(_shape(attention, state.window, len(windows), rotations[number]))
            in_order.append(windows[-1])
    decoder.capture.layers = taken
    _require_write(decoder, state, token_ids[-1])
    window_tokens = library().llama_model_n_swa(model) if windows else 0
    return CellModel(decoder, tuple(shapes), tuple(in_order), state.before(1), tuple(windows), window_tokens)


def require_ragged(reader: RaggedReader, model: CellModel) -> None:
    """Test attention over slots that differ by head, with biases.

    - Attention over a batch, and over slots and a token, is what llama.cpp's kernel gives.
    - Slots without a token, or with a bias that removes all its weight, act like leaving its cell out.

    Args:
        model: the tested model.

    Raises:
        UnsupportedModel: a test failed.
    """
    decoder, cache, sequence = model.decoder, reader.new_cache(), CellSequence()
    *token_ids, token_id = _token_ids(decoder.vocab_size)

    def compare(output: Tensor, expected: Tensor) -> None:
        error = _relative_rms(output, expected)
        _require(error < TEST_TOLERANCE, f"attention over slots of each head is off by {error:.2g}")

    def require_same(actual: Tensor, expected: Tensor) -> None:
        error = _relative_rms(actual, expected)
        _require(error < LOGITS_TOLERANCE, f"logits by slots of each head are off by {error:.2g}")

    decoder.read(sequence, [*token_ids, token_id], 0, 0, 0, None)
    state = decoder.take(sequence, NUM_TOKENS)
    with reader.compared(compare):
        reader.read(cache, [*token_ids, token_id], 0, None)
    for ours, cells in ((cache.state(), state), (_without(cache), _fewer(state))):
        sequence = CellSequence(cells.pack())
        cache.restore(ours)
        expected = decoder.read(sequence, token_ids, NUM_TOKENS, NUM_TOKENS, 1, None)
        require_same(reader.read(cache, token_ids, 1, None), expected)
        expected = decoder.read(sequence, [token_id], cache.num_tokens, cache.num_tokens, 1, None)
        with reader.compared(compare):
            require_same(reader.read(cache, [token_id], 1, None), expected)
    decoder.close()


def require_batch(reader: RaggedReader) -> None:
    """Test that caches which read a token each in one pass expect what each expects alone.

    Raises:
        UnsupportedModel: they do not.
    """
    caches = [reader.new_cache(), reader.new_cache()]
    token_ids = _token_ids(reader.vocab_size)
    reader.read(caches[0], token_ids, 0, None)
    caches[0].restore(_without(caches[0]))
    reader.read(caches[1], token_ids[:LEFT_OUT], 0, None)
    alone = [reader.read(cache.fork(), [token_id], 1, None) for cache, token_id in zip(caches, token_ids, strict=False)]
    logits = reader.read_batch(caches, token_ids[:2], [None, None])
    assert logits is not None
    error = max(_relative_rms(row, expected[0]) for row, expected in zip(logits, alone, strict=True))
    _require(error < LOGITS_TOLERANCE, f"logits of several texts in one pass are off by {error:.2g}")


def _without(cache: KVCache) -> CacheState:
    """All but the last tokens as slots: in the first head a bias hides one token, which the other heads do not have."""
    new_slots = []
    for layer in cache.compactable:
        slots = Slots.recalled(*layer.exact_entries(0, NUM_TOKENS - 2), start=0)
        hidden = slots.positions == LEFT_OUT
        bias = slots.bias.masked_fill(hidden, HEAVY)
        hidden[: slots.cu_slots[1]] = False
        new_slots.append(replace(slots, bias=bias).where(~hidden))
    return cache.compacted([Segment(0, NUM_TOKENS - 2, new_slots[0].num_slots)], new_slots, 0)


def _token_ids(vocab_size: int) -> list[int]:
    """Tokens from all over the vocabulary."""
    return [index * vocab_size // (NUM_TOKENS + 1) for index in range(1, NUM_TOKENS + 1)]


def _is_key(key: Column, attention: Attention) -> bool:
    """Whether keys of the state are those of an attention in the graph."""
    held, computed = key.tensor(attention.key.shape[0]).float(), attention.key[:, :NUM_TOKENS].float()
    return held.shape == computed.shape and _relative_rms(held, computed) < TEST_TOLERANCE


def _shape(attention: Attention, state: SequenceState, index: int, rotation: MeasuredRotation) -> LayerShape:
    num_heads, _, head_dim = attention.key.shape
    key, value = state.keys[index], state.values[index]
    width = value.tensor(num_heads).shape[-1]
    _require(width == head_dim, f"layer {index}: keys have {head_dim} numbers a head, values {width}")
    cell_bytes = key.rows.shape[1] + value.rows.shape[1]
    return LayerShape(num_heads, len(attention.query), head_dim, attention.scaling, cell_bytes, rotation)


def _require_write(decoder: Decoder, state: SequenceState, token_id: int) -> None:
    """Restore states with all cells, and with one less at other positions, and read a token behind each."""

    def logits(cells: SequenceState) -> Tensor:
        return decoder.read(CellSequence(cells.pack()), [token_id], NUM_TOKENS, NUM_TOKENS, 1, None)

    fewer = _fewer(state)
    moved = fewer.at([*range(NUM_TOKENS - 2), NUM_TOKENS - 1])
    whole, first, second = logits(state), logits(fewer), logits(moved)
    error = _relative_rms(second, first)
    _require(error < TEST_TOLERANCE, f"logits depend on where cells are said to stand (off by {error:.2g})")
    _require(not torch.equal(whole, first), "a cell that was left out is still there")


def _fewer(state: SequenceState) -> SequenceState:
    """The cells without one."""
    kept = SequenceState.join([state.take(slice(0, LEFT_OUT)), state.take(slice(LEFT_OUT + 1, None))])
    return replace(kept, window=state.window)


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-12))


def _require(is_so: bool, otherwise: Any) -> None:
    if not is_so:
        raise UnsupportedModel(
            f"this llama.cpp does not do what the engine relies on: {otherwise}. It was written for llama-cpp-python "
            f"{VERSION} and models of standard attention: use that version, another model, or engine='transformers'"
        )
