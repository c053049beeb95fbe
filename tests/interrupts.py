"""Interrupts between any two lines of what a session does.

python tests/interrupts.py    at every one of them; the tests take some
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import linecache
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from inside import context_of, shared_of

import am_memory
from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.base import Engine
from am_memory.errors import CompactionFailed, StorageError
from am_memory.session.appending import add, encode
from am_memory.text.constraints import Constraint, regex

PACKAGE = str(Path(am_memory.__file__).parent)
KEEPING_BOOKS = ("memory.py", "session/*.py", "storage/*.py", "kv_cache/*.py", "recall/originals.py", "recall/paging.py",
    "compaction/background.py", "compaction/job.py", "compaction/record.py", "compaction/refinement.py",
    "text/constraints.py")  # fmt: skip
POLICY = MemoryPolicy(trigger_tokens=96, keep_ratio=0.25, keep_recent=6, pinned=3, chunk_tokens=16, originals="host")


class interrupted_at:
    """Raise at the nth line that runs of am_memory; gives the number of those that came by.

    Args:
        place: None: nowhere, to count them.
        everywhere: else only in the files that keep the books, and in contextlib, where Ctrl-C strikes as well.
    """

    def __init__(
        self,
        place: int | None,
        *,
        everywhere: bool = True,
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self.place, self.everywhere, self.error = place, everywhere, error
        self.count, self.entered = [0], set[tuple[FrameType, int]]()
        files = {str(path) for pattern in KEEPING_BOOKS for path in Path(PACKAGE).glob(pattern)}
        self.files = {contextlib.__file__, f"{PACKAGE}/engines/transformers/engine.py"} | files

    def __enter__(self) -> list[int]:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self.count

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)
        self.entered.clear()

    def leaves_with(self, frame: FrameType) -> bool:
        """Whether a `with` block is left: Python looks for signals at calls and jumps, and there is none in between."""
        place = (frame, frame.f_lineno)
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        if place in self.entered:
            return True
        self.entered.add(place)
        return False

    def trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., object] | None:
        filename = frame.f_code.co_filename
        if filename not in self.files and not (self.everywhere and filename.startswith(PACKAGE)):
            return None
        if event == "line" and not self.leaves_with(frame):
            self.count[0] += 1
            if self.count[0] == self.place:
                sys.settrace(None)
                raise self.error
        return self.trace


@dataclass
class Scene:
    """A session in a memory of its own, in the middle of a conversation."""

    memory: Memory
    session: Session
    constraint: Constraint

    def seen(self) -> tuple[object, ...]:
        """All that can be told of it; equal before and after an interrupt, or equal to what the step leaves."""
        session, context = self.session, context_of(self.session)
        live = None if context.live is None else context.live.start
        return (
            session.name,
            session.tokens,
            tuple(map(str, session.messages)),
            session.message_starts,
            context.history.is_answering,
            tuple(context.records),
            context.cache.num_tokens,
            context.cache.is_whole,
            session.segments,
            session.recalled,
            session.mounts,
            (
                context.num_pinned,
                context.trigger_tokens,
                live,
                context.background_compaction and context.background_compaction.at_tokens,
            ),
            tuple((each.start, each.end) for each in context.originals),
            tuple(sorted(shared_of(self.memory).sessions)),
            tuple(self.memory.names()),
            torch.isfinite(self.constraint.mask(torch.zeros(260))).nonzero()[:, 0].tolist(),
        )


@dataclass(frozen=True)
class Step:
    """Something that a session does.

    Attributes:
        do: it; an iterator is run to its end, and may be left at any of its items.
        prepare: what comes before.
    """

    do: Callable[[Scene], object]
    prepare: Callable[[Scene], object] = lambda scene: None
    changes: tuple[tuple[str, object], ...] = ()


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


STEPS = {
    "add": Step(lambda scene: add(scene.session, encode(scene.session, said("And the owls?")))),
    "append": Step(lambda scene: scene.session.append(said("And the owls?"))),
    "append text": Step(lambda scene: scene.session.append(" and owls")),
    "append and compact": Step(lambda scene: scene.session.append(said("And the owls, how do they sleep all day?" * 2))),
    "generate": Step(lambda scene: scene.session.generate(3)),
    "generate by a grammar": Step(lambda scene: scene.session.generate(4, None, scene.constraint)),
    "rewind": Step(lambda scene: scene.session.rewind(len(scene.session.tokens) - 5)),
    "rewind behind a compaction": Step(lambda scene: scene.session.rewind(60)),
    "compact": Step(lambda scene: scene.session.compact()),
    "recall": Step(lambda scene: scene.session.recall(scene.session.segments[0])),
    "put away": Step(
        lambda scene: scene.session.compact(1.0), lambda scene: scene.session.recall(scene.session.segments[0])
    ),
    "refine": Step(lambda scene: scene.session.refine(), changes=(("self_study_tokens", 4),)),
    "mount": Step(
        lambda scene: scene.session.mount("owls"), lambda scene: scene.memory.compact_text("Owls are awake.", "owls")
    ),
    "unmount": Step(
        lambda scene: scene.session.unmount("owls"),
        lambda scene: (scene.memory.compact_text("Owls are awake.", "owls"), scene.session.mount("owls")),
    ),
    "fork": Step(lambda scene: scene.session.fork("branch")),
    "keep": Step(lambda scene: scene.memory.keep(scene.session.fork(), "kept")),
    "save": Step(lambda scene: scene.session.save()),
    "begin ahead": Step(
        lambda scene: scene.session.append(" owls" * 5),
        lambda scene: scene.session.append(" owls" * 3),
        (("ahead_tokens", 14), ("trigger_tokens", 120)),
    ),
}  # fmt: skip


def scenes(engine: Engine, step: Step, folder: Path) -> Callable[[], Scene]:
    """Makes equal scenes, each a branch in a memory of its own."""
    policy, numbers = POLICY.with_changes(**dict(step.changes)), itertools.count()

    def new_memory() -> Memory:
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=folder / str(next(numbers)))

    first_memory = new_memory()
    origin = Scene(first_memory, first_memory.session("alice"), regex(engine, "[a-z]{30}"))
    origin.session.append(said("I am Ada. Tell me about owls, and about bread, and about the sea."))
    list(origin.session.generate(2))
    origin.session.append(said("And about tea?"))
    step.prepare(origin)

    def new_scene() -> Scene:
        memory = new_memory()
        session = Session(shared_of(memory), context_of(origin.session).fork("alice"))
        shared_of(memory).add(session)
        for text in origin.memory.compact_texts():
            shared_of(memory).texts.add(shared_of(origin.memory).texts.get(text.name))
        return Scene(memory, session, regex(engine, "[a-z]{30}"))

    return new_scene


def run(step: Step, scene: Scene, states: list[object] | None = None) -> None:
    """Do it; `states` gets what can be seen after each item of it, and at the end."""
    done = step.do(scene)
    if isinstance(done, Iterator):
        for _ in done:
            if states is not None:
                states.append(scene.seen())
    if states is not None:
        states.append(scene.seen())


def check(
    new_scene: Callable[[], Scene],
    step: Step,
    places: Callable[[int], Sequence[int]],
    *,
    everywhere: bool = True,
    error: type[BaseException] = KeyboardInterrupt,
) -> int:
    """Interrupt a step at these of so many places; afterwards it is as before, or as after, and goes on.

    Returns:
        How many interrupts there were.
    """
    how = {"everywhere": everywhere, "error": error}
    whole = new_scene()
    states = [whole.seen()]
    run(step, whole, states)
    counted = new_scene()
    with interrupted_at(None, **how) as count:
        run(step, counted)
    struck = places(count[0])
    kept: list[BaseException] = []  # with their frames, as an interpreter keeps the last one
    for place in struck:
        there = new_scene()
        with interrupted_at(place, **how):
            try:
                run(step, there)
            except (error, CompactionFailed, StorageError) as raised:  # memory errors become one of these
                kept = [raised]
            else:
                continue  # in a part that ran less often this time, or in a thread
        found = there.seen()
        if found not in states:
            near = min(states, key=lambda state: sum(a != b for a, b in zip(state, found, strict=True)))
            wrong = [(a, b) for a, b in zip(near, found, strict=True) if a != b]
            raise AssertionError(f"neither before nor after: {error.__name__} at {place} of {count[0]}: {wrong}")
        kept.clear()
        assert there.seen() == found, f"changed later, {error.__name__} at {place} of {count[0]}"
        assert is_free(there.memory), f"the device is still held, {error.__name__} at {place} of {count[0]}"
        if found == states[0]:
            run(step, there)
            assert there.seen() == states[-1], f"done again it is another, {place} of {count[0]}"
    return len(struck)


def is_free(memory: Memory) -> bool:
    """Whether another thread gets the device."""
    got = list[bool]()

    def take() -> None:
        got.append(shared_of(memory).engine_lock.acquire(timeout=5))
        if got[0]:
            shared_of(memory).engine_lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got == [True]


def main(*, only: Sequence[str], stride: int) -> None:
    import tempfile

    from conftest import random_llama, tokenizer_of_bytes

    from am_memory.engines.transformers import TransformersEngine

    engine = TransformersEngine(random_llama(), tokenizer_of_bytes())
    total = 0
    for name, step in STEPS.items():
        if only and name not in only:
            continue
        started = time.monotonic()

        new_scene = scenes(engine, step, Path(tempfile.mkdtemp()))
        for error in (KeyboardInterrupt, MemoryError, GeneratorExit):
            num = check(
                new_scene,
                step,
                lambda count: range(1, count + 1, stride),
                everywhere=False,
                error=error,
            )
            total += num
            print(f"{name:28} {error.__name__:18} {num:6} places, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{total} interrupts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("only", nargs="*")
    args = parser.parse_args()
    main(only=args.only, stride=args.stride)
