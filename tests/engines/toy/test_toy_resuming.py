"""Saved sessions, over the toy engine."""

from __future__ import annotations

from borrowed import borrow

globals().update(borrow("session/test_resuming.py"))
