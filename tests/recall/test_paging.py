"""Compacted spans that come back exact: what they are then, how long they stay, and that nothing lasting comes of it."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from driven import some_tokens
from inside import cache_of, layers_of, originals_of, put_away_oldest, trigger_of
from policies import originals_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, InvalidPolicy, PromptTooLong
from am_memory.events import Event, OriginalsLost, SpanPutAway, SpanRecalled
from am_memory.recall.original_files import Spill, spill
from am_memory.recall.paging import PAGE_BIAS, Page
from am_memory.recall.search_index import index_bytes
from am_memory.storage.saved_originals import SavedEntries

POLICY = originals_policy()
PLACES = ["host", "disk"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go that nobody has asked for."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


NewMemory = Callable[..., Memory]


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path, temporary: Path) -> NewMemory:
    """Makes memories that share the model and a store."""

    def make(on_event: Callable[[Event], None] = lambda event: None, **changes: object) -> Memory:
        policy = POLICY.model_copy(update=changes)
        store = tmp_path / "store"
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=store, on_event=on_event)

    return make


def roomy_session(memory: Memory, num_tokens: int = 120) -> Session:
    """With a segment of half of the tokens, and room for it below the trigger of 128."""
    session = memory.session("alice")
    session.append(some_tokens(num_tokens))
    session.compact(0.5)
    assert len(session.segments) == 1
    return session


def read_session(memory: Memory, count: int = 160, name: str = "alice") -> Session:
    """With a segment or more that the trigger has made."""
    session = memory.session(name)
    session.append(some_tokens(count))
    assert session.segments
    return session


def held(session: Session) -> list[Tensor]:
    """Every entry of the cache, copied."""
    tensors = []
    for layer in layers_of(session):
        tensors += [layer.buffer.key[:, :, : layer.length].clone(), layer.buffer.value[:, :, : layer.length].clone()]
        tensors += [tensor.clone() for tensor in layer.slots.fields]
    return tensors


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def full_logits(model: PreTrainedModel, session: Session, continuation: list[int]) -> Tensor:
    with torch.no_grad():
        ids = torch.tensor([[*session.tokens, *continuation]])
        return model(ids, use_cache=False).logits[0, len(session.tokens) - 1 : -1]


# Recall


@pytest.mark.parametrize("place", PLACES)
def test_a_recalled_page_holds_what_was_read(new_memory: NewMemory, place: str) -> None:
    exact = new_memory(trigger_tokens=2000).session("exact")
    exact.append(some_tokens(160))
    session = new_memory(originals=place).session("alice")
    session.append(some_tokens(120))
    session.compact(1.0)
    assert session.recall(session.segments[0]) == [Page(3, 119)] == list(session.recalled)
    for mine, whole in zip(layers_of(session), layers_of(exact), strict=True):
        key, value = whole.exact_entries(0, 119)
        for head in range(mine.num_heads):
            slots = mine.slots.head(head)
            torch.testing.assert_close(slots.key, key[head], rtol=0, atol=1e-5)
            torch.testing.assert_close(slots.value, value[head], rtol=0, atol=1e-5)
            assert not slots.bias.any()
            assert slots.positions.tolist() == list(range(119))


def test_with_all_segments_recalled_the_model_sees_everything(
    new_memory: NewMemory, stock_model: PreTrainedModel
) -> None:
    """One compaction by hand, and nothing read after it: every entry is as the full cache has it."""
    session = new_memory(trigger_tokens=400).session("alice")
    session.append(some_tokens(200))
    session.compact(0.7)
    continuation = some_tokens(20, seed=1)
    expected = full_logits(stock_model, session, continuation)
    assert not torch.allclose(session.logits(continuation), expected, atol=1e-2)
    session.recall((0, 200))
    torch.testing.assert_close(session.logits(continuation), expected, rtol=0, atol=1e-3)


def test_a_recalled_page_takes_its_room(new_memory: NewMemory) -> None:
    session = roomy_session(new_memory())
    before, segment = session.stats, session.segments[0]
    session.recall(segment)
    after = session.stats
    assert (before.recalled_tokens, after.recalled_tokens) == (0, segment.num_tokens)
    num_heads = cache_of(session).num_heads
    assert after.kv_tokens == pytest.approx(before.kv_tokens + segment.num_tokens - segment.num_slots / num_heads)
    assert after.kv_bytes > before.kv_bytes
    assert after.originals_bytes > before.originals_bytes


def test_what_was_never_compacted_need_not_come_back(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    before = session.stats
    assert session.recall((159, 160)) == []
    assert session.recall((0, 2)) == []
    assert session.stats == before


def test_a_span_across_two_segments_becomes_two_pages(new_memory: NewMemory) -> None:
    session = new_memory(trigger_tokens=400).session("alice")
    session.append(some_tokens(300))
    for fraction in (0.2, 0.4):
        session.compact(fraction)
    first, second = session.segments
    assert session.recall((first.end - 1, second.start + 1)) == [
        Page(first.end - 1, first.end),
        Page(second.start, second.start + 1),
    ]


def test_recalling_again_changes_nothing_but_the_order(new_memory: NewMemory) -> None:
    session = new_memory(trigger_tokens=400).session("alice")
    session.append(some_tokens(300))
    for fraction in (0.2, 0.4):
        session.compact(fraction)
    first, second = session.segments
    session.recall((0, 300))
    before = held(session)
    session.recall(first)
    assert session.recalled == (Page(second.start, second.end), Page(first.start, first.end))
    assert_same(held(session), before)


@pytest.mark.parametrize("recompaction", ["segments", "refit"])
def test_a_compaction_after_a_recall_is_one_without_it(new_memory: NewMemory, recompaction: str) -> None:
    """What is recalled goes back to its slots first, and comes back afterwards: a recall leaves nothing behind."""
    session = roomy_session(new_memory(experiments=Experiments(recompaction=recompaction)))
    other = session.fork()
    session.recall((0, 80))
    assert session.recalled
    for each in (session, other):
        each.compact(1.0)
    assert session.segments == other.segments
    assert session.recalled
    put_away_oldest(session)
    assert_same(held(session), held(other))


def test_the_trigger_puts_away_what_is_recalled_before_it_compacts(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = roomy_session(new_memory(on_event=events.append))
    num_compactions, segment = session.stats.num_compactions, session.segments[0]
    session.recall(segment)
    free = int(trigger_of(session) - session.stats.kv_tokens)
    session.append(some_tokens(free + 2, seed=1))
    assert session.recalled == ()
    assert session.stats.num_compactions == num_compactions
    spans = [(type(event), event.start, event.end) for event in events if isinstance(event, SpanRecalled | SpanPutAway)]
    assert spans == [(SpanRecalled, segment.start, segment.end), (SpanPutAway, segment.start, segment.end)]


def test_a_recall_makes_room_by_compacting_what_is_exact(new_memory: NewMemory) -> None:
    session = roomy_session(new_memory())
    session.append(some_tokens(int(trigger_of(session) - session.stats.kv_tokens), seed=1))
    num_compactions = session.stats.num_compactions
    session.recall((3, 4))
    assert session.stats.num_compactions > num_compactions
    assert session.stats.kv_tokens <= trigger_of(session)


def test_what_can_never_fit_is_refused_and_nothing_changes(new_memory: NewMemory) -> None:
    session = read_session(new_memory(), 400)
    before, stats = held(session), session.stats
    with pytest.raises(
        PromptTooLong, match=r"the \d+ tokens to recall do not fit .* trigger of 128.*raise trigger_tokens"
    ):
        session.recall((0, 400))
    assert session.stats == stats
    assert_same(held(session), before)


@pytest.mark.parametrize("span", [(-1, 5), (5, 5), (7, 3), (0, 1000)])
def test_a_span_outside_of_the_conversation_is_refused(new_memory: NewMemory, span: tuple[int, int]) -> None:
    session = read_session(new_memory())
    with pytest.raises(InvalidInput, match=f"between tokens {span[0]} and {span[1]}: give a span within the 160"):
        session.recall(span)


def test_dropped_originals_cannot_be_recalled(new_memory: NewMemory) -> None:
    session = read_session(new_memory(originals="drop"))
    before = session.stats
    with pytest.raises(InvalidInput, match="their originals were not kept .* 'host' or 'disk'"):
        session.recall((0, 50))
    assert session.stats == before
    assert before.originals_bytes == 0


def test_shared_cells_take_no_originals(shared_llama: LlamaCppEngine) -> None:
    with pytest.raises(InvalidPolicy, match="originals 'host' needs a cache .* leave it at 'auto'"):
        Memory(shared_llama, POLICY.model_copy(update={"head_budget": "auto"})).session()


def test_generation_goes_on_over_recalled_segments(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    session.recall((0, 50))
    assert len([*session.generate(60)]) > 0
    assert session.recalled == ()


# What originals are


def test_originals_tile_what_is_compacted(new_memory: NewMemory) -> None:
    session = read_session(new_memory(), 500)
    spans = [(original.start, original.end) for original in originals_of(session)]
    assert spans == [(segment.start, segment.end) for segment in session.segments]
    num_numbers = sum(end - start for start, end in spans) * 3 * 2 * 2 * 16  # layers, keys and values, heads, head_dim
    assert session.stats.originals_bytes == 4 * num_numbers


def test_a_full_disk_stops_no_session(new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message failed as soon as a compaction was due, until somebody made room."""
    events: list[Event] = []
    session = read_session(new_memory(originals="disk", on_event=events.append))
    before, (first, *_) = session.stats, session.segments

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Spill, "write", full_disk)
    session.append(some_tokens(200, seed=1))
    assert session.stats.num_compactions > before.num_compactions
    assert session.search("what?")
    spans = [(event.start, event.end) for event in events if isinstance(event, OriginalsLost)]
    assert spans == [(segment.start, segment.end) for segment in session.segments[before.num_segments :]]
    assert all("no space left; set TMPDIR" in event.reason for event in events if isinstance(event, OriginalsLost))
    keys = index_bytes(originals_of(session))  # of the search
    assert session.stats.originals_bytes - keys == before.originals_bytes
    with pytest.raises(InvalidInput, match="or are lost"):
        session.recall(session.segments[-1])
    assert [segment.start for segment in session.recall(first)] == [first.start]


