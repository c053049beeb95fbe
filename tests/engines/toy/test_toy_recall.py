"""Recall of originals, over the toy engine."""

from __future__ import annotations

from borrowed import borrow

globals().update(borrow("recall/test_paging.py"))
