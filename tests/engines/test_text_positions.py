"""Models whose RoPE has several axes (M-RoPE), used for text alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_families import SIZES, assert_same_logits, tokens
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import UnsupportedOperation

POLICY = MemoryPolicy(trigger_tokens=400, keep_ratio=0.25, keep_recent=6, pinned=3, chunk_tokens=16)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
TEXT = {
    **{name: size for name, size in SIZES.items() if not name.endswith("token_id")},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
VISION3 = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16}
SMALL = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
MODELS = {
    "Qwen2VL": (TEXT, VISION),
    "Qwen2_5_VL": (TEXT, {**VISION3, "fullatt_block_indexes": [0]}),
    "Qwen3VL": ({**TEXT, "head_dim": 8}, {**VISION3, "deepstack_visual_indexes": [0]}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    text, vision = MODELS[request.param]
    config = getattr(transformers, f"{request.param}Config")(text_config=text, vision_config=vision, **SMALL)
    made = getattr(transformers, f"{request.param}ForConditionalGeneration")(config)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens()]), use_cache=False).logits[0]


@pytest.fixture
def engine(model: PreTrainedModel, expected: Tensor, byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    """The model has read an image since, which moved what followed by 7 positions back."""
    model.model.rope_deltas = None
    engine = TransformersEngine(model, byte_tokenizer)
    model.model.rope_deltas = torch.tensor([[-7]])
    return engine


def test_text_has_the_positions_of_text(engine: TransformersEngine, expected: Tensor) -> None:
    cache, ids = engine.new_cache(), tokens()
    bounds = [0, 20, 37, 38, 39, len(ids)]
    rows = [engine.forward(cache, ids[a:b], num_logits=b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert_same_logits(torch.cat(rows), expected, 1e-4)
    assert engine.capabilities.can_rotate_keys


def test_a_rewind_goes_back_to_the_positions_before(engine: TransformersEngine, expected: Tensor) -> None:
    session = Memory(engine, POLICY).session()
    session.append([*tokens()[:30], *tokens()[:20]])
    session.rewind(30)
    assert_same_logits(session.logits(tokens()[30:]), expected[29:-1], 1e-3)


def test_generate_reads_text_as_text(engine: TransformersEngine) -> None:
    model, prompt = engine.model, torch.tensor([tokens()])
    written = model.generate(prompt, cache=Memory(engine, POLICY).cache(), **GREEDY)
    model.model.rope_deltas = None
    with torch.no_grad():
        best = model(written[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :].argmax(-1)
    assert torch.equal(best, written[0, prompt.shape[1] :])


def test_images_are_refused_by_name(engine: TransformersEngine) -> None:
    pixels = {"pixel_values": torch.zeros(4, 8), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    with pytest.raises(UnsupportedOperation, match="holds text alone: leave out pixel_values"):
        engine.model(torch.tensor([[1, 2]]), cache=Memory(engine, POLICY).cache(), **pixels)
