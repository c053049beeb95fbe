"""Which tests of LangChain's own suites run on the demo model."""

from __future__ import annotations

import pytest

EXPECT_SENSE = ("test_tool_calling", "test_tool_calling_async", "test_unicode_tool_call_integration", "test_agent_loop")
"""Tests that expect an argument that only a trained model gives; the suites forbid to override and mark them there."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.name == "test_standard.py" and getattr(item, "originalname", "") in EXPECT_SENSE:
        item.add_marker(pytest.mark.model)
