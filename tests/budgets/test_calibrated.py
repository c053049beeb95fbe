"""Calibrated budgets: from curves to a ranking, and files that belong to one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inside import cache_of, layers_of
from pydantic import ValidationError
from torch import Tensor

from am_memory import Memory, MemoryPolicy
from am_memory.budgets import Calibration, adaptive_ranks, calibrated_ranks, calibration_for
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidPolicy

RATIOS = (0.01, 0.1, 0.5)
TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(240)]


def curves(*losses: tuple[float, ...], fingerprint: str = "f00d") -> Calibration:
    return Calibration(fingerprint=fingerprint, model="a model", ratios=RATIOS, losses=losses)


NEEDS_MUCH, NEEDS_LITTLE, NEEDS_NOTHING = (2.0, 0.9, 0.2), (0.3, 0.02, 0.001), (0.0, 0.0, 0.0)


def written(folder: Path, calibration: Calibration) -> str:
    path = folder / "curves.json"
    path.write_text(calibration.model_dump_json(), encoding="utf-8")
    return str(path)


# From curves to a ranking


def alike(num_heads: int, seq_len: int) -> Tensor:
    """Scores that leave the curves alone."""
    return torch.ones(num_heads, seq_len)


@pytest.mark.parametrize("seq_len", [1, 63, 500])
def test_every_slot_has_a_rank_of_its_own_and_a_head_takes_its_best_first(seq_len: int) -> None:
    calibration = curves(NEEDS_MUCH, NEEDS_LITTLE, NEEDS_NOTHING)
    ranks = calibrated_ranks(calibration, alike(3, seq_len), 2)
    assert ranks.flatten().sort().values.tolist() == list(range(3 * seq_len))
    assert (ranks.diff(dim=1) > 0).all()


def test_a_head_that_loses_more_gets_more() -> None:
    ranks = calibrated_ranks(curves(NEEDS_LITTLE, NEEDS_MUCH, NEEDS_NOTHING), alike(3, 200), 1)
    little, much, nothing = (ranks < 60).sum(dim=1).tolist()
    assert much > 2 * little > nothing == 1


def test_scores_and_curves_are_multiplied() -> None:
    """As many slots are worth having: a key of double the score, and one that saves double."""
    scores = torch.rand(3, 200)
    same = curves(NEEDS_MUCH, NEEDS_MUCH, NEEDS_MUCH)
    falling = scores.sort(dim=1, descending=True).values
    assert torch.equal(calibrated_ranks(same, scores, 1), adaptive_ranks(falling * same.gains(200), 1))
    twice = curves(NEEDS_MUCH, tuple(2 * loss for loss in NEEDS_MUCH), NEEDS_NOTHING)
    weighed = torch.stack([2 * scores[0], scores[0], scores[0]])
    first, second, _ = (calibrated_ranks(twice, weighed, 1) < 100).sum(dim=1).tolist()
    assert abs(first - second) <= 1


def test_a_calibration_may_leave_scores_out() -> None:
    calibration = curves(NEEDS_LITTLE, NEEDS_MUCH).model_copy(update={"weighs_scores": False})
    by_scores, by_curves = (calibrated_ranks(calibration, scores, 1) for scores in (torch.rand(2, 90), alike(2, 90)))
    assert torch.equal(by_scores, by_curves)


def test_no_head_gets_more_before_every_head_has_its_least() -> None:
    ranks = calibrated_ranks(curves(NEEDS_LITTLE, NEEDS_MUCH, NEEDS_NOTHING), alike(3, 200), 4)
    assert (ranks < 12).sum(dim=1).tolist() == [4, 4, 4]


def test_what_a_slot_saves_falls_though_the_measured_curve_rises_and_bulges() -> None:
    """At a tenth more was lost than at a hundredth, which no convex curve allows: the point is left out."""
    (bulging,) = curves((0.5, 0.6, 0.01)).gains(100)
    (without,) = Calibration(fingerprint="", model="", ratios=(0.01, 0.5), losses=((0.5, 0.01),)).gains(100)
    assert (bulging.diff() <= 0).all()
    assert torch.equal(bulging, without)


def test_what_all_slots_save_is_about_what_is_lost_with_one() -> None:
    """The gains are slopes: their sum over the block is the height of the curve."""
    gains = curves(NEEDS_MUCH).gains(1000)
    assert float(gains[0, 10:].sum()) / 1000 == pytest.approx(2.0, rel=0.15)


def test_exchanging_slots_greedily_ends_at_the_ranking() -> None:
    """From equal shares, a slot goes where it helps most from where it costs least, until none helps."""
    calibration = curves(NEEDS_MUCH, NEEDS_LITTLE, (1.0, 0.5, 0.3), NEEDS_NOTHING)
    gains, counts = calibration.gains(80), [12] * 4
    while True:
        helps = [float(gains[head, count]) if count < 80 else 0.0 for head, count in enumerate(counts)]
        costs = [float(gains[head, count - 1]) if count > 1 else torch.inf for head, count in enumerate(counts)]
        taker, giver = max(range(4), key=helps.__getitem__), min(range(4), key=costs.__getitem__)
        if helps[taker] <= costs[giver]:
            break
        counts[taker] += 1
        counts[giver] -= 1
    assert counts != [12] * 4
    assert (calibrated_ranks(calibration, alike(4, 80), 1) < 48).sum(dim=1).tolist() == counts


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratios": (0.1, 0.05, 0.5)},
        {"ratios": (0.0, 0.1, 0.5)},
        {"ratios": (0.1, 0.5, 1.0)},
        {"ratios": (), "losses": ((),)},
        {"ratios": (1e-300, 2e-300, 3e-300)},
        {"losses": ()},
        {"losses": ((1e308, 0.5, 0.1),)},
        {"losses": ((1.0, 0.5),)},
        {"losses": ((1.0, 0.5, -0.1),)},
        {"losses": ((1.0, 0.5, float("nan")),)},
    ],
)
def test_curves_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate({**curves(NEEDS_MUCH).model_dump(), **wrong})


# In a policy


def test_a_session_gives_its_heads_what_the_file_says(engine: TransformersEngine, tmp_path: Path) -> None:
    """Two heads in each of three layers; the fourth of all needs everything."""
    heads = [NEEDS_NOTHING] * 6
    heads[3] = NEEDS_MUCH
    path = written(tmp_path, curves(*heads, fingerprint=engine.info.fingerprint))
    policy = MemoryPolicy(trigger_tokens=2000, keep_ratio=0.1, pinned=4, keep_recent=0, head_budget=path)
    session = Memory(engine, policy).session()
    session.append(TOKENS)
    session.compact(1.0)
    layers = layers_of(session)
    counts = [layer.slots.head(head).num_slots - 4 for layer in layers for head in range(2)]
    assert counts == [1, 1, 1, round(0.1 * 235 * 6) - 5, 1, 1]
    assert session.fork().stats.kv_tokens == session.stats.kv_tokens


def test_a_calibration_of_another_model_is_refused_and_both_are_named(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    policy = MemoryPolicy(trigger_tokens=2000, head_budget=written(tmp_path, curves(NEEDS_MUCH)))
    with pytest.raises(InvalidPolicy, match=f"measured on model f00d .* this one is {engine.info.fingerprint}"):
        Memory(engine, policy)


def test_a_model_without_a_calibration_of_its_own_says_how_to_make_one(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidPolicy, match=f"no calibration ships for model {engine.info.fingerprint} .*calibrate"):
        Memory(engine, MemoryPolicy(trigger_tokens=2000, head_budget="calibrated"))


@pytest.mark.parametrize(
    "content",
    [None, "{}", '{"losses": 1', "\xff", "[" * 100_000, '{"ratios": [NaN]}', '{"ratios": [1e999]}', "9" * 5000],
)
def test_a_file_that_is_missing_or_none_of_ours_is_refused(
    engine: TransformersEngine, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "curves.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidPolicy, match=r"curves\.json.* cannot be read .* am-memory calibrate wrote"):
        Memory(engine, MemoryPolicy(trigger_tokens=2000, head_budget=str(path)))


@pytest.mark.parametrize("num_heads", [1, 5, 7])
def test_curves_of_other_heads_than_the_models_are_refused_and_nothing_is_changed(
    engine: TransformersEngine, tmp_path: Path, num_heads: int
) -> None:
    """A file that was changed by hand ended in a RuntimeError of torch's, or gave the slots to other heads."""
    heads = [NEEDS_MUCH] * num_heads
    path = written(tmp_path, curves(*heads, fingerprint=engine.info.fingerprint))
    session = Memory(engine, MemoryPolicy(trigger_tokens=2000, keep_recent=0, head_budget=path)).session()
    session.append(TOKENS)
    before = session.stats
    with pytest.raises(InvalidPolicy, match=f"has curves of {num_heads} heads, and the model has 6"):
        session.compact(1.0)
    assert session.stats == before


