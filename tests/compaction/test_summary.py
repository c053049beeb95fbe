"""A summary in the place of a block: where its entries stand, what they are, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from driven import some_tokens
from inside import cache_of, layers_of, put_away_oldest, rebuild
from policies import plain_policy
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import rotate_half

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, InvalidPolicy
from am_memory.events import CompactionProgress, Event, ignore
from am_memory.kv_cache.slots import PINNED_RANK
from am_memory.session.saving import snapshot

POLICY = plain_policy(
    trigger_tokens=400, keep_ratio=0.05, pinned=3, chunk_tokens=16, experiments=Experiments(summary_tokens=12)
)
WHOLE = {"keep_ratio": 0.5}
"""More slots than a summary has entries."""
WRITING = "am_memory.compaction.job.write_summary"

NewMemory = Callable[..., Memory]


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path) -> NewMemory:
    """Makes memories that share the model and a store."""

    def make(
        on_event: Callable[[Event], None] = ignore, engine: TransformersEngine = engine, **changes: object
    ) -> Memory:
        policy = POLICY.model_copy(update=changes)
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=tmp_path / "store", on_event=on_event)

    return make


def told_session(memory: Memory, num_tokens: int = 122) -> Session:
    session = memory.session("alice")
    session.append(some_tokens(num_tokens))
    return session


def held(session: Session) -> list[Tensor]:
    """Every entry in the cache, copied."""
    entries = []
    for layer in layers_of(session):
        entries += [of[:, :, : layer.length].clone() for of in (layer.buffer.key, layer.buffer.value)]
        entries += [] if layer.slots is None else [tensor.clone() for tensor in layer.slots.fields]
    return entries


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    """To the bit."""
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def answers(session: Session) -> list[list[int]]:
    return [list(made.summary.answer) for made in snapshot(session).records if made.summary]


def compact_positions(session: Session) -> set[int]:
    layers = layers_of(session)
    return {
        position
        for layer in layers
        for position in layer.slots.where(layer.slots.ranks != PINNED_RANK).positions.tolist()
    }


# What stands where


def test_the_slots_stand_at_the_last_positions_of_the_block(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    report = session.compact(0.5)
    assert (len(answers(session)[0]), report.summary_tokens) == (12, 12)
    assert compact_positions(session) <= set(range(report.end - 12, report.end))


def test_a_summary_takes_the_bytes_that_the_block_would(new_memory: NewMemory) -> None:
    session, without = told_session(new_memory()), told_session(new_memory(experiments=Experiments()))
    assert session.compact(0.5).kv_bytes_after == without.compact(0.5).kv_bytes_after
    assert session.stats.kv_tokens == without.stats.kv_tokens


def test_a_summary_no_longer_than_the_slots_stays_whole(new_memory: NewMemory) -> None:
    session = told_session(new_memory(**WHOLE))
    report = session.compact(0.5)
    assert report.num_slots == 12
    assert session.stats.kv_tokens == 121 - (report.end - report.start) + 12
    assert compact_positions(session) == set(range(report.end - 12, report.end))


def test_a_summary_is_never_longer_than_its_block(new_memory: NewMemory) -> None:
    session = told_session(new_memory(experiments=Experiments(summary_tokens=1000), keep_ratio=0.25), 20)
    report = session.compact(0.5)
    assert 0 < report.summary_tokens <= report.end - report.start == 8
    assert compact_positions(session) <= set(range(report.start, report.end))


def test_a_whole_summary_is_what_transformers_reads_turned_back(
    new_memory: NewMemory, stock_model: PreTrainedModel
) -> None:
    """Prompt and answer read behind the block by the stock model; the answer's entries turned by its own RoPE."""
    session = told_session(new_memory(**WHOLE))
    report, tokens, probe = session.compact(0.5), list(session.tokens), some_tokens(9, seed=1)
    (summary,) = (made.summary for made in snapshot(session).records)
    told, asked = DynamicCache(), DynamicCache()
    stock_model(torch.tensor([tokens[:-1]]), cache=told)
    stock_model(torch.tensor([[*tokens[: report.end], *summary.prompt, *summary.answer]]), cache=asked)
    back = len(summary.prompt) + len(summary.answer)
    cos, sin = stock_model.model.rotary_emb(told.layers[0].keys, torch.tensor([[back]]))
    mixed = DynamicCache()
    for index, (one, other) in enumerate(zip(told.layers, asked.layers, strict=True)):
        key, value = (of[:, :, report.end + len(summary.prompt) :] for of in (other.keys, other.values))
        key = key * cos - rotate_half(key) * sin
        mixed.update(
            torch.cat([one.keys[:, :, :3], key, one.keys[:, :, report.end :]], dim=2),
            torch.cat([one.values[:, :, :3], value, one.values[:, :, report.end :]], dim=2),
            index,
        )
        slots = layers_of(session)[index].slots
        ours = slots.where(slots.ranks != PINNED_RANK).key.unflatten(0, (2, 12))
        torch.testing.assert_close(ours, key[0], rtol=0, atol=1e-4)
    ids = torch.tensor([[tokens[-1], *probe[:-1]]])
    positions = torch.arange(len(tokens) - 1, len(tokens) + 8)[None]
    expected = stock_model(ids, cache=mixed, position_ids=positions).logits[0]
    torch.testing.assert_close(session.logits(probe), expected[:, : session.logits(probe).shape[1]], rtol=0, atol=1e-3)


