"""Self-study: answers within their budget, written on scratch; the queries of prompts and answers, read on scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from am_memory.engines.abilities import Branches
from am_memory.engines.transformers import TransformersEngine
from am_memory.kv_cache.cache import KVCache
from am_memory.queries import StudyConversations, queries_on_scratch, self_study, self_study_queries
from am_memory.queries.self_study import PROMPTS, study_prompts

TOKENS = list(range(30, 130))
EOS = 257
CONVERSATIONS = (tuple(range(40)), (7,), tuple(range(99, 121)))  # 63 tokens


def ignore(done: int, total: int) -> None:
    pass


class Answering:
    """The tiny model, but its answers are given: each so many tokens long, and then the end of its turn."""

    def __init__(self, engine: TransformersEngine, lengths: Sequence[int], way: str) -> None:
        self._engine = engine
        self._is_branching = way == "side by side"
        self._rest: list[int] = []
        self._answers = [[*range(97, 97 + length), EOS] for length in lengths]

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def branches(self, cache: KVCache, beginnings: Sequence[Sequence[int]]) -> GivenAnswers | None:
        branches = self._engine.branches(cache, beginnings)
        assert branches is not None
        return GivenAnswers(branches, self._answers) if self._is_branching else None

    def forward(self, cache: KVCache, token_ids: Sequence[int], **options: int) -> Tensor:
        logits = self._engine.forward(cache, token_ids, **options)
        if len(token_ids) > 1:  # a prompt
            self._rest = self._answers.pop(0)
        logits[0, self._rest.pop(0)] = 1e6
        return logits


class GivenAnswers:
    """Branches that say what they are told."""

    def __init__(self, branches: Branches, answers: list[list[int]]) -> None:
        self._branches, self._answers = branches, answers

    @property
    def logits(self) -> Tensor:
        logits = self._branches.logits.clone()
        for row, answer in zip(logits, self._answers, strict=True):
            row[answer[0]] = 1e6
        return logits

    def advance(self, branches: Sequence[int], token_ids: Sequence[int]) -> None:
        self._branches.advance(branches, token_ids)
        self._answers = [self._answers[index][1:] for index in branches]


class Boom(Exception):
    """Nothing that the library knows."""


@contextmanager
def failing(engine: TransformersEngine, at_call: int) -> Iterator[None]:
    """The model takes the tokens of its nth forward pass in, and then raises."""
    calls = iter(range(1, at_call + 1))

    def count(*_: object) -> None:
        if next(calls) == at_call:
            raise Boom

    hook = engine.model.base_model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


class WithoutBranches:
    """The tiny model, as an engine that reads one text at a time."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.info, self.forward = engine.info, engine.forward
        self.has_chat_template, self.render, self.encode = engine.has_chat_template, engine.render, engine.encode
        self.control_tokens = engine.control_tokens


WAYS = pytest.mark.parametrize("way", ["side by side", "one after the other"])


def in_way(engine: TransformersEngine, way: str) -> TransformersEngine | WithoutBranches:
    return engine if way == "side by side" else WithoutBranches(engine)


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


def answers(engine: TransformersEngine, conversations: StudyConversations) -> list[tuple[int, ...]]:
    """What follows the prompts."""
    prompts = study_prompts(engine)
    for prompt, conversation in zip(prompts, conversations, strict=True):
        assert conversation[: len(prompt)] == tuple(prompt)
    return [conversation[len(prompt) :] for prompt, conversation in zip(prompts, conversations, strict=True)]


def test_a_prompt_is_a_turn_of_its_own(engine: TransformersEngine) -> None:
    for prompt, ids in zip(PROMPTS, study_prompts(engine), strict=True):
        assert engine.decode(ids) == f"<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@WAYS
@pytest.mark.parametrize("max_tokens", [1, 3, 4, 10, 50])
def test_all_answers_together_keep_to_the_budget(
    engine: TransformersEngine, cache: KVCache, max_tokens: int, way: str
) -> None:
    endless = Answering(engine, [100] * len(PROMPTS), way)
    conversations = self_study(endless, cache, max_tokens=max_tokens, on_progress=ignore)
    lengths = [len(answer) for answer in answers(engine, conversations)]
    assert sum(lengths) == max_tokens
    assert max(lengths) - min(lengths) <= 1


@WAYS
def test_an_answer_ends_with_its_turn_and_leaves_its_share_to_those_after_it(
    engine: TransformersEngine, cache: KVCache, way: str
) -> None:
    answering = Answering(engine, [0, 4, 100, 100], way)
    written = answers(engine, self_study(answering, cache, max_tokens=40, on_progress=ignore))
    assert [len(answer) for answer in written] == [0, 4, 18, 18]
    assert written[1] == (97, 98, 99, 100)


@pytest.mark.parametrize(
    ("way", "lengths"), [("side by side", [18, 0, 18, 4]), ("one after the other", [10, 0, 15, 4])]
)
def test_what_a_later_answer_leaves_is_there_for_those_written_beside_it(
    engine: TransformersEngine, cache: KVCache, way: str, lengths: list[int]
) -> None:
    answering = Answering(engine, [100, 0, 100, 4], way)
    written = answers(engine, self_study(answering, cache, max_tokens=40, on_progress=ignore))
    assert [len(answer) for answer in written] == lengths


@WAYS
def test_answers_are_what_the_model_says_behind_the_prompt(
    engine: TransformersEngine, cache: KVCache, way: str
) -> None:
    conversations = self_study(in_way(engine, way), cache, max_tokens=20, on_progress=ignore)
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


@pytest.mark.parametrize(
    ("way", "used"), [("side by side", [3, 5, 6, 40]), ("one after the other", [1, 2, 3, 4, 5, 6, 40])]
)
def test_progress_goes_up_to_the_budget(engine: TransformersEngine, cache: KVCache, way: str, used: list[int]) -> None:
    events: list[tuple[int, int]] = []
    answering = Answering(engine, [2, 0, 3, 1], way)
    self_study(answering, cache, max_tokens=40, on_progress=lambda *done: events.append(done))
    assert events == [(done, 40) for done in used]


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


@WAYS
@pytest.mark.parametrize("at_call", [1, 2, 4, 5, 8])
def test_a_failing_pass_leaves_the_cache_as_it_was(
    engine: TransformersEngine, cache: KVCache, at_call: int, way: str
) -> None:
    before = held(cache)
    with pytest.raises(Boom), failing(engine, at_call):
        self_study(in_way(engine, way), cache, max_tokens=20, on_progress=ignore)
    assert is_as_it_was(cache, before)
    with pytest.raises(Boom), failing(engine, at_call):
        self_study_queries(engine, cache, CONVERSATIONS, chunk_tokens=6)
    assert is_as_it_was(cache, before)


@WAYS
def test_an_interrupt_while_it_writes_leaves_the_cache_as_it_was(
    engine: TransformersEngine, cache: KVCache, way: str
) -> None:
    before = held(cache)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_study(in_way(engine, way), cache, max_tokens=20, on_progress=interrupt)
    assert is_as_it_was(cache, before)
