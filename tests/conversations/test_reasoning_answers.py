"""Reasoning that an answer opens with: split off while it is generated, kept in the memory or forgotten."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from am_memory import Memory, MemoryPolicy
from am_memory.conversations.chat import answer_chat
from am_memory.conversations.chat_answer import ChatAnswer, Delta
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.reasoning import Reasoning, ReasoningStream, is_reasoning
from am_memory.conversations.threads import Threads
from am_memory.engines.base import Engine

ENDS = 257
NUM_OPENING = 1 + len("assistant\n")
"""Tokens of `<|im_start|>assistant` and a new line."""
POLICY = MemoryPolicy(trigger_tokens=300, keep_ratio=0.25, pinned=3, keep_recent=16, chunk_tokens=64)
HELLO = {"role": "user", "content": "hello"}
CASES = [
    ("<think>\nfirst this,\nthen that \n</think>\n\nThe answer.", False, "first this,\nthen that", "The answer."),
    (" <think></think>\n\nThe answer.", False, "", "The answer."),
    ("no tag  at all <think>x</think> ", False, "", "no tag  at all <think>x</think> "),
    ("  blank first", False, "", "  blank first"),
    ("\nfirst this\n</think>\nThe answer. </think>", True, "first this", "The answer. </think>"),
    ("<think>again</think>yes", True, "again", "yes"),
    ("cut off in </thi", True, "cut off in </thi", ""),
    ("<thi", False, "", "<thi"),
    ("", False, "", ""),
]


@pytest.mark.parametrize(("answer", "is_open", "reasoning", "text"), CASES)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_an_answer_is_split_however_it_is_cut(answer: str, is_open: bool, reasoning: str, text: str, size: int) -> None:
    stream = ReasoningStream(is_open=is_open)
    cuts = [answer[start : start + size] for start in range(0, len(answer), size)]
    parts = [*itertools.chain.from_iterable(map(stream.push, cuts)), *stream.finish()]
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == reasoning
    assert "".join(part for part in parts if isinstance(part, str)) == text


def test_a_text_may_end_inside_of_reasoning() -> None:
    assert is_reasoning("<think>so")
    assert not is_reasoning("<think>so</think>")
    assert not is_reasoning("so")


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the model say a text and end its turn."""

    def say(text: str) -> None:
        tokens = itertools.chain(text.encode(), itertools.repeat(ENDS))
        monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))

    return say


@pytest.fixture
def threads(engine: Engine) -> Threads:
    return Threads(Memory(engine, POLICY))


def answered(threads: Threads, messages: list[Any], **options: Any) -> tuple[ChatAnswer, list[Any]]:
    """A whole answer, and its parts."""
    answer, parts = ChatAnswer(threads, ChatRequest(messages, **{"reasoning": "keep", **options})), []
    for step in answer_chat(answer):
        if isinstance(step, Delta):
            parts += step.parts
        elif hasattr(step, "run"):
            step.run()
    return answer, parts


def test_reasoning_is_a_part_of_its_own_and_the_next_call_reads_nothing_again(threads: Threads, saying: Any) -> None:
    saying("<think>greet</think>\n\nHi!")
    answer, parts = answered(threads, [HELLO])
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == "greet"
    assert (answer.content, answer.reasoning) == ("Hi!", "greet")
    saying("Yes.")
    back = {"role": "assistant", "content": "Hi!"}
    again, _ = answered(threads, [HELLO, back, {"role": "user", "content": "sure?"}])
    assert again.usage.cached_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert "greet" in again.session.engine.decode(again.session.tokens)


def test_dropped_reasoning_leaves_the_memory_and_only_the_answer_is_read_again(threads: Threads, saying: Any) -> None:
    saying("<think>greet</think>\n\nHi!")
    answer, _ = answered(threads, [HELLO], reasoning="drop")
    assert answer.usage.completion_tokens == len("<think>greet</think>\n\nHi!") + 1
    saying("Yes.")
    messages = [HELLO, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "sure?"}]
    again, _ = answered(threads, messages, reasoning="drop")
    assert again.usage.cached_tokens == answer.usage.prompt_tokens - NUM_OPENING
    assert "greet" not in again.session.engine.decode(again.session.tokens)


