"""One conversation that is kept after an answer, and what is saved beside its session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import BaseModel, Field

from am_memory.conversations.prompts import Prompt, last_common_cut, last_cuts, num_shared
from am_memory.session.saving import saved_copy
from am_memory.session.session import Session
from am_memory.storage.session_file import SavedSession

BRANCH_KEY = "am_memory.branch"
"""The field of a session's metadata that holds its branch."""


class BranchMetadata(BaseModel):
    """The fields of a branch that are saved with its session; see `Branch`."""

    thread: str
    keys: Annotated[tuple[str, ...], Field(min_length=1)]
    ends: tuple[Annotated[int, Field(ge=0)] | None, ...]

    @classmethod
    def of(cls, name: str, saved: SavedSession) -> BranchMetadata:
        """The metadata in a saved session.

        Raises:
            ValueError: there is none, or it does not belong to this session.
        """
        metadata = cls.model_validate(saved.metadata.get(BRANCH_KEY))
        ends = [end for end in metadata.ends if end is not None]
        is_in_order = ends == sorted(ends) and ends[-1:] == [len(saved.tokens)]
        expected_name = branch_name(metadata.thread, metadata.keys)
        if expected_name != name or len(metadata.keys) != len(metadata.ends) or not is_in_order:
            raise ValueError("its metadata belongs to another session")
        return metadata


@dataclass
class Branch:
    """One conversation that is kept.

    Attributes:
        thread: the name that it is saved, evicted and deleted under, together with its other branches.
        keys: as in `Prompt`, the answer included.
        ends: the number of tokens of the session after each of these; None where it cannot be cut.
    """

    session: Session
    thread: str
    keys: tuple[str, ...]
    ends: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """The thread and the last key, which stands for the whole conversation."""
        return branch_name(self.thread, self.keys)

    @property
    def kv_bytes(self) -> int:
        return self.session.stats.evictable_bytes

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """For each number of entries, the last cut up to there."""
        return last_cuts(self.ends)

    def num_shared(self, prompt: Prompt) -> int:
        """How many of its first entries it shares with a prompt, up to the last cut that both have."""
        return last_common_cut(self.cuts, prompt.cuts, num_shared(self.keys, prompt.keys))

    def end_of(self, num_entries: int) -> int:
        """Tokens of the first `num_entries` entries, which must end at a cut."""
        end = self.ends[num_entries - 1]
        assert end is not None
        return end

    def can_rewind(self, num_entries: int) -> bool:
        """Whether it can go on from its first `num_entries` entries without reading anything again."""
        return self.session.can_rewind(self.end_of(num_entries))

    @property
    def was_saved(self) -> bool:
        """Whether the store has ever held it."""
        return saved_copy(self.session).was_saved

    def is_prefix_of(self, other: Branch | BranchMetadata) -> bool:
        """Whether the other branch is a longer conversation of the same thread, and begins with this one."""
        is_longer = self.thread == other.thread and len(other.keys) > len(self.keys)
        return is_longer and other.keys[len(self.keys) - 1] == self.keys[-1]

    def is_replaced_by(self, other: Branch) -> bool:
        """Whether the other branch can do everything that this one can: go on, and go back to its end.

        A compaction in the other branch may have removed that end.
        """
        return self.is_prefix_of(other) and other.session.can_rewind(self.end_of(len(self.keys)))

    def write_metadata(self) -> None:
        """Put what `BranchMetadata` reads into the session."""
        fields = {"thread": self.thread, "keys": list(self.keys), "ends": list(self.ends)}
        self.session.metadata[BRANCH_KEY] = fields


def branch_name(thread: str, keys: tuple[str, ...]) -> str:
    return f"{thread}/{keys[-1]}"
