"""GGUF files whose vocabulary cannot be right: refused by name, by both engines, before either library reads them.

llama.cpp ends the process over two tokens of one text, or a byte that has none, which nobody can catch.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from am_memory.engines.gguf_header import BadHeader, Header, read_header, require_known_merges, require_vocabulary
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers.loading import load_model
from am_memory.errors import ModelNotFound, UnsupportedModel

TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
MODEL, SCORES = "tokenizer.ggml.model", "tokenizer.ggml.scores"
IDS = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding", "unknown", "eot", "fim_pre")]
ABSENT = object()


@pytest.fixture(scope="session")
def header(tiny_gguf: Path) -> Header:
    return read_header(tiny_gguf)


@pytest.fixture
def rewritten(tiny_gguf: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """The tiny model with other values under some keys; `ABSENT` for none."""

    def rewrite(changes: dict[str, Any]) -> Path:
        reader = gguf.GGUFReader(tiny_gguf)
        writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "llama")
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture" and key not in changes:
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        for key, value in changes.items():
            if value is not ABSENT:
                add(writer, key, value)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "bad.gguf"

    return rewrite


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        str: GGUFValueType.STRING,
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.INT64,
        float: GGUFValueType.FLOAT32,
    }
    if isinstance(value, list):
        kinds |= {bytes: GGUFValueType.STRING, int: GGUFValueType.INT32}
        kind = kinds[type(value[0])]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
    elif isinstance(value, int) and 0 <= value < 2**32:
        writer.add_key_value(key, value, GGUFValueType.UINT32)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def tokens() -> list[str]:
    return [f"t{index}" for index in range(260)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({MODEL: ABSENT}, "has no vocabulary"),
    "model none": ({MODEL: "none"}, "has no vocabulary"),
    "model a number": ({MODEL: 7}, "has no vocabulary"),
    "no tokens": ({TOKENS: ABSENT}, "no list of tokens"),
    "tokens one text": ({TOKENS: "owl"}, "no list of tokens"),
    "tokens numbers": ({TOKENS: [1, 2, 3]}, "no list of tokens"),
    "one token too few": ({TOKENS: tokens()[:-1]}, "259 tokens, and its embeddings are for 260"),
    "many tokens too many": ({TOKENS: [*tokens(), *(f"u{i}" for i in range(999))]}, "1259 tokens, and its embeddings"),
    "a token twice": ({TOKENS: [*tokens()[:-1], "t7"]}, "tokens 7 and 259 of its vocabulary are both b't7'"),
    "all tokens one": ({TOKENS: ["owl"] * 260}, "tokens 0 and 1"),
    "no text": ({TOKENS: [*tokens()[:-1], b"\xff\xfe"]}, "not in UTF-8"),
    "types too few": ({TYPES: [1] * 9}, "token_type has 9 entries for 260 tokens"),
    "types texts": ({TYPES: ["a"] * 260}, "token_type is not an array of int32"),
    "types fractions": ({TYPES: [1.5] * 260}, "token_type is not an array of int32"),
    "types of one byte": ({TYPES: [True] * 260}, "token_type is not an array of int32"),
    "types one number": ({TYPES: 1}, "token_type is not an array of int32"),
    "scores too many": ({SCORES: [0.5] * 261}, "scores has 261 entries"),
    "scores no numbers": ({SCORES: [float("nan")] * 260}, "scores has entries that are not finite"),
    "scores texts": ({SCORES: ["a"] * 260}, "scores is not an array"),
    "no merges": ({MERGES: ABSENT}, "no list of merges"),
    "merges numbers": ({MERGES: [1, 2]}, "no list of merges"),
    "a merge of one": ({MERGES: ["owl"]}, "merge 0 of its vocabulary is b'owl'"),
    "a merge of nothing": ({MERGES: ["a b", "a "]}, "merge 1 of its vocabulary is b'a '"),
    "an empty merge": ({MERGES: [""]}, "merge 0"),
    "bytes without tokens": ({MODEL: "llama", SCORES: [0.0] * 260, TOKENS: tokens()}, "lacks tokens for 256 bytes"),
}
for _key in IDS:
    BAD[f"{_key} past the end"] = ({_key: 260}, f"{_key} is 260, outside its vocabulary of 260")
    BAD[f"{_key} far past the end"] = ({_key: 2**40}, f"{_key} is {2**40}, outside")
    BAD[f"{_key} below zero"] = ({_key: -7}, f"{_key} is -7, outside")
    BAD[f"{_key} a text"] = ({_key: "owl"}, f"{_key} is 'owl', which is not a token id")
    BAD[f"{_key} a fraction"] = ({_key: 1.5}, f"{_key} is 1.5, which is not a token id")
    BAD[f"{_key} several"] = ({_key: [1, 2]}, f"{_key} is .* which is not a token id")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_vocabulary_is_refused_by_both_engines(
    rewritten: Callable[[dict[str, Any]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They were bare RuntimeErrors, IndexErrors and OverflowErrors, or the end of the process."""
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path / "cache"))
    changes, reason = BAD[name]
    path = rewritten(changes)
    with pytest.raises(ModelNotFound, match=f"cannot be read by llama.cpp: .*{reason}"):
        LlamaCppEngine(path)
    with pytest.raises(ModelNotFound, match=f"cannot be read as a GGUF model: .*{reason}"):
        load_model(path, device="cpu")