def test_room_on_the_disk_goes_with_its_last_user(new_memory: NewMemory) -> None:
    memory = new_memory(originals="disk")
    session = read_session(memory)
    branch = session.fork()
    file = spill()
    size = session.stats.originals_bytes
    assert file.size == size > 0
    memory.delete("alice")
    del session
    gc.collect()
    assert file.size == size
    branch.recall((0, 20))
    del branch
    gc.collect()
    assert file.size == 0


def test_originals_on_disk_have_no_name_there(new_memory: NewMemory, temporary: Path) -> None:
    """Nobody takes them for old files, and no killed process leaves them behind."""
    session = read_session(new_memory(originals="disk"))
    assert [*temporary.iterdir()] == []
    assert session.recall((0, 20))


# Branches, and going back


def test_a_branch_shares_originals_and_recalls_for_itself(new_memory: NewMemory) -> None:
    session = roomy_session(new_memory())
    branch = session.fork()
    before = held(session)
    branch.recall((0, 50))
    assert session.recalled == ()
    assert_same(held(session), before)
    assert originals_of(branch) is originals_of(session)


def test_a_branch_of_a_session_with_a_recall_has_it_too(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    session.recall((0, 50))
    branch = session.fork()
    assert branch.recalled == session.recalled
    branch.compact()
    assert session.recalled


def test_dropping_exact_tokens_leaves_the_recall(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    session.recall((0, 50))
    recalled, num_tokens = session.recalled, len(session.tokens)
    session.append(some_tokens(5, seed=4))
    session.rewind(num_tokens)
    assert session.recalled == recalled != ()


def test_a_rebuilt_session_can_be_recalled_from(new_memory: NewMemory) -> None:
    session, other = (read_session(new_memory(), 300, name) for name in ("alice", "bob"))
    session.recall((3, 4))
    num_tokens = session.segments[-1].end - 1
    session.rewind(num_tokens)
    assert session.recalled == ()
    assert [original.end for original in originals_of(session)] == [each.end for each in session.segments]
    (segment,) = session.recall((3, 4))
    (mine,), (theirs,) = (
        [original for original in originals_of(each) if original.start == segment.start] for each in (session, other)
    )
    for (key, value), (their_key, their_value) in zip(mine.layers(), theirs.layers(), strict=True):
        torch.testing.assert_close(key, their_key, rtol=0, atol=1e-5)
        torch.testing.assert_close(value, their_value, rtol=0, atol=1e-5)


# The store


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_session_has_what_was_recalled(new_memory: NewMemory, place: str) -> None:
    session = read_session(new_memory(originals=place))
    assert {original.place for original in originals_of(session)} == {place}
    session.recall((0, 50))
    session.save()
    resumed = new_memory(originals=place).session("alice")
    assert resumed.recalled == session.recalled
    assert_same(held(resumed), held(session))
    for each in (session, resumed):
        each.compact(1.0)
    assert_same(held(resumed), held(session))
    assert {original.place for original in originals_of(resumed)} == {"store", place}


def test_originals_that_did_not_change_are_written_once(new_memory: NewMemory, tmp_path: Path) -> None:
    session = read_session(new_memory())
    session.save()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "originals").iterdir()}
    assert len(files) == 2 * len(session.segments)
    session.append(some_tokens(100, seed=1))
    session.save()
    later = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "originals").iterdir()}
    assert files.items() <= later.items()
    assert len(later) == 2 * len(session.segments) > len(files)


