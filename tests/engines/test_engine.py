"""The transformers engine itself: what it says of itself."""

from __future__ import annotations

from am_memory.engines.transformers import TransformersEngine


def test_it_says_what_it_runs_in_one_line(engine: TransformersEngine) -> None:
    assert repr(engine) == "<TransformersEngine: LlamaForCausalLM on cpu, context window of 4,096 tokens, float32>"


def test_it_reads_less_at_once_on_a_cpu(engine: TransformersEngine) -> None:
    assert engine.chunk_tokens == 512
