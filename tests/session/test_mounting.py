"""Compact texts mounted in sessions: exact where everything is kept, bounded, and undone as if they had never been."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inside import cache_of, context_of, layers_of, rebuild, records_of
from policies import plain_policy
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import CompactionFinished, Experiments, Memory, Sampling, Session
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import (
    CorruptSession,
    InvalidInput,
    ModelMismatch,
    PromptTooLong,
    TextNotFound,
    UnsupportedOperation,
)
from am_memory.events import Event, MemoryConsulted, OriginalsLost, Span, TextMounted, TextUnmounted, ignore
from am_memory.kv_cache.int8 import decoded
from am_memory.recall import search
from am_memory.recall.originals import Loss
from am_memory.recall.paging import PAGE_BIAS, Page
from am_memory.session import lookup, pages
from am_memory.storage.store import Store

POLICY = plain_policy(trigger_tokens=160, keep_ratio=0.25, keep_recent=8, pinned=3, chunk_tokens=16)
EVERYTHING = {"keep_ratio": 1.0, "trigger_tokens": 2000, "max_compact_tokens": 900}
HANDBOOK = "The ferry leaves at noon, and the key is under the third stone from the left. "
NewMemory = Callable[..., Memory]


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path) -> NewMemory:
    """Makes memories that share the model; those with `has_store` also share a store."""

    def make(on_event: Callable[[Event], None] = ignore, *, has_store: bool = False, **changes: object) -> Memory:
        policy = POLICY.model_copy(update=changes)
        store = tmp_path / "store" if has_store else None
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=store, on_event=on_event)

    return make


def held(session: Session) -> list[Tensor]:
    """Every entry of the cache, copied."""
    tensors = []
    for layer in layers_of(session):
        tensors += [tensor.clone() for tensor in layer.exact_entries(layer.start, layer.get_seq_length())]
        tensors += [] if layer.slots is None else [decoded(field).clone() for field in layer.slots.fields]
    return tensors


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def assert_equals_its_rebuild(session: Session) -> None:
    before = held(session)
    mounts, recalled = session.mounts, session.recalled
    rebuild(session)
    assert_same(held(session), before)
    assert (session.mounts, session.recalled) == (mounts, recalled)


def turned(key: Tensor, distance: int) -> Tensor:
    """Keys (..., head_dim) at `distance` positions later, as Llama's RoPE turns them."""
    half = key.shape[-1] // 2
    angle = distance * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (torch.cat([each, each]).float() for each in (angle.cos(), angle.sin()))
    rotated = torch.cat([-key[..., half:], key[..., :half]], dim=-1)
    return key * cos + rotated * sin