def test_merges_of_what_is_no_token_are_refused_of_transformers(
    rewritten: Callable[[dict[str, Any]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelNotFound, match=r"merge 0 of its vocabulary is b'owl bread', and b'owl' is not a token"):
        load_model(rewritten({MERGES: ["owl bread"]}), device="cpu")


def test_a_model_without_a_special_token_is_none_the_worse(rewritten: Callable[[dict[str, Any]], Path]) -> None:
    """Files say -1 for none, which without a sign is a large number."""
    engine = LlamaCppEngine(rewritten({IDS[2]: 2**32 - 1}), kv_type="f32")
    assert engine.forward(engine.new_cache(), [1, 2, 3], num_logits=1).isfinite().all()


def test_a_damaged_header_is_refused_whatever_is_wrong_with_it(tiny_gguf: Path, header: Header, tmp_path: Path) -> None:
    """2,000 files with some bytes of the header changed, cut off or repeated: read as a header, or refused by name."""
    content, path, chosen = tiny_gguf.read_bytes(), tmp_path / "damaged.gguf", random.Random(0)
    head = len(content) - sum(4 * int(np.prod(shape)) for shape in header.shapes.values())
    refused = 0
    for _ in range(2000):
        damaged = bytearray(content[:head])
        for _ in range(chosen.choice([1, 1, 2, 8])):
            place = chosen.randrange(4, head - 8)
            match chosen.randrange(4):
                case 0:
                    damaged[place] ^= 1 << chosen.randrange(8)
                case 1:
                    damaged[place : place + 8] = struct.pack("<Q", chosen.choice([0, 2**31, 2**63, 2**64 - 1]))
                case 2:
                    del damaged[place:]
                case 3:
                    damaged[place:place] = damaged[place : place + chosen.randrange(64)]
            damaged = damaged.ljust(head, b"\0")
        path.write_bytes(damaged)
        try:
            read = read_header(path)
            require_vocabulary(read)
            require_known_merges(read)
        except BadHeader:
            refused += 1
    assert refused > 500


def test_a_vocabulary_of_any_mixture_of_values_is_refused_or_right(header: Header) -> None:
    """3,000 mixtures of values of all types under the keys of a vocabulary."""
    chosen, values = random.Random(1), [
        ABSENT, None, "", "gpt2", "llama", "none", 0, -1, 259, 260, 2**64 - 1, 1.5, float("nan"), True, [], [b""],
        [b"a"] * 260, [b"a b"], header.metadata[TOKENS], [b"x%d" % i for i in range(260)], np.zeros(260, np.float32),
        np.zeros(260, np.int32), np.zeros(3, np.int8), np.full(260, np.inf, np.float64),
    ]  # fmt: skip
    keys = [MODEL, TOKENS, TYPES, MERGES, SCORES, *IDS]
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        metadata = dict(header.metadata)
        for key in chosen.sample(keys, chosen.choice([1, 1, 2, 3])):
            metadata[key] = chosen.choice(values)
            if metadata[key] is ABSENT:
                del metadata[key]
        try:
            require_vocabulary(Header(metadata, header.shapes))
            outcomes[True] += 1
        except BadHeader:
            outcomes[False] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGU", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"GGUF" + b"\0" * 100])
def test_what_is_hardly_a_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hardly.gguf"
    path.write_bytes(content)
    for load in (LlamaCppEngine, lambda path: load_model(path, device="cpu")):
        with pytest.raises((ModelNotFound, UnsupportedModel), match="cannot be read"):
            load(path)
