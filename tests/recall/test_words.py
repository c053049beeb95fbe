"""Words: which tokens are the same word, and what the words of a passage add to a span's score."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

from am_memory.engines.transformers import TransformersEngine
from am_memory.recall.search_heads import SPAN_TOKENS
from am_memory.recall.words import NO_WORD, WORD_WEIGHT, word_numbers, word_scores


def span(*words: int) -> list[int]:
    """The words of a span that holds no others."""
    return [*words, *[NO_WORD] * (SPAN_TOKENS - len(words))]


def numbers(*spans: list[int]) -> Tensor:
    return torch.tensor([number for one in spans for number in one])


def test_case_spaces_and_endings_make_no_difference(engine: TransformersEngine) -> None:
    class Letters:
        """An engine of which words alone are needed."""

        texts = (" Painter", "painters", "PAINT", "pain", " ...", "\n", "7", "\ufffd", "\ufffd")

        def decode(self, token_ids: list[int]) -> str:
            return self.texts[token_ids[0]]

    found = word_numbers(Letters(), range(9)).tolist()  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2]
    assert found[4:6] == [NO_WORD, NO_WORD]
    assert len({*found[2:4], *found[6:9]}) == 5  # parts of letters are words of their own, by token
    assert NO_WORD not in found[6:]
    assert torch.equal(word_numbers(engine, [5, 9, 5]), word_numbers(engine, [5, 9, 5]))
    assert word_numbers(engine, []).tolist() == []


class Owls:
    """An engine whose every token is an owl, but for token 0, which is a sea."""

    def decode(self, token_ids: list[int]) -> str:
        return "owl" if token_ids[0] else "sea"


def test_an_engine_that_is_gone_leaves_no_model() -> None:
    """Its words held its method, so that the weights of every model that was ever searched stayed."""
    engine = Owls()
    word_numbers(engine, [1])  # type: ignore[arg-type]
    is_there = weakref.ref(engine)
    del engine
    gc.collect()
    assert is_there() is None


def test_engines_give_a_word_the_same_number() -> None:
    """A compact text keeps the numbers of its words, and another memory may mount it."""
    one = word_numbers(Owls(), [0, 1]).tolist()  # type: ignore[arg-type]
    assert word_numbers(Owls(), [2, 0]).tolist() == one[::-1]  # type: ignore[arg-type]


def test_a_rare_word_adds_more_than_one_that_many_spans_have() -> None:
    history = numbers(*[span(1)] * 4, span(1, 2), *[span(1)] * 4)
    (scores,) = word_scores([torch.tensor([1, 2, 3, NO_WORD])], [(history, 0)], 9)
    expected = torch.zeros(9)
    expected[3:6] = WORD_WEIGHT * math.log(9 / 3)  # the span with the word, and those beside it; all have word 1
    torch.testing.assert_close(scores, expected)


def test_each_passage_has_its_own_words() -> None:
    history = numbers(span(1, 1), span(), span(), span(2), span(), span())
    scores = word_scores([torch.tensor([1]), torch.tensor([2, 2]), torch.tensor([NO_WORD])], [(history, 0)], 6)
    assert [row.nonzero()[:, 0].tolist() for row in scores] == [[0, 1], [2, 3, 4], []]
    assert scores[0].max() == pytest.approx(WORD_WEIGHT * math.log(6 / 2))


def test_runs_may_begin_within_a_span_and_leave_gaps() -> None:
    """What is not in a run scores nothing, and does not count among all spans."""
    early, late = torch.tensor([1] + [NO_WORD] * 11), numbers(span(1), span(), span())
    (scores,) = word_scores([torch.tensor([1])], [(early, 20), (late, 4 * SPAN_TOKENS)], 9)
    assert scores.nonzero()[:, 0].tolist() == [1, 4, 5]
    assert scores[1] == pytest.approx(WORD_WEIGHT * math.log(4 / 3))


def test_another_text_is_not_beside_the_one_before_it() -> None:
    history = numbers(span(), span(1), span(2), span(), span())
    apart = word_scores([torch.tensor([1])], [(history, 0)], 5, beginnings=[2])
    assert apart[0].nonzero()[:, 0].tolist() == [0, 1]
    apart = word_scores([torch.tensor([2])], [(history, 0)], 5, beginnings=[2])
    assert apart[0].nonzero()[:, 0].tolist() == [2, 3]


def test_a_text_without_words_adds_nothing() -> None:
    history = numbers(span(1), span())
    assert not word_scores([torch.tensor([NO_WORD])], [(history, 0)], 2).any()
    assert not word_scores([torch.tensor([7])], [], 2).any()
