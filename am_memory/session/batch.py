"""The next tokens of several answers of one memory, read in one forward pass.

Each answer's step succeeds or changes nothing, whatever the others do. Long work of one answer, a prompt or a
compaction, goes on beside the others' tokens. Knows no queue and no thread of its callers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from am_memory.compaction.compact import is_out_of_memory
from am_memory.engines.abilities import Batching
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.session.kept_queries import KeptQueries
from am_memory.session.notices import warn_beyond_window
from am_memory.session.pages import is_room_kept
from am_memory.session.shared import BESIDE_SHARE, Shared
from am_memory.session.transaction import Before

if TYPE_CHECKING:
    from am_memory.session.context import Context
    from am_memory.session.generation import Generation, Piece

T = TypeVar("T")
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
        if _holds(contexts[:row], context):
            raise InvalidInput(f"session {context.name!r} has two answers here: fork it for the second one")


class Batch:
    """Makes the next tokens of several answers of one memory together."""

    def __init__(self) -> None:
        self._last_read: WeakKeyDictionary[Generation, int] = WeakKeyDictionary()
        self._parked: WeakKeyDictionary[Generation, int] = WeakKeyDictionary()  # out of memory beside so many others
        self._num_steps, self._num_going = 0, 0

    def step(self, answers: Sequence[Generation]) -> None:
        """Make the next token of each answer; those that get it, or fail, are `is_ready` then.

        An answer waits for the steps that its prompt or its compaction takes. Of several prompts, that which has waited
        longest is read, a part of a chunk in each step. Compactions run one at a time, in the background if the engine
        can do that. An answer that runs out of memory waits until there are fewer answers.

        Args:
            answers: those that are ready or finished are left alone.
        """
        going = [answer for answer in answers if not answer.is_ready and not answer.is_finished]
        if not going:
            return
        with going[0].shared.engine_lock:
            try:
                self._step(going)
            except Exception as error:  # of any kind: it is raised again where each answer is waited for
                for answer in going:
                    if not answer.is_ready:
                        answer.fail(error)

    def _step(self, going: Sequence[Generation]) -> None:
        self._num_steps += 1
        going[0].shared.writing.update(going)
        unparked = [answer for answer in going if self._parked.get(answer, len(going) + 1) > len(going)]
        self._num_going = len(going) if unparked else 1
        able = unparked or going[:1]
        writing = [answer for answer in able if not _has_long_work(answer)]
        reading = [answer for answer in able if _num_to_read(answer) and not _is_compaction_due(answer)]
        compacting = [answer for answer in able if answer not in writing and answer not in reading]
        if reading:
            self._read_prompt(min(reading, key=lambda answer: self._last_read.get(answer, 0)), is_alone=not writing)
        if compacting and not (writing or reading):
            self._compact(compacting)
        elif compacting:
            self._compact_beside(compacting)
        if writing:
            self._write(writing)

    def _read_prompt(self, answer: Generation, *, is_alone: bool) -> None:
        self._last_read[answer] = self._num_steps
        context = answer.context
        most = context.chunk_tokens if is_alone else max(int(context.chunk_tokens * BESIDE_SHARE), 1)
        end = context.cache.num_tokens + min(_num_to_read(answer), most, max(context.room_tokens, 1))
        self._run_alone(answer, lambda: context.read(end))

    def _compact(self, answers: Sequence[Generation]) -> None:
        """Make one compaction; nothing else can go on."""
        running = [answer for answer in answers if answer.context.background_compaction is not None]
        answer = (running or answers)[0]
        self._run_alone(answer, answer.context.compact)

    def _compact_beside(self, answers: Sequence[Generation]) -> None:
        """Start a compaction in the background unless one runs; where the engine cannot do that, make it now."""
        if any(answer.context.background_compaction is not None for answer in answers):
            return
        context = answers[0].context
        can_start = context.engine.capabilities.can_read_in_parallel
        self._run_alone(answers[0], context.start_background_compaction if can_start else context.compact)

    def _write(self, answers: Sequence[Generation]) -> None:
        steps = [_Step(answer) for answer in _apart(answers)]
        with _Together(steps):
            for step in steps:
                step.run(step.prepare)
            open_steps = [step for step in steps if step.error is None]
            for step, logits in zip(open_steps, _logits(open_steps), strict=True):
                if logits is not None:
                    step.choose(logits)
        self._settle(steps)

    def _run_alone(self, answer: Generation, work: Callable[[], object]) -> None:
        """Do long work of one answer, as a step."""
        step = _Step(answer)
        with _Together([step]):
            step.run(work)
        self._settle([step])

    def _settle(self, steps: Sequence[_Step]) -> None:
        """Park the answers that ran out of memory beside others; fail the others whose steps were undone."""
        for step in steps:
            if step.error is None:
                continue
            if is_out_of_memory(step.error) and not step.has_chosen and self._num_going > 1:
                logger.warning("session %r waits until fewer answers are generated: %s", step.answer.name, step.error)
                self._parked[step.answer] = self._num_going
            else:
                step.answer.fail(step.error)


class _Step:
    """One step of one answer. An error within `run` undoes it; an error outside of `run` undoes all steps.

    Attributes:
        error: why the step was undone; None: it was not.
        has_chosen: whether a token was about to be chosen; the step cannot be repeated then.
    """

    def __init__(self, answer: Generation) -> None:
        self.answer = answer
        self.error: Exception | None = None
        self.has_chosen = False
        self._notify = answer.context.notify
        self._transaction = answer.transaction()
        self._before: Before | None = None

    def begin(self) -> None:
        """Begin the step; its events are kept for the answer's caller."""
        self._before = self._transaction.__enter__()
        self.answer.context.notify = self.answer.unsent.append

    def end(self, error: BaseException | None) -> None:
        """End the step, once; undo it if there is an error."""
        if self._before is not None:
            self._transaction.__exit__(type(error) if error else None, error, None)
            self._before = None
        self.answer.context.notify = self._notify

    def run(self, work: Callable[[], T]) -> T | None:
        """Do a part of the step, unless an earlier part failed; None if it failed."""
        if self.error is not None:
            return None
        try:
            return work()
        except Exception as error:  # of any kind: it is raised again where the answer is waited for
            self.error = error
            self.end(error)
        return None

    def prepare(self) -> None:
        """The first half of the step; the last token of the conversation can be read then."""
        self.answer.prepare()
        self.answer.context.prepare_next(keeps_room=True)

    def read(self) -> Tensor:
        """Read the last token alone; logits, (vocab_size,)."""
        context = self.answer.context
        return context.forward(context.tokens[-1:], num_logits=1)[0]

    def choose(self, logits: Tensor) -> None:
        """The second half of the step."""
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
                step.answer.interrupt()
            step.end(error)


