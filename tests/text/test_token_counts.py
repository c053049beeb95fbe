"""Counts of tokens: exact ones are the tokenizer's own on any text, estimates say that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import EncodingNotFound, UnsupportedOperation
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.text import token_counts
from am_memory.text.token_counts import (
    ByteLevelCounter,
    EstimateCounter,
    TokenCounter,
    TokenizerCounter,
    tiktoken_counter,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
CORPUS = Path(__file__).read_text(encoding="utf-8") + "猫が好きです。日本語 naïve 1234 2026 \n\n\t   " * 20
MARK = "<|im_end|>"

PIECES = [
    "a",
    "B",
    "the",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "234",
    "'s",
    "'LL",
    "é",
    "e\u0301",
    "猫",
    "👍🏽",
    ".",
    "!=",
    "<|",
    MARK,
]
any_text = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)
quickly = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])


SPLITS = {
    "gpt2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "runs of digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]),
    "llama3": split(LLAMA3),
    "a regex that leaves gaps": split(r"\p{L}+|\p{N}"),
}


def train(
    pre_tokenizer: pre_tokenizers.PreTokenizer = GPT2,
    *,
    alphabet: list[str] | None = None,
    normalizer: normalizers.Normalizer | None = None,
    marks: tuple[AddedToken, ...] = (AddedToken(MARK, special=True, normalized=False),),
) -> Tokenizer:
    """A byte-level BPE of 600 tokens, learned from this file."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    backend.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters, show_progress=False)
    )
    backend.add_special_tokens(list(marks))
    return backend


def splitting(backend: Tokenizer, regex: str) -> Tokenizer:
    """The tokenizer with another regex than it was trained with."""
    backend.pre_tokenizer = split(regex)
    return backend


def wrap(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def changed(backend: Tokenizer, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerBase:
    """The tokenizer after a change of its `tokenizer.json`."""
    content = json.loads(backend.to_str())
    change(content)
    return wrap(Tokenizer.from_str(json.dumps(content)))


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module", params=sorted(SPLITS))
def trained(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, ByteLevelCounter]:
    tokenizer = wrap(train(SPLITS[request.param]))
    return tokenizer, ByteLevelCounter(tokenizer)


@pytest.fixture(scope="module")
def normalising() -> tuple[PreTrainedTokenizerBase, ByteLevelCounter]:
    tokenizer = wrap(train(SPLITS["llama3"], normalizer=normalizers.NFC()))
    return tokenizer, ByteLevelCounter(tokenizer)


@pytest.fixture(scope="module")
def byte_counter(byte_tokenizer: PreTrainedTokenizerBase) -> ByteLevelCounter:
    return ByteLevelCounter(byte_tokenizer)


@pytest.fixture(scope="module")
def demo_counter(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> ByteLevelCounter:
    return ByteLevelCounter(demo[1])


# By the model's tokenizer


@pytest.mark.parametrize("text", ["", "plain", "猫", f"a{MARK}\n"])
def test_the_tokenizer_counts_what_the_memory_reads(engine: TransformersEngine, text: str) -> None:
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1024))
    counter: TokenCounter = TokenizerCounter(memory.tokenize)
    assert counter.is_exact
    assert counter.count(text) == len(memory.tokenize(text))


# By tiktoken, exactly


@quickly
@given(text=any_text)
def test_tiktoken_gives_the_ids_of_the_byte_tokenizer(
    byte_tokenizer: PreTrainedTokenizerBase, byte_counter: ByteLevelCounter, text: str
) -> None:
    assert byte_counter.encoding.encode(text, allowed_special="all") == ids(byte_tokenizer, text)


@quickly
@given(text=any_text)
def test_the_ids_are_the_tokenizers_on_any_text(
    trained: tuple[PreTrainedTokenizerBase, ByteLevelCounter], text: str
) -> None:
    tokenizer, counter = trained
    assert counter.encode(text) == ids(tokenizer, text)


@pytest.mark.model
@quickly
@given(text=any_text)
@example("\x04a\x04")  # its vocabulary lacks this byte
@example("\U00011de0\U00040000")  # numbers of Unicode 17, and a character of no version
def test_the_ids_are_the_demo_models_on_any_text(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase], demo_counter: ByteLevelCounter, text: str
) -> None:
    assert demo_counter.encode(text) == ids(demo[1], text)


@pytest.mark.model
def test_plain_texts_of_the_demo_model_do_not_reach_its_tokenizer(
    demo_counter: ByteLevelCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_counter, "_tokenizer", None)
    assert demo_counter.count(CORPUS) > 1000


def test_a_counter_counts_its_ids(trained: tuple[PreTrainedTokenizerBase, ByteLevelCounter]) -> None:
    tokenizer, counter = trained
    assert counter.is_exact
    assert counter.count(CORPUS) == len(ids(tokenizer, CORPUS))


def test_words_are_merged_as_the_tokenizer_merges_them() -> None:
    counter = ByteLevelCounter(wrap(train()))
    assert counter.count("tokenizer") < len("tokenizer")


