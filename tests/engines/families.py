"""The verdict on each family of transformers: the table, its part of docs/models.md, and a way to try a family.

    python tests/engines/families.py                 writes the table into docs/models.md
    python tests/engines/families.py all             tries every family, and says which verdict is not as in the table
    python tests/engines/families.py olmo4 exaone5   tries these

The table is `families.json`. A family works, is refused with a reason, or was not tried, for a reason as well.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin, made by tests/engines/families.py -->", "<!-- families: end -->"


class Table(NamedTuple):
    """What `families.json` holds, by the name of the family in transformers.

    Attributes:
        transformers: the version that was tried last.
        popular: are tried in every run of the tests.
        works: in every way that `every_family.py` asks for.
        refused: a part of the error at load.
        untried: why no tiny model of the family can be made here.
        options: fields of its configuration that need other values than `tiny_models.SIZES`.
    """

    transformers: str
    popular: list[str]
    works: list[str]
    refused: dict[str, str]
    untried: dict[str, str]
    options: dict[str, dict[str, Any]]

    @property
    def named(self) -> set[str]:
        """All families that have a verdict."""
        return {*self.works, *self.refused, *self.untried}

    def chosen(self, day: int) -> list[str]:
        """The families to try on a day of the year: popular ones, and in turn a quarter of the others."""
        others = sorted({*self.works, *self.refused} - set(self.popular))
        return sorted([*self.popular, *others[day % 4 :: 4]])


@cache
def table() -> Table:
    """The table, as it is in the file."""
    return Table(**json.loads(Path(__file__).with_name("families.json").read_text()))


def page_part(given: Table) -> str:
    """The table for docs/models.md, in Markdown."""
    lines = [
        f"{len(given.named)} families of transformers {given.transformers}: {len(given.works)} work, "
        f"{len(given.refused)} are refused, {len(given.untried)} were not tried.",
        "",
        *textwrap.wrap(f"**Works**: {_listed(given.works)}.", 120, break_on_hyphens=False),
        "",
        "| refused because | families |",
        "| --- | --- |",
        *_by_reason(given.refused),
        "",
        "| not tried because | families |",
        "| --- | --- |",
        *_by_reason(given.untried),
    ]
    return "\n".join(lines)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    families: defaultdict[str, list[str]] = defaultdict(list)
    for family, reason in sorted(reasons.items()):
        families[reason].append(family)
    ordered = sorted(families.items(), key=lambda item: -len(item[1]))
    return [f"| {reason} | {_listed(named)} |" for reason, named in ordered]


def _listed(families: list[str]) -> str:
    return ", ".join(f"`{family}`" for family in sorted(families))


def page_with(part: str) -> str:
    """docs/models.md with this part in its place."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """See above."""
    if len(sys.argv) == 1:
        PAGE.write_text(page_with(page_part(table())))
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import tokenizer_of_bytes
    from every_family import outcome
    from tiny_models import FAMILIES

    tokenizer = tokenizer_of_bytes()
    for family in FAMILIES if sys.argv[1:] == ["all"] else sys.argv[1:]:
        found = outcome(family, tokenizer, table().options.get(family))
        expected = "" if family in table().works else table().refused.get(family) or table().untried.get(family)
        if expected is None or (found != "" if expected == "" else expected not in found):
            print(f"{family}: {found or 'works'}")


if __name__ == "__main__":
    main()
