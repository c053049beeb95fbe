"""Models with adapters of peft: wrapped or not, watched, and never two sets of weights in one cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.fingerprints import model_fingerprint
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import ModelMismatch, UnsupportedModel, UnsupportedOperation

POLICY = MemoryPolicy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}
TOKENS = list(b"The owl sat on the old oak.")
PROMPT = torch.tensor([TOKENS])


def lora(seed: int = 0) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def model(new_tiny_model: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return new_tiny_model()


@pytest.fixture
def wrapped(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(model, lora()).eval().requires_grad_(False)


def new_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    return TransformersEngine(model, tokenizer)


def assert_compacts(model: nn.Module, engine: TransformersEngine) -> Tensor:
    cache = Memory(engine, POLICY).cache()
    output = model.generate(input_ids=PROMPT, cache=cache, max_new_tokens=120, **GREEDY)
    assert cache.segments
    assert cache.kv_tokens <= 64
    assert cache.num_tokens == output.shape[1] - 1
    return output


def test_a_wrapped_model_compacts_and_runs_its_adapter(
    wrapped: PeftModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its `generate` calls what is within, where nobody watched: the cache grew, and nothing was said."""
    expected = wrapped.generate(input_ids=PROMPT, max_new_tokens=30, **GREEDY)
    engine = new_engine(wrapped, byte_tokenizer)
    large = Memory(engine, POLICY.model_copy(update={"trigger_tokens": 2000}))
    same = wrapped.generate(input_ids=PROMPT, cache=large.cache(), max_new_tokens=30, **GREEDY)
    assert torch.equal(same, expected)
    assert torch.equal(assert_compacts(wrapped, engine), assert_compacts(engine.model, engine))


