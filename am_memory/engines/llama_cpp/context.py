"""One llama.cpp context: it decodes tokens and gives their logits. Knows no cache and no attention."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from am_memory.engines.llama_cpp.library import captured_log, library, reason, type_name
from am_memory.engines.llama_cpp.source import Source
from am_memory.errors import EngineFailed

CELLS_STEP = 256
"""Cells of a context are a multiple of this."""


class Context:
    """A context, which can be opened again with another number of cells.

    Args:
        source: owner of the model.
        params: parameters of the context, which are copied; some are set here.
        callback: called by llama.cpp before each operation, a `ggml_backend_sched_eval_callback`.
        batch_tokens: see below.
        num_sequences: the most sequences of one `decode_side_by_side`.

    Attributes:
        num_cells: the number of its cells; 0 while it is closed.
        vocab_size: the number of logits of a token.
        batch_tokens: the most tokens of one `decode`.
    """

    def __init__(self, source: Source, params: Any, callback: Any, batch_tokens: int, num_sequences: int = 1) -> None:
        self._lib, self._source, self._callback = library(), source, callback
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(source.model))
        self._params = self._lib.llama_context_default_params()
        ctypes.pointer(self._params)[0] = params
        self._params.n_batch = self._params.n_ubatch = self.batch_tokens = batch_tokens
        self._params.n_seq_max, self._params.kv_unified = num_sequences, True
        self._params.swa_full = self._params.no_perf = True
        self._params.cb_eval = callback
        self._batch = self._lib.llama_batch_init(batch_tokens, 0, 1)
        self._handle: Any = None
        self.num_cells = 0
        source.add(self)

    def open(self, sizes: Iterator[int]) -> None:
        """Make the context.

        Args:
            sizes: numbers of cells to try, one after the other.

        Raises:
            EngineFailed: llama.cpp makes a context of none of these sizes.
        """
        self.close()
        wanted = 0
        with captured_log() as lines:
            for wanted in sizes:
                self._params.n_ctx = wanted
                self._handle = self._lib.llama_init_from_model(self._source.model, self._params)
                if self._handle is not None:
                    self.num_cells = self._lib.llama_n_ctx(self.handle)
                    return
        raise EngineFailed(
            f"llama.cpp cannot make a context of {wanted} cells of {self.kv_types}: {reason(lines)}; nothing was "
            "changed. If memory is short, lower trigger_tokens; not every model takes every type of keys and values"
        )

    def close(self) -> None:
        """Free llama.cpp's context; it can be opened again."""
        if self._handle is not None:
            self._lib.llama_free(self._handle)
        self._handle, self.num_cells = None, 0

    def __del__(self) -> None:
        if sys is None or sys.is_finalizing():  # the process frees all of it, and llama.cpp's functions may be gone
            return
        if getattr(self, "_handle", None) is not None:
            self.close()
        if getattr(self, "_batch", None) is not None:
            self._lib.llama_batch_free(self._batch)
            self._batch = None

    @property
    def handle(self) -> Any:
        """llama.cpp's context; None while it is closed. Raises EngineFailed once the model was freed."""
        return self._handle if self._source.model is not None else None

    @property
    def memory(self) -> Any:
        """llama.cpp's handle of the cells."""
        return self._lib.llama_get_memory(self.handle)

    @property
    def kv_types(self) -> str:
        """The types of stored keys and values, such as "f16/f16"."""
        return "/".join(type_name(kind) for kind in (self._params.type_k, self._params.type_v))

    def clear(self) -> None:
        """Drop all cells."""
        self._lib.llama_memory_clear(self.memory, False)

    def decode(self, token_ids: Sequence[int], position: int, num_logits: int) -> int:
        """Compute a batch of tokens.

        Args:
            position: of the first token.
            num_logits: logits are computed for this many of the last tokens.

        Returns:
            llama.cpp's status, 0 if all went well.
        """
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for index, token_id in enumerate(token_ids):
            batch.token[index], batch.pos[index] = token_id, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index >= len(token_ids) - num_logits
        return self._decode()

    def decode_side_by_side(self, token_ids: Sequence[int], positions: Sequence[int]) -> int:
        """Compute one token of each of several sequences, with its logits; returns llama.cpp's status."""
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for index, (token_id, position) in enumerate(zip(token_ids, positions, strict=True)):
            batch.token[index], batch.pos[index] = token_id, position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, index, True
        return self._decode()

    def _decode(self) -> int:
        with interrupts_wait():
            return int(self._lib.llama_decode(self.handle, self._batch))

    def logits(self, num_rows: int) -> Tensor:
        """A copy of the last batch's logits, (num_rows, vocab_size) float32."""
        rows = np.ctypeslib.as_array(self._lib.llama_get_logits(self.handle), shape=(num_rows, self.vocab_size))
        return torch.from_numpy(rows.copy())


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Handle Ctrl-C behind the body.

    Python handles signals at the beginning of a function. In a callback, `KeyboardInterrupt` would be raised before its
    first line, and ctypes would print and forget it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[tuple[int, FrameType | None]]()
    signal.signal(signal.SIGINT, lambda *event: came.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for event in came[:1]:
            handler(*event)
