"""Fingerprints of models: what changes the cache changes them, and nothing else does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from am_memory import Memory, MemoryPolicy
from am_memory.engines.fingerprints import model_fingerprint
from am_memory.engines.transformers.loading import load_model
from am_memory.errors import UnsupportedModel


def test_a_reloaded_model_keeps_its_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    folders = model_folder, shutil.copytree(model_folder, tmp_path / "elsewhere")
    first, second = (model_fingerprint(load_model(folder, device="cpu")[0]) for folder in folders)
    assert first == second


def small_llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 64, "num_key_value_heads": 2, **shape, **changes}))


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert model_fingerprint(small_llama()) == model_fingerprint(small_llama())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"initializer_range": 0.03},
    ],
)
def test_another_shape_rope_or_weights_have_another_fingerprint(changes: dict) -> None:
    assert model_fingerprint(small_llama(**changes)) != model_fingerprint(small_llama())


def test_one_changed_layer_changes_the_fingerprint() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    assert model_fingerprint(model) != model_fingerprint(small_llama())


def test_another_dtype_has_another_fingerprint() -> None:
    assert model_fingerprint(small_llama().bfloat16()) != model_fingerprint(small_llama())


class SealedWeight(torch.Tensor):
    """A weight of two tensors, with which nothing can be done as a whole, and that does not say what it is made of."""

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, activations: str) -> SealedWeight:
        made = torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)
        made.qdata, made.scale, made.activations = qdata, scale, activations
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale, args[0].activations)
        raise NotImplementedError(f"{func} is not implemented for {cls.__name__}")


class Int8Weight(SealedWeight):
    """One that says so, as those of torchao do."""

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["qdata", "scale"], {"activations": self.activations}


def quantised_llama(
    kind: type[SealedWeight] = Int8Weight, activations: str = "float", factor: float = 1
) -> torch.nn.Module:
    model = small_llama()
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        made = kind((weight / scale).round().to(torch.int8), scale * factor, activations)
        layer.self_attn.k_proj.weight = torch.nn.Parameter(made, requires_grad=False)
    return model


def test_a_quantised_weight_is_known_by_what_it_is_made_of() -> None:
    """It ended in a bare NotImplementedError: such a tensor has no bytes of its own."""
    assert model_fingerprint(quantised_llama()) == model_fingerprint(quantised_llama())
    others = [small_llama(), quantised_llama(factor=1.01), quantised_llama(activations="int8")]
    assert model_fingerprint(quantised_llama()) not in [model_fingerprint(other) for other in others]


def test_a_weight_of_which_nothing_can_be_read_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn\.k_proj\.weight are kept as SealedWeight"):
        model_fingerprint(quantised_llama(SealedWeight))


def test_weights_in_buffers_count() -> None:
    """As GPTQ, AWQ and HQQ keep them: two models of one shape and other weights were the same."""

    def packed(seed: int) -> PreTrainedModel:
        model = small_llama()
        torch.manual_seed(seed)
        for layer in model.model.layers:
            del layer.mlp.up_proj.weight
            layer.mlp.up_proj.register_buffer("qweight", torch.randint(2**31 - 1, (4, 32), dtype=torch.int32))
        return model

    assert model_fingerprint(packed(0)) == model_fingerprint(packed(0)) != model_fingerprint(packed(1))


def test_weights_that_only_a_checkpoint_shows_count() -> None:
    """As bitsandbytes has them: the scales of a weight hang on its parameter."""

    def packed(scale: float) -> PreTrainedModel:
        model = small_llama()

        def beside(module: torch.nn.Module, state: dict, prefix: str, *_: object) -> None:
            state[f"{prefix}weight.absmax"] = torch.full((4,), scale)

        model.model.layers[0].mlp.up_proj.register_state_dict_post_hook(beside)
        return model

    assert model_fingerprint(packed(1)) == model_fingerprint(packed(1)) != model_fingerprint(packed(2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.complex64, torch.bool, torch.uint8])
def test_weights_of_any_dtype_have_a_fingerprint(dtype: torch.dtype) -> None:
    model = small_llama()
    model.register_buffer("more", torch.ones(3, 3).to(dtype))
    other = small_llama()
    other.register_buffer("more", torch.zeros(3, 3).to(dtype))
    assert model_fingerprint(model) != model_fingerprint(other)


def test_a_model_of_torchao_runs_and_is_known(tiny_model, byte_tokenizer, new_tiny_model) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from am_memory.engines.transformers import TransformersEngine

    def engine(config: object) -> TransformersEngine:
        model = new_tiny_model()
        quantization.quantize_(model, config)
        return TransformersEngine(model, byte_tokenizer)

    configs = [quantization.Int8WeightOnlyConfig(), quantization.Int8DynamicActivationInt8WeightConfig()]
    engines = [engine(config) for config in configs]
    assert len({each.info.fingerprint for each in engines} | {model_fingerprint(tiny_model)}) == 3
    assert engine(configs[0]).info.fingerprint == engines[0].info.fingerprint
    session = Memory(engines[0], MemoryPolicy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4)).session()
    session.append([byte % 256 for byte in range(300)])
    assert session.stats.num_compactions > 2
    assert session.logits([1, 2, 3]).isfinite().all()
