"""Query maps and predicted queries: fitted once, kept in a file, and in the place of a repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import another_process
from inside import cache_of
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Session
from am_memory.engines.base import Engine, SessionCache
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import CompactionProgress, Event
from am_memory.queries import query_maps as module
from am_memory.queries import repeat_queries, total_mass
from am_memory.queries.measured_files import model_fingerprint
from am_memory.queries.predicted import predicted_queries
from am_memory.queries.query_maps import LayerRepeat, QueryMap, keys_of_pairs, measure, query_maps
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import repeat_request
from am_memory.queries.total_mass import total_log_mass

TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(160)]


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture
def num_measured(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each measurement."""
    made: list[None] = []

    def measured(engine: TransformersEngine, on_progress: object) -> list[QueryMap]:
        made.append(None)
        return [QueryMap(torch.full((2, 33, 32), 0.5, dtype=torch.float16), torch.ones(2, 2)) for _ in range(3)]

    monkeypatch.setattr(module.measured(), "_measure", measured)
    return made


@pytest.fixture(params=["engine", "llama"])
def any_engine(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def read(engine: Engine, token_ids: list[int] = TOKENS) -> SessionCache:
    cache = engine.new_cache()
    engine.forward(cache, token_ids)
    return cache


def stages(session: Session, heard: list[Event]) -> Iterator[str]:
    session.append(TOKENS)
    session.compact(0.5)
    return (event.stage for event in heard if isinstance(event, CompactionProgress))


def test_a_linear_map_is_found(any_engine: Any) -> None:
    cache, positions, first = read(any_engine), torch.arange(2, 150), 200
    layer = cache.compactable[1]
    features = keys_of_pairs(layer, positions, 160)
    num_heads, num_queries, width = features.shape
    weight = torch.randn(num_heads, width, width, generator=torch.Generator().manual_seed(1)) / 5
    wanted = (features @ weight).view(num_heads, num_queries, 2, width // 2).transpose(1, 2).flatten(1, 2)
    query = layer.rotated(wanted, torch.arange(first, first + num_queries).repeat(2))
    sample = ReferenceQueries(query, total_log_mass(layer, 160, query) + 3)
    found = module._fitted([LayerRepeat(layer, 160, positions, first, sample)])
    predicted = found.queries(layer, positions, 160, first).flatten(1, 2).float()
    assert (predicted - query).norm() < 0.15 * query.norm()
    torch.testing.assert_close(found.log_mass, torch.full((num_heads, 2), 3.0), atol=1e-3, rtol=0)


def test_a_key_that_hardly_changes_makes_no_map_that_is_not_finite(engine: TransformersEngine) -> None:
    """Divided by its rounding noise, its weights would not fit into float16."""
    cache = read(engine)
    layer, positions = cache.compactable[0], torch.arange(2, 150)
    still, other = keys_of_pairs(layer, positions, 160), torch.Generator().manual_seed(1)
    query = 1e5 * torch.randn(len(still), 2 * len(positions), still.shape[2] // 2, generator=other)
    layer.buffer.key[:] = 1 + 1e-6 * layer.buffer.key
    found = module._fitted([LayerRepeat(layer, 160, positions, 200, ReferenceQueries(query, query[:, :, 0]))])
    assert found.suits(layer)


def test_keys_are_those_before_their_rotation(any_engine: Any) -> None:
    """The same token has the same key wherever it stands, in the first layer, which has no context yet."""
    layer = read(any_engine, [7, 8] * 40).compactable[0]
    pairs = keys_of_pairs(layer, torch.tensor([4, 30, 78, 79]), 80)
    torch.testing.assert_close(pairs[:, 0], pairs[:, 1], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(pairs[:, 0], pairs[:, 2], atol=2e-2, rtol=2e-2)
    own, following = pairs[:, 3].chunk(2, dim=-1)
    assert torch.equal(own, following)  # the last token of all


@pytest.mark.parametrize("changes", [{}, {"segment_dtype": "int8"}, {"pinned": 7}])
def test_the_mass_is_what_a_forward_pass_says(engine: TransformersEngine, changes: dict[str, Any]) -> None:
    """Over pinned tokens, ragged and biased slots, and exact tokens."""
    session = Memory(engine, MemoryPolicy(trigger_tokens=400, keep_ratio=0.3, **changes)).session()
    session.append(TOKENS)
    session.compact(0.4)
    session.compact(0.5)
    cache, said = cache_of(session), list[tuple[Tensor, Tensor]]()
    engine.forward(cache, [65], on_query=lambda index, query, log_mass: said.append((query, log_mass)))
    for layer, (query, log_mass) in zip(cache.compactable, said, strict=True):
        found = total_log_mass(layer, cache.num_tokens, query.flatten(1, 2))
        torch.testing.assert_close(found, log_mass.flatten(1, 2), atol=1e-4, rtol=1e-4)


def test_of_many_keys_those_with_most_mass_and_some_others_tell_the_mass(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(total_mass, "MOST_SAMPLED", 32)
    monkeypatch.setattr(total_mass, "ALL_RECENT", 8)
    session = Memory(engine, MemoryPolicy(trigger_tokens=400, keep_ratio=0.3)).session()
    session.append(TOKENS)
    session.compact(0.4)
    layer, num_tokens = cache_of(session).compactable[0], cache_of(session).num_tokens
    start = layer.start + 10
    assert num_tokens - start > 64
    key, _ = layer.exact_entries(num_tokens - 20, num_tokens - 19)
    query = 8 * (key + 0.3 * torch.randn(len(key), 6, key.shape[2], generator=torch.Generator().manual_seed(1)))
    exact = total_log_mass(layer, num_tokens, query)
    assert torch.equal(total_log_mass(layer, num_tokens, query, num_tokens - 40), exact), "few keys all count"
    error = (total_log_mass(layer, num_tokens, query, start) - exact).abs()
    assert error.max() < 0.2
    everything = torch.randn(len(key), 6, key.shape[2], generator=torch.Generator().manual_seed(2)) / 100
    even = total_log_mass(layer, num_tokens, everything, start) - total_log_mass(layer, num_tokens, everything)
    assert even.abs().max() < 0.05


def test_there_is_a_query_for_each_token_and_group_member(any_engine: Any) -> None:
    cache, positions, done = read(any_engine), [5, 6, 9, 30], list[tuple[int, int]]()
    maps = query_maps(any_engine, cache)
    samples = predicted_queries(
        maps, cache, positions, num_before=9, on_progress=lambda *at: done.append(at), weights=[1, 1, 1, 0.5]
    )
    asked = repeat_queries(any_engine, cache, [TOKENS[at] for at in positions], chunk_tokens=64, on_progress=ignore)
    assert [one.query.shape for one in samples] == [one.query.shape for one in asked]
    assert [one.query.dtype for one in samples] == [layer.exact_entries(0, 1)[0].dtype for layer in cache.compactable]
    assert all(bool(one.log_mass.isfinite().all()) for one in samples)
    assert done == [(number, len(maps)) for number in range(1, len(maps) + 1)]
    alike = predicted_queries(maps, cache, positions, num_before=9, on_progress=ignore)
    more = (samples[0].log_mass - alike[0].log_mass).view(2, 2, 4)
    torch.testing.assert_close(more, -torch.tensor([1, 1, 1, 0.5]).log().expand(2, 2, 4))


def test_a_measurement_says_how_far_it_is_and_gives_the_same_each_time(engine: TransformersEngine) -> None:
    steps = list[tuple[int, int]]()
    first, again = measure(engine, lambda done, total: steps.append((done, total))), measure(engine)
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(first, again, strict=True))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_a_measurement_stays_within_the_models_window(engine: TransformersEngine) -> None:
    twin, longest = another_process(engine), 0
    twin.info = replace(twin.info, window_tokens=300)

    def forward(cache: SessionCache, token_ids: list[int], **how: Any) -> Any:
        nonlocal longest
        longest = max(longest, cache.num_tokens + len(token_ids))
        return engine.forward(cache, token_ids, **how)

    twin.forward = forward
    assert len(measure(twin)) == 3
    assert 200 < longest <= 300


def test_what_was_measured_is_read_from_its_file(
    engine: TransformersEngine, measured_folder: Path, num_measured: list[None]
) -> None:
    first, second = (query_maps(another_process(engine), read(engine)) for _ in range(2))
    assert len(num_measured) == 1
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one.log_mass, other.log_mass) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "damage", ["empty", "a scalar", "of whole numbers", "of other heads", "not finite", "too few layers"]
)
def test_a_damaged_file_is_measured_again(
    engine: TransformersEngine, measured_folder: Path, num_measured: list[None], damage: str
) -> None:
    maps = query_maps(another_process(engine), read(engine))
    (file,) = (measured_folder / "query_maps").iterdir()
    forged = {
        "a scalar": [replace(one, log_mass=torch.tensor(1.0)) for one in maps],
        "of whole numbers": [replace(one, weight=one.weight.int()) for one in maps],
        "of other heads": [replace(one, log_mass=torch.ones(2, 3)) for one in maps],
        "not finite": [replace(one, weight=one.weight / 0) for one in maps],
        "too few layers": maps[:2],
    }
    content, fingerprint = forged.get(damage), model_fingerprint(another_process(engine).info)
    file.write_bytes(b"" if content is None else module.measured().files.packed(fingerprint, module.packed(content)))
    assert len(query_maps(another_process(engine), read(engine))) == 3
    assert len(num_measured) == 2


def test_a_compaction_repeats_nothing(engine: TransformersEngine, measured_folder: Path) -> None:
    heard = list[Event]()
    memory = Memory(another_process(engine), MemoryPolicy(trigger_tokens=512), on_event=heard.append)
    assert {*stages(memory.session(), heard)} == {"measure", "predict", "score", "fit"}
    heard.clear()
    assert {*stages(memory.session(), heard)} == {"predict", "score", "fit"}


def test_where_nothing_is_recalled_the_block_is_repeated(engine: TransformersEngine) -> None:
    """Slots alone must then say what was told, to the digit."""
    heard = list[Event]()
    memory = Memory(engine, MemoryPolicy(trigger_tokens=512, recall_tokens=0), on_event=heard.append)
    assert {*stages(memory.session(), heard)} == {"repeat", "score", "fit"}


def test_a_model_whose_keys_cannot_be_rotated_repeats(engine: TransformersEngine) -> None:
    twin, heard = another_process(engine), list[Event]()
    twin.capabilities = replace(engine.capabilities, can_rotate_keys=False)
    session = Memory(twin, MemoryPolicy(trigger_tokens=512), on_event=heard.append).session()
    assert {*stages(session, heard)} == {"repeat", "score", "fit"}


def test_a_session_that_was_just_resumed_can_be_compacted(engine: TransformersEngine, tmp_path: Path) -> None:
    """Its layers do not know the scale of their softmax yet."""
    memory = Memory(engine, MemoryPolicy(trigger_tokens=512), store=tmp_path)
    session = memory.session("chat")
    session.append(TOKENS)
    session.save()
    resumed = Memory(engine, MemoryPolicy(trigger_tokens=512), store=tmp_path).session("chat")
    assert resumed.compact(0.5).output_error == pytest.approx(session.compact(0.5).output_error, rel=1e-3)


def test_those_of_the_demo_model_are_shipped() -> None:
    """And were measured on the trial as it is: others would not count."""
    (file,) = module.measured().files.shipped.iterdir()
    with safe_open(file, framework="pt") as content:
        assert [*module.measured().files.found(content.metadata()["fingerprint"])]


@pytest.mark.model
def test_predicted_queries_are_near_those_of_a_repeat(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """On a text unlike the trial's; the queries with which it was read are far from them."""
    text = (
        "The ferry to the island leaves at ten past seven from the northern pier, unless the wind is above six. "
        "def fare(age, bikes=0): return 4 + 3 * bikes if age > 15 else 2. Tickets: 1 adult, 2 children, 1 bicycle. "
        "Its captain, Marit Solberg, keeps bees behind the lighthouse, and sells their honey on board in summer."
    )
    engine, first_read = TransformersEngine(*demo), dict[int, Tensor]()
    token_ids = engine.encode(text)
    cache = engine.new_cache()
    engine.forward(cache, token_ids, on_query=lambda index, query, log_mass: first_read.update({index: query}))
    positions = list(range(4, len(token_ids) - 1))
    asked = repeat_queries(engine, cache, [token_ids[at] for at in positions], chunk_tokens=512, on_progress=ignore)
    num_before = len(repeat_request(engine))
    maps = query_maps(engine, cache)
    predicted = predicted_queries(maps, cache, positions, num_before=num_before, on_progress=ignore)
    near, far, total = 0.0, 0.0, 0.0
    for index, layer in enumerate(cache.compactable):
        moved = layer.rotated(first_read[index][:, :, positions].flatten(1, 2), len(token_ids) + num_before)
        wanted, share = _attention(layer, asked[index].query)
        near += float((share * (_attention(layer, predicted[index].query)[0] - wanted).abs().sum(-1)).sum())
        far += float((share * (_attention(layer, moved)[0] - wanted).abs().sum(-1)).sum())
        total += float(2 * share.sum())
    assert near < 0.25 * total
    assert near < 0.8 * far


def _attention(layer: Any, query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention among the tokens behind the sinks, and these tokens' share of it."""
    key, _ = layer.exact_entries(0, layer.get_seq_length())
    weights = (query.float() @ key.float().mT * layer.scaling).softmax(dim=-1)[:, :, 4:]
    share = weights.sum(-1)
    return weights / share[:, :, None], share