def entries_of(model: PreTrainedModel, token_ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, as stock transformers writes them."""
    with torch.no_grad():
        cache = model(torch.tensor([token_ids]), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def logits_behind(
    model: PreTrainedModel, entries: Sequence[tuple[Tensor, Tensor]], token_ids: Sequence[int], position: int
) -> Tensor:
    """What stock transformers predicts after each token, if these entries come before."""
    cache = DynamicCache()
    for index, (key, value) in enumerate(entries):
        cache.update(key, value, index)
    positions = torch.arange(position, position + len(token_ids))[None]
    with torch.no_grad():
        return model(torch.tensor([token_ids]), past_key_values=cache, position_ids=positions).logits[0]


# What the model sees


@pytest.mark.parametrize("num_tokens", [0, 30])
def test_a_text_kept_whole_is_as_if_it_stood_there(
    new_memory: NewMemory, stock_model: PreTrainedModel, num_tokens: int
) -> None:
    """Behind the tokens read before it, without its opening, and with its end where these tokens end."""
    memory, text, before = new_memory(**EVERYTHING, pinned=0), some_tokens(50, 1), some_tokens(num_tokens + 1, 2)
    memory.compact_text(text, "handbook")
    session = memory.session("alice")
    if num_tokens:
        session.append(before)
    session.mount("handbook")
    if not num_tokens:
        session.append(before)
    continuation = some_tokens(12, 3)
    found = session.logits(continuation)
    opening = memory.tokenize("\n")
    start, end = len(opening), len(opening) + len(text)
    text_entries = [
        (turned(key[:, :, start:], num_tokens - end), value[:, :, start:])
        for key, value in entries_of(stock_model, [*opening, *text])
    ]
    entries = text_entries
    if num_tokens:
        own = entries_of(stock_model, before[:-1])
        entries = [
            (torch.cat([key, mine], dim=2), torch.cat([value, my_value], dim=2))
            for (key, value), (mine, my_value) in zip(own, text_entries, strict=True)
        ]
    expected = logits_behind(stock_model, entries, [before[-1], *continuation[:-1]], num_tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_texts_mounted_at_one_point_have_no_order(new_memory: NewMemory) -> None:
    memory = new_memory()
    memory.compact_text(some_tokens(80, 1), "one")
    memory.compact_text(some_tokens(90, 2), "other")
    found = []
    for names in (["one", "other"], ["other", "one"]):
        session = memory.session()
        session.append(some_tokens(20))
        for name in names:
            session.mount(name)
        assert [mount.text.name for mount in session.mounts] == names
        found.append(session.logits(some_tokens(10, 3)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_a_new_session_sees_a_text_behind_its_attention_sinks(new_memory: NewMemory) -> None:
    memory = new_memory(chunk_tokens=1)
    memory.compact_text(some_tokens(80, 1), "handbook")
    late, early = memory.session("late"), memory.session("early")
    late.append(some_tokens(4))  # the policy pins 3, and the last token is not read yet
    late.mount("handbook")
    late.append(some_tokens(60, 2))
    early.mount("handbook")
    early.append([*some_tokens(4), *some_tokens(60, 2)])
    torch.testing.assert_close(early.logits([1, 2, 3]), late.logits([1, 2, 3]), rtol=0, atol=1e-5)
    assert_equals_its_rebuild(early)


def test_the_conversation_keeps_its_tokens_and_positions(new_memory: NewMemory) -> None:
    memory = new_memory()
    memory.compact_text(HANDBOOK, "handbook")
    session, other = memory.session("alice"), memory.session("bob")
    for each in (session, other):
        each.append(some_tokens(40))
    session.mount("handbook")
    assert session.tokens == other.tokens
    assert session.stats.kv_tokens == pytest.approx(other.stats.kv_tokens + session.mounts[0].text.num_slots)
    assert session.mounts[0].at_tokens == 39  # the last token is read with what follows


def test_messages_and_tools_become_a_text(new_memory: NewMemory) -> None:
    memory = new_memory(trigger_tokens=400)
    told = [{"role": "user", "content": HANDBOOK}, {"role": "assistant", "content": "I shall remember it."}]
    text = memory.compact_text(told, "told")
    assert text.preview.startswith("The ferry leaves at noon")
    assert memory.compact_text(HANDBOOK, "said").num_tokens < text.num_tokens


@pytest.mark.parametrize("tools", [5, "tools", {"type": "function"}, ["look"]])
def test_tools_that_are_no_list_of_objects_are_refused(new_memory: NewMemory, tools: object) -> None:
    memory = new_memory()
    with pytest.raises(InvalidInput, match="give a list of objects"):
        memory.compact_text(HANDBOOK, "handbook", tools=tools)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="give a list of objects"):
        memory.scratch(tools=tools)  # type: ignore[arg-type]
    assert memory.compact_texts() == []


def test_a_long_text_is_compacted_in_several_segments(new_memory: NewMemory) -> None:
    memory = new_memory()
    text = memory.compact_text(some_tokens(600), "long")
    assert (text.num_tokens, text.num_slots) == (600, pytest.approx(40, abs=1))  # a quarter of the trigger bounds it
    session = memory.session("alice")
    session.mount("long")
    session.append(some_tokens(300, 1))
    assert session.stats.kv_tokens <= 160


def test_a_short_text_stays_exact(new_memory: NewMemory) -> None:
    assert new_memory(keep_ratio=0.1).compact_text(some_tokens(9), "short").num_slots == 9


def test_a_session_hands_on_what_it_remembers(new_memory: NewMemory) -> None:
    """Nothing is read again: its slots go on to another session, and its exact tokens are compacted."""
    events: list[Event] = []
    memory = new_memory(events.append)
    session = memory.session("alice")
    session.append(some_tokens(300))
    before, tokens = held(session), session.tokens
    events.clear()
    text = memory.compact_text(session, "alice's")
    assert sum(isinstance(event, CompactionFinished) for event in events) == 1
    assert text.num_tokens == len(tokens) - 3
    assert_same(held(session), before)
    assert session.tokens == tokens
    other = memory.session("bob")
    other.append(some_tokens(20, 1))
    other.mount("alice's")
    assert other.mounts[0].text == text


# The bound


def test_the_cache_stays_below_the_trigger(new_memory: NewMemory) -> None:
    memory = new_memory(chunk_tokens=1)
    memory.compact_text(some_tokens(150, 1), "one")
    memory.compact_text(some_tokens(130, 2), "other")
    session = memory.session("alice")
    session.append(some_tokens(140))
    for name in ("one", "other"):
        session.mount(name)
        assert session.stats.kv_tokens <= 160
    for seed in range(20):
        session.append(some_tokens(25, seed))
        assert session.stats.kv_tokens <= 160
    assert sum(mount.text.num_slots for mount in session.mounts) == pytest.approx(70, abs=1)
    assert_equals_its_rebuild(session)


def test_no_compaction_shrinks_a_mounted_text(new_memory: NewMemory) -> None:
    memory = new_memory()
    memory.compact_text(some_tokens(100, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(30))
    session.mount("handbook")
    before = [layer.slots for layer in layers_of(session)]
    session.append(some_tokens(500, 2))
    for slots, layer in zip(before, layers_of(session), strict=True):
        now = layer.slots.where(layer.slots.positions < 0)
        assert_same(now.fields, slots.fields)


def test_a_text_that_does_not_fit_is_refused_before_anything_changes(new_memory: NewMemory) -> None:
    memory = new_memory()
    memory.compact_text(some_tokens(104, 1), "one")
    memory.compact_text(some_tokens(104, 2), "two")
    memory.compact_text(some_tokens(104, 3), "three")
    session = memory.session("alice")
    session.append(some_tokens(150))
    session.mount("one")
    session.mount("two")
    before, stats = held(session), session.stats
    with pytest.raises(PromptTooLong, match=r"'three' takes 26 slots.*160.*52 slots of other.*unmount another one"):
        session.mount("three")
    assert_same(held(session), before)
    assert session.stats == stats
    session.unmount("two")
    session.mount("three")


def test_a_text_moves_nearer_before_it_leaves_the_window(engine: TransformersEngine) -> None:
    narrow = copy.copy(engine)
    narrow.info = replace(engine.info, window_tokens=300)
    memory = Memory(narrow, POLICY.with_changes(chunk_tokens=1), sampling=Sampling(temperature=0))
    memory.compact_text(some_tokens(80, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(30))
    session.mount("handbook")
    session.append(some_tokens(600, 2))
    assert session.mounts[0].at_tokens > 300
    assert_equals_its_rebuild(session)


# Undone


def test_an_unmounted_text_leaves_nothing(new_memory: NewMemory) -> None:
    events: list[Event] = []
    memory = new_memory(lambda event: events.append(event) if isinstance(event, TextMounted | TextUnmounted) else None)
    memory.compact_text(some_tokens(80, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(60))
    before = held(session)
    session.mount("handbook")
    assert len(held(session)) > len(before)
    session.unmount("handbook")
    assert_same(held(session), before)
    assert session.mounts == ()
    assert [type(event) for event in events] == [TextMounted, TextUnmounted]
    assert "'handbook' of 80 tokens is mounted at token 59" in str(events[0])


@pytest.mark.parametrize("length", [200, 420])
def test_going_back_undoes_mounts_and_repeats_them(new_memory: NewMemory, length: int) -> None:
    """Short, the tail is cut; long, compactions in between make it a rebuild."""
    memory = new_memory(trigger_tokens=300, keep_recent=60, chunk_tokens=1)
    memory.compact_text(some_tokens(80, 1), "one")
    memory.compact_text(some_tokens(90, 2), "other")
    session = memory.session("alice")
    session.append(some_tokens(40))
    session.mount("one")
    session.append(some_tokens(30, 3))
    session.mount("other")
    session.append(some_tokens(30, 4))
    session.unmount("one")
    between = held(session)
    session.append(some_tokens(length - 100, 5))
    assert_equals_its_rebuild(session)

    session.rewind(100)
    assert [mount.text.name for mount in session.mounts] == ["other"]
    assert_same(held(session), between)
    session.rewind(90)
    assert [mount.text.name for mount in session.mounts] == ["one", "other"]
    assert_equals_its_rebuild(session)
    session.rewind(60)
    assert [mount.text.name for mount in session.mounts] == ["one"]
    session.rewind(20)
    assert session.mounts == ()
    plain = memory.session("plain")
    plain.append(some_tokens(40)[:20])
    assert_same(held(session), held(plain))


def test_a_branch_has_the_mounts_and_may_change_them(new_memory: NewMemory) -> None:
    memory = new_memory()
    memory.compact_text(some_tokens(80, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(60))
    session.mount("handbook")
    before, branch = held(session), session.fork()
    assert branch.mounts == session.mounts
    branch.unmount("handbook")
    branch.append(some_tokens(200, 2))
    assert_same(held(session), before)
    assert len(session.mounts) == 1


@pytest.mark.parametrize("pinned", [0, 20])
def test_a_branch_that_pins_otherwise_sees_its_texts_where_they_were(new_memory: NewMemory, pinned: int) -> None:
    """The attention sinks of its policy decided where texts stand, also those that were mounted under another one."""
    memory = new_memory(chunk_tokens=1, originals="host", trigger_tokens=256)
    memory.compact_text(some_tokens(80, 1), "one")
    memory.compact_text(some_tokens(80, 2), "other")
    session = memory.session("alice")
    session.mount("one")
    session.append(some_tokens(10))
    branch = session.fork("branch", policy=session.policy.with_changes(pinned=pinned))
    assert branch.stats == session.stats
    branch.recall(Span(10, 30, 0.0, "", "one"))
    session.recall(Span(10, 30, 0.0, "", "one"))
    assert_same(held(branch), held(session))
    branch.mount("other")
    branch.append(some_tokens(30, 3))
    assert_equals_its_rebuild(branch)
    for each in (session, branch):
        each.rewind(6)
    assert_same(held(branch), held(session))


def test_what_a_branch_hands_on_begins_with_what_is_compacted(new_memory: NewMemory) -> None:
    """It pinned more than was pinned at the first compaction: a search of the text ended in a bare StopIteration."""
    memory = new_memory(pinned=0, originals="host")
    session = memory.session("alice")
    session.append(some_tokens(200))
    branch = session.fork("branch", policy=session.policy.with_changes(pinned=64))
    assert memory.compact_text(branch, "told").num_tokens == 200
    other = memory.session("bob")
    other.append(some_tokens(20, 1))
    other.mount("told")
    assert other.search("What is it about?")[0].mount == "told"


def test_a_step_that_fails_leaves_the_session_as_it_was(new_memory: NewMemory) -> None:
    fails = False

    def on_event(event: Event) -> None:
        if fails and isinstance(event, TextMounted | TextUnmounted):
            raise KeyboardInterrupt

    memory = new_memory(on_event)
    memory.compact_text(some_tokens(80, 1), "one")
    memory.compact_text(some_tokens(80, 2), "other")
    session = memory.session("alice")
    session.append(some_tokens(130))
    session.mount("one")
    before, mounts, stats, fails = held(session), session.mounts, session.stats, True
    for step in (lambda: session.mount("other"), lambda: session.unmount("one")):
        with pytest.raises(KeyboardInterrupt):
            step()
        assert_same(held(session), before)
        assert (session.mounts, session.stats) == (mounts, stats)


# Saved


def mounted_session(memory: Memory) -> Session:
    memory.compact_text(some_tokens(120, 1), "one")
    memory.compact_text(some_tokens(110, 2), "other")
    session = memory.session("alice")
    session.append(some_tokens(40))
    session.mount("one")
    session.append(some_tokens(120, 3))
    session.mount("other")
    session.unmount("one")
    session.append(some_tokens(50, 4))
    return session


@pytest.mark.parametrize("segment_dtype", ["model", "int8"])
def test_a_saved_session_keeps_its_texts(new_memory: NewMemory, segment_dtype: str) -> None:
    """Also if they were deleted: their names are free for others."""
    memory = new_memory(has_store=True, segment_dtype=segment_dtype, chunk_tokens=1)
    session = mounted_session(memory)
    session.save()
    for name in ("one", "other"):
        memory.delete_compact_text(name)
    assert memory.compact_texts() == []
    resumed = new_memory(has_store=True, segment_dtype=segment_dtype, chunk_tokens=1).session("alice")
    assert resumed.mounts == session.mounts
    assert_same(held(resumed), held(session))
    for each in (session, resumed):
        each.append(some_tokens(80, 5))
    assert_same(held(resumed), held(session))
    resumed.rewind(100)
    assert [mount.text.name for mount in resumed.mounts] == ["one"]
    assert_equals_its_rebuild(resumed)


def test_a_text_is_there_for_other_programs(new_memory: NewMemory, tmp_path: Path) -> None:
    memory = new_memory(has_store=True, originals="host")
    text = memory.compact_text(some_tokens(120, 1), "Ö/ name")
    memory.compact_text(HANDBOOK, "a handbook")
    other = new_memory(has_store=True, originals="host")
    assert other.compact_texts() == [memory.compact_texts()[0], text]
    assert Store(str(tmp_path / "store")).names() == []
    first, second = memory.session(), other.session()
    for session in (first, second):
        session.append(some_tokens(30))
        session.mount("Ö/ name")
    assert_same(held(first), held(second))


def test_a_text_takes_the_place_of_the_one_of_its_name(new_memory: NewMemory) -> None:
    memory, other = new_memory(has_store=True), new_memory(has_store=True)
    memory.compact_text(some_tokens(120, 1), "handbook")
    old = memory.session("old")
    old.mount("handbook")
    other.compact_text(some_tokens(80, 2), "handbook")
    new = memory.session("new")
    new.mount("handbook")
    assert [session.mounts[0].text.num_tokens for session in (old, new)] == [120, 80]


def test_originals_of_texts_end_with_the_last_that_needs_them(new_memory: NewMemory, tmp_path: Path) -> None:
    memory, folder = new_memory(has_store=True, originals="host"), tmp_path / "store" / "originals"
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("handbook")  # under the same name as the text
    session.mount("handbook")
    session.append(some_tokens(20))
    session.save()
    memory.delete_compact_text("handbook")
    assert list(folder.iterdir())
    memory.delete("handbook")
    assert not list(folder.iterdir())


def test_a_text_that_is_deleted_keeps_its_pages_where_it_is_mounted(new_memory: NewMemory) -> None:
    memory = new_memory(has_store=True, originals="host", trigger_tokens=256)
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(20))
    session.mount("handbook")
    memory.delete_compact_text("handbook")
    assert session.recall(Span(10, 40, 0.0, "", "handbook")) == [Page(10, 40)]
    session.save()
    resumed = new_memory(has_store=True, originals="host", trigger_tokens=256).session("alice")
    assert resumed.mounts == session.mounts
    assert resumed.recall(Span(50, 70, 0.0, "", "handbook")) == [Page(50, 70)]


def test_a_copied_file_is_a_text_of_its_own_name(new_memory: NewMemory, tmp_path: Path) -> None:
    """It was listed under the name of the first, and took its place where both were mounted."""
    memory = new_memory(has_store=True)
    memory.compact_text(some_tokens(80, 1), "one")
    (file,) = (tmp_path / "store" / "texts").iterdir()
    file.with_name("two.safetensors").write_bytes(file.read_bytes())
    assert [text.name for text in memory.compact_texts()] == ["one", "two"]
    session = memory.session("alice")
    session.append(some_tokens(20))
    for name in ("one", "two"):
        session.mount(name)
    assert [mount.text.name for mount in session.mounts] == ["one", "two"]
    session.unmount("one")
    assert [mount.text.name for mount in session.mounts] == ["two"]


@pytest.mark.parametrize("num_bytes", [2**40, 2**63, 100])
def test_a_list_leaves_out_files_that_are_no_texts(new_memory: NewMemory, tmp_path: Path, num_bytes: int) -> None:
    """The length of a header was believed: reading so many bytes failed, and nobody could list the others."""
    memory = new_memory(has_store=True)
    text = memory.compact_text(some_tokens(80, 1), "one")
    (tmp_path / "store" / "texts" / "two.safetensors").write_bytes(num_bytes.to_bytes(8, "little") + b"[" * 2000)
    assert memory.compact_texts() == [text]


def test_a_damaged_text_is_refused_and_can_be_deleted(new_memory: NewMemory, tmp_path: Path) -> None:
    memory = new_memory(has_store=True)
    memory.compact_text(some_tokens(80, 1), "handbook")
    (file,) = (tmp_path / "store" / "texts").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptSession, match="compact text 'handbook'"):
        memory.session("alice").mount("handbook")
    memory.delete_compact_text("handbook")
    assert memory.compact_texts() == []


def test_another_models_text_is_refused_by_name(
    new_memory: NewMemory, engine: TransformersEngine, tmp_path: Path
) -> None:
    memory = new_memory(has_store=True)
    memory.compact_text(some_tokens(80, 1), "handbook")
    other = copy.copy(engine)
    other.info = replace(engine.info, fingerprint="another")
    with pytest.raises(ModelMismatch, match="'handbook' was read by model"):
        Memory(other, POLICY, store=tmp_path / "store").session("alice").mount("handbook")


# Other settings and engines


def test_texts_and_background_compactions(new_memory: NewMemory) -> None:
    memory = new_memory(ahead_tokens=16, chunk_tokens=1)
    memory.compact_text(some_tokens(80, 1), "handbook")
    session = memory.session("alice")
    for seed in range(12):
        session.append(some_tokens(17, seed))
        if seed % 4 == 2:
            session.mount("handbook")
        if seed % 4 == 3:
            session.unmount("handbook")
        assert session.stats.kv_tokens <= 160
    assert_equals_its_rebuild(session)
    session.rewind(180)
    assert_equals_its_rebuild(session)


def test_texts_in_int8(new_memory: NewMemory) -> None:
    memory = new_memory(segment_dtype="int8", chunk_tokens=1)
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(40))
    before = held(session)
    session.mount("handbook")
    session.append(some_tokens(300, 2))
    assert_equals_its_rebuild(session)
    session.rewind(40)
    session.mount("handbook") if not session.mounts else None
    session.unmount("handbook")
    assert_same(held(session), before)


def test_a_model_with_sliding_windows_sees_a_text_in_its_other_layers(
    new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    memory = Memory(
        TransformersEngine(new_sliding_model(), byte_tokenizer),
        POLICY.with_changes(chunk_tokens=1),
        sampling=Sampling(temperature=0),
    )
    memory.compact_text(some_tokens(80, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(40))
    before = session.logits([1, 2])
    session.mount("handbook")
    assert not torch.equal(session.logits([1, 2]), before)
    session.append(some_tokens(300, 2))
    assert_equals_its_rebuild(session)


def test_texts_are_mounted_on_llama_cpp(llama: LlamaCppEngine) -> None:
    memory = Memory(llama, plain_policy(trigger_tokens=160))
    memory.compact_text(HANDBOOK, "handbook")
    session = memory.session("alice")
    session.append("Hello")
    before = session.logits("What")
    session.mount("handbook")
    assert not torch.equal(session.logits("What"), before)
    assert len("".join(piece.text for piece in session.generate(4))) > 0


def test_an_engine_that_cannot_take_slots_says_so(shared_llama: LlamaCppEngine) -> None:
    memory = Memory(shared_llama, plain_policy(trigger_tokens=160))
    with pytest.raises(UnsupportedOperation, match="cannot mount compact texts"):
        memory.compact_text(HANDBOOK, "handbook")


def test_a_model_whose_keys_cannot_be_rotated_says_why(engine: TransformersEngine) -> None:
    fixed = copy.copy(engine)
    fixed.capabilities = replace(engine.capabilities, can_rotate_keys=False, why_keys_stay="it has a table")
    with pytest.raises(UnsupportedOperation, match=r"it has a table; append the text instead"):
        Memory(fixed, POLICY).session("alice").mount("handbook")


def test_wrong_names_and_texts_are_refused(new_memory: NewMemory) -> None:
    memory = new_memory()
    memory.compact_text(HANDBOOK, "handbook")
    session = memory.session("alice")
    session.append("Hello")
    session.mount("handbook")
    with pytest.raises(InvalidInput, match="mounted in session 'alice' already"):
        session.mount("handbook")
    with pytest.raises(TextNotFound, match="no compact text 'manual'; there are: 'handbook'"):
        session.mount("manual")
    with pytest.raises(InvalidInput, match="'manual' is not mounted in session 'alice'; there are: 'handbook'"):
        session.unmount("manual")
    with pytest.raises(TextNotFound, match="'manual'"):
        memory.delete_compact_text("manual")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for content in ("", [], [300], None, 5, [True], [1, {"role": "user", "content": "Hello"}], image):
        with pytest.raises(InvalidInput):
            memory.compact_text(content, "text")
    for name in (5, None, b"handbook"):
        for call in (session.mount, memory.text, memory.delete_compact_text):
            with pytest.raises(InvalidInput, match="is no name of a compact text|give a TextCache"):
                call(name)
    with pytest.raises(InvalidInput, match="policy is 5: give a MemoryPolicy"):
        memory.compact_text(HANDBOOK, "text", policy=5)
    with pytest.raises(InvalidInput, match="no name"):
        memory.compact_text(HANDBOOK, "")
    assert context_of(session).awaited_text is None
    assert cache_of(session).num_tokens == len(session.tokens) - 1


def test_a_refinement_does_not_see_mounted_texts(new_memory: NewMemory) -> None:
    """So it is the same before and after a text is mounted at its place, and a rebuild need not know which came first."""
    memory = new_memory(originals="host", recall_tokens=0, chunk_tokens=1, self_study_tokens=4, trigger_tokens=256)
    memory.compact_text(some_tokens(80, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(140))
    session.compact(0.6)
    session.mount("handbook")
    session.refine()
    assert session.stats.num_refined == 1
    session.append(some_tokens(20, 2))
    assert_equals_its_rebuild(session)
    other = session.fork()
    other.rewind(140)
    other.unmount("handbook")
    other.mount("handbook")
    assert_equals_its_rebuild(other)


# Pages


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model looks for nothing: what it attends to most is recalled however little that is."""
    monkeypatch.setattr(lookup, "LEAST_SCORE", -1e20)


PAGES = {"originals": "host", "trigger_tokens": 256, "recall_tokens": 64}


def test_a_page_of_a_text_holds_what_was_read(new_memory: NewMemory, engine: TransformersEngine) -> None:
    """By hand: its exact entries, turned to where the text is mounted, take the place of its slots."""
    memory, token_ids = new_memory(**PAGES), some_tokens(120, 1)
    memory.compact_text(token_ids, "handbook")
    session = memory.session("alice")
    session.append(some_tokens(30))
    session.mount("handbook")
    before = held(session)
    assert session.recall(Span(40, 60, 0.0, "", "handbook")) == [Page(40, 60)]
    assert session.mounts[0].recalled == (Page(40, 60),)
    assert session.recalled == ()
    cache = engine.new_cache()
    engine.forward(cache, [*memory.tokenize("\n"), *token_ids])
    for mine, whole in zip(layers_of(session), cache.compactable, strict=True):
        key, value = whole.exact_entries(41, 61)
        for head in range(mine.num_heads):
            slots = mine.slots.head(head)
            exact = slots.where((slots.bias == PAGE_BIAS) & (slots.positions < 0))
            torch.testing.assert_close(exact.key[-20:], turned(key[head], 29 - 121), rtol=0, atol=1e-4)
            torch.testing.assert_close(exact.value[-20:], value[head], rtol=0, atol=1e-4)
    context = context_of(session)
    pages.put_away(context, context.recalled[0])
    assert_same(held(session), before)
    with pytest.raises(InvalidInput, match="of the text 'handbook'"):
        session.recall(Span(100, 140, 0.0, "", "handbook"))


def test_a_whole_text_is_exact_as_it_was_read(new_memory: NewMemory) -> None:
    """It weighed more than that, as pages of a text do; a whole segment of the conversation does not."""
    memory = new_memory(**PAGES)
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(30))
    session.mount("handbook")
    session.recall(Span(0, session.mounts[0].text.num_tokens, 0.0, "", "handbook"))
    assert all(bool((layer.slots.bias == 0).all()) for layer in layers_of(session))


