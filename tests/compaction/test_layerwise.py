"""On-policy fitting: what each layer is fitted to, that no layer runs twice, and what it cannot be combined with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from inside import cache_of, layers_of, rebuild, slots_of, state_of
from policies import plain_policy
from transformers import PreTrainedModel

from am_memory import Experiments, Memory, MemoryPolicy, Session
from am_memory.budgets import Calibration
from am_memory.compaction.head_fits import fit_all
from am_memory.compaction.plan import Plan
from am_memory.compaction.scoring import LayerEntries, ScoredLayer, slot_ranks
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidPolicy
from am_memory.events import CompactionProgress, Event
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.slots import Slots
from am_memory.queries import repeat_queries

TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(240)]
POLICY = plain_policy(
    trigger_tokens=2000,
    keep_ratio=0.25,
    pinned=4,
    keep_recent=0,
    experiments=Experiments(on_policy=True),
    chunk_tokens=64,
)


def new_session(engine: TransformersEngine, **changes: object) -> Session:
    session = Memory(engine, POLICY.model_copy(update=changes)).session()
    session.append(TOKENS)
    return session


def compacted(engine: TransformersEngine, **changes: object) -> list[Slots]:
    """What each layer holds of the first half of the tokens."""
    session = new_session(engine, **changes)
    session.compact(0.5)
    slots = slots_of(session)
    return [each.where(each.positions >= 4) for each in slots if each is not None]


def one_by_one(engine: TransformersEngine) -> list[Slots]:
    """The definition: for each layer the whole model repeats anew, with the layers below compacted already."""
    session, policy = new_session(engine), POLICY
    cache, tokens = cache_of(session), session.tokens
    assert isinstance(cache, KVCache)
    session.compact(0.5)
    segment = session.segments[0]
    cache, made = cache_of(new_session(engine)), []
    assert isinstance(cache, KVCache)
    block_tokens = tokens[segment.start : segment.end]
    exact_queries = repeat_queries(engine, cache, block_tokens, chunk_tokens=64, on_progress=lambda *_: None)
    layers = [
        ScoredLayer.of(index, layer, LayerEntries.read(layer, segment), queries)
        for index, (layer, queries) in enumerate(zip(cache.compactable, exact_queries, strict=True))
    ]
    ranks = slot_ranks([layer.exact.scores for layer in layers], policy)
    for index, layer in enumerate(cache.compactable):
        branch = cache.fork()
        for below, slots in enumerate(made):
            branch.compact_layer(below, [segment], slots, 4)
        queries = repeat_queries(engine, branch, block_tokens, chunk_tokens=1000, on_progress=lambda *_: None)
        scored = ScoredLayer.of(index, layer, LayerEntries.read(layer, segment), queries[index])
        heads = scored.heads(ranks[index])
        made += fit_all(heads, Plan((segment,)), policy, lambda *_: None).slots_by_layer(policy)
    return made


def test_each_layer_is_fitted_with_the_layers_below_compacted(engine: TransformersEngine) -> None:
    for slots, expected in zip(compacted(engine), one_by_one(engine), strict=True):
        assert torch.equal(slots.positions, expected.positions)
        for name in ("key", "value", "bias"):
            assert torch.allclose(getattr(slots, name), getattr(expected, name), atol=1e-4), name


def test_the_first_layer_has_the_queries_of_any_repeat_pass_and_others_have_not(engine: TransformersEngine) -> None:
    # Half of the tokens, so that no slot is left over for some heads alone; all at once, so that both passes are one.
    changes = {"head_budget": "uniform", "keep_ratio": 0.5, "chunk_tokens": 1000}
    first, *others = compacted(engine, **changes)
    same, *off_policy = compacted(engine, **changes, experiments=Experiments())
    assert torch.equal(first.positions, same.positions)
    assert torch.allclose(first.value, same.value, atol=1e-5)
    for on, off in zip(others, off_policy, strict=True):
        assert not torch.allclose(on.value, off.value, atol=1e-2)


@pytest.mark.parametrize(("budget", "num_passes"), [("uniform", 1), ("adaptive", 1 + 2)])
def test_no_layer_runs_twice_but_for_scores(
    engine: TransformersEngine, tiny_model: PreTrainedModel, budget: str, num_passes: int
) -> None:
    """The pass for the scores is in two chunks here."""
    session, runs = new_session(engine, head_budget=budget), Counter[int]()
    layers = tiny_model.get_decoder().layers
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: runs.update([index])) for index, layer in enumerate(layers)
    ]
    try:
        session.compact(0.5)
    finally:
        for hook in hooks:
            hook.remove()
    assert runs == dict.fromkeys(range(len(layers)), num_passes)


@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_heads_have_as_many_slots_as_off_policy(engine: TransformersEngine, budget: str) -> None:
    on_policy, off_policy = (
        compacted(engine, head_budget=budget, experiments=Experiments(on_policy=each)) for each in (True, False)
    )
    assert [slots.cu_slots for slots in on_policy] == [slots.cu_slots for slots in off_policy]


def test_a_calibrated_budget_is_the_same_as_off_policy(engine: TransformersEngine, tmp_path: Path) -> None:
    cache = cache_of(new_session(engine))
    losses = [[0.2 * head, 0.1 * head, 0.01 * head, 0.0] for head in range(1, cache.num_heads + 1)]
    calibration = Calibration(
        fingerprint=engine.info.fingerprint, model="tiny", ratios=[0.01, 0.1, 0.4, 0.9], losses=losses
    )
    path = tmp_path / "tiny.json"
    path.write_text(calibration.model_dump_json(), encoding="utf-8")
    layers = [
        compacted(engine, head_budget=str(path), experiments=Experiments(on_policy=on_policy))
        for on_policy in (True, False)
    ]
    assert [slots.cu_slots for slots in layers[0]] == [slots.cu_slots for slots in layers[1]]
    assert len({slots.num_slots for slots in layers[0]}) > 1


def test_keeping_everything_changes_nothing(engine: TransformersEngine) -> None:
    session = new_session(engine, keep_ratio=1.0, max_compact_tokens=500)
    before = session.logits(TOKENS[:20])
    session.compact(1.0)
    assert torch.allclose(session.logits(TOKENS[:20]), before, atol=2e-4)


def test_older_segments_and_int8_stay_as_they_are(engine: TransformersEngine) -> None:
    session = new_session(engine, segment_dtype="int8")
    session.compact(0.4)
    older = session.segments
    held = slots_of(session)
    session.compact(0.6)
    assert session.segments[:1] == older
    for slots, layer in zip(held, layers_of(session), strict=True):
        assert slots is not None
        assert layer.slots is not None
        again = layer.slots.where(layer.slots.positions < older[0].end)
        assert torch.equal(again.positions, slots.positions)
        assert torch.equal(again.decoded().value, slots.decoded().value)


def test_a_failure_in_the_midst_of_the_pass_leaves_the_session_as_it_was(engine: TransformersEngine) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, CompactionProgress) and event.stage == "fit" and event.done >= event.total // 2:
            raise RuntimeError("stop")

    memory = Memory(engine, POLICY)
    session = memory.session()
    session.append(TOKENS)
    before, logits = state_of(session), session.logits(TOKENS[:20])
    with memory.listening(fail), pytest.raises(RuntimeError, match="stop"):
        session.compact(0.5)
    assert state_of(session) == before
    assert session.segments == ()
    assert torch.equal(session.logits(TOKENS[:20]), logits)


def test_rebuilt_it_is_the_same(engine: TransformersEngine) -> None:
    session = new_session(engine)
    session.compact(0.5)
    session.append(TOKENS[:30])
    session.compact(0.5)
    before = session.logits(TOKENS[:20])
    rebuild(session)
    assert torch.allclose(session.logits(TOKENS[:20]), before, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"reference_queries": ("repeat", "live")}, {"reference_queries": ("live",)}, {"max_error": 0.1}]
)
def test_what_it_cannot_be_combined_with_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidPolicy, match="on_policy"):
        MemoryPolicy(experiments=Experiments(on_policy=True), **changes)
