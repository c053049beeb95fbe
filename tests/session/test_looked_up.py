"""What an answer looked up reaches those who read its pieces."""

from __future__ import annotations

import pytest

from am_memory import Memory, MemoryPolicy
from am_memory.conversations.chat_answer import MAX_SPAN_CHARS, as_shown
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import Event, MemoryConsulted, Span

POLICY = MemoryPolicy(trigger_tokens=128, recall_tokens=32, keep_ratio=0.25, keep_recent=8, pinned=3, chunk_tokens=32)


@pytest.mark.usefixtures("looking_back")
def test_the_first_piece_has_what_the_message_looked_up(engine: TransformersEngine) -> None:
    events: list[Event] = []
    session = Memory(engine, POLICY, on_event=events.append).session()
    session.append([{"role": "user", "content": "a message of more than the cache can hold. " * 6}])
    pieces = list(session.generate(4))
    (consulted,) = [event for event in events if isinstance(event, MemoryConsulted)]
    assert pieces[0].looked_up == consulted.spans
    assert [(span.start, span.end) for span in consulted.spans] == [*session.recalled]
    assert not any(piece.looked_up for piece in pieces[1:])


def test_clients_get_a_long_text_shortened_and_the_score_rounded() -> None:
    span = as_shown(Span(0, 400, 1.23456, "start " + "long " * 300 + " end"))
    assert span.score == 1.23
    assert len(span.text) == MAX_SPAN_CHARS + 3
    assert span.text.startswith("start ")
    assert span.text.endswith(" end")