def test_a_page_of_a_text_without_any_slot_comes_and_goes(new_memory: NewMemory) -> None:
    """The layers have no slots at all then: it raised an error of zip."""
    memory = new_memory(**PAGES, experiments=Experiments(fit="no_slots"))
    memory.compact_text(some_tokens(120, 1), "handbook")
    memory.compact_text(some_tokens(100, 2), "other")
    session = memory.session("alice")
    session.append(some_tokens(30))
    session.mount("handbook")
    session.mount("other")
    session.unmount("other")
    before = held(session)
    assert session.recall(Span(40, 60, 0.0, "", "handbook")) == [Page(40, 60)]
    session.unmount("handbook")
    assert_same(held(session), before)


@pytest.mark.parametrize("ahead_tokens", [0, 12])
def test_saving_and_resuming_adds_nothing_to_the_records(new_memory: NewMemory, ahead_tokens: int) -> None:
    """Each time, every exact page was recorded once more."""
    changes = {**PAGES, "has_store": True, "ahead_tokens": ahead_tokens}
    memory = new_memory(**changes)
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(40))
    session.mount("handbook")
    session.append(some_tokens(150, 2))
    session.compact(0.6)
    session.recall(Span(40, 60, 0.0, "", "handbook"))
    session.recall((10, 30))
    records, mounts = records_of(session), context_of(session).mounts.records
    for _ in range(3):
        session.save()
        session = new_memory(**changes).session("alice")
        assert session.recalled == (Page(10, 30),)
        assert session.mounts[0].recalled == (Page(40, 60),)
    assert (records_of(session), context_of(session).mounts.records) == (records, mounts)
    session.append(some_tokens(20, 3))
    session.recall((10, 30))