# What is written, and what it is fitted on


def test_what_comes_behind_the_block_is_not_summed_up(new_memory: NewMemory) -> None:
    one, other = new_memory().session("one"), new_memory().session("other")
    for session, seed in ((one, 1), (other, 2)):
        session.append([*some_tokens(90), *some_tokens(32, seed)])
        session.compact(0.5)
    assert answers(one) == answers(other)


def test_the_summary_is_what_is_repeated(new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    from am_memory.queries import sources

    session, repeated, repeat = told_session(new_memory()), [], sources.repeat_queries

    def spy(engine: object, cache: object, token_ids: list[int], **options: object) -> object:
        repeated.append(token_ids)
        return repeat(engine, cache, token_ids, **options)

    monkeypatch.setattr(sources, "repeat_queries", spy)
    session.compact(0.5)
    assert repeated == [[token_id for token_id in answers(session)[0] if token_id < 256]]


def test_where_nothing_is_written_the_block_is_compacted(
    new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("am_memory.compaction.summary.greedy_answer", lambda *_: [])
    session, without = told_session(new_memory()), told_session(new_memory(experiments=Experiments()))
    assert session.compact(0.5).summary_tokens == without.compact(0.5).summary_tokens == 0
    assert_same(held(session), held(without))


def test_a_conversation_without_an_end_stays_below_the_trigger(new_memory: NewMemory) -> None:
    policy = {"reference_queries": ("repeat", "self_study", "live"), "self_study_tokens": 4, "segment_dtype": "int8"}
    session = told_session(new_memory(trigger_tokens=100, keep_recent=6, keep_ratio=0.1, **policy), 400)
    assert session.stats.kv_tokens <= 100
    assert len(session.segments) > 3
    assert len(answers(session)) == len(session.segments)
    assert all(segment.num_slots <= 12 * 6 for segment in session.segments)
    assert session.logits(some_tokens(9)).isfinite().all()


def test_layers_with_sliding_windows_keep_the_block(
    new_memory: NewMemory, new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    session = told_session(new_memory(engine=TransformersEngine(new_sliding_model(), byte_tokenizer)))
    windows = [layer.keys.clone() for layer in cache_of(session).layers if hasattr(layer, "sliding_window")]
    report = session.compact(0.5)
    after = [layer.keys for layer in cache_of(session).layers if hasattr(layer, "sliding_window")]
    assert len(windows) == 2
    assert_same(windows, after)
    assert compact_positions(session) <= set(range(report.end - report.summary_tokens, report.end))
    assert session.logits(some_tokens(9)).isfinite().all()


# Again, and back


def test_a_rebuild_reads_the_summary_and_writes_none(new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = told_session(new_memory())
    session.compact(0.5)
    before, records = held(session), snapshot(session).records
    monkeypatch.setattr(WRITING, lambda *_args, **_options: pytest.fail("written anew"))
    rebuild(session)
    assert_same(held(session), before)
    assert snapshot(session).records == records


def test_a_saved_session_has_its_summary(new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = told_session(new_memory())
    session.compact(0.5)
    session.save()
    monkeypatch.setattr(WRITING, lambda *_args, **_options: pytest.fail("written anew"))
    loaded = new_memory().session("alice")
    assert snapshot(loaded).records == snapshot(session).records
    for _ in range(2):  # as saved, and rebuilt
        assert_same(held(loaded), held(session))
        rebuild(loaded)


def test_a_compaction_without_a_summary_is_rebuilt_without(new_memory: NewMemory) -> None:
    session = told_session(new_memory(experiments=Experiments()))
    session.compact(0.5)
    branch = session.fork(policy=POLICY)
    rebuild(branch)
    assert_same(held(branch), held(session))


def test_recall_brings_back_the_block_and_then_the_summary(new_memory: NewMemory) -> None:
    session, probe = told_session(new_memory(originals="host")), some_tokens(9)
    exact = session.logits(probe)
    report = session.compact(0.5)
    before = held(session)
    session.recall((report.start, report.end))
    torch.testing.assert_close(session.logits(probe), exact, rtol=0, atol=1e-4)
    put_away_oldest(session)
    assert_same(held(session), before)


# What goes wrong


@pytest.mark.parametrize(
    "function",
    [
        WRITING,
        "am_memory.compaction.job.replace_by_summary",
        "am_memory.queries.sources.repeat_queries",
        "am_memory.compaction.head_fits.fit",
    ],
)
def test_running_out_of_memory_leaves_the_session_as_it_was(
    new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    session = told_session(new_memory(originals="host"))
    before, stats = held(session), session.stats

    def fail(*_args: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(function, fail)
    with pytest.raises(CompactionFailed, match=r"out of memory .* lower trigger_tokens"):
        session.compact(0.5)
    assert session.stats == stats
    assert_same(held(session), before)
    assert not snapshot(session).records


def test_a_failure_in_any_forward_pass_leaves_the_session_as_it_was(
    new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Experiments(summary_tokens=3)
    session, untouched = (told_session(new_memory(experiments=short)) for _ in range(2))
    before, forward, at_call, is_made = held(session), session.engine.forward, 0, False
    while not is_made:
        at_call, calls = at_call + 1, 0

        def failing(*args: object, at_call: int = at_call, **options: object) -> Tensor:
            nonlocal calls
            logits = forward(*args, **options)
            calls += 1
            if calls == at_call:
                raise KeyboardInterrupt
            return logits

        monkeypatch.setattr(session.engine, "forward", failing)
        try:
            session.compact(0.5)
        except KeyboardInterrupt:
            assert_same(held(session), before)
            assert not snapshot(session).records
        else:
            is_made = True
    monkeypatch.undo()
    assert at_call > 5
    untouched.compact(0.5)
    assert_same(held(session), held(untouched))


def test_what_cannot_be_right_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidPolicy, match=r"summary_tokens=12.*: .*recompaction 'refit'"):
        MemoryPolicy(experiments=Experiments(summary_tokens=12, recompaction="refit"))
    with pytest.raises(InvalidPolicy, match=r"summary_tokens=12.*: .*max_error"):
        MemoryPolicy(experiments=Experiments(summary_tokens=12), max_error=0.1)
    fixed = copy.copy(engine)
    reason = "its RoPE depends on the length of the text"
    fixed.capabilities = replace(engine.capabilities, can_rotate_keys=False, why_keys_stay=reason)
    with pytest.raises(InvalidPolicy, match=r"summary_tokens 12 .* its RoPE depends on the length.* leave it at None"):
        Memory(fixed, POLICY).session("alice")


def test_progress_is_told_in_tokens(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(on_event=events.append))
    session.compact(0.5)
    progress = [event for event in events if isinstance(event, CompactionProgress)]
    stages = {stage: list(group) for stage, group in groupby(progress, key=lambda event: event.stage)}
    assert list(stages) == ["summary", "repeat", "score", "fit"]
    assert [(event.done, event.total) for event in stages["summary"]][-1] == (12, 12)
