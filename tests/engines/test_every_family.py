"""Every causal and image-text family of the installed transformers works, or is refused with the reason in the table.

A run of the tests tries the popular families, and a quarter of the others: another one each day, so that four days see
all of them. AM_MEMORY_FAMILIES=all tries all at once, which takes about two minutes.
"""

from __future__ import annotations

import os
import time

import pytest
from every_family import verdict
from families import PAGE, page_part, page_with, table
from tiny_models import FAMILIES
from transformers import PreTrainedTokenizerBase

TABLE = table()
TODAY = time.gmtime().tm_yday
TRIED = sorted({*TABLE.works, *TABLE.refused}) if os.environ.get("AM_MEMORY_FAMILIES") == "all" else TABLE.chosen(TODAY)


def test_every_family_has_a_verdict() -> None:
    """A new release of transformers shows here what is new: try it with `python tests/engines/families.py NAME`."""
    assert set(FAMILIES) - TABLE.named == set()
    assert len(TABLE.named) == len(TABLE.works) + len(TABLE.refused) + len(TABLE.untried)


def test_four_days_try_all_families() -> None:
    days = [TABLE.chosen(day) for day in range(4)]
    assert set().union(*days) == {*TABLE.works, *TABLE.refused}
    assert max(map(len, days)) - min(map(len, days)) <= 1


def test_the_page_is_made_from_the_table() -> None:
    """`python tests/engines/families.py` makes it again."""
    assert PAGE.read_text() == page_with(page_part(TABLE))


@pytest.mark.parametrize("family", [family for family in TRIED if family in FAMILIES])
def test_a_family_is_what_the_table_says(family: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    found = verdict(family, byte_tokenizer, TABLE.options.get(family))
    if family in TABLE.works:
        assert found == ""
    else:
        assert TABLE.refused[family] in found
