"""One call: a session that goes on from what was read before, and the rest of the prompt.

Its steps are short, so that other sessions can take turns on the device. `encode` and `save` need no device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from am_memory.conversations.prompts import Prompt, chained_key, message_key
from am_memory.engines.base import Message
from am_memory.session import appending
from am_memory.session.appending import Encoded
from am_memory.session.reading import PromptReading
from am_memory.session.session import Session

Save = Callable[[], None]
KeepOpening = Callable[[Session, tuple[str, ...], tuple[int | None, ...]], None]


@dataclass(kw_only=True)
class Turn:
    """One call.

    Attributes:
        session: a scratch branch, for `generate` once the prompt is read.
        reading: the rest of the prompt while it is read; a `Batch` may read its next part.
        num_cached_tokens: tokens of the prompt that are not read again.
        is_short: `encode` takes no longer than a step on the device.
    """

    session: Session
    num_cached_tokens: int
    is_short: bool
    reading: PromptReading | None = field(default=None, repr=False)
    _rest: Sequence[Message] | Sequence[int] = field(repr=False)
    _encoded: Encoded | None = field(default=None, repr=False)
    _is_appended: bool = field(default=False, repr=False)

    def encode(self) -> None:
        """Make tokens of the rest of the prompt. Needs no device, and may take long.

        Raises:
            InvalidInput: the model's chat template refuses the messages.
        """
        if self._rest:
            self._encoded = appending.encode(self.session, self._rest)

    def read(self) -> Generator[int, None, None]:
        """Read the rest of the prompt in parts; gives the number of tokens left at first, and after each part.

        After an error it can be called again, and goes on where it stopped.

        Raises:
            PromptTooLong: what the policy pins leaves no room for anything else.
            CompactionFailed: a compaction failed.
        """
        if not self._is_appended:
            self._append()
            self._is_appended, self._encoded = True, None
        self.reading = PromptReading(self.session)
        yield (left := self.reading.num_left)
        if left:
            yield from self.reading

    def read_rest(self) -> None:
        """Read what is left of the prompt at once."""
        while appending.read(self.session):
            pass

    def abandon(self) -> None:
        """Stop what goes on in the session, a compaction in the background included: the session is not kept."""
        if self.reading is not None:
            self.reading.close()
            self.reading.cancel_compaction()

    def _append(self) -> None:
        """Add the rest of the prompt to the session, without reading it."""
        if self._encoded is not None:
            appending.add(self.session, self._encoded)


@dataclass(kw_only=True)
class ChatTurn(Turn):
    """One call with a conversation.

    Attributes:
        rebuilt: why tokens that some branch had read are read again; None where none are.
        begun: the first words of the answer, which the caller gives.
        continues: the last message of the prompt is an answer that was cut, and this call goes on from its last token.
    """

    rebuilt: str | None
    begun: str = ""
    continues: bool = False
    _prompt: Prompt = field(repr=False)
    _ends: tuple[int | None, ...] = field(repr=False)
    _add: Callable[[Session, tuple[str, ...], tuple[int | None, ...]], Save] = field(repr=False)
    _save: Save | None = field(default=None, repr=False)
    _keep_opening: KeepOpening | None = field(default=None, repr=False)

    def read(self) -> Generator[int, None, None]:
        for left in super().read():
            self._note_opening(len(self.session.tokens) - left)
            yield left

    def _note_opening(self, num_read: int) -> None:
        """Once the opening of the prompt is read, keep it for other conversations that begin alike."""
        num_entries = self._prompt.num_opening
        end = self._ends[num_entries - 1] if num_entries <= len(self._ends) else None
        if self._keep_opening is not None and end is not None and num_read >= end:
            self._keep_opening(self.session, self._prompt.keys[:num_entries], self._ends[:num_entries])
            self._keep_opening = None

    def _append(self) -> None:
        super()._append()
        self._ends = (*self._ends, *self._new_ends())
        if self.begun:
            appending.begin_answer(self.session, self.begun)

    def _new_ends(self) -> Iterator[int | None]:
        """Tokens after each message that was added; None where the tokens of two messages cannot be told apart."""
        prompt, session = self._prompt, self.session
        num_known = len(prompt.prepared) - len(self._rest)
        starts = session.message_starts[-len(self._rest) :] if self._rest else ()
        for num_prepared in prompt.num_prepared[len(self._ends) :]:
            if num_prepared is None:
                yield None
            elif num_prepared == len(prompt.prepared):
                yield len(session.tokens)
            else:
                before, start = starts[num_prepared - num_known - 1 :][:2]
                yield start if start > before else None  # two messages with one start share their tokens

    def can_continue(self) -> bool:
        """Whether the session ends with the whole prompt, and its last message is an answer that was cut."""
        return not self._rest and appending.is_answering(self.session)

    def keep(self, answer: Message) -> None:
        """Keep the conversation with the model's answer, which the next call will send back.

        If the thread was deleted since the turn began, nothing is kept.

        Raises:
            StorageError: it cannot be saved. It is kept in memory.
        """
        self.keep_in_memory(answer)
        self.save()

    def keep_in_memory(self, answer: Message, *, forgets: bool = False) -> None:
        """Keep the conversation without saving it; `save` does that.

        Args:
            forgets: forget how the answer was generated. The next call reads it as its client sends it back. An answer
                that a compaction has reached is kept as it was generated.
        """
        keys, ends = self._prompt.keys, self._ends
        if self.continues:  # the answer takes the place of its first words
            keys, ends = keys[:-1], ends[:-1]
        if forgets and ends[-1] is not None and self.session.can_rewind(ends[-1]):
            self.session.rewind(ends[-1])
        else:
            keys, ends = (*keys, chained_key(keys[-1], message_key(answer))), (*ends, len(self.session.tokens))
        self._save = self._add(self.session, keys, ends)

    def save(self) -> None:
        """Save the conversation, and delete the branch that it replaces. Needs no device, and may take long.

        Raises:
            StorageError: it cannot be saved. It is kept in memory.
        """
        if self._save is not None:
            self._save()
