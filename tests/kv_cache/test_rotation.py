"""Keys turned to other positions are those that the model writes there, whatever its RoPE; what cannot turn says why."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.rotary import layer_rotations
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.slots import Segment, Slots

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 258,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
TWO_KINDS = {
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    },
}


def rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


def build(name: str, special: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **special})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def keys(model: PreTrainedModel, start: int) -> list[Tensor]:
    """Of a text that begins at a position, in each layer."""
    cache = DynamicCache(config=model.config)
    positions = torch.arange(start, start + 12)[None]
    model(torch.arange(20, 32)[None], position_ids=positions, cache=cache)
    return [layer.keys[0] for layer in cache.layers]


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("Llama", {}),
        ("Llama", rope("linear", factor=4.0)),
        ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
        ("Llama", rope("llama3", factor=8.0, original_max_position_embeddings=64, **LLAMA3)),
        ("GPTNeoX", {"rotary_pct": 0.5}),
        ("Cohere", {}),
        ("Glm4", {"head_dim": 8}),
        ("SmolLM3", {}),
        ("Gemma3Text", TWO_KINDS),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("rope_parameters", {}).get("rope_type", "")),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_turned_keys_are_those_written_elsewhere(name: str, special: dict[str, object], dtype: torch.dtype) -> None:
    """Pairs of halves and of neighbours, a part of the elements, layers that do not turn, two kinds of layers."""
    model = build(name, special).to(dtype)
    rotations = layer_rotations(model)
    for rotation, here, there in zip(rotations, keys(model, 7), keys(model, 307), strict=True):
        turned = rotation.rotated(here, torch.tensor(300))
        assert turned.dtype == dtype
        error = (turned.float() - there.float()).norm() / there.float().norm()
        assert error < (2e-5 if dtype == torch.float32 else 2e-2)


def test_each_key_turns_by_its_own_distance() -> None:
    rotation, *_ = layer_rotations(build("Llama", {}))
    key = torch.randn(3, 8)
    turned = rotation.rotated(key, torch.tensor([0, 5, 900]))
    apart = [rotation.rotated(one, torch.tensor(distance)) for one, distance in zip(key, [0, 5, 900], strict=True)]
    torch.testing.assert_close(turned, torch.stack(apart))
    assert torch.equal(turned[0], key[0])


def test_turning_in_two_steps_is_turning_once() -> None:
    rotation, *_ = layer_rotations(build("Llama", {}))
    key = torch.randn(2, 8)
    twice = rotation.rotated(rotation.rotated(key, torch.tensor(40_000)), torch.tensor(23_456))
    torch.testing.assert_close(twice, rotation.rotated(key, torch.tensor(63_456)))


def test_learned_positions_are_no_turn() -> None:
    model = build("GPT2", {"n_positions": 512, "n_embd": 32, "n_head": 4, "n_layer": 2})
    with pytest.raises(UnsupportedModel, match="its keys change with their position by more than a rotation"):
        layer_rotations(model)


def test_nothing_changes_where_everything_moves(engine: TransformersEngine) -> None:
    """Pinned entries, slots and the exact tail, and what is read next."""

    def logits(distance: int) -> Tensor:
        cache = engine.new_cache()
        engine.forward(cache, range(40, 80))
        slots = [Slots.exact(*layer.exact_entries(3, 20), start=3) for layer in cache.compactable]
        cache.restore(cache.compacted([Segment(3, 20, 0)], slots, num_pinned=3))
        moved(cache, distance)
        ids, positions = torch.arange(80, 90)[None], torch.arange(40, 50)[None] + distance
        return engine.model(ids, position_ids=positions, cache=cache).logits[0]

    torch.testing.assert_close(logits(700), logits(0), rtol=0, atol=1e-4)


def moved(cache: KVCache, distance: int) -> None:
    for layer in cache.compactable:
        layer.slots = layer.slots.rotated(layer.rotation, [Segment(3, 20, 0)], [distance])
        layer.buffer.key = layer.rotated(layer.buffer.key[0], distance)[None]


def test_many_turns_in_bfloat16_add_up_to_little() -> None:
    """A conversation of 60,000 tokens turns what is oldest some fifteen times; each rounds once."""
    rotation, *_ = layer_rotations(build("Llama", {}))
    key = torch.randn(64, 8).bfloat16()
    turned = key
    for _ in range(15):
        turned = rotation.rotated(turned, torch.tensor(4096))
    expected = rotation.rotated(key.float(), torch.tensor(15 * 4096))
    assert (turned.float() - expected).norm() < 1.5e-2 * expected.norm()


@pytest.mark.model
def test_keys_of_the_demo_model_turn_to_positions_far_past_its_window(demo) -> None:
    """The model knows its own angles at position 60,000 to 0.004 radians in float32."""
    model, _ = demo
    for rotation, here, there in zip(layer_rotations(model), keys(model, 7), keys(model, 60_007), strict=True):
        turned = rotation.rotated(here, torch.tensor(60_000))
        assert (turned - there).norm() < 5e-3 * there.norm()
