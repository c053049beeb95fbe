"""Tokens and records rebuild the cache, over the toy engine."""

from __future__ import annotations

from borrowed import borrow

WITHOUT = {"test_compactions_are_made_again_under_the_policy_that_they_were_made_under"}  # takes long
globals().update(borrow("session/test_rebuild.py", without=WITHOUT))
