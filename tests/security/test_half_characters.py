"""Half a surrogate pair in what a session is told: refused by both engines, wherever it stands, and nothing changes.

transformers' tokenizers ended in errors of their own over it, and llama.cpp read other text in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from am_memory import Memory, MemoryPolicy, Session
from am_memory.engines.base import Engine
from am_memory.engines.characters import utf8
from am_memory.errors import InvalidInput

POLICY = MemoryPolicy(trigger_tokens=2000)
HALF = "an owl \ud83e, and no more"

PLACES: dict[str, Callable[[Session], object]] = {
    "text": lambda session: session.append(HALF),
    "message": lambda session: session.append([{"role": "user", "content": HALF}]),
    "role": lambda session: session.append([{"role": HALF, "content": "x"}]),
    "continuation": lambda session: session.logits(HALF),
    "search": lambda session: session.search(HALF),
}


@pytest.fixture(params=["engine", "llama"])
def session(request: pytest.FixtureRequest) -> Session:
    engine: Engine = request.getfixturevalue(request.param)
    session = Memory(engine, POLICY).session()
    session.append("The owl sat on the old oak. " * 6)
    session.compact()
    return session


@pytest.mark.parametrize("place", PLACES)
def test_half_a_character_is_refused_wherever_it_stands(session: Session, place: str) -> None:
    before = session.tokens, session.messages, session.stats
    with pytest.raises(InvalidInput):
        PLACES[place](session)
    assert (session.tokens, session.messages, session.stats) == before


@pytest.mark.parametrize("as_text", [False, True])
def test_the_refusal_says_where_it_stands(session: Session, as_text: bool) -> None:
    words = r"character 7 of a text, '\\ud83e' in 'an owl \\ud83e, and no more', is half a surrogate pair"
    with pytest.raises(InvalidInput, match=words):
        session.engine.encode(HALF, as_text=as_text)


def test_whole_characters_beyond_the_first_65536_are_text() -> None:
    assert utf8("an owl 🦉") == b"an owl \xf0\x9f\xa6\x89"
