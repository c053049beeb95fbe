"""The bundled model, quantised as its file has it: the same tokens and templates as elsewhere, and a memory that works."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from llama_cpp import Llama
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Experiments, Memory, MemoryPolicy
from am_memory.cli.letters import prose
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.model_files import demo_model_path
from am_memory.text.constraints import json_schema

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[3]
POLICY = MemoryPolicy(trigger_tokens=400, keep_ratio=0.25, reference_queries=("repeat",))


@pytest.fixture(scope="module")
def memory(demo_llama: LlamaCppEngine) -> Memory:
    return Memory(demo_llama, POLICY)


def test_tokens_are_those_of_transformers(
    memory: Memory, demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    """On prose, code, digits, marks, scripts and the text of special tokens."""
    files = ["README.md", "am_memory/compaction/compact.py", "pyproject.toml"]
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in files]
    texts += ["<|im_start|>user\n1234 567,89<|im_end|>\n", "Grüße  \n\n\t\u2603 \U0001f989 你好 مرحبا", " a", "a ", ""]
    for text in texts:
        token_ids = demo[1](text, add_special_tokens=False)["input_ids"]
        assert memory.engine.encode(text) == token_ids
        for skip in (False, True):
            assert memory.engine.decode(token_ids, skip_special=skip) == demo[1].decode(
                token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_the_template_writes_what_transformers_writes(
    memory: Memory, demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    for told in (messages, messages[:1], [{"role": "system", "content": "Be brief."}, *messages]):
        for opens in (False, True):
            expected = demo[1].apply_chat_template(told, tokenize=False, add_generation_prompt=opens)
            assert memory.engine.render(told, add_generation_prompt=opens) == expected


def test_a_session_says_what_llama_cpp_says(memory: Memory) -> None:
    text = "The owl is a bird of prey that hunts at night. It"
    token_ids = memory.tokenize(text)
    session = memory.scratch()
    session.append(token_ids)
    said = [piece.token_ids[0] for piece in session.generate(max_new_tokens=24)]
    threads = torch.get_num_threads()
    stock = Llama(str(demo_model_path()), n_ctx=256, flash_attn=True, verbose=False, n_threads=threads, logits_all=True)
    stock.eval(token_ids)
    for token_id in said:
        assert int(stock.scores[stock.n_tokens - 1].argmax()) == token_id
        stock.eval([token_id])


def test_the_fit_is_nearer_than_eviction(memory: Memory) -> None:
    """On a text that goes on."""
    text = " ".join(prose(random.Random(0), 10))
    full = memory.scratch()
    full.append(text)
    further = " The moon rose over the hill, and nobody in the village had seen it so large before."
    exact = full.logits(further).log_softmax(-1)
    divergence = []
    for fit in ("bias_and_values", "nothing"):
        branch = full.fork(policy=MemoryPolicy(**{**dict(POLICY), "experiments": Experiments(fit=fit)}))
        assert branch.compact(1.0).num_unbiased_heads == 0
        divergence.append((exact.exp() * (exact - branch.logits(further).log_softmax(-1))).sum(-1).mean())
    assert divergence[0] < 0.95 * divergence[1]


def test_answers_can_be_constrained(memory: Memory) -> None:
    session = memory.scratch()
    session.append([{"role": "user", "content": "Give an owl's name and age as JSON."}])
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    pieces = list(session.generate(48, constraint=json_schema(memory.engine, schema)))
    assert pieces[-1].finish_reason == "stop"
    assert json.loads("".join(piece.text for piece in pieces)).keys() == {"name", "age"}


def expected_after_compactions(memory: Memory) -> Tensor:
    session = memory.scratch()
    session.append(" ".join(prose(random.Random(1), 40)))
    assert session.stats.num_compactions > 1
    return session.logits(" The moon rose over the hill").log_softmax(-1)


@pytest.mark.parametrize(
    ("heads", "kv_type"), [("ragged", "f32"), ("ragged", "bf16"), ("shared", "bf16"), ("shared", "q8_0")]
)
def test_with_keys_and_values_of_any_type_little_changes(in_half: dict[str, Tensor], heads: str, kv_type: str) -> None:
    """q8_0 among them, for which llama.cpp turns the keys of real models into another basis."""
    other = expected_after_compactions(Memory(LlamaCppEngine("demo", kv_type=kv_type, heads=heads), POLICY))
    expected = in_half[heads]
    assert float((expected.exp() * (expected - other)).sum(-1).mean()) < 0.05


@pytest.fixture(scope="module")
def in_half(memory: Memory) -> dict[str, Tensor]:
    shared = Memory(LlamaCppEngine("demo", heads="shared"), POLICY)
    return {"ragged": expected_after_compactions(memory), "shared": expected_after_compactions(shared)}
