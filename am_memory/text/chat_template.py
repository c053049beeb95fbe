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

from am_memory.engines.base import ControlTokens, Engine, Message, Tool
from am_memory.errors import InvalidInput

CharSpan = tuple[int, int]
StandIn = Callable[[str], str]
Hold = Callable[[str, StandIn], str]

_SPARE = range(0x20000, 0x2A6DE)
"""Letters of which hardly any text has one: those that no message holds stand in for what is held apart. What a
template does to text (trimming it, lower case, JSON, Python's own writing) leaves them as they are."""

_SPARE_LETTER = re.compile(f"([{chr(_SPARE.start)}-{chr(_SPARE.stop - 1)}])")


class Chat:
    """Some messages on their way through a model's chat template.

    What they spell of control tokens is held apart: one letter stands for each different text of these. It is taken
    from those that none of the messages holds, so that nothing anybody says can be taken for it. Where turns begin or
    end all the same that would not if nothing of what is said were shown to the template (two texts that make one mark
    together, or that the template changes into one), nothing of it is.

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
        self._held: dict[str, str] = {}  # texts by their stand-ins
        self._spare = _spare_letters([*messages, *tools])
        self.messages, self._tools = list(messages), list(tools)
        self._written: str | None = None  # all of it, as the turns were compared
        if trusts_messages:
            return
        control = engine.control_tokens
        everywhere = _Spelling.of(control, has_tags=True)
        own = _Spelling.of(control, has_tags=False)  # the model's own messages may hold its tags
        try:
            self._tools = [self._hold(tool, everywhere.replace) for tool in tools]
            self.messages = [
                self._hold(message, (own if message.get("role") == "assistant" else everywhere).replace)
                for message in messages
            ]
            if not self._has_its_own_turns(messages, tools, own):
                self._written = None
                self._tools = [self._hold(tool, _whole) for tool in tools]
                self.messages = [self._hold(message, _whole) for message in messages]
        except RecursionError as error:
            raise InvalidInput("messages or tools are nested too deeply to be read: give them fewer levels") from error

    def _has_its_own_turns(self, messages: Sequence[Message], tools: Sequence[Tool], spelling: _Spelling) -> bool:
        """Whether the template writes the same turns as where it sees nothing of what is said."""
        if not messages:
            return True
        unseen = [self._hold(message, _unseen) for message in messages], [self._hold(tool, _unseen) for tool in tools]
        try:
            self._written = self.write()
            template_alone = self._engine.render(unseen[0], tools=unseen[1] or None)
        except InvalidInput:  # nothing is written of them
            return True
        return spelling.spelled(self._written) == spelling.spelled(template_alone)

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
        if messages is None and has_tools and not add_generation_prompt and self._written is not None:
            return self._written
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
        spelling = _Spelling.of(engine.control_tokens, has_tags=True)
        found = list(spelling.find(text))
        written = [span for span in found if not _overlaps(spelled, span)]
        if len(written) == len(found):
            token_ids = engine.encode(text)
            # A tokenizer that normalises text may find more than was spelled.
            if spelling.count(token_ids) <= len(written):
                return token_ids
        return _encoded_in_sections(engine, text, written, spelled, spelling)

    def _hold(self, message: Message, hold: Hold) -> Message:
        held: Message = _mapped(message, lambda text: hold(text, self._stand_in))  # type: ignore[assignment]
        return held

    def _stand_in(self, text: str) -> str:
        if text not in self._stand_ins:
            letter = next(self._spare, None)
            if letter is None:
                raise InvalidInput(
                    f"the messages hold every letter from U+{_SPARE.start:X} to U+{_SPARE.stop - 1:X}, so that none is "
                    "left to tell what they spell from the chat template's own marks: leave some out"
                )
            self._stand_ins[text], self._held[letter] = letter, text
        return self._stand_ins[text]

    def _put_back(self, text: str) -> tuple[str, list[CharSpan]]:
        """The text with what the stand-ins stand for, and where that is now, in order."""
        if not self._held or text.isascii():
            return text, []
        pieces, spans, size = [], [], 0
        for piece in _SPARE_LETTER.split(text):
            spelled = self._held.get(piece, piece)
            if piece in self._held:
                spans.append((size, size + len(spelled)))
            pieces.append(spelled)
            size += len(spelled)
        return "".join(pieces), spans


def _encoded_in_sections(
    engine: Engine, text: str, written: Sequence[CharSpan], spelled: Sequence[CharSpan], spelling: _Spelling
) -> list[int]:
    """With what stands between the template's control tokens as text, where it would give control tokens itself."""
    token_ids: list[int] = []
    done = start = 0
    for first, last in [*written, (len(text), len(text))]:
        section = text[start:first]
        spells = any(_overlaps(spelled, (start + begin, start + end)) for begin, end in spelling.find(section))
        if spells or spelling.count(engine.encode(section)):
            token_ids += engine.encode(text[done:start]) if done < start else []
            token_ids += _encoded_as_text(engine, section, spelling)
            done = first
        start = last
    return token_ids + (engine.encode(text[done:]) if done < len(text) else [])


