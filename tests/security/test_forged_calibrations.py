"""Calibration files that nobody measured: refused with an error of ours, or good enough for a compaction."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from am_memory import Memory, MemoryPolicy
from am_memory.budgets import calibrated
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidPolicy

NUM_HEADS = 6
ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        0.5,
        -0.0,
        5e-324,
        1e-300,
        1e-7,
        1e300,
        1e308,
        10**30,
        -(10**30),
        "",
        "0.5",
        "nan",
        "x" * 5000,
    ),
    *([], [[]], {}, {"a": 1}, [0.1] * 50, [[0.1, 0.2, 0.3]], float("nan"), float("inf"), float("-inf")),
]


def sound(engine: TransformersEngine) -> dict[str, Any]:
    head = [2.0, 0.9, 0.2]
    return {
        "fingerprint": engine.info.fingerprint,
        "model": "a model",
        "ratios": [0.01, 0.1, 0.5],
        "losses": [head] * NUM_HEADS,
        "weighs_scores": True,
    }


def mutated(random: Random, value: Any) -> Any:
    if isinstance(value, dict | list) and value and random.random() < 0.8:
        changed = dict(value) if isinstance(value, dict) else list(value)
        place: Any = random.choice([*value] if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.15:
            del changed[place]
        else:
            changed[place] = mutated(random, value[place])
        return changed
    return random.choice([*ODD, [value], [value, value]])


def test_a_forged_file_is_refused_or_serves_for_a_compaction(engine: TransformersEngine, tmp_path: Path) -> None:
    """Absurd numbers and shapes came out as a bare RuntimeError, IndexError or OverflowError, at a compaction."""
    random, path, num_used = Random(0), tmp_path / "forged.json", 0
    policy = MemoryPolicy(trigger_tokens=60, keep_ratio=0.5, keep_recent=0, head_budget=str(path), recall_tokens=0)
    for _ in range(300):
        forged = mutated(random, sound(engine))
        content = json.dumps(forged).encode()
        path.write_bytes(content[: random.randrange(len(content))] if random.random() < 0.1 else content)
        try:
            session = Memory(engine, policy).session()
            session.append([7, 8, 9] * 22)
        except InvalidPolicy as error:
            assert len(str(error)) < 3000
            continue
        assert session.stats.num_compactions == 1
        num_used += 1
    assert num_used > 10


def test_what_is_no_file_is_not_waited_for(engine: TransformersEngine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json", "\0.json"):
        with pytest.raises(InvalidPolicy, match="cannot be read"):
            Memory(engine, MemoryPolicy(trigger_tokens=2000, head_budget=str(tmp_path / name))).session()


def test_a_file_that_is_too_large_is_not_read_to_its_end(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(sound(engine)) + " " * 1000)
    policy = MemoryPolicy(trigger_tokens=2000, head_budget=str(path))
    Memory(engine, policy).session()
    monkeypatch.setattr(calibrated, "MAX_FILE_BYTES", 900)
    with pytest.raises(InvalidPolicy, match="larger than 900 bytes"):
        Memory(engine, policy).session()
