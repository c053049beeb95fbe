"""The cache by itself: its layout, growth, sharing, cutting and bytes, on random entries and without a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.cache import CacheState, KVCache
from am_memory.kv_cache.kinds import FULL_ATTENTION, LayerKind
from am_memory.kv_cache.layers import CompactableLayer, SlidingLayer, TailState
from am_memory.kv_cache.slots import PINNED_RANK, Segment, Slots, resized

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 3, 2, 8
NUM_PINNED = 4

quickly = settings(max_examples=60, deadline=None, derandomize=True)


def grow(cache: KVCache, num_tokens: int, *, at_once: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Append random entries to every layer."""
    for layer in cache.layers:
        for start in range(0, num_tokens, at_once or num_tokens):
            count = min(at_once or num_tokens, num_tokens - start)
            layer.update(*torch.randn(2, 1, NUM_HEADS, count, HEAD_DIM).to(dtype))


def new_cache(num_tokens: int = 0, **how: object) -> KVCache:
    cache = KVCache([FULL_ATTENTION] * NUM_LAYERS)
    if num_tokens:
        grow(cache, num_tokens, **how)
    return cache


def random_slots(cache: KVCache, segment: Segment) -> list[Slots]:
    """Any slots that a compaction of the segment could give: all of its heads ranked jointly, ragged by chance."""
    size = segment.num_tokens
    ranks = torch.randperm(cache.num_heads * size).view(cache.num_heads, size).sort(dim=1).values
    layers = []
    for index, layer in enumerate(cache.compactable):
        key, value = layer.exact_entries(segment.start, segment.end)
        heads = []
        for head in range(layer.num_heads):
            kept = ranks[index * layer.num_heads + head]
            kept = kept[kept < segment.num_slots]
            where = torch.randperm(size)[: len(kept)].sort().values
            heads.append(
                Slots(
                    key=key[head, where],
                    value=value[head, where],
                    bias=torch.rand(len(kept)).to(key.dtype),
                    positions=(segment.start + where).int(),
                    ranks=kept[torch.randperm(len(kept))].int(),
                    cu_slots=(0, len(kept)),
                )
            )
        layers.append(Slots.stack(heads))
    return layers


def compact(cache: KVCache, end: int, num_slots: int, *older: Segment) -> CacheState:
    start = cache.segments[-1].end if cache.segments else NUM_PINNED
    segment = Segment(start, end, num_slots)
    return cache.compacted([*older, segment], random_slots(cache, segment), NUM_PINNED)


def compacted_cache(num_tokens: int = 50, end: int = 30, num_slots: int = 40) -> KVCache:
    """[4 pinned][1 segment][exact tail]."""
    cache = new_cache(num_tokens)
    cache.restore(compact(cache, end, num_slots))
    return cache


def tensors(cache: KVCache) -> list[Tensor]:
    """Everything that the cache holds, copied."""
    held = []
    for layer in cache.compactable:
        held += [layer.buffer.key[:, :, : layer.length].clone(), layer.buffer.value[:, :, : layer.length].clone()]
        held += [tensor.clone() for tensor in layer.slots.fields] if layer.slots is not None else []
    return held


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Layout


def test_what_is_appended_comes_back() -> None:
    layer = CompactableLayer()
    pieces = [torch.randn(2, 1, NUM_HEADS, count, HEAD_DIM) for count in (5, 1, 1, 7, 30, 1)]
    for piece in pieces:
        key, value = layer.update(*piece)
    whole = torch.cat(pieces, dim=3)
    assert torch.equal(key, whole[0])
    assert torch.equal(value, whole[1])
    assert torch.equal(layer.exact_entries(3, 9)[0], whole[0, 0, :, 3:9])


def test_update_returns_the_exact_tail_alone_and_names_its_layer() -> None:
    cache = compacted_cache(50, end=30)
    layer = cache.compactable[1]
    key, _ = layer.update(*torch.randn(2, 1, NUM_HEADS, 1, HEAD_DIM))
    assert key.shape == (1, NUM_HEADS, 50 - 30 + 1, HEAD_DIM)
    assert key.am_layer is layer


def test_logical_length_goes_on_and_physical_length_shrinks() -> None:
    cache = new_cache(50)
    assert (cache.num_tokens, cache.num_exact_tokens, cache.num_compact_slots) == (50, 50, 0)
    cache.restore(compact(cache, 30, num_slots=40))
    assert cache.num_tokens == cache.get_seq_length() == 50
    assert cache.tail_start == 30
    assert cache.num_exact_tokens == 24
    assert cache.num_compact_slots == pytest.approx(40 / (NUM_LAYERS * NUM_HEADS))
    assert cache.kv_tokens == pytest.approx(24 + 40 / 6)
    grow(cache, 3)
    assert (cache.num_tokens, cache.tail_start) == (53, 30)


