"""The worker thread of asynchronous calls."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import aclosing
from itertools import count
from threading import Event

import pytest

pytest.importorskip("langchain_core")

from langchain_am_memory.workers import Worker


def test_a_call_whose_event_loop_was_closed_ends() -> None:
    """Nobody says that it has gone: its conversation would be in use for ever."""
    worker, is_closed, is_ahead = Worker(), Event(), Event()

    def numbers() -> Generator[int, None, None]:
        try:
            for number in count():
                if number == 2:
                    is_ahead.set()
                yield number
        finally:
            is_closed.set()

    async def first(steps: Generator[int, None, None]) -> int:
        async with aclosing(worker.results(steps)) as results:
            return await anext(results)

    loop = asyncio.new_event_loop()
    results = worker.results(numbers())
    assert loop.run_until_complete(anext(results)) == 0
    assert is_ahead.wait(10)
    assert not is_closed.is_set()
    loop.close()
    assert asyncio.run(first(iter_of_one())) == 7
    assert is_closed.wait(10)


def iter_of_one() -> Generator[int, None, None]:
    yield 7