def _encoded_as_text(engine: Engine, text: str, spelling: _Spelling) -> list[int]:
    token_ids = engine.encode(text, as_text=True)
    if not spelling.count(token_ids):
        return token_ids
    # The tokenizer finds some in any text: it gets none of them whole.
    cuts = [0, *(first + 1 for first, _ in spelling.find(text)), len(text)]
    parts = [engine.encode(text[start:end], as_text=True) for start, end in pairwise(cuts)]
    token_ids = [token_id for part in parts for token_id in part]
    if spelling.count(token_ids):
        raise InvalidInput(
            f"a message spells a control token which this model's tokenizer cannot read as text: {text[:200]!r}; "
            "leave it out, or allow control tokens in messages (trust_messages=True)"
        )
    return token_ids


def _overlaps(spans: Sequence[CharSpan], span: CharSpan) -> bool:
    """Whether any of some ordered spans shares a character with another one."""
    start, end = span
    index = bisect_left(spans, (end, end))
    return index > 0 and spans[index - 1][1] > start


class _Spelling:
    """How some control tokens are spelled."""

    def __init__(self, tokens: tuple[tuple[str, int], ...], unknown: int | None) -> None:
        texts = sorted((text for text, _ in tokens), key=len, reverse=True)
        self._ids = {token_id for _, token_id in tokens} - {unknown}
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")

    @staticmethod
    def of(control: ControlTokens, *, has_tags: bool) -> _Spelling:
        tokens = {**control.turns, **control.tags} if has_tags else control.turns
        return _spelling(tuple(sorted(tokens.items())), control.unknown)

    def find(self, text: str) -> Iterator[CharSpan]:
        """Where the longest ones stand in a text, from left to right."""
        return (match.span() for match in self._pattern.finditer(text))

    def spelled(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def count(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens are such; what stands for text that the vocabulary does not know is none."""
        return sum(token_id in self._ids for token_id in token_ids)

    def replace(self, text: str, stand_in: StandIn) -> str:
        """The text with a letter for each of them."""
        return self._pattern.sub(lambda match: stand_in(match[0]), text)


@lru_cache(maxsize=64)
def _spelling(tokens: tuple[tuple[str, int], ...], unknown: int | None) -> _Spelling:
    return _Spelling(tokens, unknown)


def _whole(text: str, stand_in: StandIn) -> str:
    """A letter for all of a text but the white space around it."""
    said = text.strip()
    return text.replace(said, stand_in(said)) if said else text


def _unseen(text: str, stand_in: StandIn) -> str:
    """The same letter for every text."""
    return chr(_SPARE.stop) if text.strip() else text


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """A message, or a part of one, with all its texts changed but those that say what it is."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) and key.isidentifier() else _mapped(key, change): (
                item if _is_name(key, item) else _mapped(item, change)
            )
            for key, item in value.items()
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
    """Whether a field says what a message or a part of it is, or belongs to; templates look at these themselves."""
    return (
        key in ("role", "type", "id", "tool_call_id") and isinstance(value, str) and bool(re.fullmatch(r"\w+", value))
    )


def _spare_letters(said: Sequence[object]) -> Iterator[str]:
    """Letters that none of what is said holds; all of it is searched when the first one is asked for."""
    letters = (letter for text in _strings_in(said) if not text.isascii() for letter in text)
    held = {letter for letter in letters if ord(letter) in _SPARE}
    yield from (chr(code) for code in _SPARE if chr(code) not in held)


def _strings_in(value: object) -> Iterator[str]:
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
