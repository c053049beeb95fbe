"""Models in the shapes of published ones with random weights, which is all that speed needs; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from am_memory.compaction.head_fits import MAX_BATCH_HEADS

SHAPES: dict[str, PreTrainedConfig] = {
    "qwen3-4b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    ),
}


def random_model(shape: str, num_layers: int | None, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The shape's model; `num_layers` of its layers, or all."""
    config = SHAPES[shape].__class__(**SHAPES[shape].to_dict())
    if num_layers is not None:
        config = config.__class__(**{**config.to_dict(), "num_hidden_layers": num_layers, "layer_types": None})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's cache, which decides its bytes."""

    num_layers: int
    num_key_value_heads: int
    num_key_value_groups: int
    head_dim: int
    element_size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> CacheShape:
        config = model.config.get_text_config()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, kv_heads, heads // kv_heads, head_dim, model.dtype.itemsize)

    def exact_bytes(self, num_tokens: int) -> int:
        """Keys and values of an uncompacted cache."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * self.element_size * num_tokens

    def event_bytes(self, num_tokens: int, max_chunk_elements: int) -> int:
        """The peak memory of compacting `num_tokens` tokens, beside the cache as it was (docs/performance.md).

        Args:
            max_chunk_elements: of the solver's scores, held at once.
        """
        num_heads = self.num_layers * self.num_key_value_heads
        per_head = self.num_key_value_groups * num_tokens  # queries
        queries = num_heads * per_head * (self.head_dim * self.element_size + 4)
        outputs = num_heads * per_head * (self.head_dim + 3) * 4
        batch = min(MAX_BATCH_HEADS, num_heads) * per_head * self.head_dim * (self.element_size + 12)
        scratch = self.exact_bytes(2 * num_tokens)
        return max(2 * queries + scratch, queries + outputs + batch + 2 * 4 * max_chunk_elements)