@pytest.mark.parametrize("ahead_tokens", [0, 16])
def test_lookups_cover_mounted_texts(new_memory: NewMemory, eager: None, ahead_tokens: int) -> None:
    events: list[Event] = []
    memory = new_memory(events.append, **PAGES, has_store=True, chunk_tokens=1, ahead_tokens=ahead_tokens)
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("alice")
    session.mount("handbook")
    session.append([{"role": "user", "content": "When does the ferry leave?"}])
    pieces = list(session.generate(6))
    spans = pieces[0].looked_up
    assert spans
    assert all(span.mount == "handbook" and 0 <= span.start < span.end <= 120 for span in spans)
    assert spans[0].text == memory.engine.decode(some_tokens(120, 1)[spans[0].start : spans[0].end])
    assert [Page(span.start, span.end) for span in spans] == sorted(session.mounts[0].recalled)
    assert any(isinstance(event, MemoryConsulted) for event in events)
    for seed in range(4):
        session.append([{"role": "user", "content": bytes(97 + t % 26 for t in some_tokens(60, seed)).decode()}])
        list(session.generate(3))
        assert session.stats.kv_tokens <= 256
    assert_equals_its_rebuild(session)

    session.save()
    resumed = new_memory(**PAGES, has_store=True, chunk_tokens=1, ahead_tokens=ahead_tokens).session("alice")
    assert resumed.mounts == session.mounts
    for each in (session, resumed):
        each.append([{"role": "user", "content": "And when does it come back?"}])
    assert [piece.text for piece in session.generate(4)] == [piece.text for piece in resumed.generate(4)]
    session.rewind(60)
    assert_equals_its_rebuild(session)
    session.unmount("handbook")
    assert session.mounts == ()


