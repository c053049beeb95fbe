"""Turns chat messages into tokens with the model's chat template; only the template writes control tokens.

A control token begins or ends a turn (`<|im_end|>`) or marks a part of it (`<think>`). If a message contains the text
of a control token, that text stays text. It is replaced by a stand-in letter while the template is rendered, and is
encoded as text afterwards. Knows no session.
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
"""Rare letters, used as stand-ins if no message contains them. Templates that trim, lowercase or quote text, or write
it as JSON, leave these letters unchanged."""

_SPARE_LETTER = re.compile(f"([{chr(_SPARE.start)}-{chr(_SPARE.stop - 1)}])")


class RenderedChat:
    """Messages that are rendered by a model's chat template and encoded.

    Each control token that a message spells is replaced by a stand-in: a letter that no message contains. Two texts may
    still form a control token together, or the template may change a text into one. This is noticed because the
    rendered text has other turns than a rendering without any content. Then every text is replaced as a whole.

    Args:
        messages: dicts as chat templates take them: "role", "content", "tool_calls" and more.
        tools: functions that the template describes to the model, as OpenAI's API has them.
        trusts_messages: read control tokens that messages spell as control tokens.
        options: variables of the template beside messages and tools.

    Attributes:
        messages: the messages with stand-ins, for `write`.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        trusts_messages: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self._engine = engine
        self._options = options
        self._trusts_messages = trusts_messages
        self._stand_ins: dict[str, str] = {}
        self._held: dict[str, str] = {}  # stand-in -> text
        self._spare = _spare_letters([*messages, *tools])
        self.messages, self._tools = list(messages), list(tools)
        self._written: str | None = None  # all messages, rendered for the comparison of turns
        if trusts_messages:
            return
        control = engine.control_tokens
        everywhere = _Spelling.of(control, has_tags=True)
        own = _Spelling.of(control, has_tags=False)  # the model's own messages may contain its tags
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
        """Whether the template writes the same turns as for messages without content."""
        if not messages:
            return True
        unseen = [self._hold(message, _unseen) for message in messages], [self._hold(tool, _unseen) for tool in tools]
        try:
            self._written = self.write()
            template_alone = self._engine.render(unseen[0], tools=unseen[1] or None, options=self._options)
        except InvalidInput:  # the template takes neither
            return True
        return spelling.spelled(self._written) == spelling.spelled(template_alone)

    def write(
        self, messages: Sequence[Message] | None = None, *, add_generation_prompt: bool = False, has_tools: bool = True
    ) -> str:
        """Render messages with the template.

        Args:
            messages: some of `self.messages`, or messages with stand-ins made from them; None: all.
            add_generation_prompt: also open the model's answer.
            has_tools: pass the tools to the template.

        Raises:
            InvalidInput: the template does not take these messages.
        """
        if messages is None and has_tools and not add_generation_prompt and self._written is not None:
            return self._written
        tools = self._tools if has_tools else []
        messages = self.messages if messages is None else messages
        return self._engine.render(
            messages, tools=tools or None, add_generation_prompt=add_generation_prompt, options=self._options
        )

    def write_behind(self, messages: Sequence[Message], index: int, *, add_generation_prompt: bool = False) -> str:
        """Render messages, and return the text that follows the content of one of them.

        Two renderings that differ only in this content have that text in common at their ends.

        Args:
            index: which of the messages.

        Raises:
            InvalidInput: the template does not take these messages, or leaves this message out.
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
        """Encode a rendered text, or a part of it, with the messages' own texts in place of the stand-ins.

        The result has exactly the control tokens that the template wrote.

        Raises:
            InvalidInput: the tokenizer reads a message's text as a control token, even if the text is cut in two.
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
            # A tokenizer that normalises text may find control tokens that are spelled otherwise.
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
                    f"the messages contain every letter from U+{_SPARE.start:X} to U+{_SPARE.stop - 1:X}, and one is "
                    "needed as a stand-in for the control tokens that they spell: leave some of the letters out"
                )
            self._stand_ins[text], self._held[letter] = letter, text
        return self._stand_ins[text]

    def _put_back(self, text: str) -> tuple[str, list[CharSpan]]:
        """Replace the stand-ins by their texts; also return where these texts are, in order."""
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
    """Encode the sections between the template's control tokens, as text where they contain control tokens."""
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
    # The tokenizer finds control tokens even in plain text: cut each of them in two.
    cuts = [0, *(first + 1 for first, _ in spelling.find(text)), len(text)]
    parts = [engine.encode(text[start:end], as_text=True) for start, end in pairwise(cuts)]
    token_ids = [token_id for part in parts for token_id in part]
    if spelling.count(token_ids):
        raise InvalidInput(
            f"a message spells a control token that this model's tokenizer cannot read as text: {text[:200]!r}; "
            "leave it out, or allow control tokens in messages (trust_messages=True)"
        )
    return token_ids


