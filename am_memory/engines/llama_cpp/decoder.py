"""One llama.cpp context and the sequence in it; other sequences are kept as bytes. Knows no session and no compaction.

A context has room for one sequence. It grows when more cells are needed. When another sequence is read, the current one
is written out as bytes first, unless no cache refers to it any more.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from am_memory.engines.llama_cpp.capture import Capture, OnAttention
from am_memory.engines.llama_cpp.context import CELLS_STEP, Context
from am_memory.engines.llama_cpp.library import library
from am_memory.engines.llama_cpp.source import Source
from am_memory.engines.llama_cpp.state import WHOLE, Blob, SequenceState
from am_memory.errors import EngineFailed

BATCH_TOKENS = 512
LEAST_CELLS = 1024


class CellSequence:
    """The cells of one conversation, in the context or as bytes; several caches may share its prefix.

    Attributes:
        blob: the cells as bytes; None while the context has newer cells, or while there are no cells.
        num_shared: logical tokens at the start that other caches share, so that nobody may overwrite them.
    """

    def __init__(self, blob: Blob | None = None) -> None:
        self.blob = blob
        self.num_shared = 0
        self._writer: weakref.ref[object] | None = None

    def share(self, num_tokens: int) -> None:
        """Share the first tokens with another cache; the first cache to append becomes the writer."""
        self.num_shared = max(self.num_shared, num_tokens)
        self._writer = None

    def claim(self, writer: object, num_tokens: int) -> bool:
        """Make `writer` the only writer behind the first `num_tokens` tokens; False if that is not possible."""
        current = None if self._writer is None else self._writer()
        if num_tokens < self.num_shared or current not in (None, writer):
            return False
        self._writer = weakref.ref(writer)
        return True


class Decoder:
    """Reads tokens into sequences.

    Args:
        source: owner of the model.
        params: parameters of the contexts; the decoder sets some of them itself.
        num_layers: number of attention layers.

    Attributes:
        capture: takes queries, keys and scores out of the contexts.
    """

    def __init__(self, source: Source, params: Any, num_layers: int) -> None:
        self._lib = library()
        self.capture = Capture(num_layers)
        self._context = Context(source, params, self.capture.pointer, BATCH_TOKENS)
        self._live: weakref.ref[CellSequence] | None = None

    @property
    def vocab_size(self) -> int:
        """The number of logits of a token."""
        return self._context.vocab_size

    def close(self) -> None:
        """Free llama.cpp's context, with the sequence in it; the next `read` makes another one."""
        self._context.close()
        self._live = None

    def read(
        self,
        sequence: CellSequence,
        token_ids: Sequence[int],
        position: int,
        num_cells: int,
        num_logits: int,
        on_attention: OnAttention | None,
    ) -> Tensor:
        """Append tokens to a sequence at a position.

        Args:
            sequence: its cells at `position` and later are dropped.
            position: logical position of the first token.
            num_cells: cells that the sequence has before the tokens, in the layers with the most cells.
            num_logits: for how many of the last tokens to return logits.
            on_attention: called with the attention of every layer.

        Returns:
            (num_logits, vocab_size) float32.
        """
        self._require_room(num_cells + len(token_ids))
        self._activate(sequence)
        sequence.blob = None
        self._lib.llama_memory_seq_rm(self._context.memory, 0, position, -1)
        rows = []
        for start in range(0, len(token_ids), BATCH_TOKENS):
            chunk = token_ids[start : start + BATCH_TOKENS]
            first = max(len(token_ids) - num_logits - start, 0)  # first token of the chunk with logits
            with self.capture.taking(on_attention):
                self._decode(chunk, position + start, max(len(chunk) - first, 0))
            if first < len(chunk):
                rows.append(self._context.logits(len(chunk) - first))
        return torch.cat(rows) if rows else torch.empty(0, self._context.vocab_size)

    def take(self, sequence: CellSequence, num_tokens: int) -> SequenceState:
        """Copy the cells of the first `num_tokens` tokens out of a sequence."""
        blob = self._blob(sequence)
        assert blob is not None
        return SequenceState.parse(blob).sorted().before(num_tokens)

    def copy(self, sequence: CellSequence) -> CellSequence:
        """Make another sequence with the same cells."""
        return CellSequence(self._blob(sequence))

    def _blob(self, sequence: CellSequence) -> Blob | None:
        """The cells of a sequence as bytes; None if nothing was read into it."""
        if sequence.blob is None and self._live is not None and self._live() is sequence:
            sequence.blob = self._write_out()
        return sequence.blob

    def _activate(self, sequence: CellSequence) -> None:
        """Put a sequence into the context."""
        if self._live is not None and self._live() is sequence:
            return
        self._park()
        if sequence.blob is not None:
            self._put_in(sequence.blob)
        self._live = weakref.ref(sequence)

    def _park(self) -> None:
        """Write the current sequence out as bytes, and empty the context."""
        live = None if self._live is None else self._live()
        if live is not None:
            self._blob(live)
        self._live = None
        if self._context.handle is not None:
            self._context.clear()

    def _put_in(self, blob: Blob) -> None:
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_seq_set_data(self._context.handle, pointer, len(blob), 0) != len(blob):
            self._context.clear()
            raise EngineFailed(
                f"llama.cpp did not accept a state of {len(blob)} bytes in {self._context.num_cells} cells; nothing "
                "was changed"
            )

    def _write_out(self) -> Blob:
        size = self._lib.llama_state_seq_get_size(self._context.handle, WHOLE)
        blob = np.empty(size, dtype=np.uint8)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_seq_get_data(self._context.handle, pointer, size, WHOLE) != size:
            raise EngineFailed(f"llama.cpp did not write a state of {size} bytes; nothing was changed")
        return blob

    def _decode(self, token_ids: Sequence[int], position: int, num_logits: int) -> None:
        status = self._context.decode(token_ids, position, num_logits)
        if status != 0 and self.capture.error is None:
            raise EngineFailed(
                f"llama.cpp could not read {len(token_ids)} tokens at position {position} (status {status}) with "
                f"{self._context.num_cells} cells; nothing was changed"
            )

    def _require_room(self, num_cells: int) -> None:
        """Grow the context to at least `num_cells` cells."""
        if num_cells > self._context.num_cells:
            self._park()
            self._context.open(_sizes(num_cells, self._context.num_cells))

    @property
    def kv_types(self) -> str:
        """The types of stored keys and values, such as "f16/f16"."""
        return self._context.kv_types


def _sizes(num_cells: int, old: int) -> Iterator[int]:
    """Context sizes to try, in cells: first with room to grow, then just enough."""
    yield -(-max(num_cells * 5 // 4, 2 * old, LEAST_CELLS) // CELLS_STEP) * CELLS_STEP
    yield -(-num_cells // CELLS_STEP) * CELLS_STEP
