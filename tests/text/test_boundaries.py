from __future__ import annotations

import pytest
from inside import cache_of

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.text.boundaries import best_boundary

CHAT = "<|im_start|>user\nThe code of\nCarrow is 4711. I shall ask for it.<|im_end|>\n<|im_start|>assistant\nNoted"


def parts(engine: TransformersEngine, text: str, earliest: str, latest: str) -> tuple[str, str]:
    """Where a text is cut between the ends of two of its beginnings."""
    token_ids = engine.encode(text)
    ends = (len(engine.encode(text[: text.index(part) + len(part)])) for part in (earliest, latest))
    position = best_boundary(engine, token_ids, *ends)
    return engine.decode(token_ids[:position]), engine.decode(token_ids[position:])


@pytest.mark.parametrize(
    ("earliest", "latest", "end"),
    [
        ("The code", "assistant", "<|im_end|>\n"),  # a message before a line
        ("The", "ask for", "The code of\n"),  # a line before a sentence
        ("Carrow", "I shall", "4711."),  # a sentence before a word
        ("Carrow", "471", "is"),  # a word, and never within a number
        ("47", "47", "47"),  # what has no choice
    ],
)
def test_the_strongest_boundary_wins(engine: TransformersEngine, earliest: str, latest: str, end: str) -> None:
    before, after = parts(engine, CHAT, earliest, latest)
    assert before.endswith(end)
    assert before + after == CHAT


def test_the_last_of_equal_boundaries_wins(engine: TransformersEngine) -> None:
    assert parts(engine, "One. Two. Three. Four", "One", "Fou")[0] == "One. Two. Three."


def test_a_message_ends_at_its_mark_where_the_template_adds_no_line(engine: TransformersEngine) -> None:
    text = "Yes.<|im_end|><|im_start|>users"
    assert parts(engine, text, "Ye", "user")[0] == "Yes.<|im_end|>"


def test_a_triggered_compaction_ends_at_a_boundary(engine: TransformersEngine) -> None:
    """Codes were cut in two, and neither block knew what they were of."""
    memory = Memory(engine, MemoryPolicy(trigger_tokens=600, keep_ratio=0.2, keep_recent=10))
    session = memory.session()
    session.append("The code of Carrow is 4711. " * 60)
    texts = [engine.decode(session.tokens[made.start : made.end]) for made in cache_of(session).segments]
    assert len(texts) > 3
    assert all(text.endswith("4711.") for text in texts)


def test_what_a_compaction_by_hand_covers_is_not_changed(engine: TransformersEngine) -> None:
    session = Memory(engine, MemoryPolicy(trigger_tokens=400, keep_ratio=0.2)).session()
    session.append("The code of Carrow is 4711. " * 10)
    report = session.compact(0.5)
    assert report.end - report.start == -(-(session.stats.logical_tokens - 1 - 4) // 2)
