"""Saved sessions: what is saved comes back, what is damaged is refused, and what fails changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import folder_of
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.compaction.plan import Plan
from am_memory.compaction.record import CompactionRecord
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CorruptSession, NewerFormat, OlderFormat, SessionNotFound, StorageError
from am_memory.kv_cache.cache import CacheState
from am_memory.kv_cache.int8 import Quantised, cat
from am_memory.kv_cache.layers import CompactableLayer, SlidingState, TailBuffer, TailState
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.storage import tensor_file
from am_memory.storage.session_file import SavedSession
from am_memory.storage.store import Store

NUM_TOKENS, TAIL_START, CAPACITY = 50, 41, 13
NAMES = [
    *("alice", "Alice", "ALICE", "", ".", "..", "../x", "a/b", "a\\b", "a b%20c", "x.tmp", "n\0\n*?[0]"),
    *("名前 ☃", "\udcff", "ü" * 300, "x" * 200, "x" * 201, "x" * 1000),
]


def random_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all, NaN and infinities among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def saved_session(dtype: torch.dtype = torch.float32) -> SavedSession:
    """A compacted layer with room to spare, and a sliding window that is a view of more."""
    slots = Slots(
        key=random_bits(11, 4, dtype=dtype),
        value=random_bits(11, 4, dtype=dtype),
        bias=random_bits(11, dtype=dtype),
        positions=torch.arange(11, dtype=torch.int32),
        ranks=torch.arange(11, dtype=torch.int32) - 1,
        cu_slots=(0, 4, 11),
    )
    buffer = TailBuffer(*random_bits(2, 1, 2, CAPACITY, 4, dtype=dtype))
    window = random_bits(2, 1, 2, 20, 4, dtype=dtype)[:, :, :, -7:]
    segments = (Segment(4, 20, 3), Segment(20, TAIL_START, 5))
    return SavedSession(
        fingerprint="0123456789abcdef",
        policy={"trigger_tokens": 64, "keep_ratio": 0.1, "reference_queries": ["repeat"]},
        tokens=tuple(range(NUM_TOKENS + 1)),
        records=(
            CompactionRecord(30, Plan((Segment(4, 20, 5),))),
            CompactionRecord(48, Plan(segments, is_refit=True), conversations=((7, 8, 9), (7,)), lag_tokens=3),
        ),
        messages=(
            {"role": "user", "content": "snow ☃, half a character \udcff, nothing \0"},
            {"role": "assistant", "content": [{"type": "text", "text": "Ja."}], "tool_calls": None},
        ),
        message_starts=(0, 30),
        is_answering=True,
        num_pinned=4,
        state=CacheState(
            layers=(
                TailState(slots, buffer, TAIL_START, NUM_TOKENS - TAIL_START),
                SlidingState(window[0], window[1], NUM_TOKENS),
            ),
            segments=segments,
            num_pinned_slots=4,
        ),
    )


def plain(value: object) -> object:
    """Comparable, to the bit."""
    match value:
        case torch.Tensor():
            return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()
        case TailState(slots, TailBuffer() as buffer, start, length):
            exact = buffer.key[:, :, :length], buffer.value[:, :, :length]
            return plain(slots), plain(exact), start, length
        case tuple():
            return tuple(plain(item) for item in value)
        case _ if is_dataclass(value):
            return {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.compare}
    return value


@pytest.fixture(params=["", "file://", "memory://"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store in a folder that does not exist yet, on each kind of file system."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return Store(f"{request.param}{tmp_path}/store")


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_session_is_the_saved_one_to_the_bit(store: Store, dtype: torch.dtype) -> None:
    saved = saved_session(dtype)
    store.save("alice", saved)
    assert plain(store.load("alice")) == plain(saved)


def test_a_session_that_has_read_nothing_is_saved_as_such(store: Store) -> None:
    nothing = CacheState((TailState(None, None, 0, 0), SlidingState(None, None, 0)), (), 0)
    saved = replace(saved_session(), tokens=(), records=(), messages=(), message_starts=(), num_pinned=0, state=nothing)
    store.save("new", saved)
    assert store.load("new") == saved


def test_a_tail_of_no_tokens_keeps_its_shape(folder: Store) -> None:
    """Everything compacted: the next token still needs a buffer of the right heads."""
    saved = saved_session()
    tail, _ = saved.state.layers
    state = replace(saved.state, layers=(tail._replace(length=0),))
    folder.save("alice", replace(saved, state=state))
    (loaded,) = folder.load("alice").state.layers
    assert loaded.buffer.key.shape == (1, 2, 0, 4)


def test_saving_again_replaces_what_was_saved(store: Store) -> None:
    store.save("alice", saved_session())
    changed = replace(saved_session(), num_pinned=7)
    store.save("alice", changed)
    assert store.load("alice").num_pinned == 7


def test_spare_room_is_not_saved(folder: Store) -> None:
    folder.save("alice", saved_session())
    tail, window = folder.load("alice").state.layers
    assert tail.buffer.capacity == tail.length == NUM_TOKENS - TAIL_START
    assert window.keys.untyped_storage().nbytes() == window.keys.nbytes


def test_a_loaded_tail_is_appended_to_like_any_other(folder: Store) -> None:
    folder.save("alice", saved_session())
    state = folder.load("alice").state.layers[0]
    assert not state.buffer.is_shared
    layer = CompactableLayer()
    layer.restore(state)
    for _ in range(3):
        layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert layer.get_seq_length() == NUM_TOKENS + 3
    state.buffer.key.zero_()
    state.slots.key.zero_()


def test_a_session_is_loaded_onto_the_device_asked_for(folder: Store) -> None:
    folder.save("alice", saved_session())
    tail, window = folder.load("alice", device="meta").state.layers
    tensors = [*tail.slots.tensors, tail.buffer.key, tail.buffer.value, window.keys, window.values]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert tail.slots.positions.device.type == tail.slots.ranks.device.type == "cpu"


def test_a_saved_file_is_plain_safetensors(folder: Store, tmp_path: Path) -> None:
    folder.save("alice", saved_session())
    with safe_open(tmp_path / "alice.safetensors", "pt") as file:
        assert file.metadata()["format"] == "3"
        assert file.get_tensor("tokens").tolist() == list(range(NUM_TOKENS + 1))
        assert json.loads(bytes(file.get_tensor("session").numpy()))["fingerprint"] == "0123456789abcdef"


@pytest.mark.parametrize("message", [{"role": "user", "content": b"bytes"}, {"role": "user", 7: "seven"}])
def test_a_message_that_json_cannot_hold_is_refused(folder: Store, message: dict[str, object]) -> None:
    saved = replace(saved_session(), messages=(message,), message_starts=(0,))
    with pytest.raises(
        StorageError, match=r"(?s)a message or the metadata cannot be saved: .*; use only values that JSON can hold"
    ):
        folder.save("alice", saved)
    assert folder.names() == []


# Names


def test_any_name_is_kept_apart_from_any_other(store: Store) -> None:
    for number, name in enumerate(NAMES):
        store.save(name, replace(saved_session(), num_pinned=number))
    assert store.names() == sorted(NAMES)
    assert [store.load(name).num_pinned for name in NAMES] == list(range(len(NAMES)))
    for name in NAMES:
        store.delete(name)
    assert store.names() == []


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "outer" / "store"))
    for name in NAMES:
        store.save(name, saved_session())
    assert [path.name for path in tmp_path.iterdir()] == ["outer"]
    assert [path.name for path in (tmp_path / "outer").iterdir()] == ["store"]


def test_names_that_differ_in_capitals_have_files_that_differ_in_more(folder: Store, tmp_path: Path) -> None:
    """macOS and Windows take `Alice` and `alice` for one file."""
    for name in ("alice", "Alice", "ALICE"):
        folder.save(name, saved_session())
    assert len({path.name.lower() for path in tmp_path.iterdir()}) == 3


def test_a_plain_name_is_the_name_of_its_file(folder: Store, tmp_path: Path) -> None:
    folder.save("alice-2_v1.0", saved_session())
    assert [path.name for path in tmp_path.iterdir()] == ["alice-2_v1.0.safetensors"]


def test_other_files_in_the_folder_are_no_sessions(folder: Store, tmp_path: Path) -> None:
    folder.save("alice", saved_session())
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "Model.safetensors").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "bob.safetensors").write_text("")
    (tmp_path / "no_file.safetensors").mkdir()
    (tmp_path / "%ff.safetensors").write_text("")
    assert folder.names() == ["alice"]


def test_a_store_that_was_never_written_to_is_empty(store: Store) -> None:
    assert store.names() == []
    assert not store.exists("alice")


def test_a_missing_session_is_not_found_and_the_others_are_named(store: Store) -> None:
    store.save("bob", saved_session())
    with pytest.raises(SessionNotFound, match=r"no session 'alice' in .*store'; there are: bob"):
        store.load("alice")


def test_a_deleted_session_is_gone(store: Store) -> None:
    store.save("alice", saved_session())
    store.delete("alice")
    assert not store.exists("alice")


def test_deleting_what_is_not_there_does_nothing(store: Store) -> None:
    store.delete("alice")


# Failures


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_last_good_one_and_nothing_else(
    store: Store, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save("alice", saved_session())

    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(type(folder_of(store).files), "mv", fail)
        with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
            store.save("alice", replace(saved_session(), num_pinned=7))
    assert store.load("alice").num_pinned == 4
    assert len(folder_of(store).files.ls(folder_of(store).root)) == 1


def test_a_half_written_file_of_a_killed_process_is_no_session(folder: Store, tmp_path: Path) -> None:
    folder.save("alice", saved_session())
    whole = (tmp_path / "alice.safetensors").read_bytes()
    (tmp_path / "alice.safetensors.0badcafe.tmp").write_bytes(whole[:99])
    assert folder.names() == ["alice"]
    assert folder.load("alice").num_pinned == 4


def test_a_local_save_is_on_the_disk_before_it_takes_its_place_there(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    for _ in range(2):
        folder.save("alice", saved_session())
    assert calls == ["fsync", "link", "fsync", "replace"]


@pytest.mark.parametrize("use", [
    lambda store: store.save("alice", saved_session()),
    lambda store: store.load("alice"),
    lambda store: store.exists("alice"),
    lambda store: store.delete("alice"),
])  # fmt: skip
def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, use: Callable[[Store], object]) -> None:
    """A store out of reach must not look empty: a session begun anew would later overwrite the saved one."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=f"the store '{tmp_path}/file': (NotADirectory|FileExists)Error"):
        use(Store(str(tmp_path / "file")))


