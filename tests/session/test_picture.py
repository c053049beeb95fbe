"""A session as a picture, and progress as bars: for notebooks."""

from __future__ import annotations

import sys

import pytest
from driven import some_tokens
from inside import context_of
from policies import plain_policy

from am_memory import Memory, ProgressBars, Session
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import UnsupportedOperation
from am_memory.events import CompactionProgress, ReadProgress
from am_memory.session.picture import held_by
from am_memory.session.progress import STAGES, step_of


@pytest.fixture
def session(engine: TransformersEngine) -> Session:
    session = Memory(engine, plain_policy(trigger_tokens=400, keep_ratio=0.25, originals="host")).session("owl")
    session.append(some_tokens(1000))
    return session


def test_every_token_has_its_place_in_the_picture(session: Session) -> None:
    session.recall((20, 30))
    parts = [part for part in held_by(context_of(session)) if part.kind != "recalled"]
    assert [part.kind for part in parts] == ["pinned", *["compact"] * len(session.segments), "exact"]
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == 999  # the last token is read with the next ones
    held = sum((part.end - part.start) * part.share for part in parts)
    assert held == pytest.approx(session.stats.kv_tokens, abs=session.stats.recalled_tokens + 1)


def test_a_session_is_drawn(session: Session) -> None:
    pytest.importorskip("matplotlib")
    (axis,) = session.plot().axes
    assert axis.get_title().startswith("owl: 1,000 tokens in ")
    assert len(axis.patches) == len([*held_by(context_of(session))])


def test_an_empty_session_is_drawn_too(engine: TransformersEngine) -> None:
    pytest.importorskip("matplotlib")
    assert Memory(engine, plain_policy(trigger_tokens=100, keep_ratio=0.25)).session("owl").plot().axes


def test_without_matplotlib_the_error_says_what_to_install(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedOperation, match=r"install attention-matching-memory\[bench\]"):
        session.plot()


def test_bars_show_reading_and_compacting_and_go_away(
    engine: TransformersEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = ProgressBars()
    policy = plain_policy(trigger_tokens=100, keep_ratio=0.25, chunk_tokens=30)
    Memory(engine, policy, on_event=bars).session("owl").append(some_tokens(300))
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "compacting: fitting its heads" in shown
    assert not bars._bars


def test_the_bar_of_a_failed_compaction_goes_away_when_the_next_work_begins(capsys: pytest.CaptureFixture[str]) -> None:
    """It stayed for ever."""
    bars = ProgressBars()
    bars(ReadProgress("owl", 10, 100))
    bars(CompactionProgress("owl", "fit", 1, 3))
    assert len(bars._bars) == 2
    bars(ReadProgress("owl", 100, 100))
    assert not bars._bars


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_name(stage: str) -> None:
    assert stage in str(CompactionProgress.__doc__)
    assert step_of(CompactionProgress("owl", stage, 1, 3)) == (f"compacting: {STAGES[stage]}", 1, 3)