@quickly
@given(text=any_text)
@example("a\u0338\u0301 <\u0338 \u212b")
@example(f"{MARK}\u0338")  # normalised as a whole, the mark would be lost
def test_text_that_the_tokenizer_normalises_is_counted_as_normalised(
    normalising: tuple[PreTrainedTokenizerBase, ByteLevelCounter], text: str
) -> None:
    tokenizer, counter = normalising
    assert counter.encode(text) == ids(tokenizer, text)


def test_bytes_that_the_vocabulary_lacks_are_left_to_the_tokenizer() -> None:
    tokenizer = wrap(train(alphabet=[]))
    counter = ByteLevelCounter(tokenizer)
    for text in ("\x04", "the\x04 the\x04", "\x16猫", "ж"):
        assert counter.encode(text) == ids(tokenizer, text)


def test_a_run_of_spaces_that_the_regex_engine_gives_up_on_is_counted() -> None:
    tokenizer = wrap(train())
    counter, text = ByteLevelCounter(tokenizer), " " * 1_000_000 + "x"
    with pytest.raises(ValueError, match="stack"):
        counter.encoding.encode(text)
    assert counter.count(text) == len(ids(tokenizer, text))


def test_words_that_are_tokens_need_no_merges() -> None:
    """As in Llama 3: `ignore_merges` finds a token that its merges do not build."""

    def take_apart(content: dict[str, Any]) -> None:
        content["model"] |= {"ignore_merges": True, "merges": [["a", "b"], ["ab", "c"]]}
        byte_ids = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        content["model"]["vocab"] = byte_ids | {"ab": 256, "abc": 257, "wxyz": 258}
        content["added_tokens"] = []

    tokenizer = changed(train(), take_apart)
    counter = ByteLevelCounter(tokenizer)
    assert counter.encode("wxyz") == [258]
    for text in ("wxyz", "wxyzz", "abc", "abcabc", " wxyz"):
        assert counter.encode(text) == ids(tokenizer, text)


# What tiktoken cannot follow


def test_the_first_text_that_differs_is_named() -> None:
    """`$` is the end of a line to the tokenizer's regex engine, and the end of the text to tiktoken's."""
    tokenizer = wrap(splitting(train(), r"the$|[\s\S]"))
    with pytest.raises(UnsupportedOperation, match=r"tiktoken reads 'the\\nthe' as .*TokenizerCounter"):
        ByteLevelCounter(tokenizer)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (train(pre_tokenizers.Metaspace()), "does not split as byte-level BPE does"),
        (train(pre_tokenizers.ByteLevel(add_prefix_space=True)), "does not split as byte-level BPE does"),
        (train(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), GPT2])), "more steps than one regex"),
        (train(normalizer=normalizers.Lowercase()), "Lowercase"),
        (train(marks=(AddedToken("<a>", lstrip=True),)), "'<a>' depends on the characters around it"),
        (train(marks=(AddedToken("<a"), AddedToken("<b"), AddedToken("<a>"))), "'<a' begins '<a>'"),
        (splitting(train(), r"\p{In_Greek_and_Coptic}|[\s\S]"), "does not take its pattern"),
    ],
    ids=["metaspace", "prefix space", "punctuation", "lowercase", "strips", "marks", "regex"],
)
def test_another_kind_of_tokenizer_is_refused(backend: Tokenizer, reason: str) -> None:
    with pytest.raises(UnsupportedOperation, match=reason):
        ByteLevelCounter(wrap(backend))


def test_merges_out_of_order_are_refused() -> None:
    tokenizer = changed(train(), lambda content: content["model"]["merges"].reverse())
    with pytest.raises(UnsupportedOperation, match="not in the order of its merges"):
        ByteLevelCounter(tokenizer)


def test_a_vocabulary_that_is_not_bpe_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = GPT2
    with pytest.raises(UnsupportedOperation, match="not BPE but WordLevel"):
        ByteLevelCounter(wrap(backend))


# Estimates


@pytest.fixture
def bytes_encoding() -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={MARK: 256})


def test_a_named_encoding_estimates(bytes_encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "o200k_base", bytes_encoding)
    counter: TokenCounter = tiktoken_counter("o200k_base")
    assert not counter.is_exact
    assert counter.count(f"猫 {MARK}") == len(f"猫 {MARK}".encode())


def test_an_estimate_reads_a_long_text_in_pieces(
    bytes_encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_counts, "CHUNK_CHARACTERS", 7)
    for length in (0, 6, 7, 8, 500):
        assert EstimateCounter(bytes_encoding).count("a" * length) == length


def test_an_unknown_encoding_is_not_found() -> None:
    with pytest.raises(EncodingNotFound, match="no encoding 'o1'; it has .*o200k_base"):
        tiktoken_counter("o1")


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("Hash mismatch")])
def test_without_its_file_an_encoding_is_not_found(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(path: str) -> bytes:
        raise error

    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "cl100k_base", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    with pytest.raises(EncodingNotFound, match=rf"cl100k_base .*{error}.*TIKTOKEN_CACHE_DIR"):
        tiktoken_counter("cl100k_base")
