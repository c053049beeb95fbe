"""Only the text part of a model looks up our attention."""

from __future__ import annotations

import pytest
import torch
from test_families import Family
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerBase

from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.attention import ATTENTION_NAME
from am_memory.engines.transformers.implementation import attention_setting
from am_memory.errors import UnsupportedModel


def test_parts_for_images_and_sound_keep_their_attention(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """The part for sound of Gemma 4 takes no other attention, and with it no Gemma 4 E2B could be loaded."""
    model = tiny_model("gemma4")
    before = attention_setting(model)
    assert before["audio_config"][""] == "eager"
    engine = TransformersEngine(model, byte_tokenizer)
    assert attention_setting(model) == {**before, "": ATTENTION_NAME, "text_config": {"": ATTENTION_NAME}}
    ids = torch.arange(60, 80)
    expected = tiny_model("gemma4")(ids[None], use_cache=False).logits[0]
    actual = engine.forward(engine.new_cache(), ids.tolist(), num_logits=20)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_a_model_that_is_refused_gets_all_its_attention_back(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """Going back to one name for all parts failed, and hid the reason."""
    model = tiny_model("gemma4")
    before = attention_setting(model)
    model.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(UnsupportedModel, match="division by zero"):
        TransformersEngine(model, byte_tokenizer)
    assert attention_setting(model) == before


def test_a_model_of_text_alone_has_one_setting() -> None:
    assert attention_setting(Family("Llama").build()) == {"": "sdpa"}
