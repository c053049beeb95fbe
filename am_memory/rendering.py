"""Chat messages as tokens, by the model's own chat template: only the template writes control tokens.

A control token begins or ends a turn, or stands for something else that nobody says: `<|im_end|>`, `<think>`. A message
may spell one. What it spells stays text: it is held apart while the template is rendered, and is encoded as text.
Knows no session.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput

Span = tuple[int, int]

_SPARE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
"""Characters for private use: those that no message holds stand in for what is held apart."""


class Chat:
    """Some messages on their way through a model's chat template.

    What they spell of control tokens is held apart: one character stands for each different text of these. It is taken
    from those that none of the messages holds, so that nothing anybody says can be taken for it.

    Args:
        messages: as chat templates take them.
        tools: what the template tells the model of.
        trusts_messages: control tokens that messages spell are control tokens.

    Attributes:
        messages: what the template is shown of them; to be written, all or some of them.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        trusts_messages: bool = False,
    ) -> None:
        self._engine = engine
        self._trusts_messages = trusts_messages
        self._stand_ins: dict[str, str] = {}
        self._spare = _spare_characters([*messages, *tools])
        self.messages, self._tools = list(messages), list(tools)
        if trusts_messages:
            return
        control = engine.control_tokens
        everywhere = _Spelling.of(control.turns, control.tags)
        own = _Spelling.of(control.turns)  # the model's own messages may hold its tags
        try:
            self._tools = [self._hold(tool, everywhere) for tool in tools]
            self.messages = [
                self._hold(message, own if message.get("role") == "assistant" else everywhere) for message in messages
            ]
        except RecursionError as error:
            raise InvalidInput("messages or tools are nested too deeply to be read: give them fewer levels") from error

    def write(
        self, messages: Sequence[Message] | None = None, *, add_generation_prompt: bool = False, has_tools: bool = True
    ) -> str:
        """What the template writes.

        Args:
            messages: some of `messages`, or of the like; None: all.
            has_tools: it is told of the tools.

        Raises:
            InvalidInput: messages that the template does not take.
        """
        tools = self._tools if has_tools else []
        messages = self.messages if messages is None else messages
        return self._engine.render(messages, tools=tools or None, add_generation_prompt=add_generation_prompt)

    def write_behind(self, messages: Sequence[Message], index: int, *, add_generation_prompt: bool = False) -> str:
        """What the template writes behind the content of one of the messages.

        It is what two renderings have in common at their ends that differ in this content alone.

        Raises:
            InvalidInput: messages that the template does not take, or of which it leaves out this one.
        """
        first, second = (
            self.write(
                [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]],
                add_generation_prompt=add_generation_prompt,
            )
            for content in ("0", "x")
        )
        same = _num_same_at_end(first, second)
        if same == len(first):
            role = messages[index]["role"]
            raise InvalidInput(
                f"the chat template leaves out the {role}'s message {index}, so that nothing can follow it"
            )
        return first[len(first) - same :]

    def encode(self, text: str) -> list[int]:
        """The token ids of what was written, or of a part of it.

        There are as many control tokens as the template itself wrote. Where messages spell none, the ids are those of
        the text as it stands.

        Raises:
            InvalidInput: a control token that the tokenizer makes of text, however that is cut.
        """
        engine = self._engine
        text, spelled = self._put_back(text)
        if self._trusts_messages:
            return engine.encode(text)
        control = engine.control_tokens
        spelling = _Spelling.of(control.turns, control.tags)
        found = list(spelling.find(text))
        written = [span for span in found if not _overlaps(spelled, span)]
        if len(written) == len(found):
            token_ids = engine.encode(text)
            # A tokenizer that normalises text may find more than was spelled.
            if sum(token_id in spelling.ids for token_id in token_ids) <= len(written):
                return token_ids
        return _encoded_in_sections(engine, text, written, spelling)

    def _hold(self, message: Message, spelling: _Spelling) -> Message:
        held: Message = _mapped(message, lambda text: spelling.replace(text, self._stand_in))  # type: ignore[assignment]
        return held

    def _stand_in(self, text: str) -> str:
        if text not in self._stand_ins:
            character = next(self._spare, None)
            if character is None:
                raise InvalidInput(
                    "the messages hold every character for private use, so that none is left to tell what they spell "
                    "from the chat template's own marks: leave some out"
                )
            self._stand_ins[text] = character
        return self._stand_ins[text]

    def _put_back(self, text: str) -> tuple[str, list[Span]]:
        """The text with what the stand-ins stand for, and where that is now, in order."""
        if not self._stand_ins:
            return text, []
        text_of = {character: spelled for spelled, character in self._stand_ins.items()}
        pieces, spans, size = [], [], 0
        for piece in re.split(f"([{''.join(text_of)}])", text):
            spelled = text_of.get(piece, piece)
            if piece in text_of:
                spans.append((size, size + len(spelled)))
            pieces.append(spelled)
            size += len(spelled)
        return "".join(pieces), spans


