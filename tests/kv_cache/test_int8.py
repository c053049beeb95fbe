"""Keys and values of segments in int8: how far off they are, what they take, and that all else is as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driven import some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import layers_of, put_away_oldest, rebuild, records_of, slots_of
from policies import originals_policy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.letters import letters
from am_memory.cli.questions import ask
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine, attention
from am_memory.errors import InvalidPolicy
from am_memory.kv_cache.int8 import NOT_CODED, Quantised, Rows, cat, decoded
from am_memory.kv_cache.slots import PINNED_RANK, Segment, Slots

POLICY = originals_policy(segment_dtype="int8", head_budget="auto")
HEAD_DIM = 16
quickly = settings(max_examples=60, deadline=None, derandomize=True)


# Rows


@quickly
@given(data=st.data(), num_rows=st.integers(1, 5), exponent=st.integers(-20, 30))
def test_a_number_is_off_by_half_a_step_of_its_channel(data: st.DataObject, num_rows: int, exponent: int) -> None:
    row = st.lists(st.floats(-3.0, 3.0, width=32), min_size=HEAD_DIM, max_size=HEAD_DIM)
    rows = torch.tensor(data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))) * 10.0**exponent
    step = rows.abs().amax(dim=0) / 127
    assert ((Quantised.of(rows).decoded() - rows).abs() <= 0.501 * step + 1e-37).all()


def test_a_large_channel_does_not_cost_the_others_anything() -> None:
    """Keys of Qwen2.5 have channels of 150 beside others of one; a scale for each row lost the others."""
    rows = torch.randn(50, HEAD_DIM)
    large = rows.clone()
    large[:, 3] += 150
    others = torch.arange(HEAD_DIM) != 3
    assert torch.equal(Quantised.of(large).decoded()[:, others], Quantised.of(rows).decoded()[:, others])


def test_coding_again_what_was_decoded_gives_the_same_codes() -> None:
    rows = Quantised.of(torch.randn(500, HEAD_DIM) * torch.logspace(-8, 8, HEAD_DIM))
    assert torch.equal(Quantised.of(rows.decoded()).codes, rows.codes)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 3e38])
def test_rows_of_any_size_stay_finite(size: float) -> None:
    rows = torch.full((2, HEAD_DIM), size)
    rows[0, ::2] *= -1
    assert len(Quantised.of(rows).codes) == 2
    torch.testing.assert_close(Quantised.of(rows).decoded(), rows, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_number_takes_a_byte_and_a_channel_four(dtype: torch.dtype) -> None:
    rows = Quantised.of(torch.randn(10, HEAD_DIM).to(dtype))
    assert sum(tensor.nbytes for tensor in rows.tensors) == 10 * HEAD_DIM + 4 * HEAD_DIM
    assert rows.decoded().dtype == dtype


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, 1), (torch.bfloat16, 4), (torch.float32, 0)], ids=str)
def test_a_group_that_its_scale_would_make_no_smaller_stays_as_it_is(dtype: torch.dtype, num_rows: int) -> None:
    rows = torch.randn(num_rows + 1, HEAD_DIM).to(dtype)
    held = Quantised.of(rows[1:])
    assert len(held.codes) == len(held.scale) == 0
    assert torch.equal(held.decoded(), rows[1:])
    assert sum(tensor.nbytes for tensor in Quantised.of(rows).tensors) <= rows.nbytes


@quickly
@given(data=st.data())
def test_rows_of_both_kinds_are_indexed_and_joined_as_any_tensor(data: st.DataObject) -> None:
    parts: list[Rows] = []
    for count in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)):
        rows = torch.randn(count, HEAD_DIM)
        parts.append(Quantised.of(rows) if data.draw(st.booleans()) else rows)
    joined = cat(parts)
    expected = torch.cat([decoded(part) for part in parts])
    assert torch.equal(decoded(joined), expected)
    index = torch.tensor(data.draw(st.lists(st.integers(0, 30), max_size=8)), dtype=torch.int64)
    index = index[index < len(joined)]
    for where in (index, slice(1, 4), expected[:, 0] > 0):
        chosen = joined[where]
        assert torch.equal(decoded(chosen), expected[where])
        assert torch.equal(
            decoded(cat([chosen, *parts, chosen])), torch.cat([expected[where], expected, expected[where]])
        )


def test_other_numbers_are_coded_in_the_same_groups() -> None:
    first, pinned, second = torch.randn(9, 4), torch.randn(2, 4), 50 * torch.randn(20, 4)
    rows = cat([Quantised.of(first), Quantised.unchanged(pinned), Quantised.of(second)])
    assert isinstance(rows, Quantised)
    changed = torch.cat([second[:9], pinned + 1, first.repeat(3, 1)[:20]])
    recoded = rows.recoded(changed)
    assert torch.equal(recoded.group, rows.group)
    expected = cat([Quantised.of(changed[:9]), Quantised.unchanged(changed[9:11]), Quantised.of(changed[11:])])
    torch.testing.assert_close(recoded.decoded(), decoded(expected), atol=0, rtol=0)


def test_scales_go_with_the_last_row_that_needs_them() -> None:
    joined = cat([Quantised.of(torch.randn(4, HEAD_DIM)) for _ in range(5)])
    assert len(joined[6:9].scale) == 2
    assert len(joined[:0].scale) == 0


# Slots


def random_slots(counts: list[int], start: int, num_kept: int) -> Slots:
    """A segment's slots, of as many heads as there are counts."""
    heads = []
    for count in counts:
        positions = start + torch.randperm(20)[:count].sort().values
        ranks = torch.randperm(num_kept)[:count]
        key, value = torch.randn(2, count, HEAD_DIM)
        heads.append(Slots(key, value, torch.rand(count), positions.int(), ranks.int(), (0, count)))
    return Slots.stack(heads)


