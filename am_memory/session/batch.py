"""The next tokens of several answers of one memory, read in one forward pass.

Each answer's step succeeds or changes nothing, whatever the others do. Long work of one answer, a prompt or a
compaction, goes on beside the others' tokens. Knows no queue and no thread of its callers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from am_memory.compaction.compact import is_out_of_memory
from am_memory.engines.abilities import Batching
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.session.admission import Admission, Work
from am_memory.session.generation import Generation, Piece
from am_memory.session.kept_queries import KeptQueries
from am_memory.session.notices import warn_beyond_window
from am_memory.session.pages import is_room_kept
from am_memory.session.reading import PromptReading, read_part
from am_memory.session.shared import BESIDE_SHARE, Shared
from am_memory.session.transaction import Before
from am_memory.session.turns import Key, Turns

if TYPE_CHECKING:
    from am_memory.session.context import Context

T = TypeVar("T")
WAIT_SECONDS = 0.05
"""A step that can do nothing but wait for a compaction waits so long: whoever makes the steps may have other work."""
SHORT_TOKENS = 16
"""So many unread tokens are read together with the next token: the opening of an answer, the end of a prompt."""

logger = logging.getLogger("am_memory")


def pieces_of(shared: Shared, answers: Sequence[Generation]) -> Iterator[tuple[Generation, Piece]]:
    """`Memory.generate_many`."""
    _require_apart(shared, answers)
    batch, going, failed = Batch(), list(answers), list[Exception]()
    try:
        while going:
            batch.step(going)
            for answer in list(going):
                answer.send_events()
                if not answer.is_ready:
                    continue
                try:
                    piece = next(answer, None)
                except Exception as error:  # of any kind: it is raised once the others have ended
                    failed.append(error)
                else:
                    if piece is not None:  # else another thread has closed it
                        yield answer, piece
            going = [answer for answer in going if answer.is_ready or not answer.is_finished]
    finally:
        try:
            _close(going)
        finally:  # again, in case an interrupt stopped it
            _close(going)
    if failed:
        raise failed[0]


def _close(answers: Sequence[Generation]) -> None:
    for answer in answers:
        answer.close()


def _require_apart(shared: Shared, answers: Sequence[Generation]) -> None:
    """Raise InvalidInput unless these are answers of different sessions of this memory, with different constraints."""
    constraints: set[int] = set()
    for answer in answers:
        if answer.shared is not shared:
            raise InvalidInput(f"session {answer.name!r} belongs to another memory: generate its answer with that one")
        if id(answer.constraint) in constraints:
            raise InvalidInput(f"session {answer.name!r} has another answer's constraint: make one for each answer")
        if answer.constraint is not None:
            constraints.add(id(answer.constraint))
    contexts = [answer.context for answer in answers]
    for row, context in enumerate(contexts):
        if context in contexts[:row]:
            raise InvalidInput(f"session {context.name!r} has two answers here: fork it for the second one")


class Batch:
    """Makes the next steps of several answers of one memory together: their tokens, and the reading of their prompts.

    Args:
        max_bytes: of the caches of all answers that go on at the same time; further answers wait. None: no limit. A
            cache counts with the bytes that it reaches before it is compacted, or before its answer ends.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._turns, self._admission = Turns(), Admission(max_bytes)

    def step(self, works: Sequence[Work], keys: Sequence[Key] | None = None) -> None:
        """Make the next token of each answer; those that get it, or fail, are `is_ready` then.

        An answer waits for the steps that its prompt or its compaction takes. One prompt is read at a time, a part of a
        chunk in each step. Compactions run one at a time, in the background if the engine can do that. No step waits
        for one for longer than `WAIT_SECONDS`. Work that runs out of memory waits until there is less of it.

        Args:
            works: answers, and prompts that are read. Those that are ready or finished are left alone.
            keys: prompts are read, and compactions made, in turns between the first names of their keys, then between
                the second ones. None: in turns.
        """
        keyed = dict(zip(works, keys or ((),) * len(works), strict=True))
        going = {work: key for work, key in keyed.items() if not work.is_ready and not work.is_finished}
        if not going:
            return
        with next(iter(going)).shared.engine_lock:
            try:
                self._step(going)
            except Exception as error:  # of any kind: it is raised again where each answer is waited for
                for work in going:
                    if not work.is_ready:
                        work.fail(error)

    def _step(self, going: Mapping[Work, Key]) -> None:
        able = self._admission.able([*going])
        for work in list(able):
            if isinstance(work, Generation):
                work.shared.writing.add(work)
            elif isinstance(work, PromptReading) and not _num_to_read(work):
                work.keep_left(0)
                able.remove(work)
        writing = [work for work in able if isinstance(work, Generation) and not _has_long_work(work)]
        reading = [work for work in able if _num_to_read(work) and not _is_compaction_due(work)]
        compacting = [work for work in able if work not in writing and work not in reading]
        if reading:
            self._read_prompt(self._turns.next(reading, [going[work] for work in reading]), is_alone=not writing)
        if compacting:
            running = [work for work in compacting if work.context.background_compaction is not None]
            work = running[0] if running else self._turns.next(compacting, [going[work] for work in compacting])
            self._run_alone(work, partial(_compact, work.context, waits=not (writing or reading)))
        if writing:
            self._write(writing)

    def _read_prompt(self, work: Work, *, is_alone: bool) -> None:
        context = work.context
        most = context.chunk_tokens if is_alone else max(int(context.chunk_tokens * BESIDE_SHARE), 1)
        if self._run_alone(work, partial(read_part, context, most)) and isinstance(work, PromptReading):
            work.keep_left(_num_to_read(work))

    def _write(self, answers: Sequence[Generation]) -> None:
        steps = [_TokenStep(answer) for answer in _apart(answers)]
        with _Together(steps):
            for step in steps:
                step.run(step.prepare)
            open_steps = [step for step in steps if step.error is None]
            for step, logits in zip(open_steps, _logits(open_steps), strict=True):
                if logits is not None:
                    step.choose(logits)
        self._settle(steps)

    def _run_alone(self, work: Work, run: Callable[[], object]) -> bool:
        """Do long work, as a step. Returns whether it was done."""
        step = _Step(work)
        with _Together([step]):
            step.run(run)
        self._settle([step])
        return step.error is None

    def _settle(self, steps: Sequence[_Step]) -> None:
        """Park the answers that ran out of memory beside others; fail the others whose steps were undone."""
        for step in steps:
            if step.error is None:
                self._admission.unpark(step.work)
            elif is_out_of_memory(step.error) and not step.has_chosen and self._admission.park(step.work):
                logger.warning("session %r waits until fewer answers are generated: %s", step.work.name, step.error)
            else:
                step.work.fail(step.error)


