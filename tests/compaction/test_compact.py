"""One compaction, end to end, on the tiny model: what is kept, what composes, what the options do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from inside import cache_of, context_of, layers_of, records_of
from policies import plain_policy
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Session
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed
from am_memory.events import Event, GateMissed
from am_memory.kv_cache.slots import PINNED_RANK, Segment
from am_memory.solver import OMP, Block, HighestAttention

TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(240)]
POLICY = plain_policy(trigger_tokens=2000, keep_ratio=0.25, pinned=4, keep_recent=0, chunk_tokens=64)

NewSession = Callable[..., Session]


@pytest.fixture
def new_session(engine: TransformersEngine) -> NewSession:
    """A session of 240 tokens, its policy changed by keyword."""

    def make(tokens: list[int] = TOKENS, **changes: object) -> Session:
        policy = MemoryPolicy(**{**POLICY.model_dump(), "key_selection": "highest_attention", **changes})
        session = Memory(engine, policy).session()
        session.append(tokens)
        return session

    return make


def positions_of(session: Session) -> list[list[int]]:
    """The positions of the slots of each head of each layer."""
    layers = layers_of(session)
    return [layer.slots.head(head).positions.tolist() for layer in layers for head in range(layer.slots.num_heads)]


def kl(full: Tensor, other: Tensor) -> float:
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("selection", ["highest_attention", "omp", "omp_fast"])
@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_keeping_everything_changes_nothing(new_session: NewSession, selection: str, budget: str) -> None:
    session = new_session(keep_ratio=1.0, key_selection=selection, head_budget=budget, max_compact_tokens=500)
    before = session.logits(TOKENS[:20])
    session.compact(1.0)
    assert torch.allclose(session.logits(TOKENS[:20]), before, atol=2e-4)


def test_a_compaction_keeps_the_ratio_over_all_heads(new_session: NewSession) -> None:
    session = new_session()
    report = session.compact(1.0)
    assert (report.start, report.end) == (4, 239)
    assert report.num_slots == pytest.approx(0.25 * 235, abs=0.2)
    assert session.stats.kv_tokens == pytest.approx(4 + 0.25 * 235, abs=0.2)


def test_a_uniform_budget_gives_every_head_the_same(new_session: NewSession) -> None:
    session = new_session(head_budget="uniform")
    session.compact(1.0)
    assert max(map(len, positions_of(session))) - min(map(len, positions_of(session))) <= 1


def test_an_adaptive_budget_differs_between_heads(new_session: NewSession) -> None:
    session = new_session()
    session.compact(1.0)
    assert max(map(len, positions_of(session))) - min(map(len, positions_of(session))) > 5


def test_pinned_entries_stay_bit_for_bit(new_session: NewSession) -> None:
    session = new_session()
    exact = [layer.exact_entries(0, 4) for layer in layers_of(session)]
    exact = [(key.clone(), value.clone()) for key, value in exact]
    session.compact(0.5)
    session.compact(1.0)
    for layer, (key, value) in zip(layers_of(session), exact, strict=True):
        for head in range(layer.slots.num_heads):
            slots = layer.slots.head(head)
            is_pinned = slots.ranks == PINNED_RANK
            assert torch.equal(slots.key[is_pinned], key[head])
            assert torch.equal(slots.value[is_pinned], value[head])
            assert not slots.bias[is_pinned].any()


def test_the_fit_is_closer_than_eviction_of_the_same_slots(new_session: NewSession) -> None:
    full = new_session().logits(TOKENS[:30])
    distances = {}
    for what in ("bias_and_values", "nothing"):
        session = new_session(experiments=Experiments(fit=what))
        session.compact(0.8)
        distances[what] = kl(full, session.logits(TOKENS[:30]))
    assert distances["bias_and_values"] < distances["nothing"]


def test_eviction_keeps_the_original_values_and_no_bias(new_session: NewSession) -> None:
    session = new_session(experiments=Experiments(fit="nothing"))
    layer = layers_of(session)[0]
    key, value = (entries.clone() for entries in layer.exact_entries(0, 239))
    session.compact(1.0)
    slots = layers_of(session)[0].slots.head(1)
    positions = slots.positions.long()
    assert torch.equal(slots.key, key[1, positions])
    assert torch.equal(slots.value, value[1, positions])
    assert not slots.bias.any()


def test_shrinking_in_steps_or_at_once_keeps_the_same_slots(new_session: NewSession) -> None:
    session = new_session()
    session.compact(1.0)
    (segment,) = cache_of(session).segments
    slots = layers_of(session)[0].slots
    half, third = replace(segment, num_slots=segment.num_slots // 2), replace(segment, num_slots=segment.num_slots // 3)
    assert slots.cut([half]).cut([third]).positions.tolist() == slots.cut([third]).positions.tolist()


def test_older_segments_shrink_to_the_bound_and_are_never_re_ranked(new_session: NewSession) -> None:
    session = new_session(max_compact_tokens=40)
    session.compact(0.4)
    before = positions_of(session)
    session.append(TOKENS)
    session.compact(1.0)
    assert cache_of(session).kv_tokens - cache_of(session).num_exact_tokens <= 40
    (first, second) = cache_of(session).segments
    assert first.num_slots / first.num_tokens == pytest.approx(second.num_slots / second.num_tokens, rel=0.05)
    for old, new in zip(before, positions_of(session), strict=True):
        assert {position for position in new if position < first.end} <= set(old)


def test_refit_puts_one_segment_in_the_place_of_all(new_session: NewSession) -> None:
    session = new_session(experiments=Experiments(recompaction="refit"))
    session.compact(0.5)
    session.append(TOKENS)
    session.compact(1.0)
    cache = cache_of(session)
    assert cache.segments == (Segment(4, 479, cache.segments[0].num_slots),)
    assert cache.kv_tokens - cache.num_exact_tokens == pytest.approx(0.25 * 475, abs=1)
    assert torch.isfinite(session.logits(TOKENS[:5])).all()


def test_refit_with_room_for_everything_changes_nothing(new_session: NewSession) -> None:
    """The slots of the first round, bias and all, are the entries of the second."""
    session = new_session(experiments=Experiments(recompaction="refit"), keep_ratio=1.0, max_compact_tokens=500)
    before = session.logits(TOKENS[:20])
    session.compact(0.5)
    session.compact(1.0)
    assert torch.allclose(session.logits(TOKENS[:20]), before, atol=5e-4)


def test_refit_carries_the_bias_of_what_it_compacts_again(new_session: NewSession) -> None:
    """Slots that weigh as much as four entries still do so after a second round that has room for all of them."""
    session = new_session()
    session.compact(1.0)
    expected = session.logits(TOKENS[:20])
    branch = session.fork(
        policy=context_of(session).policy.model_copy(
            update={"experiments": Experiments(recompaction="refit"), "keep_ratio": 1.0}
        )
    )
    context_of(branch).policy = context_of(branch).policy.model_copy(update={"max_compact_tokens": 500})
    branch.append(TOKENS[:2])
    session.append(TOKENS[:2])
    branch.compact(1.0)
    expected = session.logits(TOKENS[2:20])
    assert kl(expected, branch.logits(TOKENS[2:20])) < 0.02


def test_a_key_selection_of_ones_own_is_used(new_session: NewSession) -> None:
    @dataclass(frozen=True)
    class Newest:
        name: str = "newest"

        def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
            newest_first = torch.arange(block.seq_len - 1, -1, -1)
            return newest_first[: int(num_slots.max())].expand(block.num_heads, -1)

    session = new_session(key_selection=Newest(), head_budget="uniform")
    session.compact(1.0)
    assert all(min(positions[4:]) > 170 for positions in positions_of(session))


def test_named_selections_are_those_of_the_solver() -> None:
    assert MemoryPolicy(key_selection="omp").key_selection == OMP()
    assert MemoryPolicy(key_selection="omp_fast").key_selection == OMP.fast()
    assert MemoryPolicy().key_selection == HighestAttention()


def test_a_compaction_is_repeatable(new_session: NewSession) -> None:
    first, second = new_session(), new_session()
    first.compact(0.7)
    second.compact(0.7)
    assert positions_of(first) == positions_of(second)
    assert torch.equal(first.logits(TOKENS[:9]), second.logits(TOKENS[:9]))


def test_a_fit_that_is_not_finite_leaves_the_session_as_it_was(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    from am_memory.compaction import head_fits

    session = new_session()
    before, stats = session.logits(TOKENS[:9]), session.stats
    real_fit = head_fits.fit

    def broken(*args: object, **kwargs: object) -> object:
        result = real_fit(*args, **kwargs)
        return replace(result, value=result.value * torch.nan)

    monkeypatch.setattr(head_fits, "fit", broken)
    with pytest.raises(CompactionFailed, match="not finite"):
        session.compact(0.5)
    assert session.stats == stats
    assert torch.equal(session.logits(TOKENS[:9]), before)


def check_running_out_of_memory(
    session: Session, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    """A compaction in which `function` raises `error` says so, and leaves the session as it was."""
    before, stats = session.logits(TOKENS[:9]), session.stats

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(function, fail)
    with pytest.raises(CompactionFailed, match=r"out of memory .* lower trigger_tokens"):
        session.compact(0.5)
    assert session.stats == stats
    assert torch.equal(session.logits(TOKENS[:9]), before)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_leaves_the_session_as_it_was(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    check_running_out_of_memory(new_session(), monkeypatch, "am_memory.compaction.head_fits.fit", error)


def test_live_queries_alone_need_no_pass_of_their_own(new_session: NewSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session(reference_queries=("live",))
    forward, calls = session.engine.forward, []
    monkeypatch.setattr(session.engine, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    session.compact(0.5)
    assert not calls


def test_live_and_repeat_queries_can_be_joined(new_session: NewSession) -> None:
    session = new_session(reference_queries=("repeat", "live"))
    session.compact(0.5)
    assert torch.isfinite(session.logits(TOKENS[:9])).all()


def test_live_queries_that_have_not_passed_yet_are_asked_for(new_session: NewSession) -> None:
    session = new_session(reference_queries=("live",))
    with pytest.raises(CompactionFailed, match="no query has passed since token 239"):
        session.compact(1.0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_in_the_repeat_pass_leaves_the_session_as_it_was(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The pass was outside of what turned running out of memory into an error of ours."""
    check_running_out_of_memory(new_session(), monkeypatch, "am_memory.queries.sources.repeat_queries", error)


