"""How a memory, a session and its size are shown: a line in a terminal, a small table in a notebook."""

from __future__ import annotations

from threading import Thread

from driven import some_tokens
from policies import plain_policy

from am_memory import Memory, MemoryPolicy, Stats
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import CompactionFinished, CompactionStarted, Event
from am_memory.formatting import counted
from am_memory.session.stats import html_table

STATS = Stats(
    logical_tokens=5312,
    kv_tokens=1019.6,
    exact_tokens=640,
    kv_bytes=3 * 2**20,
    exact_kv_bytes=15 * 2**20,
    num_compactions=3,
    num_segments=2,
)
MARKUP = "<img src=x onerror='alert(1)'>"


def test_the_size_is_said_in_a_line() -> None:
    assert str(STATS) == "5,312 tokens in 1,020 slots, 3 compactions"
    assert repr(STATS) == "Stats(5,312 tokens in 1,020 slots, 3 compactions, 3.0 MiB instead of 15.0 MiB)"


def test_one_of_anything_has_no_plural() -> None:
    assert [counted(number, "slot") for number in (0, 1, 1000)] == ["0 slots", "1 slot", "1,000 slots"]


def test_a_memory_and_a_session_say_what_they_hold(engine: TransformersEngine) -> None:
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1000))
    assert repr(memory) == f"Memory({engine.info.name!r}, 0 sessions)"
    session = memory.session("alice")
    session.append([1, 2, 3])
    assert repr(session) == "Session('alice', 3 tokens in 2 slots, 0 compactions)"
    assert repr(memory) == f"Memory({engine.info.name!r}, 1 session)"


def test_a_step_that_is_not_over_does_not_show(engine: TransformersEngine) -> None:
    """Another thread saw the slots of some layers and the exact entries of others, or a segment without its record."""
    seen: list[Stats] = []

    def on_event(event: Event) -> None:
        if isinstance(event, CompactionStarted | CompactionFinished):
            thread = Thread(target=lambda: seen.append(session.stats))
            thread.start()
            thread.join()

    memory = Memory(engine, plain_policy(trigger_tokens=96, keep_ratio=0.25, keep_recent=4), on_event=on_event)
    session = memory.session("alice")
    for seed in range(3):
        before = session.stats
        session.append(some_tokens(70, seed))
        assert session.stats != before
        assert seen == [before] * len(seen)
        assert bool(seen) == bool(seed)
        seen.clear()


def test_a_notebook_gets_a_table(engine: TransformersEngine) -> None:
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1000))
    session = memory.session("alice")
    session.append([1, 2, 3])
    assert "<tr><th>tokens</th><td>3</td></tr>" in session._repr_html_()
    assert "<tr><th>alice</th><td>3 tokens in 2 slots, 0 compactions</td></tr>" in memory._repr_html_()
    assert "<tr><th>cache</th><td>3.0 MiB instead of 15.0 MiB</td></tr>" in STATS._repr_html_()
    assert "originals" not in STATS._repr_html_()


def test_a_table_of_many_sessions_ends(engine: TransformersEngine) -> None:
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1000))
    for number in range(23):
        memory.session(f"session {number}")
    table = memory._repr_html_()
    assert table.count("<tr>") == 21
    assert "<tr><th>...</th><td>3 more</td></tr>" in table


def test_names_are_text_and_no_markup(engine: TransformersEngine) -> None:
    """Whoever may name a session could otherwise run scripts in a notebook."""
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1000))
    for shown in (memory.session(MARKUP), memory):
        assert "<img" not in shown._repr_html_()
        assert "&lt;img" in shown._repr_html_()
    assert "<img" not in html_table(MARKUP, {MARKUP: MARKUP})
