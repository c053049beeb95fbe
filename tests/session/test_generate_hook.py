"""`model.generate(**inputs, cache=memory.cache())`: plain transformers, compacting by itself."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout

import pytest
import torch
from inside import context_of
from policies import plain_policy
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from am_memory import Memory
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, InvalidInput, UnsupportedOperation
from am_memory.events import CompactionFinished, Event, ReadProgress
from am_memory.kv_cache.cache import KVCache

POLICY = plain_policy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
LARGE = POLICY.model_copy(update={"trigger_tokens": 2000})
PROMPT = list(b"The owl sat on the old oak.")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}


def ids(tokens: list[int] | range) -> Tensor:
    return torch.tensor([list(tokens)])


def long_prompt(count: int) -> list[int]:
    return [(7 * position * position + 3 * position) % 256 for position in range(count)]


@pytest.fixture
def memory(engine: TransformersEngine, events: list[Event]) -> Memory:
    return Memory(engine, POLICY, on_event=events.append)


@pytest.fixture
def large(engine: TransformersEngine) -> Memory:
    """Never compacts here."""
    return Memory(engine, LARGE)


@pytest.fixture
def generate(tiny_model: PreTrainedModel) -> Callable[..., list[int]]:
    def call(tokens: list[int], cache: KVCache | None, count: int = 20, **how: object) -> list[int]:
        how = {**GREEDY, "cache": cache, "max_new_tokens": count, **how}
        return tiny_model.generate(ids(tokens), **how)[0].tolist()

    return call


def num_compactions(events: list[Event]) -> int:
    return sum(isinstance(event, CompactionFinished) for event in events)


# While nothing is compacted


def test_greedy_is_that_of_the_stock_model(
    large: Memory, stock_model: PreTrainedModel, generate: Callable[..., list[int]]
) -> None:
    expected = stock_model.generate(ids(PROMPT), max_new_tokens=40, **GREEDY)[0].tolist()
    assert generate(PROMPT, large.cache(), 40) == expected


def test_sampling_is_that_of_the_stock_model(
    large: Memory, stock_model: PreTrainedModel, generate: Callable[..., list[int]]
) -> None:
    torch.manual_seed(3)
    expected = stock_model.generate(ids(PROMPT), max_new_tokens=40, **SAMPLED)[0].tolist()
    torch.manual_seed(3)
    assert generate(PROMPT, large.cache(), 40, **SAMPLED) == expected


def test_an_attention_mask_of_ones_is_taken(large: Memory, generate: Callable[..., list[int]]) -> None:
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    assert generate(PROMPT, large.cache(), attention_mask=mask) == generate(PROMPT, large.cache())


def test_a_chunked_prefill_is_taken(large: Memory, generate: Callable[..., list[int]]) -> None:
    assert generate(PROMPT, large.cache(), prefill_chunk_size=10) == generate(PROMPT, large.cache())


# Compacting


def test_a_long_generation_is_compacted_again_and_again(
    memory: Memory, events: list[Event], generate: Callable[..., list[int]]
) -> None:
    cache = memory.cache()
    tokens = generate(PROMPT, cache, 150)
    assert len(tokens) == len(PROMPT) + 150
    assert num_compactions(events) > 3
    assert cache.kv_tokens <= 64
    assert cache.num_tokens == len(tokens) - 1


def test_a_generation_is_that_of_a_session(memory: Memory, generate: Callable[..., list[int]]) -> None:
    session = memory.session()
    session.append(PROMPT)
    expected = [token for piece in session.generate(60) for token in piece.token_ids]
    assert generate(PROMPT, memory.cache(), 60)[len(PROMPT) :][: len(expected)] == expected


def test_a_prompt_longer_than_the_trigger_is_compacted_as_it_is_read(
    memory: Memory, events: list[Event], generate: Callable[..., list[int]]
) -> None:
    cache, prompt = memory.cache(), long_prompt(200)
    tokens = generate(prompt, cache, 5)
    assert tokens[:200] == prompt
    assert num_compactions(events) > 2
    assert cache.kv_tokens <= 64
    done = [event.done_tokens for event in events if isinstance(event, ReadProgress)]
    assert done == sorted(done)
    assert {event.total_tokens for event in events if isinstance(event, ReadProgress)} == {200}


def test_a_long_prompt_gives_the_logits_that_a_session_has(memory: Memory, tiny_model: PreTrainedModel) -> None:
    prompt = long_prompt(200)
    session = memory.session()
    session.append(prompt)
    with torch.no_grad():
        logits = tiny_model(ids(prompt), cache=memory.cache(), position_ids=ids(range(200))).logits
    torch.testing.assert_close(logits[0, -1], context_of(session).next_logits(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("how", [SAMPLED, {"repetition_penalty": 1.3}, {"prefill_chunk_size": 30}], ids=str)
def test_it_compacts_however_tokens_are_chosen_and_read(
    memory: Memory, events: list[Event], generate: Callable[..., list[int]], how: dict[str, object]
) -> None:
    cache = memory.cache()
    assert len(generate(long_prompt(100), cache, 60, **how)) == 160
    assert num_compactions(events) > 2
    assert cache.kv_tokens <= 64


def test_a_seed_repeats_a_compacted_generation(memory: Memory, generate: Callable[..., list[int]]) -> None:
    sampled = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        sampled.append(generate(PROMPT, memory.cache(), 80, **SAMPLED))
    assert sampled[0] == sampled[1] != sampled[2]


def test_live_queries_are_caught_as_tokens_pass(engine: TransformersEngine, generate: Callable[..., list[int]]) -> None:
    policy = POLICY.model_copy(update={"reference_queries": ("live",)})
    cache = Memory(engine, policy).cache()
    generate(PROMPT, cache, 100)
    assert len(cache.segments) > 1


def test_text_is_streamed(
    memory: Memory, byte_tokenizer: PreTrainedTokenizerBase, generate: Callable[..., list[int]], events: list[Event]
) -> None:
    with redirect_stdout(io.StringIO()) as printed:
        tokens = generate(PROMPT, memory.cache(), 80, streamer=TextStreamer(byte_tokenizer, skip_prompt=True))
    assert printed.getvalue().rstrip("\n") == byte_tokenizer.decode(tokens[len(PROMPT) :]).rstrip("\n")
    assert num_compactions(events) > 0


def test_a_second_call_goes_on_where_the_first_ended(memory: Memory, generate: Callable[..., list[int]]) -> None:
    at_once, cache = generate(PROMPT, memory.cache(), 90), memory.cache()
    tokens = PROMPT
    for _ in range(3):
        tokens = generate(tokens, cache, 30)
    assert tokens == at_once


def test_a_second_call_may_bring_new_tokens(memory: Memory, generate: Callable[..., list[int]]) -> None:
    cache = memory.cache()
    tokens = generate(PROMPT, cache, 30)
    tokens = generate([*tokens, *long_prompt(100)], cache, 30)
    assert cache.num_tokens == len(tokens) - 1
    assert cache.kv_tokens <= 64


def test_a_deep_copy_goes_on_from_a_prompt_and_compacts_for_itself(
    memory: Memory, generate: Callable[..., list[int]]
) -> None:
    """The prompt's cache is copied for each question, as transformers' guide on caches does with a DynamicCache."""
    expected, cache = generate(PROMPT, memory.cache(), 100), memory.cache()
    begun = generate(PROMPT, cache, 1)
    copies = [copy.deepcopy(cache), copy.deepcopy(cache)]
    assert all(twin is not cache and twin.num_tokens == cache.num_tokens for twin in copies)
    for twin in copies:
        assert generate(begun, twin, 99) == expected
        assert twin.segments
    assert not cache.segments
    assert cache.num_tokens == len(PROMPT)


def test_a_deep_copy_of_a_sessions_cache_is_another_cache(memory: Memory) -> None:
    session = memory.session("owl")
    session.append(PROMPT)
    cache = context_of(session).cache
    twin = copy.deepcopy({"caches": [cache, cache]})["caches"]
    assert twin[0] is twin[1] is not cache
    assert twin[0].num_tokens == cache.num_tokens


def test_pickling_a_cache_says_what_to_do_instead(memory: Memory) -> None:
    with pytest.raises(UnsupportedOperation, match=r"cannot be pickled: save a session instead"):
        pickle.dumps(memory.cache())


def test_two_caches_of_one_memory_do_not_meet(memory: Memory, generate: Callable[..., list[int]]) -> None:
    one, other = memory.cache(), memory.cache()
    alone = generate(PROMPT, memory.cache(), 60)
    half = generate(PROMPT, one, 30)
    generate(long_prompt(90), other, 20)
    assert generate(half, one, 30) == alone


def test_a_reset_cache_begins_anew(memory: Memory, generate: Callable[..., list[int]]) -> None:
    cache = memory.cache()
    first = generate(PROMPT, cache, 60)
    cache.reset()
    assert generate(PROMPT, cache, 60) == first


def test_a_model_with_sliding_windows_compacts_its_full_layers(
    new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Before each pass all layers were cut to one length; a full window refuses to be cut, even by nothing."""
    model = new_sliding_model()
    expected = model.generate(ids(PROMPT), max_new_tokens=30, **GREEDY)[0].tolist()
    engine = TransformersEngine(model, byte_tokenizer)
    cache = Memory(engine, LARGE.model_copy(update={"trigger_tokens": 500})).cache()
    assert model.generate(ids(PROMPT), cache=cache, max_new_tokens=30, **GREEDY)[0].tolist() == expected
    cache = Memory(engine, POLICY).cache()
    model.generate(ids(PROMPT), cache=cache, max_new_tokens=80, **GREEDY)
    assert cache.segments
    assert cache.layers[0].keys.shape[2] == 15


