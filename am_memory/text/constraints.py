"""Constrained decoding: a grammar of llguidance decides which tokens an answer may have. Knows no session."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from am_memory.engines.abilities import OwnVocabulary
from am_memory.engines.base import Engine
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.text.json_schemas import GrammarSchema, for_grammar, left_out_by

CLOSERS = (r'"[\]}]*', r"[\]}]+", ",")
"""Patterns of tokens that end strings, lists and objects, or numbers; tried in this order."""

logger = logging.getLogger("am_memory")


AT_A_LIMIT = re.compile(r"too (big|large|long|many|complex|deep)|limit|fuel|; max is ", re.IGNORECASE)
"""Matches errors of llguidance about a grammar that is sound but too large."""
SMALLER_GRAMMAR = (
    ": the schema or grammar is too large: give it fewer properties, values of enum and levels, and shorter texts and "
    "patterns"
)
_IN_SCHEMA = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
"""The position in the generated grammar, which users do not see."""
_BOUNDS = re.compile(r"Failed to generate regex for \w+ range: min=(?:Some\((.+?)\)|None), max=(?:Some\((.+?)\)|None)")
_NOTHING_FOLLOWS = (
    'nothing can follow: a schema or rule that refers to itself alone, as {"$ref": "#"} does, has no value'
)


class Constraint(Protocol):
    """Decides which tokens one answer may have; every answer needs a new constraint.

    Attributes:
        left_out: keywords of JSON schemas that the grammar cannot express; check the answer for them afterwards.
    """

    left_out: frozenset[str]

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete: only the end of the turn may follow."""
        ...

    def mask(self, logits: Tensor, *, is_closing: bool = False) -> Tensor:
        """Return a copy of the logits in which every forbidden token is -inf.

        Args:
            logits: (vocab_size,) float32; it may be longer than the tokenizer's vocabulary.
            is_closing: few tokens are left: if an open string, list or object can be closed, allow only that.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Append a token to the answer.

        Raises:
            InvalidInput: the token is forbidden here; the constraint is unchanged.
        """
        ...

    def state(self) -> Any:
        """A snapshot of the position in the grammar, for `restore`; later tokens do not change it."""
        ...

    def restore(self, state: Any) -> None:
        """Return to a snapshot, as if later tokens had not been accepted."""
        ...


class _Grammar:
    """A grammar of llguidance and the position in it."""

    def __init__(
        self, vocabulary: _Vocabulary, grammar: str, schemas: Sequence[GrammarSchema] = (), *, is_closed: bool
    ) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._closers = vocabulary.closers if is_closed else ()
        self._matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        _require_sound(self._matcher, "llguidance does not take this grammar")
        left_out = left_out_by(self._matcher.get_grammar_warnings())
        self.left_out = frozenset(left_out).union(*(schema.left_out for schema in schemas))
        if self.left_out:
            _warn_of(self.left_out)

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self, logits: Tensor, *, is_closing: bool = False) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _require_sound(self._matcher, "the answer cannot follow this grammar further")
        is_allowed = torch.zeros(len(logits), dtype=torch.bool)
        unpacked = torch.from_numpy(np.unpackbits(bits, count=min(len(logits), 8 * len(bits)), bitorder="little"))
        is_allowed[: len(unpacked)] = unpacked
        for closers in self._closers if is_closing else ():
            if (closing := closers[is_allowed[closers]]).numel():
                is_allowed = torch.zeros_like(is_allowed).index_fill_(0, closing, True)
                break
        return logits.masked_fill(~is_allowed.to(logits.device, non_blocking=True), -torch.inf)

    def accept(self, token_id: int) -> None:
        if self.is_complete and token_id in self._tokenizer.eos_tokens:
            return  # llguidance has already stopped
        is_token = 0 <= token_id < self._tokenizer.vocab_size
        matcher = self._matcher.deep_copy()  # keeps snapshots unchanged; it takes a microsecond
        if not is_token or matcher.try_consume_tokens([token_id]) != 1:
            _require_sound(matcher, "the answer cannot follow this grammar further")
            raise InvalidInput(f"token id {token_id} does not follow the grammar: take one that mask() allows")
        self._matcher = matcher

    def state(self) -> LLMatcher:
        return self._matcher

    def restore(self, state: LLMatcher) -> None:
        self._matcher = state


def _require_sound(matcher: LLMatcher, problem: str) -> None:
    if matcher.is_error():
        # llguidance appends the lines of the grammar, or its whole state.
        reason = re.split(r"\n *\d+ \| |<state>", matcher.get_error())[0]
        way_out = SMALLER_GRAMMAR if AT_A_LIMIT.search(reason) else ""
        raise InvalidInput(f"{problem}: {_in_words_of_schemas(' '.join(reason.split()))}{way_out}")


