"""Where messages end in what a chat template wrote, against rendering every beginning of the conversation."""

from __future__ import annotations

import itertools
import random

import pytest

from am_memory.engines.base import Message
from am_memory.engines.templates import render_template, template_errors
from am_memory.text.chat_template import RenderedChat
from am_memory.text.turns import split_turns

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESULTS_TOGETHER = (
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>tools\n{% endif %}"
    "[{{ message.content }}]"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
THOUGHTS_OF_THE_LAST = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
)
IN_TURN = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('users and the model in turn') }}"
    "{% endif %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content | trim }}{% if not loop.last %}</s>{% endif %}{% endif %}{% endfor %}"
)
SYSTEM_IN_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}"
    "<{{ message.role }}>{{ (system if loop.first else '') ~ message.content }}</{{ message.role }}>{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "results together": RESULTS_TOGETHER,
    "thoughts of the last": THOUGHTS_OF_THE_LAST,
    "in turn": IN_TURN,
    "system in first": SYSTEM_IN_FIRST,
}
TOOL = {"type": "function", "function": {"name": "hail", "parameters": {"type": "object"}}}


class Templated:
    """What a chat needs of an engine to be written, and how often it asked for it."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.num_messages_rendered = 0

    def render(
        self, messages: list[Message], *, tools: list | None, add_generation_prompt: bool, options: Message | None
    ) -> str:
        self.num_messages_rendered += len(messages)
        with template_errors("a test", messages):
            return render_template(self.template, messages, tools, add_generation_prompt, {}, options or {})

    def chat(self, messages: list[Message], tools: list[Message] | None = None) -> RenderedChat:
        return RenderedChat(self, messages, tools or [], trusts_messages=True)  # type: ignore[arg-type]


def conversation(seed: int, num_messages: int, *, in_turn: bool, has_system: bool) -> list[Message]:
    chosen = random.Random(seed)
    messages: list[Message] = [{"role": "system", "content": "Be kind."}] if has_system else []
    while len(messages) < num_messages:
        after = messages[-1]["role"] if messages else "system"
        following = {"user": ["assistant"], "assistant": ["user"] if in_turn else ["user", "tool"]}
        role = chosen.choice(following.get(str(after), ["user"] if in_turn else ["user", "assistant", "tool"]))
        messages.append({"role": role, "content": chosen.choice(["yes", "no", "user", "<user>", "\n", "", "[INST]"])})
    return messages


def by_definition(chat: RenderedChat, count: int, text: str) -> list[str]:
    """Each beginning is rendered; what is no beginning of the whole goes with the next."""
    begin = len(chat.write(chat.messages[:count])) if count else 0
    bounds = [0]
    for end in range(count + 1, len(chat.messages)):
        try:
            part = chat.write(chat.messages[:end])[begin:]
        except Exception:
            part = ""
        bounds.append(len(part) if part and text.startswith(part) else bounds[-1])
    return [text[start:end] for start, end in itertools.pairwise([*bounds, len(text)])]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_end_where_the_template_ends_their_beginning(name: str, seed: int) -> None:
    has_system = name != "in turn" and seed % 2 == 0
    messages = conversation(seed, 12, in_turn=name in ("in turn", "system in first"), has_system=has_system)
    tools = [TOOL] if seed % 3 == 0 else []
    chat = Templated(TEMPLATES[name]).chat(messages, tools)
    whole = chat.write()
    for count in (0, 3, 6, 11):
        begin = chat.write(chat.messages[:count]) if count else ""
        if not whole.startswith(begin):
            continue
        text = whole[len(begin) :]
        turns = split_turns(chat, count, text)
        assert "".join(turns) == text
        assert turns == by_definition(chat, count, text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_work_is_in_proportion_to_the_messages(name: str) -> None:
    """Finding where 800 messages end took the square of that."""

    def num_rendered(num_messages: int) -> int:
        in_turn = name in ("in turn", "system in first")
        engine = Templated(TEMPLATES[name])
        chat = engine.chat(conversation(1, num_messages, in_turn=in_turn, has_system=False))
        split_turns(chat, 0, chat.write())
        return engine.num_messages_rendered

    assert num_rendered(800) < 12 * 800


def test_many_messages_of_the_system_take_no_longer_than_others() -> None:
    """All of them were rendered again for each, and a long one with each message."""
    engine = Templated(CHATML)
    chat = engine.chat([{"role": "system", "content": "Be kind."}] * 800)
    assert len(split_turns(chat, 0, chat.write())) == 800
    assert engine.num_messages_rendered < 12 * 800
    shown = []
    chat.write = lambda messages=None, **_: shown.append(sum(len(m["content"]) for m in messages)) or ""  # type: ignore[method-assign]
    chat.messages = [{"role": "system", "content": "x" * 10_000}, *[{"role": "user", "content": "y"}] * 100]
    split_turns(chat, 0, "no match")
    assert sum(shown) < 100 * 10_000


def test_a_template_that_writes_nothing_in_turn_is_not_told_apart() -> None:
    """The last of many messages holds all: none of them can be cut off, and nothing is guessed."""
    backwards = "{% for message in messages | reverse %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    engine = Templated(backwards)
    chat = engine.chat(conversation(2, 100, in_turn=True, has_system=False))
    whole = chat.write()
    assert split_turns(chat, 0, whole) == [*[""] * 99, whole]
    assert engine.num_messages_rendered < 100 * 100