def test_kv_tokens_is_the_mean_over_heads_of_what_the_layers_hold() -> None:
    cache = compacted_cache()
    held = sum(layer.slots.num_slots + layer.num_heads * layer.length for layer in cache.compactable)
    assert cache.kv_tokens == pytest.approx(held / cache.num_heads)


def test_slots_of_a_head_keep_the_order_of_their_tokens() -> None:
    cache = compacted_cache(80, end=30)
    cache.restore(compact(cache, 60, 50, *cache.segments))
    for layer in cache.compactable:
        for head in range(layer.num_heads):
            positions = layer.slots.head(head).positions
            assert torch.equal(positions, positions.sort().values)
            assert positions[:NUM_PINNED].tolist() == list(range(NUM_PINNED))


def test_pinned_entries_are_exact_slots_that_no_budget_cuts() -> None:
    cache = new_cache(50)
    exact = [[tensor.clone() for tensor in layer.exact_entries(0, NUM_PINNED)] for layer in cache.compactable]
    cache.restore(compact(cache, 30, num_slots=40))
    for _ in range(2):
        for layer, (key, value) in zip(cache.compactable, exact, strict=True):
            for head in range(NUM_HEADS):
                pinned = layer.slots.head(head).where(layer.slots.head(head).ranks == PINNED_RANK)
                assert torch.equal(pinned.key, key[head])
                assert torch.equal(pinned.value, value[head])
                assert not pinned.bias.any()
        cache.restore(compact(cache, 40, 0, resized(cache.segments[0], 0)))


def test_a_cache_without_pinned_tokens_can_be_compacted() -> None:
    cache = new_cache(20)
    segment = Segment(0, 10, 6)
    cache.restore(cache.compacted([segment], random_slots(cache, segment), 0))
    assert cache.num_exact_tokens == 10
    assert sum(layer.slots.num_slots for layer in cache.compactable) == 6


def test_a_head_may_have_no_slots_at_all() -> None:
    empty = Slots.exact(torch.randn(1, 0, HEAD_DIM), torch.randn(1, 0, HEAD_DIM), 0)
    full = Slots.exact(torch.randn(1, 3, HEAD_DIM), torch.randn(1, 3, HEAD_DIM), 0)
    layer = Slots.stack([empty, full, empty])
    assert layer.cu_slots == (0, 0, 3, 3)
    assert [head.key.shape[2] for head in layer.heads] == [0, 3, 0]
    assert Slots.concat([layer, layer]).cu_slots == (0, 0, 6, 6)


# Growth


