"""The idle worker: it refines while no session works, gives up when one does, and ends with its memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from driven import some_tokens
from inside import context_of, pending_of, shared_of
from policies import tight_policy
from random_operations import differences

from am_memory import Memory, Sampling, Session
from am_memory.compaction.refinement import Refinement, RefinementResult
from am_memory.conversations.threads import Threads
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import Event, SegmentRefined
from am_memory.session import idle, refining
from am_memory.session.context import Context
from am_memory.session.rebuild import rebuild

POLICY = tight_policy(trigger_tokens=128, originals="host", recall_tokens=0, self_study_tokens=8, refine="idle")
PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.05)


@pytest.fixture
def memory(engine: TransformersEngine, tmp_path: Path) -> Iterator[Memory]:
    memory = Memory(engine, POLICY, sampling=Sampling(temperature=0), store=tmp_path / "store")
    yield memory
    shared_of(memory).idle_worker.close()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each refinement ended: "done", or the name of an error."""
    ended: list[str] = []
    run = Refinement.run

    def watched(refinement: Refinement, progress: Callable[[str, int, int], None]) -> RefinementResult:
        try:
            result = run(refinement, progress)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise
        ended.append("done")
        return result

    monkeypatch.setattr(Refinement, "run", watched)
    return ended


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def is_refined(session: Session) -> bool:
    return 0 < session.stats.num_refined == session.stats.num_segments


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "am-memory-idle"]


def test_a_session_is_refined_while_nobody_waits(memory: Memory) -> None:
    session = memory.session("alice")
    session.append(some_tokens(180))
    wait_until(lambda: is_refined(session))
    session.append(some_tokens(60, seed=1))
    wait_until(lambda: is_refined(session))