def test_saved_originals_go_with_the_last_session_that_needs_them(new_memory: NewMemory, tmp_path: Path) -> None:
    memory = new_memory()
    session = read_session(memory)
    branch = session.fork("bob")
    for each in (session, branch):
        each.save()
    folder = tmp_path / "store" / "originals"
    assert len([*folder.iterdir()]) == 3 * len(session.segments)
    memory.delete("alice")
    resumed = new_memory().session("bob")
    assert resumed.recall((0, 50))
    memory.delete("bob")
    assert [*folder.iterdir()] == []


def test_saving_a_session_that_was_rewound_deletes_what_it_no_longer_needs(
    new_memory: NewMemory, tmp_path: Path
) -> None:
    session = read_session(new_memory(), 300)
    session.save()
    session.rewind(2)
    session.save()
    assert [*(tmp_path / "store" / "originals").iterdir()] == []


def test_without_its_saved_originals_a_session_is_resumed_all_the_same(new_memory: NewMemory, tmp_path: Path) -> None:
    session = read_session(new_memory())
    session.recall((0, 50))
    session.save()
    for path in (tmp_path / "store" / "originals").iterdir():
        path.unlink()
    resumed = new_memory().session("alice")
    assert resumed.recalled == ()
    assert resumed.segments == session.segments
    with pytest.raises(InvalidInput, match="not kept .* or are lost"):
        resumed.recall((0, 50))


