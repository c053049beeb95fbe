"""Texts as tokenizers take them. Half a surrogate pair is no character: libraries end in errors of their own over it,
or read other text in its place."""

from __future__ import annotations

from am_memory.errors import InvalidInput

SHOWN = 20
"""Characters before and after the one that is wrong."""


def utf8(text: str) -> bytes:
    """A text's bytes.

    Raises:
        InvalidInput: it holds half a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise InvalidInput(
            f"character {at} of a text, {text[at]!a} in {text[max(at - SHOWN, 0) : at + SHOWN]!a}, is half a surrogate "
            'pair, which is no character: decode the text anew, or leave it out with text.encode(errors="ignore")'
        ) from error
