"""The weights that contexts compute with: those of a file, or those of a user's `Llama`. Knows no cache."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from typing import Any, Protocol

from am_memory.engines.gguf_header import BadHeader, read_header, require_vocabulary
from am_memory.engines.llama_cpp.library import captured_log, library, reason
from am_memory.errors import EngineFailed, InvalidInput, ModelNotFound, UnsupportedModel


class Closable(Protocol):
    """Something of llama.cpp that must be freed before the model is."""

    def close(self) -> None: ...


class Source(Protocol):
    """Owner of a model of llama.cpp.

    Attributes:
        model: the handle. Raises EngineFailed once the model was freed.
        path: the GGUF file.
    """

    path: Path

    @property
    def model(self) -> Any: ...

    def add(self, context: Closable) -> None:
        """Close a context before the model is freed."""
        ...


def _require_readable(path: Path) -> None:
    """Refuse a file for which llama.cpp would abort the process: a bad vocabulary, or a table of positions."""
    try:
        header = read_header(path)
        require_vocabulary(header)
    except (BadHeader, OSError) as error:
        raise ModelNotFound(f"{path} cannot be read by llama.cpp: {error}") from error
    if table := header.shapes.get("position_embd.weight"):
        raise UnsupportedModel(
            f"{path} has learned positions, for {table[-1]:,} tokens only: use a model with rotary positions, or "
            "engine='transformers', which stops at the last position"
        )


class Weights:
    """A model loaded from a file; freed with this object."""

    def __init__(self, path: Path, num_gpu_layers: int) -> None:
        self._lib = library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = num_gpu_layers
        self.path = path
        _require_readable(path)
        with captured_log() as lines:
            self.model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if self.model is None:
            raise ModelNotFound(f"{path} cannot be read by llama.cpp: {reason(lines)}")

    def add(self, context: Closable) -> None:
        """Nothing to do: contexts keep this object alive."""

    def __del__(self) -> None:
        if getattr(self, "model", None) is not None:
            self._lib.llama_model_free(self.model)


class UsersLlama:
    """The model of a user's `Llama`, which is kept alive.

    `Llama.close()` closes our contexts first, and nothing of llama.cpp is touched after it.
    """

    def __init__(self, llama: Any) -> None:
        lib = library()
        if not isinstance(llama, lib.Llama):
            raise InvalidInput(f"{type(llama).__name__} is not a model: give a .gguf file or a llama_cpp.Llama")
        if llama._model.model is None:
            raise InvalidInput(f"this Llama of {llama.model_path} is closed: make another one, or give the .gguf file")
        if llama.lora_path:
            raise InvalidInput(
                f"this Llama has a LoRA adapter ({llama.lora_path}), which is bound to the Llama's own context: merge "
                "the adapter into the weights, and load those"
            )
        if llama.context_params.embeddings or llama.model_params.vocab_only:
            raise InvalidInput("this Llama was made for embeddings, or without weights: make one that generates text")
        self._llama, self._model, self._is_closed = llama, llama.model, False
        self._contexts = weakref.WeakSet[Any]()
        llama._stack.callback(_close, weakref.ref(self))
        self.path = Path(llama.model_path)
        _require_readable(self.path)

    @property
    def model(self) -> Any:
        """llama.cpp's handle of the model."""
        if self._is_closed:
            raise EngineFailed(
                f"the Llama of {self.path} was closed, and this engine computes with its weights: keep it open as long "
                "as the engine is in use, or give the engine the .gguf file"
            )
        return self._model

    def add(self, context: Closable) -> None:
        """Close a context before the model is freed."""
        self._contexts.add(context)

    def close(self) -> None:
        """Close all contexts, as the model is about to be freed."""
        self._is_closed = True
        for context in list(self._contexts):
            context.close()

    def params(self) -> Any:
        """A copy of the parameters of the Llama's context."""
        params = library().llama_context_default_params()
        ctypes.pointer(params)[0] = self._llama.context_params
        return params


def _close(source: weakref.ref[UsersLlama]) -> None:
    """Called by `Llama.close`, which must not keep the engine alive."""
    if (held := source()) is not None:
        held.close()