class _Step:
    """One step of some work. An error within `run` undoes it; an error outside of `run` undoes all steps.

    Attributes:
        error: why the step was undone; None: it was not.
        has_chosen: whether a token was about to be chosen; the step cannot be repeated then.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.error: Exception | None = None
        self.has_chosen = False
        self._notify = work.context.notify
        self._transaction = work.transaction()
        self._before: Before | None = None

    def begin(self) -> None:
        """Begin the step; its events are kept for the caller of the work."""
        self._before = self._transaction.__enter__()
        self.work.context.notify = self.work.unsent.append

    def end(self, error: BaseException | None) -> None:
        """End the step, once; undo it if there is an error."""
        if self._before is not None:
            self._transaction.__exit__(type(error) if error else None, error, None)
            self._before = None
        self.work.context.notify = self._notify

    def run(self, part: Callable[[], T]) -> T | None:
        """Do a part of the step, unless an earlier part failed; None if it failed."""
        if self.error is not None:
            return None
        try:
            return part()
        except Exception as error:  # of any kind: it is raised again where the work is waited for
            self.error = error
            self.end(error)
        return None

    def read(self) -> Tensor:
        """Read the conversation's last token alone; logits, (vocab_size,)."""
        context = self.work.context
        return context.forward(context.tokens[-1:], num_logits=1)[0]


