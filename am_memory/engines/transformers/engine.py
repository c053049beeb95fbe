"""A transformers model behind the `Engine` protocol. Knows nothing of policies or compaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from am_memory.engines.base import Capabilities, ControlTokens, Message, ModelInfo, OnQuery, SessionCache, Tool
from am_memory.engines.branches import TextBranches, begin
from am_memory.engines.characters import utf8
from am_memory.engines.fingerprints import model_fingerprint, of_template, of_tokenizer
from am_memory.engines.templates import control_tokens, template_errors
from am_memory.engines.transformers import adapters, attention, support
from am_memory.engines.transformers.adapters import Adapters, unwrapped
from am_memory.engines.transformers.batches import Batches
from am_memory.engines.transformers.compiled import compile_layers
from am_memory.engines.transformers.driven import watch
from am_memory.engines.transformers.graphs import shortcut, token_graphs
from am_memory.engines.transformers.held_rope import HeldRope, length_dependent_kinds, require_choice
from am_memory.engines.transformers.implementation import attention_setting
from am_memory.engines.transformers.latents import keep_latents
from am_memory.engines.transformers.plain_text import encode_as_text
from am_memory.engines.transformers.positions import num_positions, refusal, refuse_too_long_answers
from am_memory.engines.transformers.rotary import layer_rotations
from am_memory.engines.transformers.shared_layers import keep_wanted_tokens, skips_tokens
from am_memory.engines.transformers.text_positions import use_text_positions
from am_memory.errors import InvalidInput, UnsupportedModel, UnsupportedOperation
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.rotation import Rotation

CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 2048
"""Tokens in one forward pass; fewer do not fill a GPU."""
CAPABILITIES = Capabilities(
    has_ragged_heads=True,
    can_exchange_slots=True,
    can_hold_int8=True,
    can_compact_layerwise=True,
    can_read_in_parallel=True,
    free_query_tokens=1,
    can_rotate_keys=True,
    runs_in_generate=True,
)


class TransformersEngine:
    """Runs a causal language model of transformers over caches of this project.

    The engine sets the model's attention implementation to its own. For every other cache this is transformers' sdpa
    attention, so that the model works as before.

    Args:
        model: a supported causal language model, on its device, with or without peft's wrapper. A cache belongs to the
            adapters that are active now, and cannot be used while others are: make another engine for those.
        tokenizer: the model's own.
        compile: compile the decoder layers with `torch.compile` for steps of one token. Longer caches, compactions and
            other sessions need no new compilation. Other caches, and steps of several tokens, are not compiled.
        window_tokens: the context window, if it is to be smaller than the one that the model was trained on. Compact
            keys are rotated to stay within it. A model with "longrope" needs it: it selects the short factors, for
            windows up to the original one, or the long factors, whatever the length of the text.

    Raises:
        UnsupportedModel: the model's cache cannot be compacted, or its layers cannot be compiled.
        InvalidInput: the model does not have this window.
        EngineFailed: torch.compile fails on this machine.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        compile: bool = False,
        window_tokens: int | None = None,
    ) -> None:
        attention.register()
        self.model = model = unwrapped(model)
        self._adapters = Adapters(model)
        self._weights = self._adapters.active
        self.tokenizer = tokenizer
        self._kinds = support.layer_kinds(model)
        self._rotations: list[Rotation | None] | None = None
        self._control_tokens: tuple[str, ControlTokens] | None = None
        self._cache_argument = support.cache_argument(model)
        window = support.window(model, window_tokens)
        require_choice(model, window_tokens)
        self._held_rope: HeldRope | None = None
        keep_latents(model)
        keep_wanted_tokens(model)
        before = attention_setting(model)
        support.probe(model, self.new_cache())
        with support.refusing(model):
            max_tokens = num_positions(model, self.new_cache())
        use_text_positions(model)
        if compile:
            compile_layers(model, self.new_cache())
        if length_dependent_kinds(model):
            self._held_rope = HeldRope(model, window)
        try:
            why_keys_stay = self._find_rotations()
        except UnsupportedModel:
            model.set_attn_implementation(before)
            raise
        seen_through = self._weights if self._held_rope is None else (self._weights, self._held_rope.sets)
        self.info = _model_info(
            model,
            tokenizer,
            fingerprint=model_fingerprint(model, through=seen_through, without=self._adapters.hidden),
            window_tokens=window if max_tokens is None else min(window, max_tokens),
            max_tokens=max_tokens,
        )
        if max_tokens is not None:
            refuse_too_long_answers(model, max_tokens)
        self.chunk_tokens = CPU_CHUNK_TOKENS if model.device.type == "cpu" else GPU_CHUNK_TOKENS
        self._graphs = token_graphs(model, self._read_token, self.new_cache)
        self._batches = Batches(model, self._step, self.new_cache)
        self._without_logits = {"logits_to_keep": 1} if skips_tokens(model) else {}  # of the base model
        self.capabilities = self._capabilities(why_keys_stay, hands_out_all=not compile and self._graphs is None)
        forward = model.forward
        if self._graphs is not None:
            forward = shortcut(model, self._graphs, self._cache_argument)
        watch(model, forward, self._require_adapters)

    def __repr__(self) -> str:
        return f"<TransformersEngine: {self.info}, {str(self.model.dtype).removeprefix('torch.')}>"

    def _capabilities(self, why_keys_stay: str, *, hands_out_all: bool) -> Capabilities:
        """What the engine can do.

        Args:
            why_keys_stay: "" if keys can be rotated.
            hands_out_all: single tokens are read in the same way with queries as without.
        """
        return replace(
            CAPABILITIES,
            can_refine=self.new_cache().is_all_compactable,
            can_rotate_keys=not why_keys_stay,
            why_keys_stay=why_keys_stay,
            free_query_tokens=None if self._without_logits else 1 if hands_out_all else 2,
        )

    def _find_rotations(self) -> str:
        """Measure how the layers rotate their keys; returns why they cannot be rotated, or "".

        Raises:
            UnsupportedModel: the RoPE depends on the length of the text and cannot be held at one length.
        """
        try:
            self._rotations = layer_rotations(self.model, self.new_cache, self._held_rope)
        except UnsupportedModel as error:
            if self._held_rope is None:
                return str(error)
            raise UnsupportedModel(
                f"{type(self.model).__name__} rotates its keys by the length of the text, and cannot be held at one "
                f"length ({error}); use another model"
            ) from error
        return ""

    def new_cache(self) -> KVCache:
        cache = KVCache(self._kinds, self._rotations)
        cache.weights, cache.held_rope = self._weights, self._held_rope
        return cache

    def _require_adapters(self, cache: KVCache) -> None:
        """Raise UnsupportedOperation if the active adapters are not those of the cache."""
        if cache.weights != (active := self._adapters.active):
            raise UnsupportedOperation(
                f"this cache belongs to the model {adapters.described(cache.weights)}, and the model is now "
                f"{adapters.described(active)}: set the adapters back, or make another TransformersEngine of the model "
                "as it is now, and new sessions with that"
            )

    def _require_positions(self, num_tokens: int) -> None:
        """Raise PromptTooLong if the model has no positions for so many tokens."""
        if self.info.max_tokens is not None and num_tokens > self.info.max_tokens:
            raise refusal(self.info.name, num_tokens, self.info.max_tokens)

    @torch.no_grad()
    def forward(
        self, cache: SessionCache, token_ids: Sequence[int], *, num_logits: int = 0, on_query: OnQuery | None = None
    ) -> Tensor:
        cache = _ours(cache)
        self._require_adapters(cache)
        if self.info.max_tokens is not None:
            self._require_positions(cache.num_tokens + len(token_ids))
        if len(token_ids) == num_logits == 1 and on_query is None and self._graphs is not None:
            logits = self._graphs.read(cache, token_ids[0])
            if logits is not None:
                return logits
        ids = torch.tensor([list(token_ids)]).to(self.model.device, non_blocking=True)
        with _Reading(cache, on_query):
            if num_logits == 0:
                options = {**self._without_logits, self._cache_argument: cache}
                self.model.base_model(input_ids=ids, use_cache=True, **options)
                return torch.empty(0, self.info.vocab_size)
            output = self.model(
                input_ids=ids, use_cache=True, logits_to_keep=num_logits, **{self._cache_argument: cache}
            )
        return output.logits[0, :, : self.info.vocab_size].float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def forward_batch(
        self, caches: Sequence[SessionCache], token_ids: Sequence[int], on_query: Sequence[OnQuery | None]
    ) -> Tensor | None:
        ours = [_ours(cache) for cache in caches]
        for cache in ours:
            self._require_adapters(cache)
            self._require_positions(cache.num_tokens + 1)
        if not self._batches.are_possible:
            return None
        with ExitStack() as reading:
            for cache, sink in zip(ours, on_query, strict=True):
                reading.enter_context(_Reading(cache, sink))
            return self._batches.read(ours, token_ids)

    @torch.no_grad()
    def branches(self, cache: SessionCache, beginnings: Sequence[Sequence[int]]) -> TextBranches | None:
        """Texts behind a cache, read as a batch; None where a layer has a window, a state, latents or capped scores."""
        cache = _ours(cache)
        is_plain = cache.is_all_compactable and not any(kind.has_latents for kind in cache.kinds)
        if not is_plain or any(layer.softcap for layer in cache.compactable):
            return None
        begun, logits = begin(partial(self.forward, cache, num_logits=1), cache, beginnings)
        return TextBranches(cache.compactable, begun, logits, self._step_of_branches, self._held_rope)

    def _step_of_branches(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        self._require_positions(cache.get_seq_length() + 1)
        return self._step(ids, positions, cache)

    @torch.no_grad()
    def _step(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Read one token of each text; ids and positions (num_texts, 1), logits (num_texts, vocab_size)."""
        output = self.model(
            input_ids=ids.to(self.model.device, non_blocking=True),
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
        )
        return output.logits[:, -1, : self.info.vocab_size].float()  # type: ignore[no-any-return]

    def _read_token(self, cache: KVCache, token_id: Tensor, position: Tensor) -> Tensor:
        with _Reading(cache, None):
            return self._step(token_id, position, cache)

    def encode(self, text: str, *, add_special: bool = False, as_text: bool = False) -> list[int]:
        utf8(text)  # raises for half a surrogate pair
        if as_text:
            return encode_as_text(self.tokenizer, text)
        return list(self.tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])

    @property
    def control_tokens(self) -> ControlTokens:
        template = str(self.tokenizer.chat_template)  # users may set another one
        if self._control_tokens is None or self._control_tokens[0] != template:
            tokens = self.tokenizer.added_tokens_decoder
            special = {token.content: id for id, token in tokens.items() if token.special}
            added = {token.content: id for id, token in tokens.items() if not token.special}
            self._control_tokens = (
                template,
                control_tokens(template, special, added, self.tokenizer.unk_token_id, self.render),
            )
        return self._control_tokens[1]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> str:
        chat = [dict(message) for message in messages]
        with template_errors(self.info.name, chat):
            return str(
                self.tokenizer.apply_chat_template(
                    chat,  # type: ignore[arg-type]
                    tools=[dict(tool) for tool in tools] if tools else None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **cast("dict[str, Any]", options or {}),
                )
            )


class _Reading:
    """A pass that the engine runs itself: queries go to `on_query`, and `before_forward` is not called.

    A class and not a generator: an interrupt while a generator exits would leave the rest to Python's collector.
    """

    def __init__(self, cache: KVCache, on_query: OnQuery | None) -> None:
        self._cache, self._on_query, self._layers = cache, on_query, cache.compactable
        watcher, sinks = cache.before_forward, [layer.query_sink for layer in self._layers]
        if watcher is None:  # sinks of an unwatched cache are left over from an interrupted pass
            sinks = [None] * len(sinks)
        self._before = watcher, sinks

    def __enter__(self) -> None:
        try:
            self._cache.before_forward = None
            for index, layer in enumerate(self._layers):
                layer.query_sink = None if self._on_query is None else partial(self._on_query, index)
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._put_back()
        finally:  # again, in case an interrupt stopped it
            self._put_back()

    def _put_back(self) -> None:
        self._cache.before_forward, sinks = self._before
        for layer, sink in zip(self._layers, sinks, strict=True):
            layer.query_sink = sink


def _name(source: str) -> str:
    """A hub id as it is; the name alone of a folder, whose path is this machine's business."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _model_info(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fingerprint: str,
    window_tokens: int,
    max_tokens: int | None,
) -> ModelInfo:
    config = model.config.get_text_config(decoder=True)
    of_config = getattr(config, "eos_token_id", None)  # some text parts have none
    sources = (tokenizer.eos_token_id, of_config, model.generation_config.eos_token_id)
    return ModelInfo(
        name=_name(str(model.config.name_or_path or type(model).__name__)),
        fingerprint=fingerprint,
        vocab_size=config.vocab_size,
        window_tokens=window_tokens,
        device=model.device,
        eos_token_ids=frozenset(id for ids in sources for id in _as_list(ids)),
        max_tokens=max_tokens,
        tokenizer_fingerprint=of_tokenizer(tokenizer),
        template_fingerprint=of_template(tokenizer),
    )


def _ours(cache: SessionCache) -> KVCache:
    if not isinstance(cache, KVCache) or cache.read_by != KVCache.read_by:
        raise InvalidInput(f"a {type(cache).__name__} is another engine's cache: make one with new_cache()")
    return cache


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