def coded(slots: Slots) -> Slots:
    return Slots.stack([slots.head(head).quantised() for head in range(slots.num_heads)])


def assert_same_slots(one: Slots, other: Slots) -> None:
    assert one.cu_slots == other.cu_slots
    for mine, theirs in zip(one.decoded().fields, other.decoded().fields, strict=True):
        assert torch.equal(mine, theirs)


def layer_of_two_segments() -> Slots:
    """[3 pinned][tokens 3 to 23 coded][tokens 23 to 43 coded], of two heads."""
    pinned = Slots.exact(*torch.randn(2, 2, 3, HEAD_DIM), start=0)
    segments = [random_slots(counts, start, 24) for counts, start in (([5, 9], 3), ([0, 12], 23))]
    return Slots.concat([pinned, *map(coded, segments)])


@pytest.mark.parametrize(
    "change",
    [
        lambda slots: slots.head(1),
        lambda slots: slots.within(3, 30),
        lambda slots: slots.cut([Segment(3, 23, 10), Segment(23, 43, 4)]),
        lambda slots: slots.where(slots.positions % 3 == 0),
        lambda slots: Slots.stack([slots.head(1), slots.head(0)]),
        lambda slots: Slots.concat([slots.within(3, 23), slots.within(23, 43)]),
        lambda slots: slots.to("cpu"),
    ],
)
def test_slots_in_8_bits_are_cut_and_joined_as_others(change: Callable[[Slots], Slots]) -> None:
    slots = layer_of_two_segments()
    assert_same_slots(change(slots), change(slots.decoded()))


