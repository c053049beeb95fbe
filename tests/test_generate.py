"""The drop-in: transformers' own `generate` over a cache that compacts by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from am_memory import Memory, MemoryPolicy
from am_memory.cache import KVCache
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import AMMemoryError, InvalidInput, UnsupportedOperation
from am_memory.events import CompactionFinished

PROMPT = torch.tensor([[(7 * position * position + 3) % 250 for position in range(40)]])


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    """Fires at 96 tokens; its finished compactions are in `memory.finished`."""
    finished: list[object] = []
    policy = MemoryPolicy(trigger_tokens=96, keep_ratio=0.25, keep_recent=8, chunk_tokens=32)
    memory = Memory(
        engine, policy, on_event=lambda event: finished.append(event) if isinstance(event, CompactionFinished) else None
    )
    memory.finished = finished  # type: ignore[attr-defined]
    return memory


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: object, num_tokens: int, **options: object
) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=num_tokens,
        pad_token_id=258,
        **{"do_sample": False, "min_new_tokens": num_tokens, **options},
    )


def test_while_nothing_is_compacted_it_is_the_stock_model(memory: Memory, stock_model: PreTrainedModel) -> None:
    expected = generate(stock_model, PROMPT, None, 30)
    assert torch.equal(generate(memory.engine.model, PROMPT, memory.cache(), 30), expected)


def test_a_long_generation_is_compacted_again_and_again(memory: Memory) -> None:
    cache = memory.cache()
    output = generate(memory.engine.model, PROMPT, cache, 400)
    assert output.shape[1] == 440
    assert len(memory.finished) >= 6
    assert cache.num_tokens == 439
    assert cache.kv_tokens <= 96


def test_a_prompt_longer_than_the_trigger_is_compacted_as_it_is_read(memory: Memory) -> None:
    cache = memory.cache()
    output = generate(memory.engine.model, PROMPT.repeat(1, 8), cache, 5)
    assert output.shape[1] == 325
    assert len(memory.finished) >= 3
    assert cache.kv_tokens <= 96


def test_it_generates_what_a_session_generates(memory: Memory) -> None:
    ids = PROMPT.repeat(1, 5)
    session = memory.session()
    session.append(ids[0].tolist())
    expected = [token for piece in session.generate(60) for token in piece.token_ids]
    actual = generate(memory.engine.model, ids, memory.cache(), 60, min_new_tokens=0)[0, 200:].tolist()
    assert actual[: len(expected)] == expected


def test_sampling_is_repeatable_by_seed(memory: Memory) -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(generate(memory.engine.model, PROMPT, memory.cache(), 120, do_sample=True, top_k=20))
    assert torch.equal(*outputs)


def test_a_text_streamer_gets_the_text(
    memory: Memory, byte_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(byte_tokenizer, skip_prompt=True)
    output = generate(memory.engine.model, PROMPT, memory.cache(), 100, streamer=streamer)
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == byte_tokenizer.decode(output[0, 40:]).rstrip("\n")


def test_a_second_call_with_all_ids_goes_on(memory: Memory) -> None:
    cache = memory.cache()
    first = generate(memory.engine.model, PROMPT, cache, 100)
    more = torch.cat([first, PROMPT[:, :10]], dim=1)
    second = generate(memory.engine.model, more, cache, 20)
    assert torch.equal(second[:, : more.shape[1]], more)
    assert cache.num_tokens == second.shape[1] - 1


def test_an_interrupted_forward_pass_is_forgotten(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers before the interrupt had the token already; the next pass must not count it twice."""
    model, cache = memory.engine.model, memory.cache()
    generate(model, PROMPT, cache, 10)
    num_tokens = cache.num_tokens
    layer = model.model.layers[1]

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[1]]), past_key_values=cache)
    model(torch.tensor([[1]]), past_key_values=cache)
    assert [each.get_seq_length() for each in cache.layers] == [num_tokens + 1] * 3


def refusals() -> dict[str, tuple[Callable[[PreTrainedModel, KVCache], object], str]]:
    two = PROMPT.repeat(2, 1)
    padded = torch.ones_like(PROMPT)
    padded[0, :3] = 0
    return {
        "batch": (lambda model, cache: model.generate(two, past_key_values=cache, max_new_tokens=2), "a batch of 2"),
        "beams": (
            lambda model, cache: model.generate(PROMPT, past_key_values=cache, max_new_tokens=2, num_beams=2),
            "sequences",
        ),
        "embeddings": (
            lambda model, cache: model(inputs_embeds=torch.zeros(1, 3, 64), past_key_values=cache),
            "pass input_ids",
        ),
        "padding": (lambda model, cache: model(PROMPT, attention_mask=padded, past_key_values=cache), "padd"),
    }


@pytest.mark.parametrize("what", list(refusals()))
def test_what_a_compacting_cache_cannot_do_is_refused(memory: Memory, what: str) -> None:
    call, message = refusals()[what]
    with torch.no_grad(), pytest.raises(UnsupportedOperation, match=message):
        call(memory.engine.model, memory.cache())


def test_ids_outside_the_vocabulary_are_refused(memory: Memory) -> None:
    with pytest.raises(InvalidInput, match="token id 400 at position 1 is outside the vocabulary of 260"):
        memory.engine.model(torch.tensor([[1, 400]]), past_key_values=memory.cache())


def test_the_model_works_as_before_with_every_other_cache(memory: Memory, stock_model: PreTrainedModel) -> None:
    generate(memory.engine.model, PROMPT, memory.cache(), 100)
    model = memory.engine.model
    with torch.no_grad():
        for ids in (PROMPT, PROMPT.repeat(3, 1)):
            expected = stock_model(ids, past_key_values=DynamicCache()).logits
            torch.testing.assert_close(model(ids, past_key_values=DynamicCache()).logits, expected)


def test_all_refusals_are_errors_of_this_project() -> None:
    assert issubclass(UnsupportedOperation, AMMemoryError)
