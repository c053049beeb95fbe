"""A complete engine without transformers: a small attention model in plain torch, and a cache of its own.

It shows what an engine has to answer, and the memory's own tests run over it. Nothing here is fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from am_memory.engines.base import Capabilities, ControlTokens, Message, ModelInfo, OnQuery, Tool
from am_memory.kv_cache.cache import CacheState, Snapshot
from am_memory.kv_cache.layers import TailBuffer, TailState
from am_memory.kv_cache.slots import Segment, Slots, carried_over, tail_start

NUM_LAYERS, NUM_HEADS, GROUPS, HEAD_DIM = 3, 2, 2, 16  # 2 KV heads, each seen by 2 query heads
HIDDEN_DIM = NUM_HEADS * GROUPS * HEAD_DIM
SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}
VOCAB_SIZE = 260
SCALING = HEAD_DIM**-0.5


class ToyLayer:
    """One layer of a cache at one moment, for whoever compacts it: `SessionLayer`."""

    scaling, softcap, sinks, query_rotations = SCALING, None, None, None

    def __init__(self, state: TailState) -> None:
        self.slots, self.buffer, self.start, self.length = state
        self.num_heads, self._entries = NUM_HEADS, entries_of(state)

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        where = slice(start - self.start, end - self.start)
        key, value = (entries[:, where] for entries in self._entries)
        return key, value

    def rotated(self, key: Tensor, distance: int) -> Tensor:
        assert distance == 0, "the engine does not say that it rotates keys"
        return key


class ToyCache:
    """The cache of one session: an immutable state, and another one after each step. `SessionCache`."""

    is_croppable = can_drop_tokens = True
    num_heads = NUM_LAYERS * NUM_HEADS

    def __init__(self) -> None:
        nothing = torch.empty(NUM_HEADS, 0, HEAD_DIM)
        self._state = CacheState((tail(nothing, nothing),) * NUM_LAYERS, (), 0)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._state.segments

    @property
    def num_pinned_slots(self) -> int:
        return self._state.num_pinned_slots

    @property
    def layers(self) -> list[TailState]:
        return list(self._state.layers)

    @property
    def compactable(self) -> list[ToyLayer]:
        return [ToyLayer(layer) for layer in self.layers]

    @property
    def tail_start(self) -> int:
        return tail_start(self.segments)

    @property
    def num_tokens(self) -> int:
        return min(layer.start + layer.length for layer in self.layers)

    @property
    def num_exact_tokens(self) -> int:
        return self.num_pinned_slots + self.num_tokens - self.tail_start

    @property
    def kv_tokens(self) -> float:
        num_slots = sum(layer.slots.num_slots for layer in self.layers if layer.slots)
        return self.num_tokens - self.tail_start + num_slots / self.num_heads

    @property
    def nbytes(self) -> int:
        tensors = (tensor for layer in self.layers if layer.slots for tensor in layer.slots.tensors)
        return sum(tensor.nbytes for tensor in tensors) + self._exact_nbytes(self.num_tokens - self.tail_start)

    @property
    def exact_nbytes(self) -> int:
        return self._exact_nbytes(self.num_tokens)

    def _exact_nbytes(self, num_tokens: int) -> int:
        return num_tokens * self.num_heads * 2 * HEAD_DIM * torch.float32.itemsize

    def state(self) -> CacheState:
        return self._state

    def restore(self, state: Snapshot) -> None:
        self._state = CacheState(state.layers, state.segments, state.num_pinned_slots)

    load = restore

    def truncate(self, num_tokens: int) -> None:
        layers = (layer._replace(length=num_tokens - layer.start) for layer in self.layers)
        self._state = CacheState(tuple(layers), self.segments, self.num_pinned_slots)

    def fork(self) -> ToyCache:
        branch = ToyCache()
        branch.restore(self._state)
        return branch

    def append(self, index: int, key: Tensor, value: Tensor) -> TailState:
        """One layer with more tokens; key and value: (num_heads, num_tokens, head_dim)."""
        layers, old = self.layers, self.layers[index]
        pairs = zip(entries_of(old), (key, value), strict=True)
        layers[index] = tail(*(torch.cat(pair, dim=1) for pair in pairs), old.start, old.slots)
        self._state = CacheState(tuple(layers), self.segments, self.num_pinned_slots)
        return layers[index]

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> CacheState:
        older, _ = carried_over(self.segments, segments)
        end, layers = segments[-1].end, []
        for layer, new in zip(self.compactable, new_slots, strict=True):
            before = layer.slots.cut(older) if layer.slots else Slots.exact(*layer.exact_entries(0, num_pinned), 0)
            layers.append(tail(*layer.exact_entries(end, self.num_tokens), end, Slots.concat([before, new])))
        return CacheState(tuple(layers), tuple(segments), max(self.num_pinned_slots, num_pinned))


def tail(key: Tensor, value: Tensor, start: int = 0, slots: Slots | None = None) -> TailState:
    return TailState(slots, TailBuffer(key[None], value[None]), start, key.shape[1])


def entries_of(state: TailState) -> tuple[Tensor, Tensor]:
    """The exact keys and values of a layer: (num_heads, num_tokens, head_dim)."""
    assert state.buffer is not None
    return state.buffer.key[0, :, : state.length], state.buffer.value[0, :, : state.length]


def rotated(entries: Tensor, start: int) -> Tensor:
    """RoPE: (..., num_tokens, head_dim), of which the first token is at position `start`."""
    positions = torch.arange(start, start + entries.shape[-2])[:, None]
    angle = positions * 10_000 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    one, other = entries.chunk(2, dim=-1)
    return torch.cat([one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()], dim=-1)


def attend(query: Tensor, layer: TailState) -> tuple[Tensor, Tensor]:
    """Causal attention over slots, with their biases, and the tail, of which the last tokens are those of the query.

    Args:
        query: (num_heads, groups, num_tokens, head_dim).

    Returns:
        The output, shaped as the query, and the log of the mass, (num_heads, groups, num_tokens).
    """
    outputs, masses, num_tokens = [], [], query.shape[2]
    tail_key, tail_value = entries_of(layer)
    for head in range(NUM_HEADS):
        key, value, bias = tail_key[head], tail_value[head], torch.zeros(num_tokens, layer.length)
        bias[:, layer.length - num_tokens :] = torch.full((num_tokens, num_tokens), -torch.inf).triu(1)
        if layer.slots:
            slots = layer.slots.head(head).decoded()
            key, value = torch.cat([slots.key, key]), torch.cat([slots.value, value])
            bias = torch.cat([slots.bias.expand(num_tokens, -1), bias], dim=1)
        scores = query[head] @ key.T * SCALING + bias
        outputs.append(scores.softmax(-1) @ value)
        masses.append(scores.logsumexp(-1))
    return torch.stack(outputs), torch.stack(masses)


class ToyEngine:
    """A random model over bytes: `Engine`."""

    chunk_tokens = 256
    has_chat_template = True
    control_tokens = ControlTokens(turns=SPECIAL, tags={})

    def __init__(self, capabilities: Capabilities | None = None) -> None:
        self.capabilities = capabilities or Capabilities(
            has_ragged_heads=True, can_exchange_slots=True, can_hold_int8=True, can_read_in_parallel=True
        )
        self.info = ModelInfo("toy", "toy", VOCAB_SIZE, 4096, torch.device("cpu"), frozenset({257}), "bytes", "chatml")
        random = torch.Generator().manual_seed(20260216)
        shape = HIDDEN_DIM, HIDDEN_DIM
        self._embedding = torch.randn(VOCAB_SIZE, HIDDEN_DIM, generator=random)
        self._layers = [torch.randn(4, *shape, generator=random) / HIDDEN_DIM**0.5 for _ in range(NUM_LAYERS)]

    def new_cache(self) -> ToyCache:
        return ToyCache()

    def forward(
        self, cache: ToyCache, token_ids: Sequence[int], *, num_logits: int = 0, on_query: OnQuery | None = None
    ) -> Tensor:
        hidden, start = self._embedding[list(token_ids)], cache.num_tokens  # (num_tokens, HIDDEN_DIM)
        for index, (to_query, to_key, to_value, to_output) in enumerate(self._layers):
            inputs = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
            query = (3 * inputs @ to_query).view(-1, NUM_HEADS, GROUPS, HEAD_DIM).permute(1, 2, 0, 3)
            key, value = (
                (inputs @ weight[:, : NUM_HEADS * HEAD_DIM]).view(-1, NUM_HEADS, HEAD_DIM).transpose(0, 1)
                for weight in (to_key, to_value)
            )
            query = rotated(query, start)
            output, log_mass = attend(query, cache.append(index, rotated(key, start), value))
            if on_query is not None:
                on_query(index, query, log_mass)
            hidden = hidden + output.permute(2, 0, 1, 3).flatten(1) @ to_output
        return hidden[len(token_ids) - num_logits :] @ self._embedding.T / HIDDEN_DIM**0.5

    def encode(self, text: str, *, add_special: bool = False, as_text: bool = False) -> list[int]:
        parts = [text] if as_text else re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text)
        return [id for part in parts for id in ([SPECIAL[part]] if part in SPECIAL and not as_text else part.encode())]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        texts = {id: b"" if skip_special else text.encode() for text, id in SPECIAL.items()}
        return b"".join(texts.get(id, bytes([id % 256])) for id in token_ids).decode(errors="replace")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> str:
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join([*turns, "<|im_start|>assistant\n" * add_generation_prompt])