def _overlaps(spans: Sequence[CharSpan], span: CharSpan) -> bool:
    """Whether one of the ordered spans overlaps `span`."""
    start, end = span
    index = bisect_left(spans, (end, end))
    return index > 0 and spans[index - 1][1] > start


class _Spelling:
    """The texts of some control tokens, to find them in texts and in token ids."""

    def __init__(self, tokens: tuple[tuple[str, int], ...], unknown: int | None) -> None:
        texts = sorted((text for text, _ in tokens), key=len, reverse=True)
        self._ids = {token_id for _, token_id in tokens} - {unknown}
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")

    @staticmethod
    def of(control: ControlTokens, *, has_tags: bool) -> _Spelling:
        tokens = {**control.turns, **control.tags} if has_tags else control.turns
        return _spelling(tuple(sorted(tokens.items())), control.unknown)

    def find(self, text: str) -> Iterator[CharSpan]:
        """The spans of control tokens in a text, from left to right; the longest wins."""
        return (match.span() for match in self._pattern.finditer(text))

    def spelled(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def count(self, token_ids: Sequence[int]) -> int:
        """Count the control tokens among token ids; the token for unknown text is none."""
        return sum(token_id in self._ids for token_id in token_ids)

    def replace(self, text: str, stand_in: StandIn) -> str:
        """Replace each control token in a text by a stand-in."""
        return self._pattern.sub(lambda match: stand_in(match[0]), text)


@lru_cache(maxsize=64)
def _spelling(tokens: tuple[tuple[str, int], ...], unknown: int | None) -> _Spelling:
    return _Spelling(tokens, unknown)


def _whole(text: str, stand_in: StandIn) -> str:
    """Replace a text by one stand-in; the white space around it stays."""
    stripped = text.strip()
    return text.replace(stripped, stand_in(stripped)) if stripped else text


def _unseen(text: str, stand_in: StandIn) -> str:
    """Replace every text by the same letter."""
    return chr(_SPARE.stop) if text.strip() else text


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """Change all texts in a message, except field names and the fields that identify the message."""
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
    """The length of the longest common suffix of two texts, by binary search."""
    least, most = 0, min(len(first), len(second))
    while least < most:
        middle = (least + most + 1) // 2
        if first[len(first) - middle :] == second[len(second) - middle :]:
            least = middle
        else:
            most = middle - 1
    return least


def _is_name(key: object, value: object) -> bool:
    """Whether a field identifies a message or a part of it, such as "role": templates compare these fields."""
    return (
        key in ("role", "type", "id", "tool_call_id") and isinstance(value, str) and bool(re.fullmatch(r"\w+", value))
    )


def _spare_letters(messages: Sequence[object]) -> Iterator[str]:
    """The letters that no message contains; the messages are searched when the first letter is asked for."""
    letters = (letter for text in _strings_in(messages) if not text.isascii() for letter in text)
    held = {letter for letter in letters if ord(letter) in _SPARE}
    yield from (chr(code) for code in _SPARE if chr(code) not in held)


def _strings_in(value: object) -> Iterator[str]:
    """All texts in a nested value, in any order."""
    left = [value]
    while left:
        match left.pop():
            case str(text):
                yield text
            case Mapping() as items:
                left += [*items.keys(), *items.values()]
            case list() | tuple() as items:
                left += items
