"""A prompt while it is read, part by part, alone or between the next tokens of others. Knows no messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from am_memory.session import appending
from am_memory.session.context import Context
from am_memory.session.stepwise import Stepwise

if TYPE_CHECKING:
    from am_memory.session.session import Session


@dataclass(eq=False)
class PromptReading(Stepwise[int]):
    """Reads what a session has not read yet: an iterator over the tokens left, one number for each part.

    The last number is 0. The conversation's last token is read with the first token of the answer.

    Attributes:
        is_finished: all is read, or the reading has failed, or was closed.
        error: why it has failed; None: it has not.
    """

    session: Session

    def __post_init__(self) -> None:
        self._begin(self.session._shared, self.session._context)

    def __iter__(self) -> PromptReading:
        return self

    @property
    def num_left(self) -> int:
        """Tokens to read."""
        return max(self.context.num_readable - self.context.cache.num_tokens, 0)

    def _step(self) -> int:
        num_left = appending.read(self.session)
        self.is_finished = not num_left
        return num_left

    def keep_left(self, num_tokens: int) -> None:
        """Keep the number of tokens left, after a part was read in a step with others.

        Args:
            num_tokens: 0 ends the reading; the first token of the answer reads what is left then.
        """
        self.keep(num_tokens, None)
        self.is_finished = not num_tokens

    def cancel_compaction(self) -> None:
        """Stop a compaction in the background."""
        with self.shared.engine_lock:
            self.context.cancel_background_compaction()


def read_part(context: Context, most_tokens: int) -> None:
    """Read the next tokens of a prompt, and compact first if that is due."""
    if context.cache.num_tokens < context.num_readable:
        context.compact_if_due()
        most_tokens = min(most_tokens, context.room_tokens)
        context.read(min(context.num_readable, context.cache.num_tokens + most_tokens))