class _TokenStep(_Step):
    """One step of an answer, in two halves."""

    def __init__(self, answer: Generation) -> None:
        super().__init__(answer)
        self.answer = answer

    def prepare(self) -> None:
        """The first half; the last token of the conversation can be read then."""
        self.answer.prepare()
        self.answer.context.prepare_next(keeps_room=True)

    def choose(self, logits: Tensor) -> None:
        """The second half."""
        before, self.has_chosen = self._before, True
        assert before is not None
        self.run(lambda: self.answer.keep(self.answer.choose(logits), before))


class _Together:
    """A `with` block in which some steps begin and end together. An interrupt undoes all that have not failed.

    A class and not an `ExitStack`, of which an interrupt may skip a part.
    """

    def __init__(self, steps: Sequence[_Step]) -> None:
        self._steps = steps

    def __enter__(self) -> None:
        try:
            for step in self._steps:
                step.run(step.begin)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end(error)
        finally:  # again, in case an interrupt stopped it
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        for step in self._steps:
            if error is not None and step.error is None:
                step.work.interrupt()
            step.end(error)


def _logits(steps: Sequence[_TokenStep]) -> list[Tensor | None]:
    """Read the last token of each conversation: logits (vocab_size,), or None for a step that has failed."""
    contexts = [step.work.context for step in steps]
    if len(steps) > 1 and all(context.cache.num_tokens for context in contexts):
        befores = [Before.of(context, ()) for context in contexts]
        try:
            if (logits := _read_together(contexts)) is not None:
                return list(logits)
        except Exception as error:  # of any kind: whoever fails alone as well gets it
            logger.warning("a step of %d answers failed, and each reads its token alone: %s", len(steps), error)
            for before, context in zip(befores, contexts, strict=True):
                before.put_back(context, ())
    return [step.run(step.read) for step in steps]


def _read_together(contexts: Sequence[Context]) -> Tensor | None:
    """Read the last token of each in one pass; (num_contexts, vocab_size), or None if the engine cannot."""
    engine = contexts[0].engine
    if not isinstance(engine, Batching):
        return None
    kept = [KeptQueries(context, 1) for context in contexts]
    for context in contexts:
        warn_beyond_window(context, 1)
    token_ids = [context.tokens[-1] for context in contexts]
    logits = engine.forward_batch([context.cache for context in contexts], token_ids, [each.on_query for each in kept])
    if logits is not None:
        for each in kept:
            each.settle()
    return logits


def _compact(context: Context, *, waits: bool) -> None:
    """Start a compaction in the background unless one runs; where the engine cannot do that, make it now.

    Args:
        waits: wait for it, for a moment.
    """
    if context.background_compaction is None:
        can_start = context.engine.capabilities.can_read_in_parallel
        (context.start_background_compaction if can_start else context.compact)()
    if (running := context.background_compaction) is not None:
        if waits:
            running.wait(WAIT_SECONDS)
        running.relay(context.progress)


def _num_to_read(work: Work) -> int:
    """Unread tokens that are read in steps of their own."""
    num_left = work.context.num_readable - work.context.cache.num_tokens
    return num_left if num_left > SHORT_TOKENS else 0


def _is_compaction_due(work: Work) -> bool:
    """Whether a compaction must be made, or be waited for, before the next token or the next part of a prompt."""
    context = work.context
    limit = context.rest_tokens if is_room_kept(context) and not _num_to_read(work) else context.due_tokens
    running = context.background_compaction
    return context.tokens_at_rest + 1 > limit and not (running is not None and running.is_done)


def _has_long_work(work: Work) -> bool:
    return _num_to_read(work) > 0 or _is_compaction_due(work)


def _apart(answers: Sequence[Generation]) -> list[Generation]:
    """The first answer of each session; any other fails before it can change what the first one is made of."""
    apart: list[Generation] = []
    for answer in answers:
        if answer.context in [other.context for other in apart]:
            error = f"session {answer.name!r} has two answers in one batch: fork the session for the second one"
            answer.fail(UnsupportedOperation(error))
        else:
            apart.append(answer)
    return apart
