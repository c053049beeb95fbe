"""The bytes of a sequence's state: read and rebuilt for every type, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp.cache import CellCache
from am_memory.engines.llama_cpp.library import KV_TYPES, from_rows, row_size, to_rows
from am_memory.engines.llama_cpp.state import Column, SequenceState
from am_memory.errors import UnsupportedModel


def random_state(num_cells: int, kind: str, *, is_transposed: bool = False) -> SequenceState:
    columns = [
        Column(kind, to_rows(torch.randn(num_cells, width), kind).reshape(num_cells, -1)) for width in (64, 64, 32, 32)
    ]
    return SequenceState(np.arange(num_cells, dtype=np.int32), tuple(columns[:2]), tuple(columns[2:]), is_transposed)


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("num_cells", [1, 63])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_is_packed_is_read_again(kind: str, num_cells: int, is_transposed: bool) -> None:
    if is_transposed and kind == "Q8_0":
        return  # llama.cpp does not transpose blocks
    state = random_state(num_cells, kind, is_transposed=is_transposed)
    again = SequenceState.parse(state.pack())
    assert np.array_equal(again.pack(), state.pack())
    assert np.array_equal(again.positions, state.positions)
    for mine, other in zip((*state.keys, *state.values), (*again.keys, *again.values), strict=True):
        assert np.array_equal(mine.rows, other.rows)


@pytest.mark.parametrize("flash_attention", [False, True])
def test_a_state_of_llama_cpp_is_rebuilt_byte_by_byte(tiny_gguf: Path, flash_attention: bool) -> None:
    """Without flash attention the values are written transposed."""
    engine = LlamaCppEngine(tiny_gguf, flash_attention=flash_attention, heads="shared")
    cache = engine.new_cache()
    engine.forward(cache, list(range(40, 100)))
    cells = cache.state().cells
    blob = cache.state().sequence.blob
    assert cells.is_transposed is not flash_attention
    assert np.array_equal(cells.pack(), blob)


@pytest.mark.parametrize("kind", KV_TYPES)
def test_numbers_become_rows_and_numbers_again(kind: str) -> None:
    numbers = from_rows(to_rows(torch.randn(5, 64), kind), kind)
    rows = to_rows(numbers, kind)
    assert rows.reshape(5, -1).shape[1] == row_size(kind, 64)
    assert torch.equal(from_rows(rows, kind), numbers)


def test_a_column_is_split_by_heads() -> None:
    numbers = torch.randn(4, 5, 16)  # heads, cells, head_dim
    column = random_state(1, "F32").keys[0].like(numbers)
    assert column.rows.shape == (5, 4 * 16 * 4)
    assert torch.equal(column.tensor(4), numbers)


def test_cells_are_taken_and_joined() -> None:
    state = random_state(10, "F16")
    parts = [state.take(slice(0, 3)), state.take(slice(3, 3)), state.take(slice(3, None))]
    assert np.array_equal(SequenceState.join(parts).pack(), state.pack())


def test_cells_out_of_order_are_sorted() -> None:
    """Where cells were freed in between, llama.cpp fills them first and writes cells as they lie."""
    state = random_state(6, "F16")
    order = [3, 0, 1, 5, 2, 4]
    shuffled = SequenceState.join([state.take(slice(index, index + 1)) for index in order])
    assert np.array_equal(shuffled.sorted().pack(), state.pack())


@pytest.mark.parametrize("size", [4, 30, 200, -1])
def test_a_state_that_ends_too_early_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedModel, match="ends .* bytes too early"):
        SequenceState.parse(random_state(6, "F16").pack()[:size])


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [(0, 1, "magic"), (8, 2, "2 streams"), (20, 2, "cells of other than one sequence"), (96, 99, "numbers of type 99")],
)
def test_another_layout_is_refused(offset: int, value: int, reason: str) -> None:
    blob = random_state(6, "F16").pack().copy()
    blob[offset : offset + 4] = np.frombuffer(np.uint32(value).tobytes(), dtype=np.uint8)
    with pytest.raises(UnsupportedModel, match=reason):
        SequenceState.parse(blob)


def test_sliding_windows_are_a_second_cache_with_cells_of_its_own() -> None:
    windows = random_state(4, "F32").at(range(2, 6))
    state = replace(random_state(6, "F16"), window=windows)
    again = SequenceState.parse(state.pack())
    assert np.array_equal(again.pack(), state.pack())
    assert again.window is not None
    assert again.window.positions.tolist() == [2, 3, 4, 5]
    earlier = again.before(4)
    assert earlier.positions.tolist() == [0, 1, 2, 3]
    assert earlier.window is not None
    assert earlier.window.positions.tolist() == [2, 3]


def test_a_third_cache_is_refused() -> None:
    blob = random_state(6, "F16").pack()
    with pytest.raises(UnsupportedModel, match=f"{len(blob) - 8} bytes behind its values has more than two caches"):
        SequenceState.parse(np.concatenate([blob, blob[8:], blob[8:]]))


def test_an_empty_cache_has_no_cells(shared_llama: LlamaCppEngine) -> None:
    cache: CellCache = shared_llama.new_cache()
    assert (cache.num_tokens, cache.kv_tokens, cache.nbytes) == (0, 0, 0)
