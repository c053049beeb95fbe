"""A model with sliding windows in llama.cpp: its other layers are compacted, and all goes back and forth as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from inside import cache_of, state_of
from policies import plain_policy
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CorruptSession, UnsupportedModel
from am_memory.kv_cache.layers import SlidingState, TailState

WINDOW = 16
POLICY = plain_policy(trigger_tokens=120, keep_ratio=0.25, pinned=4, keep_recent=8, head_budget="uniform")
TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(400)]


def random_gemma(**changes: object) -> PreTrainedModel:
    """Every third of six layers sees everything, the others sixteen tokens."""
    torch.manual_seed(20260216)
    config = Gemma3TextConfig(
        **{
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            **changes,
        }
    )
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerBase) -> Path:
    windows = {"attention__sliding_window": WINDOW, "attention__sliding_window_pattern": 3}
    file = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    return write_gguf(file, random_gemma(), byte_tokenizer, **windows, rope__freq_base=1e6)


@pytest.fixture(scope="module", params=["ragged", "shared"])
def gemma(path: Path, request: pytest.FixtureRequest) -> LlamaCppEngine:
    return LlamaCppEngine(path, kv_type="f32", heads=request.param)


@pytest.fixture
def memory(gemma: LlamaCppEngine, tmp_path: Path) -> Memory:
    return Memory(gemma, POLICY, store=tmp_path)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """ggml looks its GELU up in 16 bits, so that a sum in another order shows."""
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


def test_logits_are_those_of_the_other_engine(gemma: LlamaCppEngine, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    other = TransformersEngine(random_gemma(), byte_tokenizer)
    logits = [each.forward(each.new_cache(), TOKENS[:100], num_logits=100) for each in (gemma, other)]
    assert_same(*logits)


def test_only_layers_without_a_window_are_compacted(memory: Memory) -> None:
    session = memory.session()
    session.append(TOKENS[:110])
    cache = cache_of(session)
    assert len(cache.compactable) == 2
    whole = session.stats
    session.compact(1.0)
    stats = session.stats
    assert stats.kv_tokens < 40
    assert stats.kv_bytes < whole.kv_bytes < stats.exact_kv_bytes + whole.kv_bytes
    windows = [layer for layer in state_of(session).layers if isinstance(layer, SlidingState)]
    compact = [layer for layer in state_of(session).layers if isinstance(layer, TailState)]
    assert (len(windows), len(compact)) == (4, 2)
    assert all(layer.keys.shape[2] <= WINDOW + stats.exact_tokens for layer in windows)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_compacting_to_full_size_changes_nothing(memory: Memory, fraction: float) -> None:
    """Up to the last token too: the windows then begin before the tail."""
    session = memory.session(
        policy=POLICY.model_copy(update={"keep_ratio": 1.0, "trigger_tokens": 300, "max_compact_tokens": 100})
    )
    session.append(TOKENS[:100])
    before = session.logits(TOKENS[100:110])
    session.compact(fraction)
    assert session.stats.num_segments == 1
    assert_same(session.logits(TOKENS[100:110]), before)


def test_the_fit_of_ragged_heads_is_that_of_the_other_engine(
    path: Path, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    divergence = []
    for engine in (LlamaCppEngine(path, kv_type="f32"), TransformersEngine(random_gemma(), byte_tokenizer)):
        session = Memory(engine, POLICY).session()
        session.append(TOKENS[:110])
        expected = session.logits(TOKENS[110:140]).log_softmax(-1)
        session.compact(0.8)
        actual = session.logits(TOKENS[110:140]).log_softmax(-1)
        divergence.append(float((expected.exp() * (expected - actual)).sum(-1).mean()))
    assert divergence[0] == pytest.approx(divergence[1], rel=0.05)


def test_tokens_one_by_one_see_the_same_window(path: Path) -> None:
    """The kernel writes behind what a cache holds, and copies it where another cache has written already."""
    gemma = LlamaCppEngine(path, kv_type="f32")
    session = Memory(gemma, POLICY).session()
    session.append(TOKENS[:110])
    session.compact(0.8)
    cache, tokens = cache_of(session), TOKENS[110:200]
    expected = gemma.forward(cache.fork(), tokens, num_logits=len(tokens))
    branches = [cache.fork() for _ in range(2)]
    rows = [[gemma.forward(branch, [token], num_logits=1) for branch in branches] for token in tokens]
    for actual in zip(*rows, strict=True):
        assert_same(torch.cat(actual), expected)
    state, last = branches[0].state(), gemma.forward(branches[0], TOKENS[200:201], num_logits=1)
    gemma.forward(branches[0], TOKENS[300:301])
    branches[0].restore(state)
    gemma.forward(branches[1], TOKENS[300:301])
    assert_same(gemma.forward(branches[0], TOKENS[200:201], num_logits=1), last)
    assert_same(gemma.forward(branches[0], TOKENS[201:230], num_logits=1).isfinite().float(), torch.ones(1, 260))


def test_a_session_goes_back_while_others_take_the_context(memory: Memory, gemma: LlamaCppEngine) -> None:
    session, other = memory.session(), memory.session()
    session.append(TOKENS[:60])
    expected = session.logits(TOKENS[60:70])
    session.append(TOKENS[60:100])
    other.append(TOKENS[200:260])
    session.rewind(60)
    assert_same(session.logits(TOKENS[60:70]), expected)


def test_a_fork_and_its_origin_go_on_apart_over_compactions(memory: Memory) -> None:
    session = memory.session()
    session.append(TOKENS[:150])
    assert session.stats.num_compactions > 0
    branch = session.fork()
    alone = memory.session()
    alone.append(TOKENS[:150])
    alone.append(TOKENS[200:230])
    session.append(TOKENS[300:330])
    branch.append(TOKENS[200:230])
    assert_same(branch.logits(TOKENS[230:240]), alone.logits(TOKENS[230:240]))


def test_a_saved_session_goes_on_with_its_windows(memory: Memory, gemma: LlamaCppEngine) -> None:
    session = memory.session("alice")
    session.append(TOKENS[:150])
    expected = session.logits(TOKENS[150:160])
    windows = [layer for layer in state_of(session).layers if isinstance(layer, SlidingState)]
    assert len(windows) == 4
    session.save()
    again = Memory(gemma, POLICY, store=memory.store).session("alice")
    assert_same(again.logits(TOKENS[150:160]), expected)


def test_windows_of_another_model_are_refused(memory: Memory, gemma: LlamaCppEngine) -> None:
    session = memory.session()
    session.append(TOKENS[:50])
    content = state_of(session)

    class Saved:
        layers = content.layers[:-1]
        segments, num_pinned_slots = content.segments, content.num_pinned_slots

    with pytest.raises(CorruptSession, match="sliding windows,? is not one of this model's"):
        gemma.new_cache().load(Saved())


def test_windows_that_do_not_slide_need_shared_heads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("am_memory.engines.llama_cpp.support.CHUNKED", {"gemma3"})
    with pytest.raises(UnsupportedModel, match=r"tiny \(gemma3\) attends within fixed chunks of the text"):
        LlamaCppEngine(path)
    LlamaCppEngine(path, heads="shared")


def test_a_model_with_windows_alone_is_refused(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    model = random_gemma(layer_types=["sliding_attention"] * 6)
    windows = {"attention__sliding_window": WINDOW, "attention__sliding_window_pattern": 7}
    path = write_gguf(tmp_path / "windows.gguf", model, byte_tokenizer, **windows, rope__freq_base=1e6)
    with pytest.raises(UnsupportedModel, match="only layers with a sliding window"):
        LlamaCppEngine(path)
