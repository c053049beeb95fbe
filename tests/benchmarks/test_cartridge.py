"""benchmarks/baselines/cartridge.py: what is trained, what it is held against, and that the session stays as it was."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean

import pareto
import pytest
import torch
from baselines import cartridge
from baselines.cartridge import Cartridge, trained
from inside import layers_of
from recall import Judge, Scene
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Session
from am_memory.cli.letters import facts
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import UnsupportedOperation

POLICY = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", keep_ratio=0.1, self_study_tokens=24)
FRACTION = 0.75
NEXT = " And what did the owl see?"


def told(engine: TransformersEngine, policy: MemoryPolicy) -> Session:
    session = Memory(engine=engine, policy=policy).scratch()
    session.append("The owl sleeps in the barn, and the hen is awake. " * 5)
    return session


@pytest.fixture
def session(engine: TransformersEngine) -> Session:
    return told(engine, POLICY)


def test_training_brings_what_is_expected_nearer_to_the_full_cache(session: Session) -> None:
    trainee = Cartridge(session, FRACTION)
    conversations = trainee.conversations()

    def kl() -> float:
        return fmean(trainee.loss(conversation).item() for conversation in conversations)

    before = kl()
    for conversation in conversations * 4:
        trainee.step(conversation)
    assert kl() < 0.7 * before


def test_as_many_slots_as_tokens_and_no_step_are_the_full_cache(engine: TransformersEngine) -> None:
    """Both where it is trained, through the model's own attention, and where it is judged, through ours."""
    session = told(engine, MemoryPolicy(**{**dict(POLICY), "keep_ratio": 1.0, "max_compact_tokens": 1000}))
    trainee = Cartridge(session, FRACTION)
    assert trainee.key[0].shape[1] == trainee.block.num_tokens
    for conversation in trainee.conversations():
        assert trainee.loss(conversation).item() < 1e-6
    torch.testing.assert_close(trainee.swapped_in().logits(NEXT), session.logits(NEXT), atol=1e-4, rtol=0)


def test_every_head_gets_as_many_slots_as_a_compaction_leaves_it_on_average(session: Session) -> None:
    branch = session.fork()
    branch.compact(FRACTION)
    swapped_in = Cartridge(session, FRACTION).swapped_in()
    (compacted,), (trained_block,) = branch.segments, swapped_in.segments
    assert (trained_block.start, trained_block.end) == (compacted.start, compacted.end)
    assert swapped_in.stats.kv_tokens == pytest.approx(branch.stats.kv_tokens, abs=0.5)
    assert all(
        {end - begin for begin, end in itertools.pairwise(layer.slots.cu_slots)} == {4 + 18}
        for layer in layers_of(swapped_in)
    )


def test_the_session_stays_as_it_was_and_a_checkpoint_too_while_training_goes_on(session: Session) -> None:
    tokens, stats, logits = session.tokens, session.stats, session.logits(NEXT)
    trainee = Cartridge(session, FRACTION)
    checkpoint = trainee.swapped_in()
    first = checkpoint.logits(NEXT)
    trainee.step(trainee.conversations()[0])
    assert torch.equal(checkpoint.logits(NEXT), first)
    assert not torch.equal(trainee.swapped_in().logits(NEXT), first)
    assert (session.tokens, session.stats) == (tokens, stats)
    assert torch.equal(session.logits(NEXT), logits)
    assert all(parameter.grad is None for parameter in session.engine.model.parameters())


def test_the_whole_block_and_all_prompts_are_among_the_conversations(session: Session) -> None:
    trainee = Cartridge(session, FRACTION)
    *studied, repeated = trainee.conversations()
    assert len(studied) == 4
    block = session.tokens[trainee.block.start : trainee.block.end]
    assert repeated.token_ids[-len(block) :] == block
    assert repeated.expected.shape == (len(repeated.token_ids), session.engine.info.vocab_size)


def test_the_clock_counts_writing_and_steps_and_stands_at_checkpoints(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at this clock is a second after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr(cartridge.time, "perf_counter", lambda: float(next(ticks)))
    checkpoints = []
    for checkpoint in trained(session, FRACTION, [0.0, 3.0, 4.0]):
        next(ticks)  # judging
        checkpoints.append(checkpoint)
    assert [(each.seconds, each.writing_seconds, each.steps) for each in checkpoints] == [
        (1, 1, 0),
        (3, 1, 2),
        (4, 1, 3),
    ]
    assert checkpoints[0].kl_training is None
    assert all(each.kl_training > 0 for each in checkpoints[1:])


def test_what_cannot_be_trained_is_refused(
    session: Session,
    new_sliding_model: Callable[[], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    compacted = session.fork()
    compacted.compact(FRACTION)
    with pytest.raises(UnsupportedOperation, match="has 1 compact segments"):
        Cartridge(compacted, FRACTION)
    sliding = told(TransformersEngine(new_sliding_model(), byte_tokenizer), POLICY)
    with pytest.raises(UnsupportedOperation, match="2 of 3 layers have a sliding window"):
        Cartridge(sliding, FRACTION)


def test_a_trained_cache_is_judged_as_every_other_scheme(engine: TransformersEngine) -> None:
    """A row has what theirs have, and how it was trained."""
    memory = Memory(engine=engine, policy=POLICY)
    full = told(engine, POLICY)
    scene = Scene(full, [], Judge(full, [facts(random.Random(0), 1)], NEXT), FRACTION)
    (row,) = pareto.train(memory, scene, 0, 10.0, [0.0])
    expected = scene.judge.judge(
        Cartridge(full, FRACTION).swapped_in(), "Cartridges style, 0 s", 10.0, 0, row["seconds"]
    )
    training = {"writing_seconds": row["seconds"], "steps": 0, "kl_training": None}
    assert row == {**asdict(expected), **training}
    assert json.loads(json.dumps(row)) == row


def test_rows_of_trained_caches_come_behind_the_schemes_and_may_be_on_the_front() -> None:
    def row(scheme: str, seconds: float, kl: float) -> pareto.Row:
        return {"scheme": scheme, "ratio": 10.0, "seconds": seconds, "kl_answer": kl}

    names = [pareto.cartridge_name(seconds) for seconds in (30.0, 300.0)]
    rows = [row(names[0], 30, 0.5), row(pareto.DEFAULT, 20, 0.1), row(names[1], 301, 0.05)]
    (schemes,) = pareto.groups(rows).values()
    assert list(schemes) == [pareto.DEFAULT, *names]
    assert pareto.front(schemes) == {pareto.DEFAULT, names[1]}