def test_a_listener_that_fails_does_not_end_the_worker(
    engine: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread ended with its error, and until the next compaction nothing was refined."""

    def on_event(event: Event) -> None:
        if isinstance(event, SegmentRefined):
            raise ValueError("a bar that is closed")

    memory = Memory(engine, POLICY, on_event=on_event)
    before = workers()
    session = memory.session("alice")
    session.append(some_tokens(180))
    (worker,) = [thread for thread in workers() if thread not in before]
    wait_until(lambda: is_refined(session))
    assert session.stats.num_refined > 1
    assert worker.is_alive()
    assert "a bar that is closed" in caplog.text
    assert "a listener failed on SegmentRefined(session='alice'" in caplog.text
    shared_of(memory).idle_worker.close()


def test_its_records_give_the_same_again(memory: Memory) -> None:
    session = memory.session("alice", policy=POLICY.with_changes(chunk_tokens=1))
    session.append(some_tokens(140))
    wait_until(lambda: is_refined(session))
    rebuilt = context_of(session).fork("rebuilt")
    rebuild(rebuilt, len(rebuilt.tokens), "a test")
    assert differences(context_of(session), rebuilt) == []


def test_who_works_does_not_wait_and_loses_nothing(memory: Memory, runs: list[str]) -> None:
    """The worker sees the step at its next report, and begins again when it is over."""
    session, lock = memory.session("alice"), shared_of(memory).engine_lock
    session.append(some_tokens(180))
    before = context_of(session).fork("before")
    with lock:
        time.sleep(0.2)
        runs.clear()
        assert differences(context_of(session), before) == []
    wait_until(lambda: is_refined(session))
    assert "done" in runs


def test_a_step_in_the_middle_ends_a_refinement(
    memory: Memory, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, lock = memory.session("alice"), shared_of(memory).engine_lock
    begun, go_on = threading.Event(), threading.Event()
    give_up_if_seen = idle.IdleWorker._give_up_if_seen

    def held_up(worker: idle.IdleWorker, stage: str, done: int, total: int) -> None:
        begun.set()
        go_on.wait()
        give_up_if_seen(worker, stage, done, total)

    monkeypatch.setattr(idle.IdleWorker, "_give_up_if_seen", held_up)
    session.append(some_tokens(180))
    before = context_of(session).fork("before")
    assert begun.wait(PATIENCE_SECONDS)
    with lock:
        go_on.set()
        wait_until(lambda: bool(runs))
        assert runs == ["_StepSeenError"]
        assert differences(context_of(session), before) == []
    wait_until(lambda: is_refined(session))


def test_a_result_of_other_slots_is_thrown_away(
    memory: Memory, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction came while the refinement ran, and cut its segment."""
    session = memory.session("alice")
    begun, go_on = threading.Event(), threading.Event()

    def held_up(worker: idle.IdleWorker, stage: str, done: int, total: int) -> None:
        begun.set()
        go_on.wait()

    monkeypatch.setattr(idle.IdleWorker, "_give_up_if_seen", held_up)
    session.append(some_tokens(180))
    assert begun.wait(PATIENCE_SECONDS)
    session.compact()
    before = context_of(session).fork("before")
    with shared_of(memory).engine_lock:
        go_on.set()
        wait_until(lambda: bool(runs))
    wait_until(lambda: len(runs) > 1)
    assert runs[0] == "done"
    assert all(one.num_slots in {s.num_slots for s in before.cache.segments} for one in refinements(session))


def refinements(session: Session) -> list[object]:
    return [one for record in context_of(session).records for one in record.refinements]


def test_the_session_used_last_is_first(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    refine = idle.IdleWorker._refine

    def noted(worker: idle.IdleWorker, context: object) -> bool:
        is_more = refine(worker, context)  # type: ignore[arg-type]
        if is_more:
            order.append(context.name)  # type: ignore[attr-defined]
        return is_more

    monkeypatch.setattr(idle.IdleWorker, "_refine", noted)
    with shared_of(memory).engine_lock:
        for name in ("one", "other"):
            memory.session(name).append(some_tokens(110))
            memory.session(name).compact(0.5)
    wait_until(lambda: len(order) == 2)
    assert order == ["other", "one"]


def test_a_compaction_in_the_background_is_swapped_in_once_it_is_made(memory: Memory) -> None:
    session = memory.session("alice", policy=POLICY.with_changes(ahead_tokens=12))
    session.append(some_tokens(121))
    wait_until(lambda: is_refined(session))
    assert pending_of(session) is None


def test_a_compaction_that_began_meanwhile_in_the_background_is_swapped_in_first(
    memory: Memory, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session is saved as it was when that compaction began: new slots that came later must not be in it."""
    session = memory.session("alice", policy=POLICY.with_changes(ahead_tokens=20))
    begun, go_on = threading.Event(), threading.Event()

    def held_up(worker: idle.IdleWorker, stage: str, done: int, total: int) -> None:
        begun.set()
        go_on.wait()

    monkeypatch.setattr(idle.IdleWorker, "_give_up_if_seen", held_up)
    with shared_of(memory).engine_lock:
        session.append(some_tokens(106))
        session.compact()
    assert begun.wait(PATIENCE_SECONDS)
    with shared_of(memory).engine_lock:
        session.append(some_tokens(50, seed=1)[: int(context_of(session).room_tokens) + 4])
        assert pending_of(session) is not None
        swapped: list[bool] = []
        swap_in = refining.swap_in

        def noted(context: Context, planned: Refinement, result: RefinementResult) -> object:
            swapped.append(context.background_compaction is None)
            return swap_in(context, planned, result)

        monkeypatch.setattr(refining, "swap_in", noted)
        go_on.set()
        wait_until(lambda: bool(runs))
    wait_until(lambda: is_refined(session))
    assert all(swapped)


def test_a_listener_may_wait_for_whoever_works_with_the_memory(engine: TransformersEngine) -> None:
    """An application's own lock around its sessions, which its listener takes as well."""
    lock, is_told = threading.RLock(), threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, SegmentRefined):
            is_told.set()
        with lock:
            pass

    memory = Memory(engine, POLICY, on_event=on_event)
    session = memory.session("alice")
    session.append(some_tokens(180))

    def work() -> None:
        with lock:
            assert is_told.wait(PATIENCE_SECONDS)
            session.append(some_tokens(3))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(PATIENCE_SECONDS)
    assert not worker.is_alive()
    shared_of(memory).idle_worker.close()


def test_nothing_runs_where_no_policy_asks_for_it(engine: TransformersEngine) -> None:
    before = workers()
    session = Memory(engine, POLICY.with_changes(refine="off")).session("alice")
    session.append(some_tokens(180))
    time.sleep(0.2)
    assert workers() == before
    assert session.stats.num_refined == 0


def test_scratch_sessions_are_left_alone_until_they_are_kept(memory: Memory) -> None:
    session = memory.scratch()
    session.append(some_tokens(180))
    time.sleep(0.2)
    assert session.stats.num_refined == 0
    memory.keep(session, "kept")
    wait_until(lambda: is_refined(session))


def test_a_chat_that_is_sent_whole_goes_on_from_its_refined_branch(memory: Memory) -> None:
    """As LangChain and the server send chats: each turn is a branch, and kept under a name."""
    threads = Threads(memory)
    messages: list[dict[str, str]] = [{"role": "user", "content": "The owl sleeps all day, and flies at night. " * 5}]
    turn = threads.turn(messages)
    list(turn.session.generate(2))
    turn.keep({"role": "assistant", "content": turn.session.messages[-1]["content"]})
    (branch,) = threads.branches("default")
    wait_until(lambda: is_refined(branch.session))
    assert branch.session.stats.num_segments
    turn = threads.turn([*branch.session.messages, {"role": "user", "content": "And?"}])
    assert turn.num_cached_tokens > 0
    assert turn.session.stats.num_refined == branch.session.stats.num_refined


def test_it_sleeps_when_everything_is_refined(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory.session("alice")
    session.append(some_tokens(140))
    wait_until(lambda: is_refined(session))
    time.sleep(0.2)
    looks: list[bool] = []
    monkeypatch.setattr(idle.IdleWorker, "_sees_step", lambda worker: looks.append(True))
    time.sleep(0.2)
    assert looks == []


def test_it_ends_with_its_memory(engine: TransformersEngine) -> None:
    before = workers()
    memory = Memory(engine, POLICY)
    memory.session("alice").append(some_tokens(180))
    (worker,) = [thread for thread in workers() if thread not in before]
    del memory
    gc.collect()

    def has_ended() -> bool:
        gc.collect()  # it holds the memory while it refines
        return not worker.is_alive()

    wait_until(has_ended)


def test_the_program_ends_at_once_and_without_a_word(model_folder: Path) -> None:
    program = f"""
        from am_memory import Memory, MemoryPolicy
        from am_memory.session import idle
        idle.IDLE_SECONDS = 0.01
        policy = MemoryPolicy(trigger_tokens=128, keep_ratio=0.25, keep_recent=6, refine="idle", self_study_tokens=4000)
        memory = Memory.from_pretrained({str(model_folder)!r}, policy=policy, device="cpu")
        session = memory.session("alice")
        session.append([number % 251 for number in range(180)])
        import time
        time.sleep(0.5)
        print(session.stats.num_refined)
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    assert done.stdout.strip() in ("0", "1")
    assert "Error" not in done.stderr
