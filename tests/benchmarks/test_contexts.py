"""Chats made of files of lost-in-compaction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from contexts_files import MOST_TURNS, USER_CHARS, load_contexts, shortened


def told(number: int, **changes: Any) -> dict[str, Any]:
    """A fact of four turns, said in the second."""
    fact = {
        "fact_id": f"F{number:02d}",
        "question": f"What is number {number}?",
        "question_type": "single-session-user",
        "answer": f"value {number}",
        "message_start": 8 * number,
        "message_end": 8 * number + 8,
        "compacted": False,
    }
    return {**fact, **changes}


def write(folder: Path, listed: list[dict[str, Any]], name: str = "d80") -> Path:
    messages = [
        {"role": role, "content": f"Value {number} it is." if (turn, role) == (1, "user") else "So we go on."}
        for number in range(len(listed))
        for turn in range(4)
        for role in ("user", "assistant")
    ]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(messages))
    path.with_name(f"{name}_meta.json").write_text(json.dumps({"facts": listed}))
    return path


def test_a_chat_has_the_sessions_of_ten_facts_that_the_user_says(tmp_path: Path) -> None:
    unusable = [
        told(10, compacted=True),
        told(11, answer="nobody says this"),
        told(12, question_type="single-session-preference"),
        told(13, answer="yes"),
    ]
    (chat,) = load_contexts([write(tmp_path, [*map(told, range(10)), *unusable])])
    assert len(chat.facts) == 10
    assert len(chat.turns) == 40
    for fact in chat.facts:
        (turn,) = fact.turns
        assert fact.answer in chat.turns[turn][0]
        assert fact.answer == f"Value {int(fact.kind[-2:])}"


def test_a_fact_of_two_contexts_is_taken_once(tmp_path: Path) -> None:
    both = [write(tmp_path, [told(number) for number in range(12)], name) for name in ("d80", "d60")]
    (chat,) = load_contexts(both)
    assert len({fact.kind for fact in chat.facts}) == 10


def test_of_a_long_session_the_turns_up_to_the_fact_are_taken(tmp_path: Path) -> None:
    listed = [told(number, message_start=0, message_end=80) for number in range(10)]
    (chat,) = load_contexts([write(tmp_path, listed)])
    assert max(len(chat.turns) // len(chat.facts), 1) <= MOST_TURNS
    assert all(fact.answer in chat.turns[fact.turns[0]][0] for fact in chat.facts)


def test_a_long_message_is_cut_behind_a_sentence() -> None:
    text = shortened("**Sums** up. " + "A sentence of some length. " * 60, USER_CHARS)
    assert text.startswith("Sums up. A sentence")
    assert len(text) <= USER_CHARS
    assert text.endswith("length.")


def test_a_file_that_is_no_context_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"fact_id": "F1"}])
    with pytest.raises(ValueError, match="no context of lost-in-compaction, KeyError"):
        load_contexts([path])