def test_a_decoded_token_is_written_in_place() -> None:
    layer = CompactableLayer()
    layer.update(*torch.randn(2, 1, NUM_HEADS, 640, HEAD_DIM))
    places = set()
    for _ in range(640 // 64):
        key, value = layer.update(*torch.randn(2, 1, NUM_HEADS, 1, HEAD_DIM))
        places.add((key.data_ptr(), value.data_ptr()))
    assert len(places) == 1


def test_spare_room_is_at_most_a_64th() -> None:
    layer = CompactableLayer()
    for count in (1, 1, 1, 100, 27, 500, *[1] * 200):
        layer.update(*torch.randn(2, 1, NUM_HEADS, count, HEAD_DIM))
        assert layer.buffer.capacity - layer.length <= layer.length / 64 + 1


def test_the_old_tail_is_not_kept_alive_by_the_new_one() -> None:
    """Bytes would be unreal: a view of the remaining tail holds the whole old buffer."""
    cache = new_cache(500)
    old = cache.compactable[0].buffer.key
    cache.restore(compact(cache, 480, num_slots=10))
    new = cache.compactable[0].buffer.key
    assert new.untyped_storage().nbytes() < old.untyped_storage().nbytes() / 10


# Compaction


def test_compacted_leaves_the_cache_as_it_was() -> None:
    cache = compacted_cache(80, end=30)
    before, state, segments, kv_bytes = tensors(cache), cache.state(), cache.segments, cache.nbytes
    after = compact(cache, 60, 50, resized(cache.segments[0], 10))
    assert cache.state() == state
    assert (cache.segments, cache.nbytes) == (segments, kv_bytes)
    assert_same(tensors(cache), before)
    assert after.segments != segments


def test_the_tail_behind_a_compaction_is_bit_identical() -> None:
    cache = new_cache(50)
    expected = [[tensor.clone() for tensor in layer.exact_entries(30, 50)] for layer in cache.compactable]
    cache.restore(compact(cache, 30, num_slots=40))
    for layer, (key, value) in zip(cache.compactable, expected, strict=True):
        assert torch.equal(layer.exact_entries(30, 50)[0], key)
        assert torch.equal(layer.exact_entries(30, 50)[1], value)


def test_all_exact_tokens_may_be_compacted() -> None:
    cache = new_cache(20)
    cache.restore(compact(cache, 20, num_slots=30))
    assert (cache.num_tokens, cache.tail_start) == (20, 20)
    grow(cache, 1)
    assert (cache.num_tokens, cache.tail_start) == (21, 20)


def test_a_segment_that_is_not_named_gives_way_to_the_new_one() -> None:
    """`recompaction="refit"`: one new segment stands for the old segment and the tail behind it."""
    cache = compacted_cache(50, end=30)
    slots = random_slots(new_cache(50), whole := Segment(NUM_PINNED, 40, 12))
    cache.restore(cache.compacted([whole], slots, NUM_PINNED))
    assert cache.segments == (whole,)
    assert sum(layer.slots.num_slots for layer in cache.compactable) == 12 + NUM_PINNED * cache.num_heads


@quickly
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_cutting_in_steps_or_at_once_keeps_the_same_slots(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    cache = compacted_cache(60, end=30, num_slots=90)
    slots, segment = cache.compactable[0].slots, cache.segments[0]
    in_steps = slots
    for size in sorted(sizes, reverse=True):
        in_steps = in_steps.cut([resized(segment, size)])
    at_once = slots.cut([resized(segment, min(sizes))])
    assert in_steps.cu_slots == at_once.cu_slots
    assert_same(list(in_steps.fields), list(at_once.fields))


@quickly
@given(size=st.integers(0, 70), seed=st.integers(0, 99))
def test_a_segment_holds_exactly_the_slots_it_says(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    cache = compacted_cache(80, end=30, num_slots=70)
    cache.restore(compact(cache, 60, 50, resized(cache.segments[0], size)))
    held = sum(layer.slots.within(NUM_PINNED, 30).num_slots for layer in cache.compactable)
    assert held == size
    assert sum(layer.slots.within(30, 60).num_slots for layer in cache.compactable) == 50


def test_cutting_one_segment_leaves_the_others_bit_identical() -> None:
    cache = compacted_cache(80, end=30)
    cache.restore(compact(cache, 60, 50, *cache.segments))
    older, newer = cache.segments
    slots = cache.compactable[0].slots
    cut = slots.cut([resized(older, 5), newer])
    assert cut.num_slots < slots.num_slots
    assert_same(list(cut.within(30, 60).fields), list(slots.within(30, 60).fields))


def test_cutting_nothing_copies_nothing() -> None:
    cache = compacted_cache()
    slots = cache.compactable[0].slots
    assert slots.cut(cache.segments) is slots


# Sharing


def test_a_fork_shares_all_memory_until_it_appends() -> None:
    cache = compacted_cache()
    branch = cache.fork()
    for mine, other in zip(cache.compactable, branch.compactable, strict=True):
        assert mine.buffer.key.data_ptr() == other.buffer.key.data_ptr()
        assert mine.slots.key is other.slots.key
    grow(branch, 1)
    for mine, other in zip(cache.compactable, branch.compactable, strict=True):
        assert mine.buffer.key.data_ptr() != other.buffer.key.data_ptr()
        assert mine.slots.key is other.slots.key


@pytest.mark.parametrize("first", ["the original", "the branch"])
def test_neither_side_of_a_fork_sees_what_the_other_appends(first: str) -> None:
    cache = compacted_cache()
    grow(cache, 70)  # leaves room behind the tail, where an append would be written
    branch = cache.fork()
    shared = tensors(cache)
    one, other = (cache, branch) if first == "the original" else (branch, cache)
    grow(one, 1)
    appended = tensors(one)
    assert_same(tensors(other), shared)
    grow(other, 1)
    assert_same(tensors(one), appended)


def test_a_fork_keeps_what_the_original_takes_back_and_overwrites() -> None:
    cache = new_cache(100)
    branch = cache.fork()
    expected = tensors(branch)
    cache.truncate(40)
    grow(cache, 30)
    assert_same(tensors(branch), expected)


def test_a_fork_of_a_fork_is_on_its_own() -> None:
    cache = new_cache(100)
    branch = cache.fork()
    twig = branch.fork()
    expected = tensors(twig)
    branch.truncate(50)
    grow(branch, 10)
    grow(cache, 5)
    assert_same(tensors(twig), expected)


def test_a_fork_that_is_compacted_leaves_the_original_alone() -> None:
    cache = compacted_cache(80, end=30)
    expected, branch = tensors(cache), cache.fork()
    branch.restore(compact(branch, 60, 50, resized(branch.segments[0], 10)))
    assert_same(tensors(cache), expected)
    assert cache.segments != branch.segments


# States


def test_a_restored_state_is_what_it_was_to_the_bit() -> None:
    cache = compacted_cache()
    state, expected, segments = cache.state(), tensors(cache), cache.segments
    grow(cache, 100, at_once=7)
    cache.restore(compact(cache, 120, 50, resized(cache.segments[0], 3)))
    cache.restore(state)
    assert_same(tensors(cache), expected)
    assert (cache.segments, cache.num_tokens) == (segments, 50)


def test_a_state_before_the_first_token_can_be_restored() -> None:
    cache = new_cache()
    state = cache.state()
    grow(cache, 10)
    cache.restore(state)
    assert (cache.num_tokens, cache.nbytes) == (0, 0)
    grow(cache, 4)
    assert cache.num_tokens == 4


def test_a_reset_cache_is_as_new() -> None:
    """transformers' `reset` reached the layers alone: the segments stayed, and with them a size that was not there."""
    cache = compacted_cache()
    cache.reset()
    assert (cache.num_tokens, cache.kv_tokens, cache.segments, cache.nbytes) == (0, 0, (), 0)


# Bytes


@pytest.mark.parametrize("keep_ratio", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_tail_tokens", [0, 300])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "overhead"),
    [
        (torch.float32, 64, 0.03),
        (torch.float32, 128, 0.03),
        (torch.bfloat16, 128, 0.03),
        (torch.float16, 128, 0.03),
        (torch.bfloat16, 64, 0.03),
        (torch.float16, 32, 0.03),
    ],
)
def test_bytes_are_those_of_slots_and_exact_entries(
    dtype: torch.dtype, head_dim: int, overhead: float, num_tail_tokens: int, keep_ratio: float
) -> None:
    cache = KVCache([FULL_ATTENTION] * NUM_LAYERS)
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, NUM_HEADS, 1000 + NUM_PINNED, head_dim).to(dtype))
    num_slots = int(keep_ratio * 1000 * cache.num_heads)
    cache.restore(compact(cache, 1000 + NUM_PINNED, num_slots))
    for _ in range(num_tail_tokens):
        for layer in cache.layers:
            layer.update(*torch.randn(2, 1, NUM_HEADS, 1, head_dim).to(dtype))
    exact = cache.num_heads * (NUM_PINNED + num_tail_tokens) * 2 * head_dim
    expected = dtype.itemsize * (num_slots * (2 * head_dim + 1) + exact)
    assert expected <= cache.nbytes <= (1 + overhead) * expected


def test_bytes_are_those_of_the_storage() -> None:
    cache = compacted_cache(80, end=30)
    cache.restore(compact(cache, 60, 50, resized(cache.segments[0], 10)))
    grow(cache, 20, at_once=1)
    held = [tensor for layer in cache.layers for tensor in layer.tensors]
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held)