@pytest.mark.parametrize("function", ["self_study", "self_study_queries"])
def test_running_out_of_memory_in_self_study_leaves_the_session_as_it_was(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    session = new_session(reference_queries=("self_study",), self_study_tokens=8)
    check_running_out_of_memory(session, monkeypatch, f"am_memory.queries.sources.{function}", MemoryError())


def test_keys_that_are_not_finite_cannot_be_compacted_and_say_so(new_session: NewSession) -> None:
    session = new_session()
    stats = session.stats
    key, _ = layers_of(session)[1].exact_entries(20, 21)
    key.fill_(torch.nan)
    with pytest.raises(CompactionFailed, match="not finite"):
        session.compact(0.5)
    assert session.stats == stats


# The gate


def test_without_a_gate_nothing_is_held_out(new_session: NewSession) -> None:
    assert new_session().compact(1.0).held_out_error is None


def test_the_held_out_error_is_that_of_queries_that_were_not_fitted(new_session: NewSession) -> None:
    """It is near the fitted one, and above it: a fit does best on what it was made on."""
    report = new_session(max_error=1e9).compact(1.0)
    assert report.output_error < report.held_out_error < 3 * report.output_error


def test_keys_are_chosen_by_all_queries_with_a_gate_too(new_session: NewSession) -> None:
    gated, other = new_session(max_error=1e9), new_session()
    for session in (gated, other):
        session.compact(1.0)
    assert positions_of(gated) == positions_of(other)


def test_a_compaction_above_the_gate_gets_more_slots(new_session: NewSession) -> None:
    plain = new_session(max_error=1e9, keep_ratio=0.05, max_compact_tokens=400).compact(1.0)
    session = new_session(max_error=plain.held_out_error / 2, keep_ratio=0.05, max_compact_tokens=400)
    report = session.compact(1.0)
    doublings = math.log2(report.num_slots / plain.num_slots)
    assert doublings >= 1
    assert doublings == round(doublings) or report.num_slots == report.end - report.start
    assert report.held_out_error <= plain.held_out_error / 2
    assert session.segments[0].num_slots == records_of(session)[0].plan.newest.num_slots
    assert session.stats.kv_tokens == pytest.approx(4 + report.num_slots)


def test_where_there_is_no_room_for_more_slots_the_gate_is_missed_and_said(engine: TransformersEngine) -> None:
    events: list[Event] = []
    policy = POLICY.model_copy(update={"max_error": 1e-6, "max_compact_tokens": 80})
    session = Memory(engine, policy, on_event=events.append).session()
    session.append(TOKENS)
    report = session.compact(1.0)
    assert report.num_slots == pytest.approx(80, abs=0.2)
    (missed,) = [event for event in events if isinstance(event, GateMissed)]
    assert (missed.start, missed.end, missed.held_out_error) == (4, 239, report.held_out_error)
    assert missed.max_error == 1e-6 < missed.held_out_error


def test_the_gate_does_not_let_a_cache_outgrow_its_trigger(engine: TransformersEngine) -> None:
    policy = POLICY.model_copy(update={"max_error": 1e-6, "trigger_tokens": 96})
    session = Memory(engine, policy).session()
    session.append(TOKENS)
    assert session.stats.num_compactions > 3
    assert session.stats.kv_tokens <= 96


def test_a_rebuilt_session_has_the_slots_that_the_gate_gave(engine: TransformersEngine) -> None:
    policy = POLICY.model_copy(update={"max_error": 1e-6, "trigger_tokens": 96, "keep_ratio": 0.05})
    session = Memory(engine, policy).session()
    session.append(TOKENS)
    made = records_of(session)
    session.rewind(session.segments[-1].end - 1)
    assert records_of(session) == made[: len(records_of(session))]
    assert records_of(session)


def test_too_few_queries_to_hold_any_out_have_no_gate(new_session: NewSession) -> None:
    session = new_session(TOKENS[:8], max_error=1e-6, keep_ratio=0.5)
    report = session.compact(1.0)
    assert (report.end - report.start) * 2 < 8
    assert report.held_out_error is None
