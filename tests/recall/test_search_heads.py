"""Search heads: measured once for a model, kept in a file that may be damaged, and then measured again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driven import another_process
from inside import cache_of
from policies import plain_policy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory
from am_memory.engines.model_files import cache_folder
from am_memory.engines.transformers import TransformersEngine
from am_memory.queries.trial import trial
from am_memory.recall import search_heads as module
from am_memory.recall.search_heads import NUM_HEADS, SearchHeads, measure, ready_search_heads, search_heads


@pytest.fixture
def num_measured(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each measurement, all of which give the same."""
    made: list[None] = []
    found = SearchHeads((module.SearchHead(1, 0, 1), module.SearchHead(2, 1, 0)), torch.ones(2, 3, 16) / 3, 77)

    def measured(engine: TransformersEngine, on_progress: object) -> SearchHeads:
        made.append(None)
        return found

    monkeypatch.setattr(module.measured(), "_measure", measured)
    return made


def test_as_many_heads_are_found_and_the_same_ones_each_time(engine: TransformersEngine) -> None:
    found, again = measure(engine), measure(engine)
    assert len(set(found.heads)) == NUM_HEADS
    assert found.heads == again.heads
    assert found.usual.shape[0] == NUM_HEADS
    assert found.usual.shape[1] <= module.MAX_USUAL
    assert torch.equal(found.usual, again.usual)


def test_a_measurement_says_how_far_it_is(engine: TransformersEngine) -> None:
    """It takes half a minute on a slow machine, in which the engine answered nobody and nothing was said."""
    steps: list[tuple[int, int]] = []
    measure(engine, lambda done, total: steps.append((done, total)))
    num_texts = 1 + len(trial().ordinary) + len(trial().questions)
    assert steps == [(number, num_texts) for number in range(1, num_texts + 1)]


def test_heads_that_would_have_to_be_measured_are_not_ready(
    engine: TransformersEngine, measured_folder: Path, num_measured: list[None]
) -> None:
    twin = another_process(engine)
    assert ready_search_heads(twin) is None
    assert num_measured == []
    assert search_heads(twin) is ready_search_heads(twin) is not None


def test_what_was_measured_is_read_from_its_file(
    engine: TransformersEngine, measured_folder: Path, num_measured: list[None]
) -> None:
    first, second = (search_heads(another_process(engine)) for _ in range(2))
    assert len(num_measured) == 1
    assert (first.heads, first.position) == (second.heads, second.position)
    torch.testing.assert_close(first.usual, second.usual, rtol=0, atol=1e-3)
    search_heads(another_process(engine, "another model"))
    assert len(num_measured) == 2
    assert len([*(measured_folder / "search_heads").iterdir()]) == 2


@pytest.mark.parametrize("name", ["engine", "llama"])
def test_a_file_is_checked_against_a_cache_without_an_exact_token(
    request: pytest.FixtureRequest, measured_folder: Path, num_measured: list[None], name: str
) -> None:
    """The first lookup of a process may come right after everything was compacted."""
    engine = another_process(request.getfixturevalue(name))
    search_heads(engine)
    session = Memory(another_process(engine), plain_policy(trigger_tokens=512, keep_ratio=0.5)).session()
    session.append("The owl of the mill sleeps all day. " * 4)
    session.compact(1.0)
    cache = cache_of(session)
    assert cache.tail_start == cache.num_tokens
    found = search_heads(another_process(engine), cache)
    assert found.suits(cache)
    assert len(num_measured) == 1
    assert not replace(found, usual=torch.ones(2, 3, 8)).suits(cache)
    assert not replace(found, heads=(module.SearchHead(1, 2, 0),)).suits(cache)
    session.search("Where is the owl?")


@pytest.mark.parametrize("damage", [b"", b"owl", None], ids=["empty", "no safetensors", "another model's"])
def test_a_damaged_file_is_measured_again(
    engine: TransformersEngine, measured_folder: Path, num_measured: list[None], damage: bytes | None
) -> None:
    found = search_heads(another_process(engine))
    (file,) = (measured_folder / "search_heads").iterdir()
    file.write_bytes(
        module.measured().files.packed("another model", module.packed(found)) if damage is None else damage
    )
    again = search_heads(another_process(engine))
    assert len(num_measured) == 2
    assert again.heads == found.heads
    assert search_heads(another_process(engine)).heads == found.heads
    assert len(num_measured) == 2


def test_a_folder_that_cannot_be_written_stops_nobody(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_measured: list[None]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path / "file"))
    assert search_heads(another_process(engine)).position == 77
    assert len(num_measured) == 1


def test_tests_have_a_folder_of_their_own() -> None:
    assert "am-memory-tests-" in str(cache_folder())


@pytest.mark.model
def test_those_of_the_demo_model_are_shipped(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """As this machine would measure them: nobody waits for it in the demo."""
    engine = TransformersEngine(*demo)
    shipped = ready_search_heads(engine)
    assert shipped is not None
    measured = module.measure(engine)
    assert shipped.heads == measured.heads
    torch.testing.assert_close(shipped.usual, measured.usual, rtol=2e-2, atol=2e-2)
