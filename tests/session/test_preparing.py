"""A model is measured before anybody waits for it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from driven import another_process
from policies import plain_policy

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import CompactionProgress, Event, SearchHeadsProgress


def test_a_prepared_memory_measures_nothing_later(
    engine: TransformersEngine, measured_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = list[Event]()
    memory = Memory(another_process(engine), MemoryPolicy(trigger_tokens=512), on_event=heard.append)
    with caplog.at_level(logging.INFO, "am_memory"):
        memory.prepare()
        memory.prepare()
    assert [record.message.split()[0] for record in caplog.records] == ["measuring", "measured"]
    session = memory.session()
    session.append("The owl of the mill sleeps all day. " * 20)
    session.search("Where is the owl?")
    stages = {event.stage for event in heard if isinstance(event, CompactionProgress)}
    assert "predict" in stages
    assert "measure" not in stages
    assert not any(isinstance(event, SearchHeadsProgress) for event in heard)


def test_a_policy_that_needs_no_measurement_makes_none(engine: TransformersEngine, measured_folder: Path) -> None:
    Memory(another_process(engine), plain_policy(trigger_tokens=512, recall_tokens=0)).prepare()
    assert [*measured_folder.iterdir()] == []