def test_attention_sees_what_is_decoded() -> None:
    slots = layer_of_two_segments()
    query, key, value = torch.randn(1, 4, 2, HEAD_DIM), *torch.randn(2, 1, 2, 7, HEAD_DIM)
    for mine, theirs in zip(
        attention.attend(query, key, value, slots, 0.25),
        attention.attend(query, key, value, slots.decoded(), 0.25),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


# Sessions

NewSession = Callable[..., Session]


@pytest.fixture
def new_session(engine: TransformersEngine, tmp_path: Path) -> NewSession:
    """Makes sessions that share a model and a store."""

    def make(name: str = "alice", num_tokens: int = 0, **changes: object) -> Session:
        policy = POLICY.model_copy(update=changes)
        session = Memory(engine, policy, sampling=Sampling(temperature=0), store=tmp_path / "store").session(name)
        if num_tokens:
            session.append(some_tokens(num_tokens))
        return session

    return make


def assert_same_sessions(one: Session, other: Session) -> None:
    for mine, theirs in zip(slots_of(one), slots_of(other), strict=True):
        assert_same_slots(mine, theirs)
        for held, expected in zip(mine.tensors, theirs.tensors, strict=True):
            assert held.dtype == expected.dtype
            assert torch.equal(held.float(), expected.float())
    assert torch.equal(one.logits(some_tokens(9, seed=9)), other.logits(some_tokens(9, seed=9)))


def test_segments_are_those_of_the_model_s_dtype_rounded_once(new_session: NewSession) -> None:
    """The first ones; what comes later is read beside rounded ones."""
    session, plain = new_session(num_tokens=120), new_session("plain", 120, segment_dtype="model")
    for each in (session, plain):
        each.compact(0.5)
    for mine, theirs in zip(slots_of(session), slots_of(plain), strict=True):
        is_pinned = theirs.ranks == PINNED_RANK
        assert_same_slots(mine.where(is_pinned), theirs.where(is_pinned))
        assert_same_slots(mine.where(~is_pinned), coded(theirs.where(~is_pinned)))


def test_bytes_are_what_is_held(new_session: NewSession) -> None:
    session = new_session(num_tokens=120)
    session.compact(0.5)
    expected = 0
    for layer in layers_of(session):
        expected += 4 * 2 * HEAD_DIM * layer.num_heads * layer.buffer.capacity
        for head in range(layer.num_heads):
            num_slots = layer.slots.head(head).num_slots - 3
            assert num_slots > 1
            expected += 3 * 4 * (2 * HEAD_DIM + 1) + num_slots * (2 * HEAD_DIM + 4) + 4 * 2 * HEAD_DIM
    assert session.stats.kv_bytes == expected


def test_a_saved_session_is_resumed_to_the_bit(new_session: NewSession) -> None:
    session = new_session(num_tokens=500)
    session.save()
    resumed = new_session()
    assert_same_sessions(resumed, session)
    for each in (session, resumed):
        each.compact(1.0)
    assert_same_sessions(resumed, session)


def test_a_session_saved_in_the_model_s_dtype_goes_on_in_int8(new_session: NewSession) -> None:
    session = new_session(num_tokens=150, segment_dtype="model")
    session.save()
    resumed = new_session()
    older = slots_of(resumed)
    for mine, theirs in zip(older, slots_of(session), strict=True):
        assert_same_slots(mine, theirs)
    resumed.compact(1.0)
    first = resumed.segments[0]
    for slots, before in zip(slots_of(resumed), older, strict=True):
        assert (slots.key.group != NOT_CODED).any()
        kept = slots.within(first.start, first.end)
        assert torch.equal(kept.key.decoded(), before.cut([first]).within(first.start, first.end).key)


def test_a_recalled_segment_is_exact_and_goes_back_to_the_same_codes(new_session: NewSession) -> None:
    session, untouched = new_session(num_tokens=120), new_session("bob", 120)
    exact = new_session("exact", 120, trigger_tokens=2000)
    for each in (session, untouched):
        each.compact(0.5)
    (segment,) = session.recall((3, 4))
    for slots, layer in zip(slots_of(session), layers_of(exact), strict=True):
        key, value = layer.exact_entries(segment.start, segment.end)
        for head in range(layer.num_heads):
            held = slots.head(head).within(segment.start, segment.end)
            torch.testing.assert_close(held.key.decoded(), key[head], rtol=0, atol=1e-4)
            torch.testing.assert_close(held.value.decoded(), value[head], rtol=0, atol=1e-4)
    put_away_oldest(session)
    assert_same_sessions(session, untouched)


def test_a_rebuilt_session_has_the_same_codes(new_session: NewSession) -> None:
    session, other = new_session(num_tokens=300), new_session("bob", 300)
    rebuild(session)
    for mine, theirs in zip(slots_of(session), slots_of(other), strict=True):
        assert torch.equal(mine.key.codes, theirs.key.codes)
        assert torch.equal(mine.value.codes, theirs.value.codes)


def test_a_branch_shares_codes_and_goes_its_own_way(new_session: NewSession) -> None:
    session, other = new_session(num_tokens=300), new_session("bob", 300)
    branch = session.fork()
    assert slots_of(branch)[0].key.codes is slots_of(session)[0].key.codes
    branch.append(some_tokens(200, seed=1))
    branch.compact(1.0)
    assert_same_sessions(session, other)


def test_what_is_compacted_again_is_decoded_first(new_session: NewSession) -> None:
    session = new_session(num_tokens=300, experiments=Experiments(recompaction="refit"))
    assert len(records_of(session)) > 1
    assert len(session.segments) == 1
    assert all(slots.key.decoded().isfinite().all() for slots in slots_of(session))


def test_a_span_is_found_among_codes(new_session: NewSession) -> None:
    session = new_session(num_tokens=300, originals="drop")
    assert session.search("What was that?", top=2)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidPolicy, match="segment_dtype.*'int4'"):
        MemoryPolicy(segment_dtype="int4")


def test_shared_cells_take_their_dtype_from_the_engine(shared_llama: LlamaCppEngine) -> None:
    with pytest.raises(InvalidPolicy, match="segment_dtype 'int8' needs a cache .* kv_type='q8_0'"):
        Memory(shared_llama, MemoryPolicy(trigger_tokens=600, segment_dtype="int8")).session()


@pytest.mark.model
def test_a_fact_told_first_is_recalled_from_8_bits(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    policy = MemoryPolicy(trigger_tokens=384, keep_ratio=0.25, segment_dtype="int8")
    session = Memory(TransformersEngine(*demo), policy).session()
    written = letters(seed=0, num_letters=5, num_facts=1)
    for letter in written:
        session.append(letter.messages)
    assert session.stats.num_compactions >= 3
    ship = written[0].facts[0]
    assert ask(session, [ship]) == {ship: ship.code}
