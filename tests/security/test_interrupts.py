"""Control-C, no memory left, a generator that is closed: wherever it strikes, a session is as before or as after."""

from __future__ import annotations

from pathlib import Path

import pytest
from interrupts import STEPS, check, scenes

from am_memory.engines.transformers import TransformersEngine

NUM_PLACES = 12


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupt_leaves_a_session_as_before_or_as_after(
    engine: TransformersEngine, tmp_path: Path, name: str
) -> None:
    """Tokens stayed without their message when it struck behind the commit. `python tests/interrupts.py` does all."""
    step = STEPS[name]

    def places(count: int) -> list[int]:
        return sorted({round(1 + share * (count - 1) / (NUM_PLACES - 1)) for share in range(NUM_PLACES)})

    check(scenes(engine, step, tmp_path), step, places, everywhere=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, GeneratorExit])
@pytest.mark.parametrize("name", ["add", "rewind"])
def test_the_last_lines_of_a_step_and_the_first_behind_it_are_no_exception(
    engine: TransformersEngine, tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    step = STEPS[name]
    check(
        scenes(engine, step, tmp_path), step, lambda count: range(count - 20, count + 1), everywhere=False, error=error
    )


def test_a_grammar_is_where_the_answer_is(engine: TransformersEngine, tmp_path: Path) -> None:
    """It had accepted a token that was taken back, or not one that stayed, and refused to go on with the answer."""
    step = STEPS["generate by a grammar"]
    check(scenes(engine, step, tmp_path), step, lambda count: range(count // 2, count // 2 + 60), everywhere=False)