def test_a_folder_that_may_not_be_listed_is_not_taken_for_an_empty_one(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(type(folder_of(folder).files), "ls", refuse)
    with pytest.raises(StorageError, match=r"cannot list the store .*not yours"):
        folder.names()


@pytest.mark.parametrize("url", ["bogus://bucket", "s4://bucket/folder"])
def test_an_unknown_protocol_is_refused_with_its_url(url: str) -> None:
    with pytest.raises(StorageError, match=f"cannot open the store '{url}'"):
        Store(url)


def test_an_error_does_not_tell_the_password() -> None:
    with pytest.raises(StorageError, match=r"bogus://me:\*\*\*@host/folder") as raised:
        Store("bogus://me:secret@host/folder")
    assert "secret" not in str(raised.value)


# Damage


@pytest.fixture(scope="module")
def file_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("store")
    Store(str(path)).save("alice", saved_session(torch.bfloat16))
    return (path / "alice.safetensors").read_bytes()


def load_bytes(data: bytes) -> SavedSession:
    store = Store("memory://damaged")
    folder_of(store).files.pipe_file("/damaged/alice.safetensors", data)
    return store.load("alice")


ANYWHERE = st.floats(0, 1, exclude_max=True)
quickly = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quickly
@given(place=ANYWHERE, mask=st.integers(1, 255))
def test_a_changed_byte_is_found(file_bytes: bytes, place: float, mask: int) -> None:
    data = bytearray(file_bytes)
    data[int(place * len(data))] ^= mask
    with pytest.raises(CorruptSession, match="cannot be read: its checksum does not match"):
        load_bytes(bytes(data))


def test_a_changed_byte_is_found_anywhere_in_the_header(file_bytes: bytes) -> None:
    header_bytes = int.from_bytes(file_bytes[:8], "little")
    for place in range(8 + header_bytes):
        data = bytearray(file_bytes)
        data[place] ^= 0x29  # turns the padding's spaces into tabs, which is JSON still
        with pytest.raises(CorruptSession):
            load_bytes(bytes(data))


@quickly
@given(place=ANYWHERE)
def test_a_truncated_file_is_found(file_bytes: bytes, place: float) -> None:
    with pytest.raises(CorruptSession):
        load_bytes(file_bytes[: int(place * len(file_bytes))])


@quickly
@given(data=st.binary(max_size=300))
def test_garbage_is_no_session(data: bytes) -> None:
    with pytest.raises(CorruptSession):
        load_bytes(data)


def test_a_file_with_something_behind_it_is_refused(file_bytes: bytes) -> None:
    with pytest.raises(CorruptSession):
        load_bytes(file_bytes + b"\0")


def test_a_model_is_not_a_session() -> None:
    with pytest.raises(CorruptSession):
        load_bytes(safetensors.torch.save({"weight": torch.ones(3)}))


def test_a_damaged_session_can_be_replaced_and_deleted(folder: Store, tmp_path: Path) -> None:
    (tmp_path / "alice.safetensors").write_bytes(b"")
    assert folder.names() == ["alice"]
    folder.delete("alice")
    folder.save("alice", saved_session())
    assert folder.load("alice").num_pinned == 4


def rows_in_int8() -> Quantised:
    """3 of 11 rows as they are, the others of two groups."""
    rows = cat([torch.randn(3, 4), Quantised.of(torch.randn(6, 4)), Quantised.of(torch.randn(2, 4))])
    assert isinstance(rows, Quantised)
    return rows


def test_slots_in_int8_are_loaded_as_they_were_saved(folder: Store) -> None:
    saved = with_slots(key=rows_in_int8(), value=rows_in_int8())
    folder.save("alice", saved)
    assert plain(folder.load("alice")) == plain(saved)


def with_slots(**changes: object) -> SavedSession:
    saved = saved_session()
    tail, window = saved.state.layers
    slots = replace(tail.slots, **changes)
    return replace(saved, state=replace(saved.state, layers=(tail._replace(slots=slots), window)))


def with_tail(**changes: object) -> SavedSession:
    saved = saved_session()
    tail, window = saved.state.layers
    return replace(saved, state=replace(saved.state, layers=(tail._replace(**changes), window)))


@pytest.mark.parametrize("contradiction", [
    lambda: with_slots(cu_slots=(0, 4, 12)),
    lambda: with_slots(cu_slots=(0, 12, 11)),
    lambda: with_slots(cu_slots=(0, 11)),
    lambda: with_slots(bias=torch.zeros(10)),
    lambda: with_slots(value=torch.zeros(10, 4)),
    lambda: with_slots(key=replace(rows_in_int8(), codes=torch.zeros(7, 4, dtype=torch.int8))),
    lambda: with_slots(value=replace(rows_in_int8(), scale=torch.ones(1, 4))),
    lambda: with_slots(key=replace(rows_in_int8(), exact=torch.zeros(4, 4))),
    lambda: with_tail(length=3),
    lambda: with_tail(buffer=TailBuffer(torch.zeros(1, 2, 9, 4), torch.zeros(1, 3, 9, 4))),
    lambda: with_tail(slots=None, buffer=None),
    lambda: replace(saved_session(), tokens=(1, 2, 3)),
    lambda: replace(saved_session(), message_starts=(0,)),
])  # fmt: skip
def test_contents_that_contradict_each_other_are_refused(
    folder: Store, contradiction: Callable[[], SavedSession]
) -> None:
    folder.save("alice", contradiction())
    with pytest.raises(CorruptSession, match=r"'alice' in .* be read: .*; restore .*/alice\.safetensors"):
        folder.load("alice")


@pytest.fixture
def bytes_of_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bytes]:
    def save(number: int) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(tensor_file, "FORMAT", number)
            patch.setattr(tensor_file, "NEEDS", "7.8.9")
            Store(str(tmp_path)).save("alice", saved_session())
        return (tmp_path / "alice.safetensors").read_bytes()

    return save


