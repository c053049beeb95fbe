"""What an engine cannot do is refused by name; all else works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from driven import some_tokens
from inside import slots_of
from policies import plain_policy
from toy_engine import ToyEngine

import am_memory
from am_memory import Experiments, Memory
from am_memory.compaction.sensitivity import calibrate
from am_memory.engines.base import Capabilities
from am_memory.errors import InvalidPolicy, UnsupportedOperation

POLICY = plain_policy(trigger_tokens=96, keep_ratio=0.25, keep_recent=8, pinned=4)


@pytest.fixture
def plain() -> ToyEngine:
    """An engine that can do no more than it must."""
    return ToyEngine(Capabilities())


def test_an_engine_without_any_capability_compacts_again_and_again(plain: ToyEngine) -> None:
    session = Memory(plain, POLICY).session()
    session.append(some_tokens(400))
    branch = session.fork()
    list(branch.generate(20))
    session.rewind(390)
    assert session.stats.num_compactions > 3
    for slots in slots_of(session):
        assert len({slots.head(head).num_slots for head in range(slots.num_heads)}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_budget": "adaptive"}, "head_budget 'adaptive' needs .* leave it at 'auto'"),
        ({"originals": "host"}, "originals 'host' needs .* leave it at 'auto'"),
        ({"segment_dtype": "int8"}, "segment_dtype 'int8' .* leave it at 'model'"),
        ({"ahead_tokens": 8}, "ahead_tokens 8 needs .* leave it at 0"),
        ({"experiments": Experiments(on_policy=True)}, "on_policy needs .* leave it at False"),
        ({"experiments": Experiments(summary_tokens=8)}, "summary_tokens 8 needs .* does not rotate keys; leave it"),
    ],
    ids=str,
)
def test_a_policy_that_asks_for_more_is_refused(plain: ToyEngine, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidPolicy, match=words):
        Memory(plain, POLICY.with_changes(**changes)).session()


def test_what_needs_another_cache_is_refused(plain: ToyEngine) -> None:
    with pytest.raises(UnsupportedOperation, match=r"a ToyCache cannot go into generate\(\) of transformers"):
        Memory(plain, POLICY).cache()
    with pytest.raises(UnsupportedOperation, match="a calibration compacts one head alone"):
        calibrate(plain, ["a text"])


def test_a_calibration_is_measured_over_any_engine_with_ragged_heads(engine: ToyEngine) -> None:
    calibration = calibrate(engine, ["The owl sat on the old oak and looked at the moon. " * 6], block_tokens=100)
    assert len(calibration.losses) == engine.new_cache().num_heads
    assert all(head[0] > head[-1] >= 0 for head in calibration.losses)


def test_nothing_but_engines_asks_for_the_class_of_a_cache() -> None:
    package = Path(am_memory.__file__).parent
    for path in package.rglob("*.py"):
        if not {"engines", "kv_cache"} & set(path.relative_to(package).parts):
            assert not re.search(r"isinstance\([^)]*Cache\b", path.read_text(encoding="utf-8")), path
