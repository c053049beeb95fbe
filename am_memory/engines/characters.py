"""Encodes texts for tokenizers. Half a surrogate pair is not a character: libraries fail on it or misread it."""

from __future__ import annotations

from am_memory.errors import InvalidInput

SHOWN = 20
"""Characters that an error shows before and after the wrong one."""


def utf8(text: str) -> bytes:
    """Encode a text in UTF-8.

    Raises:
        InvalidInput: the text has half a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise InvalidInput(
            f"character {at} of a text, {text[at]!a} in {text[max(at - SHOWN, 0) : at + SHOWN]!a}, is half a surrogate "
            'pair, which is not a character: decode the text again, or drop it with text.encode(errors="ignore")'
        ) from error
