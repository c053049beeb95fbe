"""Words: the rare words that a text shares with a span, by their letters.

A question often says a word of what it asks for. Search heads find also what is said in other words, but their queries
come from a context that has lost much; words do not depend on it. Knows no attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from am_memory.engines.base import Engine
from am_memory.recall.search_heads import SPAN_TOKENS

WORD_WEIGHT = 0.25
"""What a nat of rarity counts beside a nat of attention; 0.15 to 0.5 find about as much (docs/log.md)."""
STEM_LETTERS = 5
"""Tokens that begin with the same letters, so many, are the same word."""
NO_WORD = -1
"""The number of a token without letters and digits."""


_unused, _number_of_word = count(), dict[str, int]()  # one for all engines, since runs keep the numbers
_numbers: WeakKeyDictionary[Engine, dict[int, int]] = WeakKeyDictionary()  # of each engine's tokens


def word_numbers(engine: Engine, token_ids: Sequence[int]) -> Tensor:
    """The number of each token's word, (num_tokens,) int64: equal for equal words; `NO_WORD` for punctuation.

    Upper and lower case, spaces and word endings make no difference. A word of several tokens counts as several.
    """
    known = _numbers.setdefault(engine, {})
    different, where = torch.tensor(token_ids, dtype=torch.int64).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    for token_id in different.tolist():
        if token_id not in known:
            known[token_id] = _number(engine, token_id)
    return torch.tensor([known[token_id] for token_id in different.tolist()], dtype=torch.int64)[where]


def _number(engine: Engine, token_id: int) -> int:
    """The number of a token's word."""
    text = engine.decode([token_id]).strip()
    if "\ufffd" in text:
        word = f"\ufffd{token_id}"  # a part of a letter
    elif any(letter.isalnum() for letter in text):
        word = text.casefold()[:STEM_LETTERS]
    else:
        return NO_WORD
    return _number_of_word.setdefault(word, next(_unused))


def word_scores(
    passages: Sequence[Tensor], runs: Iterable[tuple[Tensor, int]], num_spans: int, beginnings: Sequence[int] = ()
) -> Tensor:
    """What each span scores for the words that it or a span beside it shares with a passage.

    A word that stands near one span in n adds log(n) nats, times `WORD_WEIGHT`, however often it stands there.

    Args:
        passages: numbers of the words of each passage.
        runs: numbers of the words of consecutive tokens, and the place of the first one.
        num_spans: of `SPAN_TOKENS` places each.
        beginnings: spans at which another text begins, so that the span before it is not beside it.

    Returns:
        (num_passages, num_spans) float32, in nats; 0 where no run is.
    """
    asked = torch.cat([torch.tensor([], dtype=torch.int64), *passages]).unique()  # type: ignore[no-untyped-call]
    asked = asked[asked != NO_WORD]
    stands, is_known = torch.zeros(len(asked), num_spans, dtype=torch.bool), torch.zeros(num_spans, dtype=torch.bool)
    for numbers, place in runs:
        is_known[place // SPAN_TOKENS : -(-(place + len(numbers)) // SPAN_TOKENS)] = True
        if len(asked):
            index = torch.searchsorted(asked, numbers).clamp_max(len(asked) - 1)
            found = (asked[index] == numbers).nonzero()[:, 0]
            stands[index[found], (found + place) // SPAN_TOKENS] = True
    is_joined = torch.ones(num_spans, dtype=torch.bool)  # to the span before it
    is_joined[list(beginnings)] = False
    near = stands.clone()
    near[:, 1:] |= stands[:, :-1] & is_joined[1:]
    near[:, :-1] |= stands[:, 1:] & is_joined[1:]
    near &= is_known
    rarity = WORD_WEIGHT * (is_known.sum().clamp_min(1) / near.sum(dim=1).clamp_min(1)).log()
    counts = torch.stack([torch.isin(asked, passage) for passage in passages]).float()
    return (counts * rarity) @ near.float()
