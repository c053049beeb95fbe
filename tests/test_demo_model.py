"""On the bundled model: exact while nothing is compacted, and a fact told first is recalled after compactions."""

from __future__ import annotations

import random

import pytest
import torch
from inside import rebuild
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.cli.letters import letters, prose
from am_memory.cli.questions import ask
from am_memory.engines.transformers import TransformersEngine
from am_memory.session.saving import snapshot

pytestmark = pytest.mark.model

Demo = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_logits_are_those_of_the_stock_model(demo: Demo) -> None:
    model, tokenizer = demo
    model.set_attn_implementation("sdpa")
    ids = tokenizer(" ".join(prose(random.Random(1), 8)))["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0]
    session = Memory(TransformersEngine(model, tokenizer), MemoryPolicy(chunk_tokens=50)).session()
    session.append(ids[:100])
    logits = session.logits(ids[100:])
    torch.testing.assert_close(logits, expected[99:-1], rtol=0, atol=2e-3)


def test_a_fact_told_first_is_recalled_after_three_compactions(demo: Demo) -> None:
    """The first letter's ship is asked for when its letter has been compacted, and the cache has been cut thrice."""
    policy = MemoryPolicy(trigger_tokens=384, keep_ratio=0.25)
    session = Memory(TransformersEngine(*demo), policy).session()
    written = letters(seed=0, num_letters=5, num_facts=1)
    for letter in written:
        session.append(letter.messages)
        assert session.stats.kv_tokens <= 384
    stats = session.stats
    assert stats.num_compactions >= 3
    assert stats.kv_bytes < stats.exact_kv_bytes / 2
    ship = written[0].facts[0]
    assert ask(session, [ship]) == {ship: ship.code}


def test_a_bfloat16_model_compacts_and_recalls() -> None:
    """In bfloat16 rounding alone sends logits after special tokens far astray, and the probe once refused the model."""
    memory = Memory.from_pretrained(
        "demo", dtype=torch.bfloat16, policy=MemoryPolicy(trigger_tokens=384, keep_ratio=0.25)
    )
    session = memory.session()
    written = letters(seed=0, num_letters=3, num_facts=1)
    for letter in written:
        session.append(letter.messages)
    assert session.stats.num_compactions >= 1
    ship = written[0].facts[0]
    assert ask(session, [ship]) == {ship: ship.code}


def test_self_study_writes_about_the_block_and_a_rebuild_reads_that_again(demo: Demo) -> None:
    policy = MemoryPolicy(
        trigger_tokens=384,
        keep_ratio=0.25,
        reference_queries=("repeat", "self_study"),
        self_study_tokens=96,
        originals="drop",
    )
    session = Memory(TransformersEngine(*demo), policy).session()
    written = letters(seed=0, num_letters=3, num_facts=1)
    for letter in written:
        session.append(letter.messages)
    ship, made = written[0].facts[0], snapshot(session).records
    assert made
    assert all(len(entry.conversations) == 4 for entry in made)
    assert ask(session, [ship]) == {ship: ship.code}
    rebuild(session)
    assert snapshot(session).records == made
    assert ask(session, [ship]) == {ship: ship.code}