# Failures


@contextmanager
def interrupted(model: PreTrainedModel, layer: int, at_call: int):
    calls = []

    def interrupt(*args: object) -> None:
        calls.append(1)
        if len(calls) == at_call:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("at_call", [1, 2, 9])
def test_an_interrupted_pass_can_be_made_again(
    large: Memory, tiny_model: PreTrainedModel, generate: Callable[..., list[int]], layer: int, at_call: int
) -> None:
    """The first layers held tokens that the last ones did not, and generate() asked the first: it skipped them."""
    expected, cache = generate(PROMPT, large.cache(), 20), large.cache()
    with interrupted(tiny_model, layer, at_call):
        generate(PROMPT, cache, 20)
    num_read = 0 if at_call == 1 else len(PROMPT) + at_call - 2
    assert cache.get_seq_length() == num_read
    told = expected[: max(num_read + 1, len(PROMPT))]
    assert generate(told, cache, len(expected) - len(told)) == expected


def test_an_interrupted_prompt_can_be_read_again(
    memory: Memory, tiny_model: PreTrainedModel, generate: Callable[..., list[int]]
) -> None:
    """In the middle of a prompt that is read in pieces and compacted: as if it had never been begun."""
    prompt, cache = long_prompt(150), memory.cache()
    expected = generate(prompt, memory.cache(), 10)
    for at_call in (1, 6, 9, 12):
        with interrupted(tiny_model, 1, at_call):
            generate(prompt, cache, 10)
        assert (cache.num_tokens, cache.segments) == (0, ())
    assert generate(prompt, cache, 10) == expected


