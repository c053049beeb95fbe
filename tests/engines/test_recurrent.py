"""Hybrid models: recurrent states beside full attention. A state is left alone, and never goes back by a token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inside import cache_of, context_of
from random_operations import KINDS, POLICY, Driver, differences
from test_families import LINEAR, MAMBA, Family, tokens
from transformers import PreTrainedTokenizerBase

from am_memory import Memory
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CorruptSession, InvalidPolicy, UnsupportedOperation
from am_memory.kv_cache.layers import RecurrentState

HYBRIDS = {
    "linear attention": Family("Qwen3Next", LINEAR),
    "short convolution": Family("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "state beside keys": Family("FalconH1", {**MAMBA, "mamba_d_ssm": 64}),
}


@pytest.fixture(scope="module", params=HYBRIDS)
def family(request: pytest.FixtureRequest) -> Family:
    return HYBRIDS[request.param]


@pytest.fixture(scope="module")
def hybrid(family: Family, byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    return TransformersEngine(family.build(), byte_tokenizer)


def test_a_snapshot_is_not_written_into(hybrid: TransformersEngine) -> None:
    """Models write into the states that the cache hands out."""
    cache, ids = hybrid.new_cache(), tokens()
    hybrid.forward(cache, ids[:20])
    state = cache.state()
    copies = [tensor.clone() for layer in state.layers if isinstance(layer, RecurrentState) for tensor in layer.tensors]
    first = hybrid.forward(cache, ids[20:21], num_logits=1)
    hybrid.forward(cache, ids[21:40])
    cache.restore(state)
    kept = [tensor for layer in cache.state().layers if isinstance(layer, RecurrentState) for tensor in layer.tensors]
    assert copies
    assert all(torch.equal(*pair) for pair in zip(copies, kept, strict=True))
    assert torch.equal(hybrid.forward(cache, ids[20:21], num_logits=1), first)


def test_forks_go_on_apart(hybrid: TransformersEngine) -> None:
    cache, ids = hybrid.new_cache(), tokens()
    hybrid.forward(cache, ids[:20])
    fork = cache.fork()
    for token in ids[30:35]:
        hybrid.forward(fork, [token])
    alone = hybrid.new_cache()
    hybrid.forward(alone, ids[:20])
    expected = hybrid.forward(alone, ids[20:21], num_logits=1)
    assert torch.equal(hybrid.forward(cache, ids[20:21], num_logits=1), expected)


def test_kv_bytes_counts_states(hybrid: TransformersEngine) -> None:
    cache = hybrid.new_cache()
    hybrid.forward(cache, tokens()[:20])
    layers = cache.state().layers
    states = sum(layer.nbytes for layer in layers if isinstance(layer, RecurrentState))
    assert states > 0
    assert cache.nbytes == sum(layer.nbytes for layer in layers)
    assert cache.exact_nbytes == cache.nbytes - sum(
        2 * layer.buffer.key[:, :, layer.length :].nbytes for layer in cache.compactable
    )


@pytest.mark.parametrize("changes", [{}, {"ahead_tokens": 15, "originals": "host"}], ids=str)
def test_random_operations(hybrid: TransformersEngine, tmp_path: Path, changes: dict[str, object]) -> None:
    """Appends, answers, rewinds, forks, recalls and saved sessions: all as their rebuild has it, to the bit."""
    driver = Driver(hybrid, POLICY.with_changes(**changes), "hybrids", str(tmp_path), kinds=tuple(KINDS))
    for _ in range(2):
        for _ in range(3):
            driver.step()
        assert driver.differences() == [], driver.done


def test_a_state_cannot_drop_a_token(hybrid: TransformersEngine) -> None:
    session = Memory(hybrid, POLICY).session()
    session.append(tokens()[:50])
    with pytest.raises(UnsupportedOperation, match="a recurrent state has seen them; use Session.rewind"):
        cache_of(session).truncate(29)


def test_a_saved_state_must_be_one_of_the_model(
    hybrid: TransformersEngine, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    memory = Memory(hybrid, POLICY, store=tmp_path)
    session = memory.session("one")
    session.append(tokens()[:40])
    session.save()
    resumed = Memory(hybrid, POLICY, store=tmp_path).session("one")
    assert differences(context_of(session), context_of(resumed)) == []
    cache = cache_of(session)
    last = max(index for index, layer in enumerate(cache.state().layers) if isinstance(layer, RecurrentState))
    layer = cache.recurrent[max(cache.recurrent)]
    layer.conv_states[0] = layer.conv_states[0][:, :-1]
    session.save()
    with pytest.raises(CorruptSession, match=f"layer {last} holds"):
        Memory(hybrid, POLICY, store=tmp_path).session("one")


def test_refining_is_refused_by_name(hybrid: TransformersEngine) -> None:
    with pytest.raises(InvalidPolicy, match="recurrent states, and heads"):
        Memory(hybrid, POLICY.with_changes(originals="host", refine="idle"))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_interrupted_pass_can_be_made_again(
    family: Family, byte_tokenizer: PreTrainedTokenizerBase, layer: int
) -> None:
    """A state that has seen a token does not show it: the token would be read twice."""
    model = family.build()
    memory = Memory(TransformersEngine(model, byte_tokenizer), POLICY)
    prompt, greedy = torch.tensor([tokens()[:20]]), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(prompt, cache=memory.cache(), max_new_tokens=8, **greedy)
    cache, calls = memory.cache(), []

    def interrupt(*args: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, cache=cache, max_new_tokens=8, **greedy)
    hook.remove()
    assert cache.num_tokens == 22
    again = model.generate(whole[:, :23], cache=cache, max_new_tokens=5, **greedy)
    assert torch.equal(again, whole)
