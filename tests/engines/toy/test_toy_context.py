"""Watching a context, over the toy engine."""

from __future__ import annotations

from borrowed import borrow

WITHOUT = {
    "test_a_failure_in_any_forward_pass_changes_nothing",  # breaks a layer of a transformers model
    "test_the_cache_never_exceeds_the_trigger_nor_the_segments_their_bound",  # takes long
}
globals().update(borrow("session/test_context.py", without=WITHOUT))
