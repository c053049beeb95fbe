"""Chats for `facts.py` that others wrote: the contexts of the repository profff/lost-in-compaction.

They hold conversations of LongMemEval (arXiv:2410.10813). A context, such as d80_C1.json, is a list of messages. Beside
it stands d80_C1_meta.json, whose "facts" are questions, their answers, and the messages that tell them: "fact_id",
"question", "question_type", "answer", "message_start", "message_end" and "compacted" are read. Files are the user's
own.

A fact is used if the user says it, letter for letter, in at most six words. A chat is made of the sessions of ten such
facts, six turns of each at most. Long messages are cut behind a sentence: a context has 190,000 tokens, of which a
small model would know little.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from facts_files import Chat, Fact

KINDS = ("single-session-user", "knowledge-update")
"""The kinds of questions whose answers the user says; the others are about what a model said, or about preferences."""
MOST_WORDS, MOST_TURNS, FACTS_PER_CHAT = 6, 6, 10
USER_CHARS, MODEL_CHARS = 700, 900
Turn = tuple[str, str]


def load_contexts(paths: Sequence[Path]) -> list[Chat]:
    """Make chats of contexts; a fact that several contexts have is taken from the first.

    Raises:
        OSError: a context, or the file of its facts, cannot be read.
        ValueError: a file is not as it should be.
    """
    found: dict[str, tuple[str, Fact, list[Turn]]] = {}
    seen: set[str] = set()
    for path in paths:
        messages = json.loads(path.read_text(encoding="utf-8"))
        listed = json.loads(path.with_name(f"{path.stem}_meta.json").read_text(encoding="utf-8"))
        try:
            for told in listed["facts"]:
                name = told["fact_id"]
                if told["compacted"] or name in seen:
                    continue
                seen.add(name)
                turns = list(turns_of(messages[told["message_start"] : told["message_end"]]))
                if (fact := _fact(told, turns)) is not None:
                    first = max(fact.turns[0] + 1 - MOST_TURNS, 0)
                    found[name] = name, _moved(fact, -first), turns[first : first + MOST_TURNS]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: no context of lost-in-compaction, {error!r} is missing") from error
    used = [one for _, one in sorted(found.items())]
    random.Random(0).shuffle(used)
    ends = range(FACTS_PER_CHAT, len(used) + 1, FACTS_PER_CHAT)
    return [_chat(f"contexts-{number}", used[end - FACTS_PER_CHAT : end]) for number, end in enumerate(ends)]


def turns_of(messages: Sequence[dict[str, str]]) -> Iterator[Turn]:
    """The turns of some messages: a user's message with the model's behind it."""
    number = 0
    while number + 1 < len(messages):
        user, model = messages[number : number + 2]
        if (user["role"], model["role"]) == ("user", "assistant"):
            yield shortened(user["content"], USER_CHARS), shortened(model["content"], MODEL_CHARS)
            number += 1
        number += 1


def shortened(text: str, num_chars: int) -> str:
    """A text in one line, without Markdown, cut behind a sentence; a long first sentence is cut a little later."""
    plain = re.sub(r"\s+", " ", re.sub(r"[*#`|]", "", text)).strip()
    if len(plain) <= num_chars:
        return plain
    first, *others = re.split(r"(?<=[.!?]) ", plain)
    for sentence in others:
        if len(first) + len(sentence) > num_chars:
            break
        first += f" {sentence}"
    return first[: num_chars + 200]


def _fact(told: dict[str, Any], turns: Sequence[Turn]) -> Fact | None:
    """A fact that the user says in some turns; None if there is none, or it is none that is used."""
    answer = str(told["answer"]).strip().rstrip(".")
    if told["question_type"] not in KINDS or len(answer.split()) > MOST_WORDS or answer.lower() in ("yes", "no"):
        return None
    pattern = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
    said = [(number, match.group()) for number, (user, _) in enumerate(turns) if (match := pattern.search(user))]
    if not said:
        return None
    number, words = said[-1]
    kind = f"{told['question_type']} {told['fact_id']}"
    return Fact(kind, (number,), shortened(told["question"], USER_CHARS), "The answer is", (words,))


def _moved(fact: Fact, distance: int) -> Fact:
    (turn,) = fact.turns
    return Fact(fact.kind, (turn + distance,), fact.question, fact.opening, fact.accepted)


def _chat(name: str, used: Sequence[tuple[str, Fact, list[Turn]]]) -> Chat:
    turns, facts = list[Turn](), list[Fact]()
    for _, fact, session in used:
        facts.append(_moved(fact, len(turns)))
        turns += session
    return Chat(name, tuple(turns), tuple(facts))