def test_a_newer_format_says_which_version_reads_it(bytes_of_format: Callable[[int], bytes]) -> None:
    with pytest.raises(NewerFormat, match=r"format 4, .* up to 3: upgrade .* to 7\.8\.9 or newer"):
        load_bytes(bytes_of_format(4))


def test_an_older_format_is_refused_by_its_number(bytes_of_format: Callable[[int], bytes]) -> None:
    with pytest.raises(OlderFormat, match=r"has format 2, and this version reads format 3 only: open it with the ver"):
        load_bytes(bytes_of_format(2))


def test_a_damaged_file_is_not_taken_for_a_newer_format(file_bytes: bytes) -> None:
    with pytest.raises(CorruptSession):
        load_bytes(file_bytes.replace(b'"format":"3"', b'"format":"4"'))


# With a model

NewMemory = Callable[[], Memory]
POLICY = MemoryPolicy(trigger_tokens=96, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=32)
GREEDY = Sampling(temperature=0)
TEXT = "The owl sat on the old oak and looked at the moon. " * 3


@pytest.fixture(scope="module")
def sliding_model() -> PreTrainedModel:
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=256,
        eos_token_id=257,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["tiny_model", "sliding_model"])
def new_memory(
    request: pytest.FixtureRequest,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> NewMemory:
    """Makes memories that share nothing but the model and a store."""
    engine = TransformersEngine(request.getfixturevalue(request.param), byte_tokenizer)
    folder = tmp_path_factory.mktemp("sessions")
    return lambda: Memory(engine, policy=POLICY, sampling=GREEDY, store=folder)


@pytest.fixture(scope="module")
def alice(new_memory: NewMemory) -> Session:
    """Saved in the midst of a generation, after compactions; tests go on with forks of it."""
    session = new_memory().session("alice")
    session.append(TEXT)
    generated(session, 5)
    assert session.stats.num_compactions > 1
    session.save()
    return session


def generated(session: Session, num_tokens: int) -> list[int]:
    return [token for piece in session.generate(num_tokens) for token in piece.token_ids]


def test_a_resumed_session_has_the_same_logits_to_the_bit(new_memory: NewMemory, alice: Session) -> None:
    resumed = new_memory().session("alice")
    continuation = "and what it saw, nobody knows"
    assert torch.equal(resumed.logits(continuation), alice.logits(continuation))


def test_a_resumed_session_generates_what_the_original_does(new_memory: NewMemory, alice: Session) -> None:
    resumed, original = new_memory().session("alice"), alice.fork()
    assert generated(resumed, 40) == generated(original, 40)
    for session in (resumed, original):
        session.append(TEXT)
    assert generated(resumed, 40) == generated(original, 40)
    assert resumed.tokens == original.tokens
    assert resumed.stats.num_compactions == original.stats.num_compactions > alice.stats.num_compactions


def test_a_resumed_session_can_be_compacted_at_once(new_memory: NewMemory, alice: Session) -> None:
    resumed, original = new_memory().session("alice"), alice.fork()
    resumed.compact(1.0)
    original.compact(1.0)
    assert torch.equal(resumed.logits("hoo"), original.logits("hoo"))


def test_a_resumed_session_is_rewound_like_the_original(new_memory: NewMemory, alice: Session) -> None:
    resumed, original = new_memory().session("alice"), alice.fork()
    resumed.rewind(100)
    original.rewind(100)
    assert torch.equal(resumed.logits("hoo"), original.logits("hoo"))


def test_a_session_with_nothing_in_it_is_resumed(new_memory: NewMemory) -> None:
    new_memory().session("empty").save()
    resumed, fresh = new_memory().session("empty"), new_memory().session("fresh")
    assert resumed.append("An owl.") == fresh.append("An owl.")
    assert torch.equal(resumed.logits("hoo"), fresh.logits("hoo"))


def test_a_resumed_chat_closes_the_answer_that_was_being_generated(new_memory: NewMemory) -> None:
    session = new_memory().session("chat")
    session.append([{"role": "user", "content": "Who? ☃"}])
    generated(session, 5)
    session.save()
    resumed = new_memory().session("chat")
    assert resumed.messages == session.messages
    question = [{"role": "user", "content": "And then?"}]
    assert resumed.append(question) == session.append(question)
    assert resumed.tokens == session.tokens
