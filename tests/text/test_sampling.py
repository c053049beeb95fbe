"""The choice of the next token: what transformers' own generate() would choose from."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedModel

from am_memory import AMMemoryError, Sampling
from am_memory.errors import InvalidInput
from am_memory.text.sampling import Sampler

PROMPT = [72, 101, 108, 108, 111, 32, 101, 101, 32, 108]
VOCAB_SIZE = 260


def choices(sampling: Sampling, count: int, logits: torch.Tensor) -> list[int]:
    sampler, tokens = Sampler(sampling), list(PROMPT)
    return [sampler.choose(logits, tokens) for _ in range(count)]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.7},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_processed_logits_are_those_of_generate(values: dict[str, float], stock_model: PreTrainedModel) -> None:
    asked = {"top_k": 0, **values}
    output = stock_model.generate(
        torch.tensor([PROMPT]),
        generation_config=GenerationConfig(
            do_sample=True, max_new_tokens=6, output_scores=True, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=258, **asked,
        ),
    )  # fmt: skip
    processors = Sampling(**values).processors()
    for step, (raw, expected) in enumerate(zip(output.logits, output.scores, strict=True)):
        context = output.sequences[:, : len(PROMPT) + step]
        torch.testing.assert_close(processors(context, raw.clone()), expected)


def test_the_choice_is_drawn_from_the_processed_logits() -> None:
    logits = torch.randn(VOCAB_SIZE)
    best = set(logits.topk(3).indices.tolist())
    assert set(choices(Sampling(temperature=5.0, top_k=3, seed=0), 200, logits)) == best


def test_the_draws_have_the_right_frequencies() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    counts = torch.tensor(choices(Sampling(temperature=1.0, seed=0), 3000, logits)).bincount(minlength=3)
    torch.testing.assert_close(counts / 3000, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.03)


def test_greedy_is_the_default() -> None:
    logits = torch.randn(VOCAB_SIZE)
    assert set(choices(Sampling(), 3, logits)) == {int(logits.argmax())}


def test_a_repetition_penalty_changes_greedy_choices() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[PROMPT[0]], logits[200] = 5.0, 4.0
    assert choices(Sampling(), 1, logits) == [PROMPT[0]]
    assert choices(Sampling(repetition_penalty=2.0), 1, logits) == [200]


def test_a_seed_repeats_and_another_differs() -> None:
    logits = torch.randn(VOCAB_SIZE)
    one, again, other = (choices(Sampling(temperature=1.0, seed=seed), 30, logits) for seed in (7, 7, 8))
    assert one == again != other


def test_without_a_seed_nothing_repeats_not_even_under_a_global_one() -> None:
    """Two sessions of a server must not say the same because somebody called manual_seed."""
    logits, sampled = torch.randn(VOCAB_SIZE), []
    for _ in range(2):
        torch.manual_seed(0)
        sampled.append(choices(Sampling(temperature=1.0), 30, logits))
    assert sampled[0] != sampled[1]


def test_sampling_leaves_the_global_generator_alone() -> None:
    logits, state = torch.randn(VOCAB_SIZE), torch.get_rng_state()
    choices(Sampling(temperature=1.0, seed=1), 5, logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(VOCAB_SIZE)
    before = logits.clone()
    choices(Sampling(temperature=0.5, top_k=3, repetition_penalty=2.0, seed=1), 3, logits)
    assert torch.equal(logits, before)


EXTREMES = list(
    itertools.product(
        (0, 5e-324, 1e-39, 1e-30, 1e308), (None, 5e-324, 1 - 1e-16), (None, 5e-324, 1), (0.01, 1, 100), (None, 1, 2**70)
    )
)


@pytest.mark.parametrize("is_constrained", [False, True])
def test_at_the_ends_of_all_ranges_there_is_a_next_token(is_constrained: bool) -> None:
    """At a temperature of 1e-39 all logits were infinite, and no token could be drawn."""
    logits = torch.randn(VOCAB_SIZE) * 50
    allowed = [7, 200] if is_constrained else list(range(VOCAB_SIZE))
    logits = torch.full_like(logits, -torch.inf).index_copy_(0, torch.tensor(allowed), logits[allowed])
    for temperature, top_p, min_p, penalty, top_k in EXTREMES:
        values = {"top_p": top_p, "min_p": min_p, "repetition_penalty": penalty, "top_k": top_k}
        (chosen,) = choices(Sampling(temperature=temperature, seed=0, **values), 1, logits)
        assert chosen in allowed
        if temperature < 1 and penalty == 1:
            assert chosen == int(logits.argmax())


# What a model asks for


def test_a_model_that_samples_is_sampled_as_it_says() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1)
    assert Sampling.from_generation_config(config) == Sampling(
        temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1
    )


def test_a_model_that_does_not_sample_is_greedy_whatever_its_temperature() -> None:
    config = GenerationConfig(do_sample=False, temperature=0.6, repetition_penalty=1.2)
    assert Sampling.from_generation_config(config) == Sampling(repetition_penalty=1.2)


def test_a_config_that_says_nothing_gives_the_defaults_of_generate(stock_model: PreTrainedModel) -> None:
    """generate() cuts to 50 tokens unless it is told otherwise; we sampled from all of them."""
    assert Sampling.from_generation_config(GenerationConfig()) == Sampling()
    asked = GenerationConfig(do_sample=True, pad_token_id=258)
    how = {"max_new_tokens": 1, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    output = stock_model.generate(torch.tensor([PROMPT]), generation_config=asked, **how)
    ours = Sampling.from_generation_config(asked).processors()(torch.tensor([PROMPT]), output.logits[0].clone())
    torch.testing.assert_close(ours, output.scores[0])


def test_top_k_of_zero_is_none() -> None:
    assert Sampling.from_generation_config(GenerationConfig(do_sample=True, top_k=0)).top_k is None


# Bad values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("inf")),
        ("seed", 2**64),
        ("repetition_penalty", 1e-39),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop", "a string, where a list is meant"),
        ("seed", 0.5),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidInput) as raised:
        Sampling(**{name: value})
    assert isinstance(raised.value, AMMemoryError)
    assert name in str(raised.value)
    assert str(value) in str(raised.value)


def test_a_sampling_is_frozen_and_survives_json() -> None:
    sampling = Sampling(temperature=0.3, stop=("a", "b"), seed=5)
    with pytest.raises(ValidationError):
        sampling.seed = 6
    assert Sampling.model_validate_json(sampling.model_dump_json()) == sampling


def test_a_setting_that_there_is_not_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidInput, match=r"there is no temprature \(did you mean temperature\?\)$"):
        Sampling(temprature=0.5)


@pytest.mark.parametrize(
    ("stop", "message"), [(("a" * 1001,), "at most 1000 characters"), (("a",) * 17, "at most 16 items")]
)
def test_stop_texts_are_few_and_short(stop: tuple[str, ...], message: str) -> None:
    assert Sampling(stop=("a" * 1000,) * 16).stop[0] == "a" * 1000
    with pytest.raises(InvalidInput, match=message) as refused:
        Sampling(stop=stop)
    assert len(str(refused.value)) < 500


def test_penalties_count_the_tokens_of_the_answer_alone() -> None:
    """As OpenAI's API has them: the prompt's own tokens cost nothing."""
    logits = torch.zeros(260)
    logits[PROMPT[0]], logits[200], logits[201] = 3.0, 2.5, 2.2
    assert choices(Sampling(presence_penalty=1.0), 4, logits) == [PROMPT[0], 200, 201, PROMPT[0]]
    assert choices(Sampling(frequency_penalty=0.6), 4, logits) == [PROMPT[0], 200, PROMPT[0], 201]
    assert choices(Sampling(presence_penalty=-1.0), 3, logits) == [PROMPT[0]] * 3


def test_a_bias_is_added_to_the_logits_and_leaves_them_as_they_were() -> None:
    logits = torch.zeros(260)
    logits[7] = 1.0
    assert choices(Sampling(logit_bias={7: -100, 9: 0.5}), 2, logits) == [9, 9]
    assert logits[7] == 1.0
    with pytest.raises(InvalidInput, match="logit_bias names token 260, and the model has tokens 0 to 259"):
        choices(Sampling(logit_bias={260: 1}), 1, logits)