def test_a_session_of_a_wrapped_model_expects_what_the_model_does(
    wrapped: PeftModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        expected = wrapped(PROMPT).logits[0]
    session = Memory(new_engine(wrapped, byte_tokenizer), POLICY).session()
    session.append(TOKENS[:1])
    torch.testing.assert_close(session.logits(TOKENS[1:]), expected[:-1], rtol=0, atol=1e-3)


def test_adapters_that_come_later_are_refused_by_the_engine_before_them(
    model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    before = new_engine(model, byte_tokenizer)
    memory = Memory(before, POLICY)
    session, cache = memory.session(), memory.cache()
    session.append(TOKENS)
    wrapped = get_peft_model(before.model, lora())
    with pytest.raises(UnsupportedOperation, match="the model without adapters, and the model is now with default"):
        session.append(TOKENS)
    with pytest.raises(UnsupportedOperation, match="with default"):
        wrapped.generate(input_ids=PROMPT, cache=cache, max_new_tokens=5, **GREEDY)
    with wrapped.disable_adapter():
        session.append(TOKENS)
    assert_compacts(wrapped, new_engine(wrapped, byte_tokenizer))


def test_adapters_have_an_engine_each_and_share_no_cache(
    wrapped: PeftModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    first = new_engine(wrapped, byte_tokenizer)
    session = Memory(first, POLICY).session()
    session.append(TOKENS)
    wrapped.add_adapter("other", lora(1))
    session.append(TOKENS)  # it is there, and not active
    wrapped.set_adapter("other")
    second = new_engine(wrapped, byte_tokenizer)
    assert second.info.fingerprint != first.info.fingerprint
    with pytest.raises(UnsupportedOperation, match="the model with default, and the model is now with other"):
        next(session.generate(1))
    assert_compacts(wrapped, second)
    wrapped.set_adapter("default")
    next(session.generate(1))
    assert_compacts(wrapped, first)


def test_merged_adapters_are_other_weights(wrapped: PeftModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = new_engine(wrapped, byte_tokenizer)
    session = Memory(engine, POLICY).session()
    session.append(TOKENS)
    wrapped.merge_adapter()
    with pytest.raises(UnsupportedOperation, match="with default and merged with default"):
        session.append(TOKENS)
    wrapped.unmerge_adapter()
    session.append(TOKENS)
    merged = wrapped.merge_and_unload()
    with pytest.raises(UnsupportedOperation, match="the model is now without adapters"):
        session.append(TOKENS)
    assert_compacts(merged, new_engine(merged, byte_tokenizer))


def test_a_session_loads_with_the_adapter_that_it_was_saved_with(
    new_tiny_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def memory(*adapters: int) -> Memory:
        model: nn.Module = new_tiny_model()
        for seed in adapters:
            model = get_peft_model(model, lora(seed))
        return Memory(new_engine(model, byte_tokenizer), POLICY, store=str(tmp_path))

    session = memory(0).session("alice")
    session.append(TOKENS * 5)
    session.save()
    assert memory(0).session("alice").tokens == session.tokens
    for other in ((), (1,)):
        with pytest.raises(ModelMismatch):
            memory(*other).session("alice")


def test_an_adapter_that_is_switched_off_leaves_the_fingerprint_of_the_model(
    model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = model_fingerprint(model)
    wrapped = get_peft_model(model, lora())
    with wrapped.disable_adapter():
        assert new_engine(wrapped, byte_tokenizer).info.fingerprint == plain
    assert new_engine(wrapped, byte_tokenizer).info.fingerprint != plain


def test_adapters_without_a_wrapper_are_seen(model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    plain = new_engine(model, byte_tokenizer)
    inject_adapter_in_model(lora(), model, "mine")
    with pytest.raises(UnsupportedOperation, match="the model is now with mine"):
        plain.forward(plain.new_cache(), TOKENS)
    assert_compacts(model, new_engine(model, byte_tokenizer))


def test_other_kinds_that_change_weights_work(model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    wrapped = get_peft_model(model, IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    assert_compacts(wrapped, new_engine(wrapped, byte_tokenizer))


def test_adapters_for_each_text_are_refused(wrapped: PeftModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    cache = Memory(new_engine(wrapped, byte_tokenizer), POLICY).cache()
    with pytest.raises(UnsupportedOperation, match=r"adapter_names .*set_adapter\(\)"):
        wrapped.generate(input_ids=PROMPT, cache=cache, max_new_tokens=5, adapter_names=["default"], **GREEDY)


def test_a_refused_choice_of_adapters_leaves_the_model_as_it_was(
    wrapped: PeftModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """peft took its hooks away only where no error came, so that every session was refused from then on."""
    memory = Memory(new_engine(wrapped, byte_tokenizer), POLICY)
    session = memory.session()
    session.append(TOKENS)
    expected = session.logits([5])
    hooks = [len(layer._forward_pre_hooks) for layer in wrapped.modules()]
    for call in (wrapped.generate, wrapped):
        with pytest.raises(UnsupportedOperation, match="adapter_names"):
            call(input_ids=PROMPT, cache=memory.cache(), adapter_names=["default"])
        assert [len(layer._forward_pre_hooks) for layer in wrapped.modules()] == hooks
        assert torch.equal(session.logits([5]), expected)
    assert wrapped(input_ids=PROMPT, adapter_names=["default"]).logits.isfinite().all()


def test_an_adapter_that_begins_within_the_text_is_refused_by_its_argument(
    model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=TOKENS[4:7])
    wrapped = get_peft_model(model, config).eval()
    cache = Memory(new_engine(wrapped, byte_tokenizer), POLICY).cache()
    with pytest.raises(UnsupportedOperation, match="alora_offsets"):
        wrapped.generate(input_ids=PROMPT, cache=cache, max_new_tokens=5, **GREEDY)
    assert not cache.num_tokens
    assert not any(layer._forward_pre_hooks for layer in wrapped.modules())


def test_virtual_tokens_are_refused_by_name(model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    wrapped = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModel, match=r"an adapter of kind PREFIX_TUNING.*\(LoRA and similar ones\)"):
        new_engine(wrapped, byte_tokenizer)


def test_other_wrappers_are_refused_by_name(model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnsupportedModel, match="Sequential is not a transformers model.*pass the model itself"):
        new_engine(nn.Sequential(model), byte_tokenizer)
    with pytest.raises(UnsupportedModel, match="OptimizedModule is not a transformers model"):
        new_engine(torch.compile(model), byte_tokenizer)  # type: ignore[arg-type]
