"""Tool calls parsed from a model's answer while it is generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NoReturn

from am_memory.conversations.reasoning import END_OF_THINK, THINK
from am_memory.conversations.tool_calls.formats import ToolFormat
from am_memory.engines.base import Engine
from am_memory.text.text_stream import TextStream, overlap

CALL_KEYS = ("name", "arguments", "parameters", "function", "type", "id")
"""A bare object may be a call if its first key is one of these."""


@dataclass(frozen=True)
class ParsedCall:
    """A valid call."""

    name: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class InvalidCall:
    """Text that was meant as a call, and the reason why it is not one."""

    text: str
    error: str


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed answer.

    Attributes:
        content: the text beside the calls, reasoning included.
        tool_calls: the valid calls, in the order of the answer.
        invalid: the invalid calls.
    """

    content: str
    tool_calls: list[ParsedCall]
    invalid: list[InvalidCall]


AnswerEvent = str | ParsedCall | InvalidCall


def parse(text: str, format: ToolFormat) -> ParsedAnswer:
    """Parse an answer. No text makes this raise.

    Args:
        text: the answer with the markers of the format; see `answer_text`.
    """
    stream = ToolCallStream(format)
    events = [*stream.push(text), *stream.finish()]
    return ParsedAnswer(
        content="".join(event for event in events if isinstance(event, str)),
        tool_calls=[event for event in events if isinstance(event, ParsedCall)],
        invalid=[event for event in events if isinstance(event, InvalidCall)],
    )


def answer_text(engine: Engine, markers: Sequence[str], stop: Sequence[str] = ()) -> TextStream:
    """Decode an answer token by token, for a `ToolCallStream` or a `ReasoningStream`.

    Some vocabularies have the markers as special tokens, which `Piece.text` leaves out. This stream keeps the markers
    and leaves out all other special tokens, the end of the turn included.

    Args:
        markers: those of the tool format, and the tags of reasoning.
        stop: texts that end the answer, as in `Sampling`.
    """
    ids = (engine.encode(marker) for marker in markers)
    kept = {found[0] for found in ids if len(found) == 1}
    return TextStream(partial(_decode, engine, kept), stop)


def _decode(engine: Engine, markers: set[int], token_ids: Sequence[int]) -> str:
    kept = [token_id for token_id in token_ids if token_id not in engine.info.eos_token_ids]
    return "".join(
        engine.decode([*run], skip_special=not is_marker) for is_marker, run in groupby(kept, markers.__contains__)
    )


