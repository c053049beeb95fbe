"""Sessions over cells that all heads share: compacted, forked, rewound, saved, and several in one context."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inside import context_of, decoder_of, rebuild, state_of
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Session
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, CorruptSession, EngineFailed, InvalidPolicy, UnsupportedOperation
from am_memory.events import CompactionFinished, Event
from am_memory.kv_cache.layers import TailState
from am_memory.kv_cache.slots import PINNED_RANK, carried_over
from am_memory.session.saving import snapshot

POLICY = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, pinned=4, keep_recent=8)
TEXT = "An owl is a bird that hunts at night, and sleeps by day. It hears a mouse under the snow, and flies without a sound. "
PROBE = "Owls"
NewSession = Callable[..., Session]


@pytest.fixture
def memory(shared_llama: LlamaCppEngine, tmp_path: Path) -> Memory:
    return Memory(shared_llama, POLICY, store=tmp_path)


@pytest.fixture
def new_session(memory: Memory) -> NewSession:
    """A session of 100 tokens, below the trigger; keywords change the policy."""

    def build(text: str = TEXT[:100], **changes: object) -> Session:
        session = memory.session(policy=MemoryPolicy(**{**dict(POLICY), **changes}))
        session.append(text)
        return session

    return build


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# Compaction


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_compacting_to_full_size_changes_nothing(new_session: NewSession, fraction: float) -> None:
    session = new_session(keep_ratio=1.0, trigger_tokens=300, max_compact_tokens=100)
    before = session.logits(PROBE)
    session.compact(fraction)
    assert session.stats.num_segments == 1
    assert_same(session.logits(PROBE), before)


def test_a_fit_of_nothing_is_the_same_cells(new_session: NewSession) -> None:
    """Eviction: a fork that keeps the same keys, values and biases as they are has an exact reference in transformers."""
    session = new_session(
        keep_ratio=1.0, trigger_tokens=300, max_compact_tokens=100, experiments=Experiments(fit="nothing")
    )
    before = session.logits(PROBE)
    session.compact(0.7)
    assert_same(session.logits(PROBE), before)


def test_every_head_has_a_slot_in_every_cell(new_session: NewSession) -> None:
    session = new_session()
    report = session.compact(0.5)
    content = state_of(session)
    (num_cells,) = content.segment_cells
    assert num_cells == int(report.num_slots) == content.base_cells - 4
    for layer in content.layers:
        assert layer.slots is not None
        assert layer.slots.cu_slots == (0, num_cells + 4, 2 * (num_cells + 4))
        assert layer.slots.ranks[: num_cells + 4].tolist() == [PINNED_RANK] * 4 + list(range(5, 6 * num_cells, 6))
        assert not layer.slots.bias.any()


def test_the_cache_takes_the_cells_that_it_says(new_session: NewSession, shared_llama: LlamaCppEngine) -> None:
    session = new_session()
    before = session.stats
    session.compact(0.5)
    stats, cell_bytes = session.stats, 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
    assert stats.kv_bytes == stats.kv_tokens * cell_bytes < before.kv_bytes == before.kv_tokens * cell_bytes
    assert state_of(session).sequence.blob.nbytes < stats.kv_bytes + 20 * stats.kv_tokens + 300
    assert stats.exact_kv_bytes == 99 * cell_bytes


def test_pinned_and_recent_cells_stay_as_they_are(new_session: NewSession) -> None:
    session = new_session()
    old = state_of(session).cells
    session.compact(0.5)
    content = state_of(session)
    new, tail = content.cells, content.num_tail_tokens
    for before, after in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
        assert (before.rows[:4] == after.rows[:4]).all()
        assert (before.rows[-tail:] == after.rows[-tail:]).all()


def test_the_fit_is_nearer_than_eviction(new_session: NewSession) -> None:
    """Keys with their biases in them, and values fitted to what these keys do, are worth their while."""
    session = new_session(pinned=0)
    exact = session.logits(TEXT[100:]).log_softmax(-1)
    errors = []
    for fit in ("bias_and_values", "nothing"):
        branch = session.fork(
            policy=MemoryPolicy(**{**dict(POLICY), "experiments": Experiments(fit=fit), "keep_ratio": 0.1})
        )
        branch.compact(1.0)
        errors.append((branch.logits(TEXT[100:]).log_softmax(-1) - exact).square().mean())
    assert errors[0] < 0.8 * errors[1]


def test_a_conversation_without_an_end_stays_below_the_trigger(new_session: NewSession) -> None:
    session = new_session()
    for _ in range(8):
        session.append(TEXT)
        assert session.stats.kv_tokens <= 120
    assert session.stats.num_compactions > 10
    assert session.logits(PROBE).isfinite().all()


def test_older_segments_shrink_by_whole_cells(new_session: NewSession) -> None:
    """All heads are cut at one rank, and the cells behind it are free."""
    session = new_session(max_compact_tokens=16)
    sizes = []
    for _ in range(4):
        session.append(TEXT)
        sizes.append(state_of(session).segment_cells)
    assert sum(sizes[-1]) <= 16
    assert all(later <= earlier for earlier, later in zip(sizes[0], sizes[-1], strict=False))


def test_cutting_depends_on_the_size_alone(new_session: NewSession) -> None:
    """A segment born with 20 cells and cut to 10 holds what it would hold had it been born with 10, before any fit."""
    cells = []
    for ratio in (0.2, 0.4):
        session = new_session(
            keep_ratio=ratio, experiments=Experiments(fit="nothing"), trigger_tokens=300, max_compact_tokens=60
        )
        session.compact(0.5)
        content = state_of(session)
        cells.append(content.cells.take(slice(4, 4 + 8)))
    for few, many in zip(cells[0].keys, cells[1].keys, strict=True):
        assert (few.rows == many.rows).all()


def test_everything_can_be_compacted_again_and_again(new_session: NewSession) -> None:
    session = new_session(experiments=Experiments(recompaction="refit"))
    for _ in range(4):
        session.append(TEXT)
    assert (session.stats.num_segments, session.stats.kv_tokens <= 120) == (1, True)
    assert session.logits(PROBE).isfinite().all()


def test_live_queries_need_no_pass_of_their_own(new_session: NewSession) -> None:
    session = new_session(reference_queries=("live",))
    session.append(TEXT)
    assert session.stats.num_compactions > 0
    assert session.logits(PROBE).isfinite().all()


def test_self_study_compacts_and_a_rebuild_gives_the_same(new_session: NewSession) -> None:
    policy = {"reference_queries": ("repeat", "self_study"), "self_study_tokens": 8}
    session, other = new_session(**policy), new_session(**policy)
    for each in (session, other):
        each.append(TEXT[:100])
    session.append(TEXT)
    session.rewind(len(other.tokens))
    made = snapshot(session).records
    assert made
    assert made == snapshot(other).records
    assert_same(session.logits(PROBE), other.logits(PROBE))


def test_heads_without_a_constant_direction_are_reported(
    shared_llama: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from am_memory.solver import fold

    heard: list[Event] = []
    memory = Memory(shared_llama, POLICY, on_event=heard.append)
    for limit, expected in ((10.0, 0), (-1.0, 6)):
        monkeypatch.setattr(fold, "MAX_FOLD_ERROR", limit)
        session = memory.session()
        session.append(TEXT[:100])
        session.compact(0.5)
        finished = [event for event in heard if isinstance(event, CompactionFinished)]
        assert finished[-1].report.num_unbiased_heads == expected


def test_heads_cannot_differ_in_their_slots(shared_llama: LlamaCppEngine) -> None:
    policy = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, keep_recent=8, head_budget="adaptive")
    with pytest.raises(InvalidPolicy, match="head_budget 'adaptive' needs a cache whose heads can differ"):
        Memory(shared_llama, policy)


def test_generate_of_transformers_is_refused(memory: Memory) -> None:
    with pytest.raises(UnsupportedOperation, match=r"CellCache cannot go into generate\(\) of transformers"):
        memory.cache()


# Beyond the model's window


@pytest.fixture
def narrow(shared_llama: LlamaCppEngine, tmp_path: Path) -> Memory:
    """The tiny model, as if it had been trained on few positions."""
    twin = copy.copy(shared_llama)
    twin.info = replace(shared_llama.info, window_tokens=200)
    return Memory(twin, POLICY, store=tmp_path)


def test_what_gets_out_of_reach_moves_up(narrow: Memory) -> None:
    """The keys are those of the same text at later positions; pinned ones go with the oldest segment."""
    session = narrow.session()
    session.append(TEXT * 2)
    context, moved = context_of(session), 0
    for token in narrow.tokenize(TEXT * 2):
        old = context.cache.state()
        session.append([token])
        new = context.cache.state()
        if new.segments == old.segments:
            continue
        _, distances = carried_over(old.segments, new.segments)
        moved += max(distances) > 0
        starts = [0, *itertools.accumulate(old.segment_cells[:-1], initial=4)]
        counts = [4, *new.segment_cells[:-1]]
        for layer, before, after in zip(new.model.layers, old.cells.keys, new.cells.keys, strict=True):
            expected = [
                before.tensor(2)[:, start : start + count] @ layer.rotation.by(distance).mT
                for start, count, distance in zip(starts, counts, [distances[0], *distances], strict=True)
            ]
            torch.testing.assert_close(
                after.tensor(2)[:, : sum(counts)], torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4
            )
    assert moved
    assert len(context.tokens) - 1 - session.segments[0].shift <= 200


def test_what_was_moved_up_is_saved_and_rebuilt_as_it_is(narrow: Memory) -> None:
    session = narrow.session("alice")
    session.append(TEXT * 3)
    assert session.segments[0].shift > 0
    before = session.logits(PROBE)
    session.save()
    rebuild(session)
    assert_same(session.logits(PROBE), before)
    loaded = Memory(narrow.engine, POLICY, store=narrow.store).session("alice")
    assert loaded.segments == session.segments
    assert_same(loaded.logits(PROBE), before)


def test_a_summary_takes_the_place_of_a_block(new_session: NewSession) -> None:
    session = new_session(experiments=Experiments(summary_tokens=12), keep_ratio=0.1)
    report = session.compact(0.9)
    assert 0 < report.summary_tokens <= 12
    compacted = session.logits(PROBE)
    rebuild(session)
    assert_same(session.logits(PROBE), compacted)


# Nothing changes on failure


def test_a_failed_compaction_changes_nothing(new_session: NewSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session()
    before, stats = session.logits(PROBE), session.stats

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("am_memory.compaction.head_fits.fit", fail)
    with pytest.raises(CompactionFailed, match="out of memory"):
        session.compact(0.5)
    monkeypatch.undo()
    assert session.stats == stats
    assert torch.equal(session.logits(PROBE), before)


def test_a_state_that_llama_cpp_does_not_take_changes_nothing(
    new_session: NewSession, shared_llama: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It erases what the context held before: that must be out by then."""
    session = new_session()
    before, stats = session.logits(PROBE), session.stats
    monkeypatch.setattr(decoder_of(shared_llama)._lib, "llama_state_seq_set_data", lambda *_: 0)
    with pytest.raises(EngineFailed, match="did not accept a state of"):
        session.append(TEXT)
    monkeypatch.undo()
    assert session.stats == stats
    assert torch.equal(session.logits(PROBE), before)