def test_before_the_attention_sinks_are_read_no_page_comes_back(new_memory: NewMemory, eager: None) -> None:
    """It raised an error of zip: the text was not in the cache yet."""
    memory = new_memory(**PAGES, chunk_tokens=1)
    memory.compact_text(some_tokens(120, 1), "handbook")
    session = memory.session("alice")
    session.mount("handbook")
    session.append([1, 2])
    with pytest.raises(InvalidInput, match="is seen once 3 tokens are read, and there are 1"):
        session.recall(Span(10, 20, 0.0, "", "handbook"))
    list(session.generate(8))
    assert_equals_its_rebuild(session)


def test_a_search_finds_places_in_texts_and_conversation(new_memory: NewMemory) -> None:
    memory = new_memory(**PAGES)
    memory.compact_text(some_tokens(120, 1), "one")
    memory.compact_text(some_tokens(100, 2), "other")
    session = memory.session("alice")
    session.append(some_tokens(200))
    session.mount("one")
    session.mount("other")
    session.compact(0.9)
    before = held(session)
    found = session.search("What is it about?", top=30)
    assert {span.mount for span in found} == {None, "one", "other"}
    texts = {None: list(session.tokens), "one": some_tokens(120, 1), "other": some_tokens(100, 2)}
    for span in found:
        assert span.text == memory.engine.decode(texts[span.mount][span.start : span.end])
    assert_same(held(session), before)


