"""The tokens of a chat that are repeated: those of messages, and not what the chat template puts around them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory.engines.base import Engine, Message
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.queries import message_token_positions

CHAT: list[Message] = [
    {"role": "user", "content": "Read this:\nthe mill."},
    {"role": "assistant", "content": "I see."},
    {"role": "user", "content": "And the assistant\nsaid so."},
    {"role": "assistant", "content": "Yes."},
]


def message_text(engine: Engine, token_ids: list[int], start: int = 0, end: int | None = None) -> str:
    positions = message_token_positions(engine, token_ids, start, len(token_ids) if end is None else end)
    assert positions == sorted(set(positions))
    assert all(start <= position < (end or len(token_ids)) for position in positions)
    return engine.decode([token_ids[position] for position in positions])


@pytest.mark.parametrize("name", ["engine", "llama"])
def test_what_stands_between_two_messages_is_one_white_space(name: str, request: pytest.FixtureRequest) -> None:
    engine: TransformersEngine | LlamaCppEngine = request.getfixturevalue(name)
    token_ids = engine.encode(engine.render(CHAT, add_generation_prompt=False))
    assert message_text(engine, token_ids) == (
        "user\nRead this:\nthe mill.\nI see.\nAnd the assistant\nsaid so.\nYes.\n"
    )


def test_a_block_may_begin_and_end_inside_of_a_header(engine: TransformersEngine) -> None:
    text = engine.render(CHAT, add_generation_prompt=False)
    token_ids = engine.encode(text)
    start = len(engine.encode(text[: text.index("assistant") + 3]))
    end = len(engine.encode(text[: text.rindex("assistant") + 3]))
    assert message_text(engine, token_ids, start, end) == "\nI see.\nAnd the assistant\nsaid so."


def test_text_without_marks_is_repeated_as_it_is(engine: TransformersEngine) -> None:
    token_ids = engine.encode("The user\nasked, the assistant\nanswered.")
    assert message_token_positions(engine, token_ids, 3, len(token_ids)) == list(range(3, len(token_ids)))


def test_a_block_of_nothing_but_marks_is_repeated_as_it_is(engine: TransformersEngine) -> None:
    token_ids = engine.encode("<|im_end|><|im_end|><|im_start|>")
    assert message_token_positions(engine, token_ids, 0, 3) == [0, 1, 2]


@pytest.mark.model
def test_of_a_real_chat_every_word_is_repeated(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    engine = TransformersEngine(*demo)
    token_ids = engine.encode(engine.render(CHAT, add_generation_prompt=False))
    said = message_text(engine, token_ids)
    assert "<|" not in said
    assert said.endswith("Read this:\nthe mill.\nI see.\nAnd the assistant\nsaid so.\nYes.\n")
