"""One chat completion: read the prompt, generate the answer, keep the conversation.

Every chat API runs `answer_chat`. Messages and tools have the form of OpenAI's API. Knows no web server and no
framework.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from am_memory.conversations.chat_answer import ChatAnswer, Delta
from am_memory.conversations.turn import Turn
from am_memory.errors import CompactionFailed
from am_memory.session.batch import Batch


@dataclass(frozen=True)
class HostWork:
    """Work that needs no device and may take long.

    Whoever iterates `answer_chat` calls `run` before the next step, on any thread.
    """

    run: Callable[[], None]


@dataclass(frozen=True)
class PromptProgress:
    """A part of the prompt has been read, or the reading begins.

    Attributes:
        left_tokens: tokens of the prompt still to be read.
        total_tokens: tokens that this call reads.
    """

    left_tokens: int
    total_tokens: int


ChatStep = HostWork | PromptProgress | Delta


def answer_chat(answer: ChatAnswer, *, max_retries: int = 0) -> Generator[ChatStep, None, None]:
    """Answer a conversation in short steps, so that other conversations can take turns on the device.

    Where the request asks for several answers, they share the prompt and take turns: a `Delta` has the answer's index.
    Reading gives a `PromptProgress` at first and for each part, generating a `Delta` for each token. The last `Delta`
    of an answer has a `finish_reason`. After that the conversation is kept, with the first answer. Stopping earlier
    leaves nothing behind.

    After each of these steps, `answer.next_steps` go on; a `Batch` may make them together with those of others.

    Args:
        max_retries: how often a failed compaction is tried again while the prompt is read.

    Raises:
        InvalidInput: the model's chat template refuses the messages.
        PromptTooLong: what the policy pins leaves no room for anything else.
        CompactionFailed: a compaction failed.
        StorageError: from the last `HostWork`: the conversation is kept in memory, but cannot be saved.
    """
    turn = answer.begin()
    if turn.is_short:
        turn.encode()
    else:
        yield HostWork(turn.encode)
    try:
        for left in _read(turn, max_retries):
            if not left:
                answer.start_generating()
            yield PromptProgress(left, len(turn.session.tokens) - turn.num_cached_tokens)
        yield from answer.generate() if not answer.others else _generate_all((answer, *answer.others))
    except BaseException:
        answer.abandon()
        raise
    turn.keep_in_memory(answer.message, forgets=answer.forgets_reasoning)
    yield HostWork(turn.save)


def _generate_all(answers: Sequence[ChatAnswer]) -> Iterator[Delta]:
    """Generate several answers: whoever's next token is made already goes on; else all get theirs in one pass."""
    batch, going = Batch(), {answer: answer.generate() for answer in answers}
    while going:
        if not (ready := [answer for answer in going if answer.is_ready]):
            batch.step([step for answer in going for step in answer.own_steps])
        for answer in ready:
            if (delta := next(going[answer], None)) is None:
                del going[answer]
            else:
                yield delta


def _read(turn: Turn, max_retries: int) -> Iterator[int]:
    for attempt in range(max_retries + 1):
        try:
            yield from turn.read()
            return
        except CompactionFailed:
            if attempt == max_retries:
                raise
