"""The name of a model's cache argument: `cache`, and `past_key_values` before transformers 5.24."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from driven import some_tokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine

POLICY = MemoryPolicy(
    trigger_tokens=96, keep_ratio=0.25, keep_recent=8, pinned=4, reference_queries=("repeat", "self_study")
)
TOKENS = some_tokens(150)


def older_forward(
    forward: Callable[..., object], *args: object, past_key_values: object = None, **options: object
) -> object:
    return forward(*args, **({} if past_key_values is None else {"cache": past_key_values}), **options)


@pytest.fixture
def _deprecations_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


@pytest.mark.usefixtures("_deprecations_are_errors")
def test_no_deprecation_warning_comes_from_our_code(
    new_tiny_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new_tiny_model()
    memory = Memory(TransformersEngine(model, byte_tokenizer), POLICY)
    session = memory.session()
    session.append(TOKENS)
    assert len(list(session.generate(max_new_tokens=3))) > 0
    assert session.segments
    model.generate(torch.tensor([TOKENS]), cache=memory.cache(), max_new_tokens=3, do_sample=False)


def test_an_older_model_is_called_by_the_older_name(
    new_tiny_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase, engine: TransformersEngine
) -> None:
    model = new_tiny_model()
    for module in (model.model, model):
        module.forward = partial(older_forward, module.forward)
    older = Memory(TransformersEngine(model, byte_tokenizer), POLICY).session()
    newer = Memory(engine, POLICY).session()
    for session in (older, newer):
        session.append(TOKENS)
    assert torch.equal(older.logits(TOKENS[:4]), newer.logits(TOKENS[:4]))
