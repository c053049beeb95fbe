"""The compact texts of one memory, by name, in memory or in the store. Does not know how one is made."""

from __future__ import annotations

from collections.abc import MutableMapping
from weakref import WeakValueDictionary

from am_memory.engines.base import Engine
from am_memory.errors import InvalidInput, TextNotFound, UnsupportedOperation
from am_memory.recall.original_store import OriginalStore
from am_memory.storage.compact_text import CompactText, TextCache
from am_memory.storage.store import Store


def require_mountable(engine: Engine) -> None:
    """Raise UnsupportedOperation if the engine cannot mount texts."""
    can = engine.capabilities
    if not can.can_exchange_slots:
        raise UnsupportedOperation(
            f"the engine of {engine.info.name} cannot mount compact texts: its caches take no slots from elsewhere; "
            "use engine='transformers'"
        )
    if not can.can_rotate_keys:
        raise UnsupportedOperation(
            f"{engine.info.name} cannot mount compact texts, whose keys have to be rotated to where they are mounted: "
            f"{can.why_keys_stay}; append the text instead"
        )


def _require_name(name: object) -> None:
    if not isinstance(name, str):
        raise InvalidInput(f"{name!r} is no name of a compact text: give a str")


class CompactTexts:
    """The compact texts of one memory, by name. Threads may share it.

    Without a store it holds them all. With one, they are in the store, and it holds those that sessions use.
    """

    def __init__(self, store: Store | None, original_store: OriginalStore) -> None:
        self._store, self._original_store = store, original_store
        self._held: MutableMapping[str, TextCache] = {} if store is None else WeakValueDictionary()

    def add(self, text: TextCache) -> None:
        """Keep a text under its name, in place of the one that has it; sessions that have mounted that one keep it."""
        self._take_out(text.about.name)
        if self._store is not None:
            text = self._store.texts.save(text)
        self._held[text.about.name] = text

    def get(self, name: str) -> TextCache:
        """The text of that name. It may be read from the store, and needs no engine; `check_text` comes later.

        Raises:
            InvalidInput: the name is not a str.
            TextNotFound: there is none.
            StorageError: it cannot be read.
        """
        _require_name(name)
        held = self._held.get(name)
        if self._store is None and held is None:
            raise TextNotFound(name, self._held)
        if self._store is None or (held is not None and self._store.texts.version(name) == held.version):
            assert held is not None
            return held
        text = self._store.texts.load(name, self._original_store)
        self._held[name] = text
        return text

    def all(self) -> list[CompactText]:
        """All of them, in the order of their names."""
        if self._store is not None:
            return self._store.texts.all()
        return sorted((text.about for text in [*self._held.values()]), key=lambda text: text.name)

    def delete(self, name: str) -> None:
        """Delete a text; sessions that have mounted it keep it. Raises TextNotFound if there is none of that name."""
        _require_name(name)
        known = sorted(self._held) if self._store is None else self._store.texts.names()
        if name not in known:
            raise TextNotFound(name, known)
        self._take_out(name)
        if self._store is not None:
            self._store.texts.delete(name)
        self._held.pop(name, None)

    def _take_out(self, name: str) -> None:
        """Keep the originals of a text that goes, for the sessions of this memory that have mounted it."""
        held = self._held.get(name)
        for original in () if held is None else held.originals:
            self._original_store.take_out(original)
