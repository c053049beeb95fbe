"""Passes that others drive into a watched cache: what they ask for, they get, or an error before anything is read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from inside import context_of
from policies import plain_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Experiments, Memory
from am_memory.compaction.plan import most_at_once
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.cache import KVCache

POLICY = plain_policy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}
OWL = list(b"The owl sat on the old oak, the owl sat on the old oak.")


def ids(tokens: list[int] | bytes | range) -> Tensor:
    return torch.tensor([list(tokens)])


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


@pytest.fixture
def passes(tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every pass that asks for a number of logits: how many, and how many came."""
    seen: list[tuple[int, int]] = []
    forward = tiny_model.forward

    def counted(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        if isinstance(asked := kwargs.get("logits_to_keep"), int) and asked:
            seen.append((asked, output.logits.shape[1]))
        return output

    counted.__wrapped__ = forward
    monkeypatch.setattr(tiny_model, "forward", counted)
    return seen


@pytest.mark.parametrize("trigger", [60, 64, 71, 83])
@pytest.mark.parametrize("proposed", [1, 3, 6])
def test_prompt_lookup_gets_a_logit_for_each_candidate(
    engine: TransformersEngine, passes: list[tuple[int, int]], trigger: int, proposed: int
) -> None:
    """A pass that did not fit below the trigger was read in pieces, and gave the logits of the last piece alone."""
    memory = Memory(engine, POLICY.model_copy(update={"trigger_tokens": trigger}))
    cache = memory.cache()
    output = engine.model.generate(
        ids(OWL), cache=cache, max_new_tokens=150, prompt_lookup_num_tokens=proposed, **GREEDY
    )
    assert output.shape[1] == len(OWL) + 150
    assert any(asked > 1 for asked, _ in passes)
    assert all(asked == came for asked, came in passes)
    assert cache.segments
    assert cache.kv_tokens <= trigger


def test_an_assistant_model_gets_a_logit_for_each_candidate(
    memory: Memory, passes: list[tuple[int, int]], stock_model: PreTrainedModel
) -> None:
    cache = memory.cache()
    memory.engine.model.generate(ids(OWL), cache=cache, max_new_tokens=100, assistant_model=stock_model, **GREEDY)
    assert all(asked == came for asked, came in passes)
    assert cache.segments
    assert cache.kv_tokens <= 64


def test_assisted_decoding_says_what_decoding_says_while_nothing_is_compacted(
    engine: TransformersEngine, stock_model: PreTrainedModel
) -> None:
    memory = Memory(engine, POLICY.model_copy(update={"trigger_tokens": 2000}))
    expected = stock_model.generate(ids(OWL), max_new_tokens=60, **GREEDY).tolist()
    for how in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": stock_model}):
        assert engine.model.generate(ids(OWL), cache=memory.cache(), max_new_tokens=60, **how, **GREEDY).tolist() == (
            expected
        )


def test_more_candidates_than_ever_fit_are_refused_before_the_answer(memory: Memory) -> None:
    cache = memory.cache()
    with pytest.raises(UnsupportedOperation, match=r"the logits of \d+ tokens at once .*prompt_lookup_num_tokens"):
        memory.engine.model.generate(
            ids(OWL * 2), cache=cache, max_new_tokens=150, prompt_lookup_num_tokens=50, **GREEDY
        )
    assert cache.num_tokens == 0


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_a_pass_in_pieces_gives_the_logits_of_all_its_tokens(
    memory: Memory, tiny_model: PreTrainedModel, name: str, is_tuple: bool
) -> None:
    tokens = some_tokens(150)
    session = memory.session()
    session.append(tokens[:1])
    expected = []
    for token in tokens[1:]:
        context_of(session).compact_if_due()
        expected.append(context_of(session).forward(context_of(session).tokens[-1:], num_logits=1)[0])
        context_of(session).tokens.append(token)
    with torch.no_grad():
        cache = memory.cache()
        output = tiny_model(ids(tokens), **{name: cache}, return_dict=not is_tuple)
    logits = output[0] if is_tuple else output.logits
    assert logits.shape == (1, 150, 260)
    assert logits.dtype == tiny_model.dtype
    torch.testing.assert_close(logits[0, :-1], torch.stack(expected), rtol=0, atol=1e-3)
    assert len(cache.segments) > 1


def test_the_logits_of_chosen_positions_come_whatever_was_read_before_them(
    memory: Memory, tiny_model: PreTrainedModel
) -> None:
    tokens = some_tokens(150)
    with torch.no_grad():
        last_four = tiny_model(ids(tokens), cache=memory.cache(), logits_to_keep=4).logits
        chosen = tiny_model(ids(tokens), cache=memory.cache(), logits_to_keep=torch.tensor([146, 149, -2])).logits
    torch.testing.assert_close(chosen, last_four[:, [0, 3, 2]], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "asked",
    [{"labels": ids(some_tokens(100))}, {"output_hidden_states": True}, {"output_attentions": True}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_only_one_pass_can_give_is_refused_of_several(
    memory: Memory, tiny_model: PreTrainedModel, asked: dict[str, object]
) -> None:
    """The loss, and the hidden states, were those of the last piece."""
    cache, name = memory.cache(), next(iter(asked))
    with pytest.raises(UnsupportedOperation, match=rf"a pass with {name} reads its 100 tokens at once, but only"):
        tiny_model(ids(some_tokens(100)), cache=cache, **asked)
    assert cache.num_tokens == 0


def test_what_only_one_pass_can_give_is_had_while_it_fits(memory: Memory, tiny_model: PreTrainedModel) -> None:
    tokens = ids(some_tokens(40))
    with torch.no_grad():
        output = tiny_model(tokens, cache=memory.cache(), labels=tokens, output_hidden_states=True)
        expected = tiny_model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.hidden_states[0].shape[1] == 40


def test_hidden_states_of_a_generation_are_had_from_the_prompt_on(memory: Memory, tiny_model: PreTrainedModel) -> None:
    how = {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 80}
    output = tiny_model.generate(ids(OWL), cache=memory.cache(), **how)
    assert [states[0].shape[1] for states in output.hidden_states] == [len(OWL), *[1] * 79]


@pytest.mark.parametrize("name", ["pixel_values", "image_sizes", "input_features"])
def test_other_media_than_text_are_refused(memory: Memory, tiny_model: PreTrainedModel, name: str) -> None:
    with pytest.raises(UnsupportedOperation, match=f"holds text alone: leave out {name}"):
        tiny_model(ids(OWL), cache=memory.cache(), **{name: torch.zeros(1)})


def test_a_cache_that_is_not_to_be_used_is_refused_before_it_reads(
    memory: Memory, engine: TransformersEngine, tiny_model: PreTrainedModel
) -> None:
    """Every token had the whole text read into the cache once more, and the answer was another, in silence."""
    for cache in (memory.cache(), engine.new_cache()):
        with pytest.raises(UnsupportedOperation, match="use_cache=False.*leave use_cache out"):
            tiny_model.generate(ids(OWL), cache=cache, max_new_tokens=5, use_cache=False, **GREEDY)
        assert cache.num_tokens == 0
        tiny_model.generate(ids(OWL), cache=cache, max_new_tokens=5, **GREEDY)


def test_arguments_may_be_given_by_their_place(memory: Memory, tiny_model: PreTrainedModel) -> None:
    cache = memory.cache()
    with torch.no_grad():
        tiny_model(ids(some_tokens(150)), None, None, cache)
    assert cache.segments


# Passes that nobody announces


@pytest.fixture
def watched(memory: Memory) -> KVCache:
    return memory.cache()


def test_a_copy_of_the_model_cannot_fill_a_cache_unseen(watched: KVCache, tiny_model: PreTrainedModel) -> None:
    """It read on and on, never compacted, and said nothing."""
    twin = copy.deepcopy(tiny_model)
    with pytest.raises(UnsupportedOperation, match=r"by another model than its memory's.*memory\.engine\.model"):
        twin.generate(ids(OWL), cache=watched, max_new_tokens=5, **GREEDY)
    assert watched.num_tokens == 0


def test_a_part_of_the_model_cannot_fill_a_cache_unseen(watched: KVCache, tiny_model: PreTrainedModel) -> None:
    with torch.no_grad(), pytest.raises(UnsupportedOperation, match="or by a part of it"):
        tiny_model.model(ids(OWL), cache=watched)


def test_a_copy_of_the_model_is_a_model_of_its_own(
    new_tiny_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new_tiny_model()
    TransformersEngine(model, byte_tokenizer)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        assert not twin(ids(OWL)).logits.any()
        assert model(ids(OWL)).logits.any()


def test_a_call_of_forward_itself_is_watched(watched: KVCache, tiny_model: PreTrainedModel) -> None:
    """Hooks of a module see calls of the module alone, and wrappers may call its `forward`."""
    with torch.no_grad():
        tiny_model.forward(input_ids=ids(some_tokens(150)), cache=watched)
    assert watched.segments


@pytest.mark.parametrize(
    "changes", [{}, {"ahead_tokens": 8}, {"keep_ratio": 0.2, "experiments": Experiments(min_slots=2)}, {"pinned": 0}]
)
def test_room_for_as_many_as_are_sure_to_fit_can_be_made_at_any_time(
    engine: TransformersEngine, changes: dict[str, object]
) -> None:
    policy = POLICY.model_copy(update=changes)
    memory = Memory(engine, policy)
    context = context_of(memory.scratch())
    most = most_at_once(context.policy, context.rest_tokens, context.num_fixed)
    assert most > 3
    for start in range(40, 64, 3):
        session = memory.scratch()
        session.append(some_tokens(200)[: start + 1])
        context = context_of(session)
        context.compact_if_due(most)
        assert context.room_tokens >= most
        context.forward(some_tokens(most, seed=1))
        assert context.cache.kv_tokens <= session.trigger_tokens
