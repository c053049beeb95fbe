"""Runs a GGUF model in llama.cpp, behind the `Engine` protocol. Knows no policy and no compaction."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from llguidance import LLTokenizer
from torch import Tensor

from am_memory.engines.abilities import Branches
from am_memory.engines.base import ControlTokens, Message, ModelInfo, OnQuery, SessionCache, Tool
from am_memory.engines.fingerprints import file_fingerprint, template_fingerprint
from am_memory.engines.llama_cpp import support
from am_memory.engines.llama_cpp.decoder import Decoder
from am_memory.engines.llama_cpp.library import TORCH_TYPES, ggml_type, library, type_name
from am_memory.engines.llama_cpp.ragged import RaggedReader
from am_memory.engines.llama_cpp.self_test import require_batch, require_ragged, tested_model
from am_memory.engines.llama_cpp.shared import SharedReader
from am_memory.engines.llama_cpp.source import Source, UsersLlama, Weights
from am_memory.engines.llama_cpp.vocabulary import Vocabulary
from am_memory.engines.model_files import gguf_path
from am_memory.engines.templates import control_tokens, template_errors
from am_memory.errors import InvalidInput, UnsupportedModel

logger = logging.getLogger("am_memory")

Heads = Literal["ragged", "shared"]
"""Whether the KV heads of a layer differ in their slots, or share every cell."""


class LlamaCppEngine:
    """Runs a GGUF model with the stock llama-cpp-python.

    Args:
        model: a .gguf file, "demo", or a `llama_cpp.Llama` with any parameters. The weights and settings of a `Llama`
            are used, but not its context: the engine makes contexts of its own. Keep it open: after `close()`, calls of
            the engine raise EngineFailed.
        heads: "ragged": each KV head has slots of its own, with biases, as on the transformers engine. This project
            keeps keys and values in host memory and computes attention on the CPU; llama.cpp computes the rest.
            "shared": all heads of all layers share the cells of llama.cpp, which computes attention too; biases are
            folded into keys. A memory recalls much less so.
        kv_type: type of the stored keys and values: "f16", "f32" or "bf16", or "q8_0" with shared heads. None: the
            type of the `Llama`, else f16.
        num_gpu_layers: layers to offload to a GPU; -1 offloads all, if llama.cpp was built for a GPU.
        num_threads: None takes as many as torch uses.
        flash_attention: for shared heads; None uses it where llama.cpp supports it.

    Raises:
        InvalidInput: ragged heads with q8_0 or without flash attention, or a `Llama` that cannot be used.
        ModelNotFound: the file does not exist, or llama.cpp cannot read it.
        UnsupportedModel: llama-cpp-python does not do what is relied on, or the model's cache cannot be compacted.
    """

    chunk_tokens = 512

    def __init__(
        self,
        model: Any,
        *,
        heads: Heads = "ragged",
        kv_type: str | None = None,
        num_gpu_layers: int = -1,
        num_threads: int | None = None,
        flash_attention: bool | None = None,
    ) -> None:
        if heads not in get_args(Heads):
            raise InvalidInput(f"heads {heads!r} is none of {', '.join(get_args(Heads))}: give one of them")
        lib = library()
        self._lib = lib
        if isinstance(model, str | os.PathLike):
            self._source: Source = Weights(gguf_path(model), num_gpu_layers)
            params = lib.llama_context_default_params()
            params.type_k = params.type_v = ggml_type(kv_type or "f16")
        else:
            users = UsersLlama(model)
            self._source, params = users, users.params()
        if kv_type is not None:
            params.type_k = params.type_v = ggml_type(kv_type)
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        if heads == "ragged":
            _set_for_ragged_heads(params, flash_attention)
        params.n_threads = params.n_threads_batch = num_threads or torch.get_num_threads()
        handle = self._source.model
        support.require_supported(handle)
        self.vocabulary = Vocabulary(self._source)
        num_layers = lib.llama_model_n_layer(handle)
        decoder = Decoder(self._source, params, num_layers)
        cell_model = tested_model(decoder, handle, num_layers)
        self._kv_types = decoder.kv_types
        self._reader: RaggedReader | SharedReader = SharedReader(cell_model)
        if heads == "ragged":
            if cell_model.windows:
                support.require_plain_windows(handle)
            self._reader = RaggedReader(self._source, params, cell_model)
            require_ragged(self._reader, cell_model)
        self.capabilities = self._reader.capabilities
        self.info = self._model_info(handle, self._source.path, heads)

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> LlamaCppEngine:
        """Load a model, with the arguments of `Memory.from_pretrained`.

        Args:
            device: "cpu" does not use the GPU, even if llama.cpp was built for one.
            dtype: type of the stored keys and values; None is float16.

        Raises:
            InvalidInput: llama.cpp cannot store this dtype.
        """
        kinds = {kind: name.lower() for name, kind in TORCH_TYPES.items()}
        if dtype is not None and dtype not in kinds:
            raise InvalidInput(
                f"llama.cpp does not store keys and values in {dtype}: use one of {', '.join(map(str, kinds))}"
            )
        kv_type = None if dtype is None else kinds[dtype]
        return cls(model, kv_type=kv_type, num_gpu_layers=0 if device == "cpu" else -1)

    def _model_info(self, handle: Any, path: Path, heads: Heads) -> ModelInfo:
        ragged = " ragged" if heads == "ragged" else ""
        digest = hashlib.sha256(f"llama.cpp {file_fingerprint(path)} {self._kv_types}{ragged}".encode())
        return ModelInfo(
            name=path.stem,
            fingerprint=digest.hexdigest()[:16],
            vocab_size=len(self.vocabulary),
            window_tokens=self._lib.llama_model_n_ctx_train(handle),
            device=torch.device("cpu"),
            eos_token_ids=self.vocabulary.eos_token_ids,
            tokenizer_fingerprint=self.vocabulary.fingerprint,
            template_fingerprint=template_fingerprint(self.vocabulary.chat_template, self.vocabulary.ends),
        )

    def __repr__(self) -> str:
        return f"<LlamaCppEngine: {self.info}, keys and values in {self._kv_types}>"

    def new_cache(self) -> SessionCache:
        return self._reader.new_cache()

    def forward(
        self, cache: SessionCache, token_ids: Sequence[int], *, num_logits: int = 0, on_query: OnQuery | None = None
    ) -> Tensor:
        return self._reader.read(cache, token_ids, num_logits, on_query)

    def forward_batch(
        self, caches: Sequence[SessionCache], token_ids: Sequence[int], on_query: Sequence[OnQuery | None]
    ) -> Tensor | None:
        """Read token i into cache i; None with shared heads, and for a model with sliding windows."""
        return self._batches.read_batch(caches, token_ids, on_query) if self._batches is not None else None

    @cached_property
    def _batches(self) -> RaggedReader | None:
        """What reads several caches in one pass; tested once, on a few tokens."""
        if not isinstance(self._reader, RaggedReader) or not self._reader.can_batch:
            return None
        try:
            require_batch(self._reader)
        except UnsupportedModel as error:
            logger.warning("%s reads sessions one by one: %s", self.info.name, error)
            return None
        return self._reader

    def branches(self, cache: SessionCache, beginnings: Sequence[Sequence[int]]) -> Branches | None:
        """Texts behind a cache, read as a batch; None with shared heads, and for a model with sliding windows."""
        return self._reader.branches(cache, beginnings)

    def encode(self, text: str, *, add_special: bool = False, as_text: bool = False) -> list[int]:
        return self.vocabulary.encode(text, add_special=add_special, as_text=as_text)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        vocabulary = self.vocabulary
        return control_tokens(
            vocabulary.chat_template, vocabulary.special, vocabulary.added, vocabulary.unknown, self.render
        )

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self.vocabulary.decode(token_ids, skip_special=skip_special)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.vocabulary.chat_template)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> str:
        with template_errors(self.info.name, messages):
            return self.vocabulary.render(messages, tools, add_generation_prompt, options or {})

    def grammar_tokenizer(self) -> LLTokenizer:
        return self.vocabulary.grammar_tokenizer()

    def token_texts(self) -> dict[str, int]:
        return self.vocabulary.token_texts()


def _set_for_ragged_heads(params: Any, flash_attention: bool | None) -> None:
    """Set the parameters of a context whose attention is computed by this project.

    Raises:
        InvalidInput: they cannot be so.
    """
    if flash_attention is False:
        raise InvalidInput(
            "heads 'ragged' takes the place of llama.cpp's flash attention, which flash_attention=False leaves out: "
            "leave it at None, or use heads='shared'"
        )
    kinds = {type_name(kind) for kind in (params.type_k, params.type_v)}
    if strange := kinds - {name.lower() for name in TORCH_TYPES}:
        raise InvalidInput(
            f"heads 'ragged' does not keep keys and values in {', '.join(sorted(strange))}: use kv_type 'f16' with the "
            "policy's segment_dtype 'int8', or heads='shared'"
        )
    params.flash_attn_type = 1
    params.offload_kqv = False  # attention is computed in host memory
