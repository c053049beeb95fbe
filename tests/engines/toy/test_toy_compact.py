"""One compaction, over the toy engine."""

from __future__ import annotations

from borrowed import borrow

globals().update(borrow("compaction/test_compact.py"))