def test_originals_of_a_text_that_are_lost_are_reported_once(new_memory: NewMemory, eager: None) -> None:
    events: list[Event] = []
    memory = new_memory(events.append, **PAGES)
    memory.compact_text(some_tokens(400, 1), "handbook")
    session = memory.session("alice")
    session.mount("handbook")
    session.append([{"role": "user", "content": "When does the ferry leave?"}])
    first, *others = context_of(session).mounts.texts[0].text.originals
    assert others
    first.replace(Loss("a test"))
    list(session.generate(2))
    list(session.search("When does the ferry leave?"))
    lost = [event for event in events if isinstance(event, OriginalsLost)]
    assert [event.reason for event in lost] == ["of the mounted text 'handbook': a test"]
    assert all(page.start >= lost[0].end for page in session.mounts[0].recalled)


def test_a_long_text_and_a_rough_first_look(
    new_memory: NewMemory, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search chooses spans of a text in a first look as it does those of a conversation."""
    memory = new_memory(**PAGES)
    memory.compact_text(some_tokens(500, 1), "handbook")
    session = memory.session("alice")
    session.append(some_tokens(60))
    session.mount("handbook")
    exact = session.search("What is it about?", top=3)
    monkeypatch.setattr(search, "EXACT_SPANS", 8)
    monkeypatch.setattr(search, "EXACT_SHARE", 1.0)
    rough = session.search("What is it about?", top=3)
    assert [(span.mount, span.start) for span in rough] == [(span.mount, span.start) for span in exact]


@pytest.mark.model
def test_the_demo_model_answers_from_a_mounted_text(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """The right number is likelier by far than without the text, and likelier still with its page."""
    text = (
        "The observatory stands on the hill above the town. Its key hangs behind the bar of the inn. In winter the road "
        "is closed, and visitors walk up along the brook, which takes twenty minutes. The code of the cash box in the "
        "hall is 7351, and nobody but the warden may know it. On clear nights one sees the great nebula, and the "
        "children push the dome round by hand, because the motor gave up years ago. The library is open on Mondays."
    )
    memory = Memory(TransformersEngine(*demo), sampling=Sampling(temperature=0))
    harbour = (Path(__file__).parents[2] / "benchmarks" / "texts" / "harbour.txt").read_text(encoding="utf-8")
    memory.compact_text(f"{harbour[:1200]}\n\n{text}\n\n{harbour[1200:2400]}", "guide")
    likely = []
    for is_mounted in (False, True):
        session = memory.scratch()
        if is_mounted:
            session.mount("guide")
        session.append([{"role": "system", "content": "You answer questions about the text that you were given."}])
        session.append([{"role": "user", "content": "What is the code of the cash box in the hall?"}])
        pieces = list(session.generate(1))
        session.rewind(len(session.tokens) - 1)
        if is_mounted:
            assert any("7351" in span.text for span in pieces[0].looked_up)
        opening, answer = memory.tokenize("The code of the cash box is"), memory.tokenize(" 7351")
        logits = session.logits([*opening, *answer])[len(opening) :].log_softmax(-1)
        likely.append(float(logits[torch.arange(len(answer)), torch.tensor(answer)].sum()))
    assert likely[1] > likely[0] + 5
