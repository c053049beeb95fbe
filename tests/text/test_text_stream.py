"""Streamed text: whole characters only, nothing of a stop text, and in the end everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import SupportsIndex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from am_memory.text.text_stream import REPLACEMENT, TextStream

Decode = Callable[[Sequence[int]], str]
TEXTS = ["plain", "naïve café", "猫が好き。", "👩‍🚀 and 🇪🇺, e\u0301", "mixed 猫 👍🏽 ok", "\ufffd is a character too"]

quickly = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def decode(byte_tokenizer: PreTrainedTokenizerBase) -> Decode:
    """One token a byte; special tokens are skipped, as a session does."""
    return lambda ids: str(byte_tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    """All that a stream gives out, until it ends or is stopped."""
    given_out = []
    for token in tokens:
        given_out.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*given_out, stream.finish()]


def multi_byte_decode(tokens: Sequence[int]) -> str:
    """A tokenizer of ten bytes of 猫猫猫 in tokens of two and three bytes, none of which is a character."""
    data = "猫猫猫".encode()
    parts = [data[:2], data[2:5], data[5:7], data[7:9]]
    return b"".join(parts[token] for token in tokens).decode(errors="replace")


# Characters


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_whole_or_not_at_all(decode: Decode, text: str) -> None:
    given_out = pieces(TextStream(decode), list(text.encode()))
    assert "".join(given_out) == text
    assert all(REPLACEMENT not in piece for piece in given_out) or REPLACEMENT in text


def test_a_character_comes_with_its_last_byte(decode: Decode) -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in "a👍b".encode()] == ["a", "", "", "", "👍", "b"]


def test_characters_may_end_in_the_middle_of_a_token() -> None:
    assert pieces(TextStream(multi_byte_decode), range(4)) == ["", "", "", "猫猫猫", ""]


def test_half_a_character_is_given_out_when_the_stream_ends(decode: Decode) -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in "ok 👍".encode()[:-1]][-3:] == ["", "", ""]
    assert stream.finish() == REPLACEMENT


def test_bytes_that_are_no_character_do_not_stop_the_stream(decode: Decode) -> None:
    assert "".join(pieces(TextStream(decode), [*b"a\xff\xfeb", *"é".encode()])) == "a\ufffd\ufffdbé"


def test_special_tokens_are_silent(decode: Decode, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    end = byte_tokenizer.eos_token_id
    assert pieces(TextStream(decode), [end, *b"a", end, *b"b", end]) == ["", "a", "", "b", "", ""]


def test_a_leading_space_is_not_lost() -> None:
    """Decoders of SentencePiece drop the space of the first token: alone, every word would lose its own."""
    words = ["▁The", "▁owl", "s", "▁see"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    assert pieces(TextStream(decode), range(4)) == ["The", " owl", "s", " see", ""]


@quickly
@given(data=st.binary(max_size=60) | st.text(max_size=20).map(str.encode))
def test_the_pieces_are_the_text_of_all_tokens(decode: Decode, data: bytes) -> None:
    assert "".join(pieces(TextStream(decode), list(data))) == decode(list(data))


def test_each_token_is_decoded_with_little_before_it(decode: Decode) -> None:
    """The cost of a token must not grow with the text."""
    longest = 0

    def counted(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    pieces(TextStream(counted), list(("猫 and owl 👍 " * 30).encode()))
    assert longest <= 5


# Stop texts


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("one two three", ["three", "two"], "one "),
        ("one", ["one"], ""),
        ("aaaab", ["aab"], "aa"),
        ("a\n\nb", ["\n\n"], "a"),
        ("好猫猫好", ["猫好"], "好猫"),
        ("one two", [""], "one two"),
        ("abcabd!", ["abd"], "abc"),
        ("ends with a stop that never comes <|", ["<|end|>"], "ends with a stop that never comes <|"),
    ],
)
def test_text_ends_before_the_stop(decode: Decode, text: str, stop: list[str], expected: str) -> None:
    assert "".join(pieces(TextStream(decode, stop), list(text.encode()))) == expected


def test_what_may_begin_a_stop_is_held_back(decode: Decode) -> None:
    stream = TextStream(decode, ["\nUser:"])
    given_out = [stream.push(byte) for byte in b"Hi.\nUses"]
    assert given_out == ["H", "i", ".", "", "", "", "", "\nUses"]


def test_what_is_held_back_is_given_out_at_the_end(decode: Decode) -> None:
    stream = TextStream(decode, ["\nUser:"])
    assert "".join(stream.push(byte) for byte in b"Hi.\nUse") == "Hi."
    assert stream.finish() == "\nUse"
    assert not stream.is_stopped


def test_nothing_comes_after_a_stop(decode: Decode) -> None:
    stream = TextStream(decode, ["stop"])
    assert "".join(stream.push(byte) for byte in b"go stop go") == "go "
    assert stream.is_stopped
    assert stream.finish() == ""


def test_a_stop_may_lie_across_tokens_of_several_characters() -> None:
    words = ["the e", "nd of", " it"]
    stream = TextStream(lambda tokens: "".join(words[token] for token in tokens), ["end"])
    assert [stream.push(token) for token in range(2)] == ["the ", ""]
    assert stream.is_stopped


@quickly
@given(
    text=st.text(alphabet="ab猫", max_size=30),
    stop=st.lists(st.text(alphabet="ab猫", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_are_the_text_up_to_the_first_stop_that_is_complete(
    decode: Decode, text: str, stop: list[str]
) -> None:
    stream = TextStream(decode, stop)
    actual = "".join(pieces(stream, list(text.encode())))
    seen = next((text[:end] for end in range(len(text) + 1) if any(each in text[:end] for each in stop)), None)
    expected = text if seen is None else seen[: min(seen.find(each) for each in stop if each in seen)]
    assert actual == expected
    assert stream.is_stopped == (seen is not None)


class CountedText(str):
    """Counts how often it is looked into."""

    looks = 0

    def __getitem__(self, place: SupportsIndex | slice) -> str:
        CountedText.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("pattern", ["a", "ab", "aab", "abacabad"])
@pytest.mark.parametrize("ending", ["", "!", "a"])
def test_a_stop_is_looked_into_once_a_character_however_much_of_it_is_held_back(pattern: str, ending: str) -> None:
    """Each beginning of it was compared at each token: the square of what is held back, for every token."""
    CountedText.looks = 0
    text = (pattern * 2000)[:2000] + ending
    stream = TextStream(lambda tokens: "".join(text[token] for token in tokens), [CountedText(pattern * 4000)])
    assert "".join(pieces(stream, range(len(text)))) == text
    assert CountedText.looks <= 4 * (len(text) + len(pattern * 4000))