class ToolCallStream:
    """Parses an answer while it is generated.

    Content is returned once no later text can turn it into a call. White space beside a call is dropped. A call is
    returned as soon as its arguments are complete. If an answer opens with <think>, everything up to </think> is
    content. The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._text = ""  # not parsed yet
        self._blank = ""  # white space that is held back: it is dropped if a call follows
        self._events: list[AnswerEvent] = []
        self._step = self._start
        self._is_last = False
        self._is_after_call = False  # no content has followed the last call
        self._is_list = False
        self._name: str | None = None  # of the call, in formats that write it before the arguments
        self._object = _ObjectScanner()
        self._marker = re.compile("|".join(map(re.escape, format.markers)) or r"(?!)")

    def push(self, text: str) -> list[AnswerEvent]:
        """Add some text; returns the content and the calls that are certain now, in order."""
        self._text += text
        return self._run()

    def finish(self) -> list[AnswerEvent]:
        """End the answer; returns what was held back."""
        self._is_last = True
        events = self._run()
        if self._blank and not self._is_after_call:
            events.append(self._blank)
        self._blank = ""
        return events

    def _run(self) -> list[AnswerEvent]:
        while self._step():
            pass
        events, self._events = self._events, []
        return list(_joined(events))

    # Each step parses some of the text and sets the next step. It returns False if it needs more text.

    def _start(self) -> bool:
        text = self._text.lstrip()
        if len(text) < len(THINK) and THINK.startswith(text) and not self._is_last:
            return False
        self._step = self._think if text.startswith(THINK) else self._content
        return True

    def _think(self) -> bool:
        end = self._text.find(END_OF_THINK)
        if end >= 0:
            self._emit_content(end + len(END_OF_THINK))
            self._step = self._content
            return True
        self._emit_content(len(self._text) - (0 if self._is_last else overlap(self._text, END_OF_THINK)))
        return False

    def _content(self) -> bool:
        found = self._marker.search(self._text)
        end = found.start() if found else len(self._text)
        if self._format.is_bare:
            for brace in re.finditer(r"\{", self._text[:end]):
                is_call = _begins_call(self._text[brace.start() :])
                if is_call is None and not self._is_last:
                    self._emit_content(brace.start())
                    return False
                if is_call:
                    self._emit_content(brace.start())
                    self._begin_object()
                    return True
        if found is None:
            keep = max((overlap(self._text, marker) for marker in self._format.markers), default=0)
            self._emit_content(end - (0 if self._is_last else keep))
            return False
        self._emit_content(end)
        self._take(len(found.group()))
        if found.group() == self._format.opening:
            self._is_list, self._step = False, self._body
        return True

    def _body(self) -> bool:
        """After the opening marker, or between two calls of a list."""
        self._text = self._text.lstrip()
        if not self._text:
            if self._is_last and not self._is_list:
                self._emit_invalid("", f"nothing follows {self._format.opening}")
            return False
        if self._text[0] == "{":
            self._begin_object()
        elif self._text[0] == ("," if self._is_list else "["):
            self._is_list = True
            self._take(1)
        elif self._text[0] == "]" and self._is_list:
            self._is_list, self._step = False, self._after
            self._take(1)
        elif "[ARGS]" in self._format.markers and not self._is_list:
            self._step = self._named
        else:
            self._step = self._garbage
        return True

    def _named(self) -> bool:
        """A name, then its arguments."""
        brace = self._text.find("{")
        if brace < 0 and not self._is_last:
            return False
        found = re.fullmatch(r"([^\s\[\]{}]+)\s*(\[CALL_ID\]\s*\w*\s*)?(\[ARGS\])?\s*", self._text[: max(brace, 0)])
        if found is None:
            self._step = self._garbage
        else:
            self._name = found.group(1)
            self._take(brace)
            self._begin_object()
        return True

    def _garbage(self) -> bool:
        """Text that is not a call, up to the next marker."""
        found = self._marker.search(self._text)
        if found is None and not self._is_last:
            return False
        self._emit_invalid(self._take(found.start() if found else len(self._text)), "this is no JSON object")
        return True

    def _begin_object(self) -> None:
        self._object = _ObjectScanner()
        self._step = self._arguments

    def _arguments(self) -> bool:
        """A JSON object: a whole call, or the arguments of a call whose name is known."""
        end = self._object.end(self._text)
        if end is None and not self._is_last:
            return False
        if end is None:
            self._cut_off()
            return True
        event = _to_call(self._text[:end], self._name)
        if self._format.is_bare and not _resembles_call(self._text[:end]):
            self._emit_content(end)
            self._step = self._content
            return True
        self._take(end)
        self._name = None
        self._emit_call(event)
        self._step = self._body if self._is_list else self._after
        return True

    def _cut_off(self) -> None:
        """The answer ended inside an object, or a broken string hid the end of the call."""
        found = self._marker.search(self._text)
        text = self._text[: found.start() if found else len(self._text)]
        if self._format.is_bare and '"name"' not in text:
            self._emit_content(len(text))
            self._step = self._content
            return
        self._take(len(text))
        self._emit_invalid(text, "the call is cut off, or a string or a brace in it is not closed")

    def _after(self) -> bool:
        """After a call: its closing marker, or the separator before the next call."""
        text = self._text.lstrip()
        closing = self._format.closing
        if closing:
            if closing.startswith(text) and not self._is_last:
                return False
            if text.startswith(closing) or (text and closing.startswith(text)):  # the answer may be cut off within it
                self._text = text[len(closing) :]
        elif self._format.is_bare:
            following = text.lstrip(";,").lstrip()
            if not following and not self._is_last:
                return False
            if following.startswith("{"):
                self._text = following
        self._step = self._content
        return True

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _emit_content(self, count: int) -> None:
        """Emit content. White space at its end is held back."""
        text = self._blank + self._take(count)
        content = text.rstrip()
        self._blank = text[len(content) :]
        if content:
            self._is_after_call = False
            self._events.append(content)

    def _emit_call(self, event: ParsedCall | InvalidCall) -> None:
        self._blank, self._is_after_call = "", True
        self._events.append(event)

    def _emit_invalid(self, text: str, error: str) -> None:
        """Emit an invalid call; content follows it."""
        name, self._name, self._is_list = self._name, None, False
        self._emit_call(InvalidCall(f"{name or ''}{text}".strip(), error))
        self._step = self._content


def _joined(events: Sequence[AnswerEvent]) -> Iterator[AnswerEvent]:
    for is_text, group in groupby(events, lambda event: isinstance(event, str)):
        if is_text:
            yield "".join(str(text) for text in group)
        else:
            yield from group


def _begins_call(text: str) -> bool | None:
    """Whether the object at the start of the text may be a call, by its first key; None: more text is needed."""
    found = re.match(r'\{\s*("(\w*)("?))?', text)
    assert found is not None
    _, key, quote = found.groups()
    if quote:
        return key in CALL_KEYS
    return None if found.end() == len(text) and any(name.startswith(key or "") for name in CALL_KEYS) else False


def _resembles_call(text: str) -> bool:
    """Whether a bare object is meant as a call, even a broken one. Other JSON is content."""
    return '"name"' in text and ('"arguments"' in text or '"parameters"' in text)


class _ObjectScanner:
    """Finds the end of a JSON object in a growing text."""

    _IN_STRING, _OUTSIDE = re.compile(r'\\.|"', re.DOTALL), re.compile(r'["{}]')

    def __init__(self) -> None:
        self._position, self._depth, self._is_string = 0, 0, False

    def end(self, text: str) -> int | None:
        """Where the object at the start of the text ends; None if it has not ended yet."""
        while found := (self._IN_STRING if self._is_string else self._OUTSIDE).search(text, self._position):
            self._position = found.end()
            if found.group() == '"':
                self._is_string = not self._is_string
            elif found.group() == "{":
                self._depth += 1
            elif found.group() == "}":
                self._depth -= 1
                if self._depth == 0:
                    return self._position
        self._position = max(self._position, len(text) - 1)  # the last character may begin an escape
        return None


def _to_call(text: str, name: str | None) -> ParsedCall | InvalidCall:
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
        call = {"name": name, "arguments": value} if name is not None else _unwrapped(value)
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False, parse_constant=_refuse)
        # Half a surrogate pair is not text, and 1e999 is not a number.
        json.dumps([call, arguments], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return InvalidCall(text if name is None else f"{name}{text}", f"not JSON: {error}")
    called = call.get("name")
    if not isinstance(called, str) or not called:
        return InvalidCall(text, 'there is no "name"')
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return InvalidCall(text, f"the arguments are {arguments!r}, not an object")
    return ParsedCall(called, arguments)


def _unwrapped(value: dict[str, object]) -> dict[str, object]:
    """The call in a `function` field, where some models write it, as OpenAI's API does."""
    function = value.get("function")
    return function if isinstance(function, dict) else value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