def _in_words_of_schemas(reason: str) -> str:
    """Reword an error of llguidance for the author of a JSON schema."""
    if reason == "NoExtensionBias":
        return _NOTHING_FOLLOWS
    reason = _IN_SCHEMA.sub("the JSON schema: ", reason)
    if (found := _BOUNDS.search(reason)) is None:
        return reason
    bounds = " and ".join(
        f"{name} {value}" for name, value in zip(("minimum", "maximum"), found.groups(), strict=True) if value
    )
    return f"a grammar cannot hold a number with the {bounds}: give bounds of 18 digits at most"


def json_schema(engine: Engine, schema: Mapping[str, object]) -> Constraint:
    """Constrain an answer to one JSON value of a schema, on one line.

    An object gets no properties that the schema does not mention, unless the schema allows them explicitly. A `format`
    that the grammar does not know is ignored. Other keywords that the grammar cannot express are in `left_out`, and a
    warning names them once.

    Raises:
        InvalidInput: the schema is not JSON, or contradicts itself.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    held = for_grammar(schema)
    return lark(engine, f"start: {json_rule(held)}", [held])


def regex(engine: Engine, pattern: str) -> Constraint:
    """Constrain an answer to match a regular expression (Rust's syntax) from beginning to end.

    Raises:
        InvalidInput: this is not a regular expression, or it has lookaround or back-references.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    return _Grammar(_vocabulary(engine), LLMatcher.grammar_from_regex(pattern), is_closed=False)


def lark(engine: Engine, grammar: str, schemas: Sequence[GrammarSchema] = (), *, has_text: bool = False) -> Constraint:
    """Constrain an answer to a grammar in llguidance's dialect of Lark; its first rule is `start`.

    Args:
        schemas: the schemas that the grammar includes with `json_rule`. If there are any, JSON that is open is closed
            when few tokens are left.
        has_text: the grammar also has free text, in which quotes and brackets close nothing.

    Raises:
        InvalidInput: this is not a grammar.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    is_closed = bool(schemas) and not has_text
    return _Grammar(_vocabulary(engine), LLMatcher.grammar_from_lark(grammar), schemas, is_closed=is_closed)


@lru_cache(256)
def _warn_of(left_out: frozenset[str]) -> None:
    """Log the keywords that a grammar lacks, once for the same keywords."""
    logger.warning(
        "no grammar holds %s: answers follow the rest of the JSON schema, and are checked for these afterwards",
        ", ".join(sorted(left_out)),
    )


def json_rule(schema: GrammarSchema) -> str:
    """The right side of a rule of `lark` that matches a JSON value of this schema."""
    return f"%json {schema.text}"


@dataclass(frozen=True)
class _Vocabulary:
    """An engine's tokenizer for llguidance, and the ids of the tokens that match each of `CLOSERS`."""

    tokenizer: LLTokenizer
    closers: tuple[Tensor, ...]


_vocabularies: WeakKeyDictionary[Engine, _Vocabulary] = WeakKeyDictionary()
_building = threading.Lock()


def _vocabulary(engine: Engine) -> _Vocabulary:
    """The vocabulary of an engine, which takes about a second to build, once an engine."""
    with _building:
        if engine not in _vocabularies:
            tokens: Mapping[str, int]
            if isinstance(engine, OwnVocabulary):
                tokenizer, tokens = engine.grammar_tokenizer(), engine.token_texts()
            else:
                tokenizer = _build_tokenizer(engine)
                tokens = engine.tokenizer.get_vocab()  # type: ignore[attr-defined]  # as _build_tokenizer
            closers = (
                [token_id for token, token_id in tokens.items() if re.fullmatch(pattern, token)] for pattern in CLOSERS
            )
            _vocabularies[engine] = _Vocabulary(tokenizer, tuple(torch.tensor(ids).long() for ids in closers))
        return _vocabularies[engine]


def _build_tokenizer(engine: Engine) -> LLTokenizer:
    tokenizer: object = getattr(engine, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedOperation(
            f"answers of {engine.info.name} cannot be constrained: that takes a fast tokenizer of transformers, and "
            f"this {type(engine).__name__} has none"
        )
    if not engine.info.eos_token_ids:
        raise UnsupportedOperation(
            f"answers of {engine.info.name} cannot be constrained: no token ends its turn; set an eos_token"
        )
    num_tokens = max(engine.info.vocab_size, len(tokenizer))
    return from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=sorted(engine.info.eos_token_ids))