def test_text_stays_as_it_is_unless_reasoning_is_asked_for(threads: Threads, saying: Any) -> None:
    saying("<think>greet</think>Hi!")
    answer, _ = answered(threads, [HELLO], reasoning="text")
    assert (answer.content, answer.reasoning) == ("<think>greet</think>Hi!", "")


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "given"])
def test_an_answer_goes_on_from_its_last_word(threads: Threads, saying: Any, is_known: bool) -> None:
    """A known one goes on from its last token, and nothing of it is read again."""
    said = "once upon a time"
    if is_known:
        saying(said)
        first, _ = answered(threads, [HELLO], max_tokens=len(said))
        assert first.finish_reason == "length"
    saying(" there was")
    begun = {"role": "assistant", "content": said}
    second, _ = answered(threads, [HELLO, begun], continues_last=True)
    assert second.content == " there was"
    assert second.message["content"] == f"{said} there was"
    if is_known:
        assert second.usage.cached_tokens == second.usage.prompt_tokens
    text = second.session.engine.decode(second.session.tokens)
    assert text.endswith(f"<|im_start|>assistant\n{said} there was<|im_end|>")
    saying("go on")
    third, _ = answered(threads, [HELLO, second.message, {"role": "user", "content": "and?"}])
    assert third.usage.cached_tokens == second.usage.prompt_tokens + second.usage.completion_tokens


def test_a_begun_answer_that_speaks_of_the_tag_goes_on_as_text(threads: Threads, saying: Any) -> None:
    """All that followed was taken for reasoning, and the answer had no more text."""
    saying(" to begin")
    begun = {"role": "assistant", "content": "Write <think>"}
    answer, _ = answered(threads, [HELLO, begun], continues_last=True)
    assert (answer.content, answer.reasoning) == (" to begin", "")


def test_a_begun_answer_that_opens_with_the_tag_goes_on_as_reasoning(threads: Threads, saying: Any) -> None:
    saying(" it is</think>Hi!")
    begun = {"role": "assistant", "content": "<think>so"}
    answer, _ = answered(threads, [HELLO, begun], continues_last=True)
    assert (answer.content, answer.reasoning) == ("Hi!", "it is")


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
EFFORT = "{% if reasoning_effort is defined %}<|im_start|>system\n{{ reasoning_effort }}<|im_end|>\n{% endif %}"


@pytest.fixture
def template_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda template: monkeypatch.setattr(engine.tokenizer, "chat_template", template)  # type: ignore[attr-defined]


def test_a_template_that_opens_the_reasoning_may_be_told_not_to(
    threads: Threads, saying: Any, template_of: Any
) -> None:
    """Both calls share what came before: the option changes the opening of the answer only."""
    template_of(THINKING)
    saying("greet</think>\n\nHi!")
    first, _ = answered(threads, [HELLO])
    assert (first.content, first.reasoning) == ("Hi!", "greet")
    saying("Yes.")
    messages = [HELLO, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "sure?"}]
    second, _ = answered(threads, messages, template_options={"enable_thinking": False})
    assert (second.content, second.reasoning) == ("Yes.", "")
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert "</think>\n\nYes." in second.session.engine.decode(second.session.tokens)


def test_an_option_that_changes_the_first_messages_is_another_conversation(
    threads: Threads, saying: Any, template_of: Any
) -> None:
    template_of(EFFORT + THINKING)
    for effort, cached in (("low", False), ("high", False), ("low", True)):
        saying("no</think>Hi!")
        answer, _ = answered(threads, [HELLO], template_options={"reasoning_effort": effort})
        assert f"system\n{effort}<|im_end|>" in answer.session.engine.decode(answer.session.tokens)
        assert bool(answer.usage.cached_tokens) == cached
