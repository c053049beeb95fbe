"""One chat completion: read the prompt, generate the answer, keep the conversation.

Every chat API runs `answer_chat`. Messages and tools have the form of OpenAI's API. Knows no web server and no
framework.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from am_memory.conversations.chat_answer import ChatAnswer, Delta
from am_memory.conversations.turn import Turn
from am_memory.errors import CompactionFailed


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

    Reading gives a `PromptProgress` at first and for each part, generating a `Delta` for each token. The last `Delta`
    has a `finish_reason`. After it the conversation is kept. Stopping earlier leaves nothing behind.

    After each of these steps, `answer.next_step` is what goes on; a `Batch` may do it together with that of others.

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
        yield from answer.generate()
    except BaseException:
        answer.abandon()
        raise
    turn.keep_in_memory(answer.message, forgets=answer.forgets_reasoning)
    yield HostWork(turn.save)


def _read(turn: Turn, max_retries: int) -> Iterator[int]:
    for attempt in range(max_retries + 1):
        try:
            yield from turn.read()
            return
        except CompactionFailed:
            if attempt == max_retries:
                raise