def test_an_uncompacted_cache_takes_its_exact_bytes() -> None:
    cache = new_cache(63)
    assert cache.nbytes == cache.exact_nbytes == NUM_LAYERS * NUM_HEADS * 63 * 2 * HEAD_DIM * 4


# What it refuses


@pytest.mark.parametrize("num_tokens_before", [0, 5])
def test_a_batch_is_refused(num_tokens_before: int) -> None:
    """Only the first `update` looked: a batch that came later failed in a copy, with an error of torch."""
    cache = new_cache(num_tokens_before)
    with pytest.raises(UnsupportedOperation, match="a batch of 2 sequences"):
        cache.layers[0].update(*torch.randn(2, 2, NUM_HEADS, 3, HEAD_DIM))
    assert cache.num_tokens == num_tokens_before


def test_beams_are_refused() -> None:
    cache = new_cache(5)
    with pytest.raises(UnsupportedOperation, match="beam"):
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(UnsupportedOperation, match="2 sequences"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedOperation, match="2 sequences"):
        cache.batch_select_indices(torch.tensor([0, 0]))


def test_one_sequence_may_be_repeated_once() -> None:
    cache = new_cache(5)
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.num_tokens == 5


def test_cropping_beyond_the_exact_tail_is_refused() -> None:
    cache = compacted_cache(50, end=30)
    with pytest.raises(UnsupportedOperation, match="cannot remove 21 tokens .* only the last 20 are exact"):
        cache.crop(-21)
    assert cache.num_tokens == 50
    cache.crop(-20)
    assert (cache.num_tokens, cache.tail_start) == (30, 30)


