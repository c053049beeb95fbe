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
from am_memory.engines.llama_cpp.library import captured_log, library, reason, type_name
from am_memory.engines.llama_cpp.state import WHOLE, Blob, SequenceState
from am_memory.errors import EngineFailed

BATCH_TOKENS = 512
LEAST_CELLS = 1024
CELLS_STEP = 256
NO_SLOT = 1


class CellSequence:
    """The cells of one conversation, in the context or as bytes; several caches may share its prefix.

    Attributes:
        blob: the cells as bytes; None while the context has newer cells, or while there are no cells.
        num_shared: logical tokens at the start that other caches share, so that nobody may overwrite them.
        biases: for each layer (num_key_value_heads, num_cells) float32, for the first cells; they are added to the
            products of queries and keys before these are scaled. () if there are none.
    """

    def __init__(self, blob: Blob | None = None, biases: Sequence[Tensor] = ()) -> None:
        self.blob = blob
        self.biases = biases
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
        source: owner of the model handle `source.model`, which must outlive the contexts.
        params: parameters of the contexts; the decoder sets some of them itself.
        num_layers: number of attention layers.

    Attributes:
        capture: takes queries, keys and scores out of the contexts.
    """

    def __init__(self, source: Any, params: Any, num_layers: int) -> None:
        self._lib = library()
        self._source = source
        self._vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(source.model))
        self.capture = Capture(num_layers)
        self._params = params
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max, params.swa_full, params.no_perf = 1, True, True
        params.cb_eval = self.capture.pointer
        self._batch = self._lib.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context: Any = None
        self._num_cells = 0
        self._live: weakref.ref[CellSequence] | None = None

    def close(self) -> None:
        """Free the memory; the decoder cannot be used afterwards."""
        self._free_context()
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        self._batch, self._live = None, None

    def __del__(self) -> None:
        self.close()

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
        self._cut(position)
        rows = []
        for start in range(0, len(token_ids), BATCH_TOKENS):
            chunk = token_ids[start : start + BATCH_TOKENS]
            first = max(len(token_ids) - num_logits - start, 0)  # first token of the chunk with logits
            with self.capture.taking(on_attention, sequence.biases):
                self._decode(chunk, position + start, first)
            if first < len(chunk):
                rows.append(self._logits(len(chunk) - first))
        return torch.cat(rows) if rows else torch.empty(0, self._vocab_size)

    def take(self, sequence: CellSequence, num_tokens: int) -> SequenceState:
        """Copy the cells of the first `num_tokens` tokens out of a sequence."""
        blob = self._blob(sequence)
        assert blob is not None
        return SequenceState.parse(blob).sorted().before(num_tokens)

    def copy(self, sequence: CellSequence) -> CellSequence:
        """Make another sequence with the same cells."""
        return CellSequence(self._blob(sequence), sequence.biases)

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
        if self._context is not None:
            self._lib.llama_memory_clear(self._memory, False)

    def _put_in(self, blob: Blob) -> None:
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_seq_set_data(self._context, pointer, len(blob), 0) != len(blob):
            self._lib.llama_memory_clear(self._memory, False)
            raise EngineFailed(
                f"llama.cpp did not accept a state of {len(blob)} bytes in {self._num_cells} cells; nothing was changed"
            )

    def _write_out(self) -> Blob:
        size = self._lib.llama_state_seq_get_size(self._context, WHOLE)
        blob = np.empty(size, dtype=np.uint8)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_seq_get_data(self._context, pointer, size, WHOLE) != size:
            raise EngineFailed(f"llama.cpp did not write a state of {size} bytes; nothing was changed")
        return blob

    def _cut(self, position: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, 0, position, -1)

    @property
    def _memory(self) -> Any:
        return self._lib.llama_get_memory(self._context)

    def _decode(self, token_ids: Sequence[int], position: int, first_logit: int) -> None:
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for index, token_id in enumerate(token_ids):
            batch.token[index], batch.pos[index] = token_id, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index >= first_logit
        status = self._lib.llama_decode(self._context, batch)
        if status != 0 and self.capture.error is None:
            raise EngineFailed(
                f"llama.cpp could not read {len(token_ids)} tokens at position {position} (status {status}) with "
                f"{self._num_cells} cells; nothing was changed"
            )

    def _logits(self, num_rows: int) -> Tensor:
        pointer = self._lib.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(pointer, shape=(num_rows, self._vocab_size))
        return torch.from_numpy(rows.copy())

    def _require_room(self, num_cells: int) -> None:
        """Grow the context to at least `num_cells` cells."""
        if num_cells <= self._num_cells:
            return
        old = self._num_cells
        self._park()
        self._free_context()
        with captured_log() as lines:
            for wanted in _sizes(num_cells, old):
                self._params.n_ctx = wanted
                self._context = self._lib.llama_init_from_model(self._source.model, self._params)
                if self._context is not None:
                    self._num_cells = self._lib.llama_n_ctx(self._context)
                    return
        raise EngineFailed(
            f"llama.cpp cannot make a context of {num_cells} cells of {self.kv_types}: {reason(lines)}; nothing was "
            "changed. If memory is short, lower trigger_tokens; not every model takes every type of keys and values"
        )

    @property
    def kv_types(self) -> str:
        """The types of stored keys and values, such as "f16/f16"."""
        return "/".join(type_name(kind) for kind in (self._params.type_k, self._params.type_v))

    def _free_context(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
        self._context, self._num_cells = None, 0


def _sizes(num_cells: int, old: int) -> Iterator[int]:
    """Context sizes to try, in cells: first with room to grow, then just enough."""
    yield -(-max(num_cells * 5 // 4, 2 * old, LEAST_CELLS) // CELLS_STEP) * CELLS_STEP
    yield -(-num_cells // CELLS_STEP) * CELLS_STEP