def test_a_model_with_sliding_windows_recovers_from_an_interrupt(
    new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new_sliding_model()
    engine = TransformersEngine(model, byte_tokenizer)
    whole = model.generate(ids(PROMPT), max_new_tokens=20, cache=Memory(engine, POLICY).cache(), **GREEDY)
    cache = Memory(engine, POLICY).cache()
    with interrupted(model, 2, 11):
        model.generate(ids(PROMPT), max_new_tokens=20, cache=cache, **GREEDY)
    rest = whole[:, : cache.get_seq_length() + 1]
    again = model.generate(rest, max_new_tokens=20 - (rest.shape[1] - len(PROMPT)), cache=cache, **GREEDY)
    assert torch.equal(again, whole)


def test_a_failed_compaction_can_be_made_again(
    memory: Memory, generate: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cache = generate(PROMPT, memory.cache(), 60), memory.cache()

    def exhausted(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(CompactionFailed, match="out of memory"):
        patch.setattr("am_memory.compaction.head_fits.fit", exhausted)
        generate(PROMPT, cache, 60)
    assert (cache.num_tokens, cache.segments) == (64, ())
    assert generate(expected[:65], cache, len(expected) - 65) == expected


# Refused


def test_a_batch_is_refused(memory: Memory, tiny_model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedOperation, match=r"a batch of 2 sequences .*: use one cache for each"):
        tiny_model.generate(ids(PROMPT).repeat(2, 1), cache=memory.cache(), max_new_tokens=5, **GREEDY)


@pytest.mark.parametrize("how", [{"num_beams": 2}, {**SAMPLED, "num_return_sequences": 2}], ids=["beams", "several"])
def test_several_sequences_are_refused(memory: Memory, generate: Callable[..., list[int]], how: dict) -> None:
    with pytest.raises(UnsupportedOperation, match="a batch of 2 sequences"):
        generate(PROMPT, memory.cache(), **how)


def test_embeddings_are_refused(memory: Memory, tiny_model: PreTrainedModel) -> None:
    embeddings = tiny_model.get_input_embeddings()(ids(PROMPT))
    with pytest.raises(UnsupportedOperation, match="pass input_ids, not inputs_embeds"):
        tiny_model.generate(inputs_embeds=embeddings, cache=memory.cache(), max_new_tokens=5, **GREEDY)


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_padding_is_refused(memory: Memory, generate: Callable[..., list[int]], num_tokens: int) -> None:
    """In a prompt that is read in pieces, only the last piece saw its mask: padding before it was read as text."""
    mask, cache = torch.ones(1, num_tokens, dtype=torch.long), memory.cache()
    mask[0, :3] = 0
    with pytest.raises(UnsupportedOperation, match="pass one sequence without padding"):
        generate(long_prompt(num_tokens), cache, attention_mask=mask)
    assert cache.num_tokens == 0


def test_ids_outside_the_vocabulary_are_refused(memory: Memory, generate: Callable[..., list[int]]) -> None:
    with pytest.raises(InvalidInput, match="token id 260 at position 2 is outside the vocabulary of 260"):
        generate([1, 2, 260], memory.cache())


# The model itself


def test_the_model_is_as_it_was_for_its_own_cache(
    memory: Memory, tiny_model: PreTrainedModel, stock_model: PreTrainedModel, generate: Callable[..., list[int]]
) -> None:
    generate(long_prompt(100), memory.cache(), 30)
    with torch.no_grad():
        logits = [
            model(ids(PROMPT), cache=DynamicCache(config=model.config)).logits for model in (tiny_model, stock_model)
        ]
    assert torch.equal(*logits)
    assert generate(PROMPT, None) == stock_model.generate(ids(PROMPT), max_new_tokens=20, **GREEDY)[0].tolist()
    padded = ids([258] * 4 + PROMPT), torch.tensor([[0] * 4 + [1] * len(PROMPT)])
    both = [
        model.generate(padded[0].repeat(2, 1), attention_mask=padded[1].repeat(2, 1), max_new_tokens=9, **GREEDY)
        for model in (tiny_model, stock_model)
    ]
    assert torch.equal(*both)


def test_two_memories_on_one_model_do_not_watch_each_other(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, generate: Callable[..., list[int]]
) -> None:
    """Each engine hooks the model: each hook must leave alone what an engine reads by itself."""
    engines = [TransformersEngine(tiny_model, byte_tokenizer) for _ in range(2)]
    tokens = [generate(long_prompt(100), Memory(engine, POLICY).cache(), 30) for engine in engines]
    assert tokens[0] == tokens[1]


def test_a_cache_that_nobody_uses_any_more_is_freed_at_once(generate: Callable[..., list[int]], memory: Memory) -> None:
    gc.collect()
    gc.disable()
    try:
        cache = memory.cache()
        generate(long_prompt(100), cache, 4)
        assert cache.segments
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