def test_the_first_search_of_a_resumed_session_reads_its_search_keys_alone(
    new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read all that was ever compacted."""
    session = read_session(new_memory())
    session.save()
    resumed = new_memory().session("alice")
    monkeypatch.setattr(SavedEntries, "packed", lambda entries: pytest.fail("all entries were read"))
    assert resumed.search("what?") == session.search("what?")


@pytest.mark.parametrize("damage", ["nan", "cut", "missing"])
def test_search_keys_that_cannot_be_used_are_lost(new_memory: NewMemory, tmp_path: Path, damage: str) -> None:
    session = read_session(new_memory(), 300)
    session.save()
    events: list[Event] = []
    resumed = new_memory(events.append).session("alice")
    path = tmp_path / "store" / "originals" / f"{originals_of(session)[0].digest}.safetensors"
    tensors = {name: tensor * torch.nan for name, tensor in safetensors.torch.load_file(path).items()}
    if damage == "nan":
        safetensors.torch.save_file(tensors, path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()
    assert resumed.search("what?")
    (lost,) = [event for event in events if isinstance(event, OriginalsLost)]
    assert (lost.start, lost.end) == (originals_of(session)[0].start, originals_of(session)[0].end)


def test_a_policy_without_originals_does_not_load_them(new_memory: NewMemory) -> None:
    read_session(new_memory()).save()
    assert new_memory(originals="drop").session("alice").stats.originals_bytes == 0


@pytest.mark.model
def test_the_demo_model_knows_again_what_it_is_reminded_of(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    policy = MemoryPolicy(trigger_tokens=600, keep_ratio=0.02, max_compact_tokens=12, originals="host", pinned="sinks")
    memory = Memory(TransformersEngine(*demo), policy)
    session, full = memory.session("alice"), memory.session("full", policy=MemoryPolicy(trigger_tokens=4096))
    told = [
        {"role": "user", "content": "The harbour master's locker has the number 4721. Please remember it."},
        {
            "role": "assistant",
            "content": "I will remember it. " + "The sea was calm that day, and the gulls slept. " * 12,
        },
    ]
    asked = " 4721"
    question = [{"role": "user", "content": "What number has the harbour master's locker?"}]
    for each in (session, full):
        each.append(told)
    session.compact(1.0)
    opening = full.engine.render([*told, *question], add_generation_prompt=True)
    opening = opening.removeprefix(full.engine.render(told)) + "The harbour master's locker has the number"

    def likelihood(each: Session) -> float:
        before, ids = each.engine.encode(opening), each.engine.encode(asked)
        logits = each.logits([*before, *ids])[len(before) :]
        return float(logits.log_softmax(-1)[range(len(ids)), ids].mean())

    compact, exact = likelihood(session), likelihood(full)
    session.recall(session.segments[0])
    assert compact < exact - 0.1
    assert likelihood(session) == pytest.approx(exact, abs=1e-3)


# Pages


def roomy(memory: Memory) -> Session:
    """With two segments by hand, in a roomy cache."""
    session = memory.session("alice")
    session.append(some_tokens(300))
    for fraction in (0.2, 0.4):
        session.compact(fraction)
    return session


def test_a_page_inside_a_segment_leaves_its_other_slots(new_memory: NewMemory) -> None:
    session = roomy(new_memory(trigger_tokens=400))
    before, page = held(session), Page(20, 40)
    slots = [layer.slots for layer in layers_of(session)]
    assert session.recall(page) == [page]
    for layer, old in zip(layers_of(session), slots, strict=True):
        new = layer.slots
        assert new.within(20, 40).num_slots == 20 * layer.num_heads
        assert bool(
            (new.within(20, 40).bias == PAGE_BIAS).all()
        )  # it weighs more than it did, a whole segment does not
        for mine, theirs in zip(
            new.where((new.positions < 20) | (new.positions >= 40)).fields,
            old.where((old.positions < 20) | (old.positions >= 40)).fields,
            strict=True,
        ):
            assert torch.equal(mine, theirs)
    put_away_oldest(session)
    assert_same(held(session), before)


def test_pages_that_overlap_become_one_and_others_stay_apart(new_memory: NewMemory) -> None:
    session = roomy(new_memory(trigger_tokens=400))
    before = held(session)
    session.recall((10, 20))
    session.recall((20, 30))
    assert session.recalled == (Page(10, 20), Page(20, 30))
    assert session.recall((15, 18)) == [Page(10, 20)]
    assert session.recall((25, 45)) == [Page(20, 45)]
    assert session.recalled == (Page(10, 20), Page(20, 45))
    while session.recalled:
        put_away_oldest(session)
    assert_same(held(session), before)


def test_the_page_that_was_recalled_last_stays_longest(new_memory: NewMemory) -> None:
    session = roomy_session(new_memory())
    for page in ((5, 15), (20, 30), (35, 45)):
        session.recall(page)
    session.recall((5, 15))
    free = int(trigger_of(session) - session.stats.kv_tokens)
    session.append(some_tokens(free + 2, seed=1))
    assert session.recalled == (Page(35, 45), Page(5, 15))