@pytest.mark.parametrize("budget", ["calibrated", "curves.json"])
def test_cells_that_all_heads_share_cannot_follow_a_calibration(shared_llama: LlamaCppEngine, budget: str) -> None:
    policy = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, keep_recent=8, head_budget=budget)
    with pytest.raises(InvalidPolicy, match=f"head_budget '{budget}' needs a cache whose heads can differ"):
        Memory(shared_llama, policy).session()


def test_by_itself_a_budget_is_calibrated_only_where_a_calibration_ships(engine: TransformersEngine) -> None:
    assert calibration_for("auto", engine.info) is None


@pytest.mark.model
def test_the_demo_models_calibration_ships_with_the_package(demo) -> None:
    engine = TransformersEngine(*demo)
    calibration = calibration_for("calibrated", engine.info)
    assert calibration_for("auto", engine.info) == calibration
    assert calibration_for("adaptive", engine.info) is None
    assert calibration is not None
    assert calibration.fingerprint == engine.info.fingerprint
    session = Memory(engine, MemoryPolicy(trigger_tokens=384, keep_ratio=0.25, head_budget="calibrated")).session()
    session.append(" ".join(map(str, range(200))))
    assert session.stats.num_compactions >= 1
    assert len(calibration.losses) == cache_of(session).num_heads
