"""Turns between owners and between their conversations, and jobs whose clients do not read or go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from threading import Event, Semaphore
from time import sleep
from typing import Any

import pytest
from am_memory_server.fair_queue import FairLimit, FairQueue
from am_memory_server.jobs import AnswerNotRead, Job, Publish, QueueFull, ShuttingDown, Steps, on_host
from am_memory_server.scheduler import MAX_UNREAD, NUM_HOST_THREADS, Scheduler


def counting(name: str, num_steps: int, seen: list[str]) -> Job:
    def steps(publish: Publish, found: object) -> Steps[None]:
        for number in range(num_steps):
            seen.append(name)
            publish(number)
            yield None

    return steps


def endless(publish: Publish, found: object) -> Steps[None]:
    publish("begun")
    while True:
        sleep(0.001)
        yield None


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(max_active=2, max_queued=3)
    yield scheduler
    await asyncio.to_thread(scheduler.close)


async def all_of(scheduler: Scheduler, name: str, steps: Job) -> list[object]:
    return [item async for item in scheduler.stream((name, "chat"), steps)]


def test_turns_are_taken_between_owners_and_then_between_their_conversations() -> None:
    queue: FairQueue[str] = FairQueue()
    for path in (("a", "1"), ("a", "1"), ("a", "2"), ("b", "1")):
        queue.push(path, "/".join(path))
    assert queue.count("a") == 3
    assert [queue.pop() for _ in range(4)] == ["a/1", "b/1", "a/2", "a/1"]
    assert len(queue) == 0


def test_a_new_owner_is_before_the_one_that_had_the_last_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "aab":
        queue.push((name,), name)
    assert queue.pop() == "a"
    queue.push(("c",), "c")
    assert [queue.pop() for _ in range(3)] == ["b", "c", "a"]


def test_each_owner_has_a_share_of_the_active_jobs() -> None:
    limit: Any = FairLimit(4)
    for name in "aaaaaabbbccd":
        limit.waiting.push((name, "chat"), name)
        assert all(name for name in limit.admit())
    assert limit.active == {"a": 4, "b": 2, "c": 1, "d": 1}
    for _ in range(4):
        limit.release("a")
        list(limit.admit())
    assert limit.active == {"a": 1, "b": 2, "c": 1, "d": 1}
    assert limit.waiting.names == ["b", "c", "a"]
    limit.release("b")
    assert list(limit.admit()) == []  # four have one active job each
    limit.release("d")
    assert list(limit.admit()) == ["b"]  # the next in turn becomes active


def gated(name: str, seen: list[str], gate: Semaphore) -> Job:
    """A job whose steps are noted when they begin, and end when the gate lets them."""

    def steps(publish: Publish, found: object) -> Steps[None]:
        while True:
            seen.append(name)
            gate.acquire()
            publish(name)
            yield None

    return steps


async def until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.001)


async def given_up(*jobs: asyncio.Future[Any]) -> None:
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


async def test_a_new_owner_gets_the_next_step(scheduler: Scheduler) -> None:
    """Four long answers of one key once kept all other keys waiting until they ended."""
    seen: list[str] = []
    gate = Semaphore(0)

    def call(name: str) -> Steps[None]:
        while True:
            seen.append(name)
            gate.acquire()
            yield None

    flood = [asyncio.ensure_future(all_of(scheduler, "a", gated("a", seen, gate))) for _ in range(4)]
    flood.append(asyncio.ensure_future(scheduler.call(("a", "calls"), lambda: call("a calls"))))
    for _ in range(7):  # each active job has had a turn
        gate.release()
        num_steps = len(seen)
        await until(lambda: len(seen) > num_steps)  # noqa: B023  # waited for here
    other = asyncio.ensure_future(all_of(scheduler, "b", gated("b", seen, gate)))
    flood += [asyncio.ensure_future(scheduler.call(("b", "calls"), lambda: call("b calls")))]
    await until(lambda: scheduler.num_active == 3)
    assert seen[-1] in ("a", "a calls")
    for _ in range(8):
        num_steps = len(seen)
        gate.release()
        await until(lambda: len(seen) > num_steps)  # noqa: B023  # waited for here
    await given_up(*flood, other)
    gate.release()
    assert "".join(name[0] for name in seen[8:16]) == "babababa"


async def test_a_host_call_blocks_no_other_job(scheduler: Scheduler) -> None:
    begun, done = Event(), Event()

    def waiting() -> str:
        begun.set()
        assert done.wait(30)
        return "found"

    def steps(publish: Publish, found: object) -> Steps[None]:
        publish((yield from on_host(waiting)))

    job = asyncio.ensure_future(all_of(scheduler, "a", steps))
    assert await asyncio.to_thread(begun.wait, 30)
    assert await all_of(scheduler, "a", counting("a", 5, [])) == [0, 1, 2, 3, 4]
    done.set()
    assert await job == ["found"]


async def test_host_calls_of_one_owner_do_not_delay_another() -> None:
    scheduler = Scheduler(max_active=2 * NUM_HOST_THREADS, max_queued=3)
    done = Event()

    def steps(publish: Publish, found: object) -> Steps[None]:
        yield from on_host(lambda: done.wait(30))

    jobs = [asyncio.ensure_future(all_of(scheduler, "a", steps)) for _ in range(2 * NUM_HOST_THREADS)]
    await until(lambda: scheduler.num_active == 2 * NUM_HOST_THREADS)
    assert await scheduler.call_on_host(("b", "calls"), lambda: "looked") == "looked"
    done.set()
    await asyncio.gather(*jobs)
    await asyncio.to_thread(scheduler.close)


async def test_an_error_of_a_host_call_is_raised_in_the_job(scheduler: Scheduler) -> None:
    def steps() -> Steps[str]:
        try:
            yield from on_host(lambda: 1 // 0)
        except ZeroDivisionError:
            return "caught"
        return "not raised"

    assert await scheduler.call(("a", "calls"), steps) == "caught"
    with pytest.raises(ZeroDivisionError):
        await scheduler.call_on_host(("a", "calls"), lambda: 1 // 0)


async def test_a_job_gets_its_preparation_and_does_not_start_if_that_fails(scheduler: Scheduler) -> None:
    def steps(publish: Publish, found: object) -> Steps[None]:
        publish(found)
        yield None

    assert [item async for item in scheduler.stream(("a", "chat"), steps, lambda: "found")] == ["found"]
    gate, seen = Semaphore(0), list[str]()
    busy = asyncio.ensure_future(all_of(scheduler, "b", gated("b", seen, gate)))
    await until(lambda: seen)
    with pytest.raises(ZeroDivisionError):  # raised without a step of any job
        await anext(scheduler.stream(("a", "chat"), steps, lambda: 1 // 0))
    await given_up(busy)
    gate.release()


async def test_a_call_on_a_host_thread_waits_for_no_step(scheduler: Scheduler) -> None:
    gate, seen = Semaphore(0), list[str]()
    job = asyncio.ensure_future(all_of(scheduler, "a", gated("a", seen, gate)))
    await until(lambda: seen)
    assert await scheduler.call_on_host(("a", "calls"), lambda: len(seen)) == 1
    await given_up(job)
    gate.release()


async def test_calls_of_an_owner_run_one_after_the_other_and_count_as_waiting(scheduler: Scheduler) -> None:
    seen: list[str] = []

    def call(name: str) -> Steps[str]:
        seen.append(f"{name} begins")
        yield from on_host(lambda: sleep(0.01))
        seen.append(f"{name} ends")
        return name

    gate = Semaphore(0)
    blocking = asyncio.ensure_future(all_of(scheduler, "b", gated("b", [], gate)))
    calls = [asyncio.ensure_future(scheduler.call(("a", "calls"), lambda name=name: call(name))) for name in "1234"]
    await until(lambda: scheduler.num_waiting == 3)
    with pytest.raises(QueueFull, match="3 requests"):
        await scheduler.call_on_host(("a", "calls"), lambda: None)
    with pytest.raises(QueueFull, match="3 requests"):
        await all_of(scheduler, "a", endless)
    await given_up(blocking)
    gate.release()
    assert await asyncio.gather(*calls) == list("1234")
    assert seen == [f"{name} {what}" for name in "1234" for what in ("begins", "ends")]


async def test_a_client_that_does_not_read_blocks_only_its_own_job(scheduler: Scheduler) -> None:
    posted: list[int] = []

    def talking(publish: Publish, found: object) -> Steps[None]:
        for number in range(10 * MAX_UNREAD):
            posted.append(number)
            publish(number)
            yield None

    async with aclosing(scheduler.stream(("a", "chat"), talking)) as items:
        assert await anext(items) == 0
        await until(lambda: len(posted) > MAX_UNREAD)
        assert await all_of(scheduler, "b", counting("b", 50, [])) == list(range(50))
        assert len(posted) <= MAX_UNREAD + 2
        assert [item async for item in items] == list(range(1, 10 * MAX_UNREAD))


def talking_to_nobody(publish: Publish, found: object) -> Steps[None]:
    for number in range(3 * MAX_UNREAD):
        publish(number)
        yield None


async def test_a_blocked_job_is_not_active(scheduler: Scheduler) -> None:
    async with AsyncExitStack() as stack:
        unread = [scheduler.stream(("a", str(number)), talking_to_nobody) for number in range(2)]
        for items in unread:
            await stack.enter_async_context(aclosing(items))
            assert await anext(items) == 0
        await until(lambda: len(scheduler._blocked) == 2)
        assert scheduler.num_active == 0
        assert await all_of(scheduler, "a", counting("a", 50, [])) == list(range(50))
        for items in unread:  # no update is lost
            assert [item async for item in items] == list(range(1, 3 * MAX_UNREAD))
    assert not scheduler._parked


async def test_of_too_many_blocked_jobs_the_longest_blocked_one_is_ended(
    scheduler: Scheduler,
) -> None:
    async with AsyncExitStack() as stack:
        unread = [scheduler.stream((owner, "chat"), talking_to_nobody) for owner in "baaa"]
        for number, items in enumerate(unread):
            await stack.enter_async_context(aclosing(items))
            assert await anext(items) == 0
            if number < 3:
                await until(lambda: len(scheduler._blocked) == number + 1)  # noqa: B023  # used at once
        await until(lambda: scheduler._num_jobs == 3)
        other, ended, *rest = unread
        with pytest.raises(AnswerNotRead, match="3 answers of this key were not read"):
            assert [item async for item in ended]
        for items in (other, *rest):
            assert [item async for item in items] == list(range(1, 3 * MAX_UNREAD))
    assert not scheduler._parked


@pytest.mark.parametrize("is_read_again", [True, False])
async def test_a_parked_job_is_closed_when_its_client_goes_away(is_read_again: bool) -> None:
    scheduler, closed = Scheduler(max_active=1, max_queued=3), Event()

    def talking(publish: Publish, found: object) -> Steps[None]:
        try:
            yield from talking_to_nobody(publish, found)
        finally:
            closed.set()

    async with aclosing(scheduler.stream(("a", "chat"), talking)) as items:
        await anext(items)
        await until(lambda: scheduler._blocked)
        async with aclosing(scheduler.stream(("a", "other"), endless)) as others:
            assert await anext(others) == "begun"
            while is_read_again and not scheduler.num_waiting:
                await anext(items)
            await items.aclose()
            assert await asyncio.to_thread(closed.wait, 30)
    await asyncio.to_thread(scheduler.close)
    assert not scheduler._num_jobs
    assert not scheduler._streams.active


async def test_a_blocked_job_ends_with_its_client_or_with_the_server() -> None:
    scheduler, closed = Scheduler(max_active=2, max_queued=3), Event()

    def talking(publish: Publish, found: object) -> Steps[None]:
        try:
            for number in range(3 * MAX_UNREAD):
                publish(number)
                yield None
        finally:
            closed.set()

    async with aclosing(scheduler.stream(("a", "chat"), talking)) as items:
        await anext(items)
        await until(lambda: scheduler._blocked)
    assert await asyncio.to_thread(closed.wait, 30)
    async with aclosing(scheduler.stream(("a", "chat"), talking)) as items:
        await anext(items)
        await until(lambda: scheduler._blocked)
        await asyncio.to_thread(scheduler.close)


async def test_updates_arrive_in_order(scheduler: Scheduler) -> None:
    assert await all_of(scheduler, "a", counting("a", 5, [])) == [0, 1, 2, 3, 4]


async def test_active_jobs_take_turns_step_by_step(scheduler: Scheduler) -> None:
    seen: list[str] = []
    await asyncio.gather(*(all_of(scheduler, name, counting(name, 300, seen)) for name in "ab"))
    changes = sum(one != other for one, other in zip(seen, seen[1:], strict=False))
    assert changes > 50  # one at a time would be a single change


async def test_an_error_of_a_job_is_raised_at_its_client_only(scheduler: Scheduler) -> None:
    def failing(publish: Publish, found: object) -> Steps[None]:
        yield None
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        await all_of(scheduler, "a", failing)
    assert await all_of(scheduler, "b", counting("b", 2, [])) == [0, 1]


async def test_a_job_is_closed_when_its_client_goes_away(scheduler: Scheduler) -> None:
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def noticing(publish: Publish, found: object) -> Steps[None]:
        try:
            yield from endless(publish, found)
        finally:
            loop.call_soon_threadsafe(closed.set)

    async with aclosing(scheduler.stream(("a", "chat"), noticing)) as items:
        await anext(items)
    await asyncio.wait_for(closed.wait(), 10)


async def test_an_owner_with_too_many_waiting_jobs_is_refused_and_others_are_not(scheduler: Scheduler) -> None:
    jobs: list[asyncio.Future[list[object]]] = []
    for num_active, num_waiting in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        jobs.append(asyncio.ensure_future(all_of(scheduler, "a", endless)))
        while (scheduler.num_active, scheduler.num_waiting) != (num_active, num_waiting):
            await asyncio.sleep(0.001)
    with pytest.raises(QueueFull, match="3 requests"):
        await all_of(scheduler, "a", counting("a", 1, []))
    jobs.pop().cancel()  # it leaves the queue
    while scheduler.num_waiting != 2:
        await asyncio.sleep(0.001)
    other = asyncio.ensure_future(all_of(scheduler, "b", counting("b", 1, [])))
    for job in jobs:
        job.cancel()
    assert await asyncio.wait_for(other, 10) == [0]


async def test_on_shutdown_accepted_jobs_finish_and_new_ones_are_refused() -> None:
    scheduler = Scheduler(max_active=1, max_queued=5)
    jobs = [asyncio.ensure_future(all_of(scheduler, name, counting(name, 50, []))) for name in "abc"]
    await asyncio.sleep(0)
    await asyncio.to_thread(scheduler.close)
    assert [len(found) for found in await asyncio.gather(*jobs)] == [50, 50, 50]
    with pytest.raises(ShuttingDown):
        await all_of(scheduler, "d", counting("d", 1, []))


class Shared:
    """Work that is done together with that of others."""

    is_ready = False

    @property
    def has_news(self) -> bool:
        return self.is_ready


def sharing(name: str, num_steps: int, begun: list[str], seen: list[str]) -> Job:
    def steps(publish: Publish, found: object) -> Steps[None]:
        begun.append(name)
        while len(begun) < 3:
            yield None
        for _ in range(num_steps):
            work = Shared()
            yield work
            assert work.is_ready
            seen.append(name)
            publish(name)

    return steps


async def test_what_jobs_await_is_done_for_all_of_them_at_once() -> None:
    done: list[int] = []

    def together(works: Sequence[Shared], keys: object) -> None:
        done.append(len(works))
        for work in works:
            work.is_ready = True

    scheduler = Scheduler(max_active=3, max_queued=3, together=together)
    begun, seen = list[str](), list[str]()
    jobs = [all_of(scheduler, name, sharing(name, 5, begun, seen)) for name in "abc"]
    assert await asyncio.gather(*jobs) == [["a"] * 5, ["b"] * 5, ["c"] * 5]
    assert len(done) <= 8
    assert max(done) == 3
    await asyncio.to_thread(scheduler.close)


async def test_a_job_waits_until_what_it_awaits_is_done() -> None:
    """Others go on meanwhile, and its client may leave."""
    slow: list[Shared] = []

    def together(works: Sequence[Shared], keys: object) -> None:
        slow[:] = slow or works[:1]
        for work in works:
            work.is_ready = work is not slow[0]

    scheduler = Scheduler(max_active=3, max_queued=3, together=together)
    begun, seen = ["c"], list[str]()
    stuck = asyncio.ensure_future(all_of(scheduler, "a", sharing("a", 1, begun, seen)))
    await until(lambda: len(begun) == 2)
    begun.append("")
    await until(lambda: slow)
    assert await all_of(scheduler, "b", sharing("b", 4, begun, seen)) == ["b"] * 4
    assert "a" not in seen
    await given_up(stuck)
    await asyncio.to_thread(scheduler.close)
    assert scheduler.num_active == 0
