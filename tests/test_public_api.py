"""What users can write: a public name, parameter, endpoint or option changes on purpose only."""

from __future__ import annotations

import difflib

from public_api import STORED, describe

from am_memory.engines.transformers import TransformersEngine


def test_public_names_are_those_that_are_stored(engine: TransformersEngine) -> None:
    stored, now = STORED.read_text(encoding="utf-8"), describe(engine)
    changes = "\n".join(difflib.unified_diff(stored.splitlines(), now.splitlines(), "stored", "now", lineterm="", n=0))
    assert not changes, f"on purpose? python tests/public_api.py stores the new names:\n{changes}"