def _encoded_in_sections(engine: Engine, text: str, written: Sequence[Span], spelling: _Spelling) -> list[int]:
    """With what stands between the template's control tokens as text, where it would give control tokens itself."""
    token_ids: list[int] = []
    done = start = 0
    for first, last in [*written, (len(text), len(text))]:
        if not spelling.ids.isdisjoint(engine.encode(text[start:first])):
            token_ids += engine.encode(text[done:start]) if done < start else []
            token_ids += _encoded_as_text(engine, text[start:first], spelling)
            done = first
        start = last
    return token_ids + (engine.encode(text[done:]) if done < len(text) else [])


def _encoded_as_text(engine: Engine, text: str, spelling: _Spelling) -> list[int]:
    token_ids = engine.encode(text, as_text=True)
    if spelling.ids.isdisjoint(token_ids):
        return token_ids
    # The tokenizer finds some in any text: it gets none of them whole.
    cuts = [0, *(first + 1 for first, _ in spelling.find(text)), len(text)]
    parts = [engine.encode(text[start:end], as_text=True) for start, end in pairwise(cuts)]
    token_ids = [token_id for part in parts for token_id in part]
    if not spelling.ids.isdisjoint(token_ids):
        raise InvalidInput(
            f"a message spells a control token which this model's tokenizer cannot read as text: {text[:200]!r}; "
            "leave it out, or allow control tokens in messages (trust_messages=True)"
        )
    return token_ids


def _overlaps(spans: Sequence[Span], span: Span) -> bool:
    """Whether any of some ordered spans shares a character with another one."""
    start, end = span
    index = bisect_left(spans, (end, end))
    return index > 0 and spans[index - 1][1] > start


class _Spelling:
    """How some control tokens are spelled.

    Attributes:
        ids: of the tokens.
        find: where the longest ones stand in a text, from left to right.
    """

    def __init__(self, tokens: tuple[tuple[str, int], ...]) -> None:
        texts = sorted((text for text, _ in tokens), key=len, reverse=True)
        self.ids = frozenset(token_id for _, token_id in tokens)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._beginnings = frozenset(text[:size] for text in texts for size in range(1, len(text)))
        self._longest = max(map(len, texts), default=0)

    @staticmethod
    def of(*kinds: Mapping[str, int]) -> _Spelling:
        return _spelling(tuple(sorted(item for kind in kinds for item in kind.items())))

    def find(self, text: str) -> Iterator[Span]:
        return (match.span() for match in self._pattern.finditer(text))

    def replace(self, text: str, stand_in: Callable[[str], str]) -> str:
        """With a stand-in for each of them, and for the last character where a text behind it may end one."""
        text = self._pattern.sub(lambda match: stand_in(match[0]), text)
        said = text.rstrip()
        tails = (said[-size:] for size in range(1, min(self._longest, len(said) + 1)))
        if any(tail in self._beginnings for tail in tails):
            text = said[:-1] + stand_in(said[-1]) + text[len(said) :]
        return text


@lru_cache(maxsize=64)
def _spelling(tokens: tuple[tuple[str, int], ...]) -> _Spelling:
    return _Spelling(tokens)


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """A message, or a part of one, with all its texts changed but those that say what it is."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _mapped(key, change): item if _is_name(key, item) else _mapped(item, change) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def _num_same_at_end(first: str, second: str) -> int:
    """How many of their last characters two texts have in common."""
    least, most = 0, min(len(first), len(second))
    while least < most:
        middle = (least + most + 1) // 2
        if first[len(first) - middle :] == second[len(second) - middle :]:
            least = middle
        else:
            most = middle - 1
    return least


def _is_name(key: object, value: object) -> bool:
    """Whether a field says what a message or a part of it is; templates compare these with words of their own."""
    return key in ("role", "type") and isinstance(value, str) and value.isidentifier()


def _spare_characters(said: Sequence[object]) -> Iterator[str]:
    """Characters that none of what is said holds; all of it is searched when the first one is asked for."""
    held = {character for text in _texts(said) for character in _SPARE.findall(text)}
    for codes in (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)):
        yield from (chr(code) for code in codes if chr(code) not in held)


def _texts(value: object) -> Iterator[str]:
    """All texts in it, in no order."""
    left = [value]
    while left:
        match left.pop():
            case str(text):
                yield text
            case Mapping() as items:
                left += [*items.keys(), *items.values()]
            case list() | tuple() as items:
                left += items