def test_a_pass_that_llama_cpp_refuses_changes_nothing(
    new_session: NewSession, shared_llama: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    before = session.logits(PROBE)
    monkeypatch.setattr(decoder_of(shared_llama)._lib, "llama_decode", lambda *_: -3)
    with pytest.raises(EngineFailed, match=r"could not read .* \(status -3\)"):
        session.append("x")
    monkeypatch.undo()
    assert torch.equal(session.logits(PROBE), before)


# Forks, rewinds, files


def test_sessions_take_turns_in_one_context(new_session: NewSession) -> None:
    alone = [new_session(text) for text in (TEXT[:80], TEXT[20:110])]
    expected = []
    for session in alone:
        session.append(" It is white.")
        expected.append(session.logits(PROBE))
    first, second = new_session(TEXT[:80]), new_session(TEXT[20:110])
    for character in " It is white.":
        first.append(character)
        second.append(character)
    assert_same(first.logits(PROBE), expected[0])
    assert_same(second.logits(PROBE), expected[1])


def test_a_fork_goes_its_own_way(new_session: NewSession) -> None:
    session = new_session()
    branch = session.fork()
    before = session.logits(PROBE)
    branch.append(" Cats do not.")
    expected = branch.logits(PROBE)
    session.append(" Dogs do.")
    assert_same(branch.logits(PROBE), expected)
    for each in (session, branch):
        each.rewind(100)
        assert_same(each.logits(PROBE), before)


def test_a_fork_that_goes_on_first_copies_nothing(new_session: NewSession) -> None:
    """This is how threads go on: the branch that they leave is hardly ever read again."""
    session = new_session()
    branch = session.fork()
    branch.append(" Cats do not.")
    assert state_of(branch).sequence is state_of(session).sequence
    session.append(" Dogs do.")
    assert state_of(branch).sequence is not state_of(session).sequence


def test_a_fork_that_is_rewound_leaves_the_other_alone(new_session: NewSession) -> None:
    session = new_session()
    before = session.logits(PROBE)
    branch = session.fork()
    branch.rewind(60)
    branch.append(" Cats do not.")
    assert_same(session.logits(PROBE), before)


def test_a_fork_of_a_compacted_session_is_compacted(new_session: NewSession) -> None:
    session = new_session()
    session.compact(0.5)
    before = session.logits(PROBE)
    branch = session.fork()
    branch.compact(1.0)
    assert_same(session.logits(PROBE), before)
    assert branch.stats.kv_tokens < session.stats.kv_tokens


def test_rewinding_into_a_segment_reads_again(new_session: NewSession) -> None:
    session = new_session()
    expected = new_session(TEXT[:30]).logits(PROBE)
    session.compact(0.5)
    session.rewind(30)
    assert_same(session.logits(PROBE), expected)


def test_rewinding_behind_a_segment_drops_cells(new_session: NewSession) -> None:
    session = new_session()
    session.compact(0.5)
    assert session.can_rewind(90) is False  # the compaction came later
    session.append("and so on")
    before = session.logits(PROBE)
    session.append(" and on")
    session.rewind(109)
    assert_same(session.logits(PROBE), before)


@pytest.mark.parametrize("fraction", [None, 0.5, 1.0])
def test_a_saved_session_goes_on_as_it_was(
    new_session: NewSession, shared_llama: LlamaCppEngine, memory: Memory, fraction: float | None
) -> None:
    session = new_session()
    if fraction is not None:
        session.compact(fraction)
    session.save()
    loaded = Memory(shared_llama, POLICY, store=memory.store).session(session.name)
    assert loaded.stats == session.stats
    assert torch.equal(loaded.logits(PROBE), session.logits(PROBE))
    for each in (loaded, session):
        each.append(TEXT)
    assert_same(loaded.logits(PROBE), session.logits(PROBE))


def test_an_empty_session_is_saved(memory: Memory, shared_llama: LlamaCppEngine) -> None:
    session = memory.session("empty")
    session.save()
    again = Memory(shared_llama, POLICY, store=memory.store).session("empty")
    again.append(TEXT[:50])
    session.append(TEXT[:50])
    assert torch.equal(again.logits(PROBE), session.logits(PROBE))


def test_a_cache_of_ragged_heads_is_not_taken(shared_llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    session = Memory(engine, POLICY).session()
    session.append(TEXT[:100])
    session.compact(0.5)
    state = state_of(session)
    assert any(isinstance(layer, TailState) for layer in state.layers)
    with pytest.raises(CorruptSession, match="whose heads differ in their slots"):
        shared_llama.new_cache().load(state)


def test_the_context_grows_when_it_must(shared_llama: LlamaCppEngine) -> None:
    memory = Memory(shared_llama, MemoryPolicy(trigger_tokens=4000))
    session = memory.session()
    session.append(TEXT[:100])
    before = session.logits(PROBE)
    branch = session.fork()
    branch.append(TEXT * 20)
    assert decoder_of(shared_llama)._context.num_cells > 2000
    branch.rewind(100)
    assert_same(branch.logits(PROBE), before)
    assert_same(session.logits(PROBE), before)


def test_a_session_that_is_gone_is_not_written_out(
    new_session: NewSession, shared_llama: LlamaCppEngine, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = memory.scratch()
    scratch.append(TEXT[:50])
    other, written = new_session(), []
    scratch.append("x")
    write_out = decoder_of(shared_llama)._write_out
    monkeypatch.setattr(decoder_of(shared_llama), "_write_out", lambda: written.append(1) or write_out())
    del scratch
    gc.collect()  # a session may be part of a cycle
    other.append("y")
    assert not written
