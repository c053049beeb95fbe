"""What an engine may be able to do beyond `Engine`, as classes that `isinstance` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from am_memory.engines.base import OnQuery, SessionCache

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Branches(Protocol):
    """Several texts that continue one cache as a batch: each attends to the cache and to itself."""

    @property
    def logits(self) -> Tensor:
        """Next-token logits of each branch, (num_branches, vocab_size) float32."""
        ...

    def advance(self, branches: Sequence[int], token_ids: Sequence[int]) -> None:
        """Read one token into each of some branches; the others end. From then on only these are counted."""
        ...


@runtime_checkable
class Branching(Protocol):
    """An engine that can read one token of each of several texts in one forward pass (optional)."""

    def branches(self, cache: SessionCache, beginnings: Sequence[Sequence[int]]) -> Branches | None:
        """Texts behind a cache, which does not change; None if this cache cannot have branches.

        Args:
            beginnings: the first tokens of each text, at least one.
        """
        ...


@runtime_checkable
class Batching(Protocol):
    """An engine that can read one token into each of several caches in one forward pass (optional)."""

    def forward_batch(
        self, caches: Sequence[SessionCache], token_ids: Sequence[int], on_query: Sequence[OnQuery | None]
    ) -> Tensor | None:
        """Read token i into cache i. Each cache is afterwards as if it had read its token alone, to rounding.

        If this raises, some layers may have read their tokens: the caller restores all caches.

        Args:
            caches: at least two, each with at least one token.
            on_query: called with every compactable layer's queries of token i.

        Returns:
            Logits, (num_caches, vocab_size) float32. None: nothing was read, as these caches must be read one by one.
        """
        ...


@runtime_checkable
class OwnVocabulary(Protocol):
    """An engine without a transformers `tokenizer` that supports constrained answers (optional)."""

    def grammar_tokenizer(self) -> LLTokenizer: ...

    def token_texts(self) -> Mapping[str, int]:
        """Token ids by the text of the token."""
        ...
