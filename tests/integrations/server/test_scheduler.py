"""Whose turn it is: between owners, between their conversations, and what ends with its consumer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import aclosing
from time import sleep

import pytest
from am_memory_server.scheduler import FairQueue, Post, QueueFull, Scheduler, ShuttingDown, Steps


def counting(name: str, num_steps: int, seen: list[str]) -> Steps:
    def steps(post: Post) -> Generator[None, None, None]:
        for number in range(num_steps):
            seen.append(name)
            post(number)
            yield

    return steps


def endless(post: Post) -> Generator[None, None, None]:
    post("begun")
    while True:
        sleep(0.001)
        yield


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(max_active=2, max_queued=3)
    yield scheduler
    await asyncio.to_thread(scheduler.close)


async def all_of(scheduler: Scheduler, name: str, steps: Steps) -> list[object]:
    return [item async for item in scheduler.stream((name, "chat"), steps)]


def test_turns_are_taken_between_owners_and_then_between_their_conversations() -> None:
    queue: FairQueue[str] = FairQueue()
    for path in (("a", "1"), ("a", "1"), ("a", "2"), ("b", "1")):
        queue.push(path, "/".join(path))
    assert queue.count("a") == 3
    assert [queue.pop() for _ in range(4)] == ["a/1", "b/1", "a/2", "a/1"]
    assert len(queue) == 0


async def test_a_job_gives_what_it_posts_in_order(scheduler: Scheduler) -> None:
    assert await all_of(scheduler, "a", counting("a", 5, [])) == [0, 1, 2, 3, 4]


async def test_active_jobs_take_turns_step_by_step(scheduler: Scheduler) -> None:
    seen: list[str] = []
    await asyncio.gather(*(all_of(scheduler, name, counting(name, 300, seen)) for name in "ab"))
    changes = sum(one != other for one, other in zip(seen, seen[1:], strict=False))
    assert changes > 50  # one at a time would be a single change


async def test_an_error_of_a_job_is_raised_where_it_is_awaited_and_nowhere_else(scheduler: Scheduler) -> None:
    def failing(post: Post) -> Generator[None, None, None]:
        yield
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        await all_of(scheduler, "a", failing)
    assert await all_of(scheduler, "b", counting("b", 2, [])) == [0, 1]


async def test_a_job_is_closed_when_nobody_listens_any_more(scheduler: Scheduler) -> None:
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def noticing(post: Post) -> Generator[None, None, None]:
        try:
            yield from endless(post)
        finally:
            loop.call_soon_threadsafe(closed.set)

    async with aclosing(scheduler.stream(("a", "chat"), noticing)) as items:
        await anext(items)
    await asyncio.wait_for(closed.wait(), 10)


async def test_errands_go_before_the_next_step_of_a_job(scheduler: Scheduler) -> None:
    async with aclosing(scheduler.stream(("a", "chat"), endless)) as items:
        await anext(items)
        assert await scheduler.call(lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        await scheduler.call(lambda: 1 // 0)


async def test_an_owner_who_has_too_much_waiting_is_refused_and_others_are_not(scheduler: Scheduler) -> None:
    jobs: list[asyncio.Future[list[object]]] = []
    for num_active, num_waiting in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        jobs.append(asyncio.ensure_future(all_of(scheduler, "a", endless)))
        while (scheduler.num_active, scheduler.num_waiting) != (num_active, num_waiting):
            await asyncio.sleep(0.001)
    with pytest.raises(QueueFull, match="3 requests"):
        await all_of(scheduler, "a", counting("a", 1, []))
    jobs.pop().cancel()  # it waits, and gives up its place
    while scheduler.num_waiting != 2:
        await asyncio.sleep(0.001)
    other = asyncio.ensure_future(all_of(scheduler, "b", counting("b", 1, [])))
    for job in jobs:
        job.cancel()
    assert await asyncio.wait_for(other, 10) == [0]


async def test_what_was_taken_is_finished_and_nothing_new_is_taken_at_the_end() -> None:
    scheduler = Scheduler(max_active=1, max_queued=5)
    jobs = [asyncio.ensure_future(all_of(scheduler, name, counting(name, 50, []))) for name in "abc"]
    await asyncio.sleep(0)
    await asyncio.to_thread(scheduler.close)
    assert [len(found) for found in await asyncio.gather(*jobs)] == [50, 50, 50]
    with pytest.raises(ShuttingDown):
        await all_of(scheduler, "d", counting("d", 1, []))