def test_a_length_to_keep_is_no_number_of_tokens_to_remove() -> None:
    """transformers' old `crop(length)`: a positive number was ignored in silence."""
    with pytest.raises(UnsupportedOperation, match="crop"):
        new_cache(10).crop(4)


# Sliding windows


def mixed_cache(num_tokens: int, window: int = 8) -> KVCache:
    cache = KVCache([LayerKind(window=window), FULL_ATTENTION, LayerKind(window=window)])
    grow(cache, num_tokens, at_once=3)
    return cache


def test_a_sliding_layer_is_restored_exactly() -> None:
    cache = mixed_cache(20)
    layer, state = cache.layers[0], cache.state()
    keys = layer.keys.clone()
    grow(cache, 5)
    cache.restore(state)
    assert torch.equal(layer.keys, keys)
    assert layer.get_seq_length() == cache.num_tokens == 20


def test_a_sliding_layer_goes_on_after_a_fork() -> None:
    cache = mixed_cache(20)
    branch = cache.fork()
    grow(branch, 5)
    assert (cache.layers[0].get_seq_length(), branch.layers[0].get_seq_length()) == (20, 25)
    assert branch.layers[0].keys.shape[2] == 7


def test_only_the_full_layers_are_compacted() -> None:
    cache = mixed_cache(50)
    states = [cache.layers[0].state(), cache.layers[2].state()]
    cache.restore(compact(cache, 30, num_slots=10))
    assert [cache.layers[0].state(), cache.layers[2].state()] == states
    assert cache.num_heads == NUM_HEADS
    assert cache.num_tokens == 50


def test_a_sliding_window_that_has_forgotten_tokens_cannot_be_cropped() -> None:
    """transformers calls such a layer croppable, and then raises a RuntimeError, for no tokens at all too."""
    cache = mixed_cache(20)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(UnsupportedOperation, match="sliding window"):
        cache.crop(-1)
    assert {layer.get_seq_length() for layer in cache.layers} == {20}


def test_a_sliding_window_that_holds_everything_can_be_cropped() -> None:
    cache = mixed_cache(7)
    assert cache.is_croppable
    cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {4}


def test_the_length_is_that_of_the_layer_that_is_furthest_behind() -> None:
    """A forward pass that is interrupted leaves the first layers ahead; generate() would skip the tokens they hold."""
    for cache in (new_cache(10), mixed_cache(20)):
        num_tokens = cache.get_seq_length()
        cache.layers[0].update(*torch.randn(2, 1, NUM_HEADS, 3, HEAD_DIM))
        assert cache.get_seq_length() == cache.num_tokens == num_tokens


def test_a_sliding_window_does_not_keep_a_long_chunk_alive() -> None:
    """transformers keeps a view of the last tokens, and with it the whole chunk: bytes that nobody counted."""
    cache = KVCache([LayerKind(window=8), FULL_ATTENTION])
    grow(cache, 500)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == 7
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for each in cache.layers for tensor in each.tensors)


def test_layers_are_of_the_kind_that_their_window_says() -> None:
    cache = KVCache([LayerKind(window=8), FULL_ATTENTION])
    assert isinstance(cache.layers[0], SlidingLayer)
    assert isinstance(cache.layers[1], CompactableLayer)
    assert cache.layers[1].state() == TailState(None, None, 0, 0)


def test_a_cache_says_what_it_holds_in_one_line() -> None:
    assert repr(new_cache()) == "<KVCache: 0 tokens in 0 slots, 0.0 MiB, 0 segments>"
    cache = compacted_cache(num_tokens=50, end=30, num_slots=40)
    assert repr(cache) == f"<KVCache: 50 tokens in {cache.kv_tokens:,.0f} slots, 0.0 MiB, 1 segment>"
