"""Self-study: answers within their budget, written on scratch; the queries of prompts and answers, read on scratch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from am_memory.cache import KVCache
from am_memory.engines.transformers import TransformersEngine
from am_memory.queries import Conversations, queries_on_scratch, self_study, self_study_queries
from am_memory.queries.self_study import PROMPTS, study_prompts

TOKENS = list(range(30, 130))
EOS = 257
CONVERSATIONS = (tuple(range(40)), (7,), tuple(range(99, 121)))  # 63 tokens


def ignore(done: int, total: int) -> None:
    pass


class Answering:
    """The tiny model, but its answers are given: each so many tokens long, and then the end of its turn."""

    def __init__(self, engine: TransformersEngine, lengths: Sequence[int]) -> None:
        self._engine = engine
        self._rest: list[int] = []
        self._answers = iter([[*range(97, 97 + length), EOS] for length in lengths])

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, cache: KVCache, token_ids: Sequence[int], **options: int) -> Tensor:
        logits = self._engine.forward(cache, token_ids, **options)
        if len(token_ids) > 1:  # a prompt
            self._rest = next(self._answers)
        logits[0, self._rest.pop(0)] = 1e6
        return logits


class Boom(Exception):
    """Nothing that the library knows."""


class Failing:
    """The tiny model, which takes the tokens of its nth forward pass in, and then raises."""

    def __init__(self, engine: TransformersEngine, at_call: int) -> None:
        self._engine = engine
        self._calls_left = at_call

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, *args: object, **options: object) -> Tensor:
        logits = self._engine.forward(*args, **options)
        self._calls_left -= 1
        if not self._calls_left:
            raise Boom
        return logits


@pytest.fixture
def cache(engine: TransformersEngine) -> KVCache:
    """Holds what the conversations are about."""
    cache = engine.new_cache()
    engine.forward(cache, TOKENS)
    return cache


def held(cache: KVCache) -> list[Tensor]:
    return [tensor.clone() for layer in cache.compactable for tensor in layer.exact_entries(0, len(TOKENS))]


def is_as_it_was(cache: KVCache, before: list[Tensor]) -> bool:
    return cache.num_tokens == len(TOKENS) and all(map(torch.equal, held(cache), before))


def answers(engine: TransformersEngine, conversations: Conversations) -> list[tuple[int, ...]]:
    """What follows the prompts."""
    prompts = study_prompts(engine)
    for prompt, conversation in zip(prompts, conversations, strict=True):
        assert conversation[: len(prompt)] == tuple(prompt)
    return [conversation[len(prompt) :] for prompt, conversation in zip(prompts, conversations, strict=True)]


def test_a_prompt_is_a_turn_of_its_own(engine: TransformersEngine) -> None:
    for prompt, ids in zip(PROMPTS, study_prompts(engine), strict=True):
        assert engine.decode(ids) == f"<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 10, 50])
def test_all_answers_together_keep_to_the_budget(engine: TransformersEngine, cache: KVCache, max_tokens: int) -> None:
    endless = Answering(engine, [100] * len(PROMPTS))
    conversations = self_study(endless, cache, max_tokens=max_tokens, on_progress=ignore)
    lengths = [len(answer) for answer in answers(engine, conversations)]
    assert sum(lengths) == max_tokens
    assert max(lengths) - min(lengths) <= 1


def test_an_answer_ends_with_its_turn_and_leaves_its_share_to_those_after_it(
    engine: TransformersEngine, cache: KVCache
) -> None:
    answering = Answering(engine, [0, 4, 100, 100])
    written = answers(engine, self_study(answering, cache, max_tokens=40, on_progress=ignore))
    assert [len(answer) for answer in written] == [0, 4, 18, 18]
    assert written[1] == (97, 98, 99, 100)


def test_answers_are_what_the_model_says_behind_the_prompt(engine: TransformersEngine, cache: KVCache) -> None:
    conversations = self_study(engine, cache, max_tokens=20, on_progress=ignore)
    written = answers(engine, conversations)
    assert sum(map(len, written)) > len(PROMPTS)
    for conversation, answer in zip(conversations, written, strict=True):
        read = engine.new_cache()
        engine.forward(read, TOKENS)
        logits = engine.forward(read, conversation, num_logits=len(answer) + 1)
        assert tuple(logits.argmax(-1).tolist()[: len(answer)]) == answer


def test_the_same_is_written_again(engine: TransformersEngine, cache: KVCache) -> None:
    read_bit_by_bit = engine.new_cache()
    for start in range(0, len(TOKENS), 7):
        engine.forward(read_bit_by_bit, TOKENS[start : start + 7])
    first, second, other = (
        self_study(engine, each, max_tokens=20, on_progress=ignore) for each in (cache, cache, read_bit_by_bit)
    )
    assert first == second == other


def test_progress_goes_up_to_the_budget(engine: TransformersEngine, cache: KVCache) -> None:
    events: list[tuple[int, int]] = []
    answering = Answering(engine, [2, 0, 3, 1])
    self_study(answering, cache, max_tokens=40, on_progress=lambda *done: events.append(done))
    assert events == [(1, 40), (2, 40), (3, 40), (4, 40), (5, 40), (6, 40), (40, 40)]


def test_there_is_a_query_for_each_token_and_group_member(engine: TransformersEngine, cache: KVCache) -> None:
    samples = self_study_queries(engine, cache, CONVERSATIONS, chunk_tokens=16)
    assert [tuple(sample.query.shape) for sample in samples] == [(2, 2 * 63, 16)] * 3
    assert [tuple(sample.log_mass.shape) for sample in samples] == [(2, 2 * 63)] * 3


def test_each_conversation_is_read_behind_the_cache_alone(engine: TransformersEngine, cache: KVCache) -> None:
    """The last one's queries are those of a pass that no other conversation came before."""
    samples, last = self_study_queries(engine, cache, CONVERSATIONS, chunk_tokens=1000), CONVERSATIONS[-1]
    for sample, passes in zip(samples, queries_on_scratch(engine, cache, [last]), strict=True):
        query, log_mass = passes[0]
        torch.testing.assert_close(sample.query[:, -2 * len(last) :], query.flatten(1, 2))
        torch.testing.assert_close(sample.log_mass[:, -2 * len(last) :], log_mass.flatten(1, 2))


def test_the_cache_is_afterwards_as_it_was(engine: TransformersEngine, cache: KVCache) -> None:
    before = held(cache)
    conversations = self_study(engine, cache, max_tokens=20, on_progress=ignore)
    assert is_as_it_was(cache, before)
    self_study_queries(engine, cache, conversations, chunk_tokens=16)
    assert is_as_it_was(cache, before)


@pytest.mark.parametrize("at_call", [1, 2, 8])
def test_a_failing_pass_leaves_the_cache_as_it_was(engine: TransformersEngine, cache: KVCache, at_call: int) -> None:
    before = held(cache)
    with pytest.raises(Boom):
        self_study(Failing(engine, at_call), cache, max_tokens=20, on_progress=ignore)
    assert is_as_it_was(cache, before)
    with pytest.raises(Boom):
        self_study_queries(Failing(engine, at_call), cache, CONVERSATIONS, chunk_tokens=6)
    assert is_as_it_was(cache, before)


def test_an_interrupt_while_it_writes_leaves_the_cache_as_it_was(engine: TransformersEngine, cache: KVCache) -> None:
    before = held(cache)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_study(engine, cache, max_tokens=20, on_progress=interrupt)
    assert is_as_it_was(cache, before)