def _logits(steps: Sequence[_Step]) -> list[Tensor | None]:
    """Read the last token of each conversation: logits (vocab_size,), or None for a step that has failed."""
    contexts = [step.answer.context for step in steps]
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


def _num_to_read(answer: Generation) -> int:
    """Unread tokens that are read in steps of their own."""
    num_left = answer.context.num_readable - answer.context.cache.num_tokens
    return num_left if num_left > SHORT_TOKENS else 0


def _is_compaction_due(answer: Generation) -> bool:
    """Whether a compaction must be made, or be waited for, before the next token or the next part of a prompt."""
    context = answer.context
    limit = context.rest_tokens if is_room_kept(context) and not _num_to_read(answer) else context.due_tokens
    running = context.background_compaction
    return context.tokens_at_rest + 1 > limit and not (running is not None and running.is_done)


def _has_long_work(answer: Generation) -> bool:
    return _num_to_read(answer) > 0 or _is_compaction_due(answer)


def _apart(answers: Sequence[Generation]) -> list[Generation]:
    """The first answer of each session; any other fails before it can change what the first one is made of."""
    apart: list[Generation] = []
    for answer in answers:
        if _holds([other.context for other in apart], answer.context):
            error = f"session {answer.name!r} has two answers in one batch: fork the session for the second one"
            answer.fail(UnsupportedOperation(error))
        else:
            apart.append(answer)
    return apart


def _holds(contexts: Sequence[Context], wanted: Context) -> bool:
    return any(context is wanted for context in contexts)
