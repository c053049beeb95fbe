"""What is measured once for each model: shipped with the package, kept on this machine, or measured now.

Does not know what is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from am_memory.engines.base import Engine, SessionCache
from am_memory.queries.measured_files import MeasuredFile, MeasuredFiles, model_fingerprint

T = TypeVar("T")

OnProgress = Callable[[int, int], None]
"""Called with (steps done, steps in all) of a measurement."""


def ignore_progress(done: int, total: int) -> None:
    """For who does not want to know how far a measurement is."""


class Measurement(Generic[T]):
    """One thing that is measured of every model.

    Args:
        files: where results are kept.
        measure: measures an engine's model.
        packed: a result as its file has it.
        unpacked: the result of a file; raises KeyError, ValueError or TypeError, or returns None, if it makes no sense.
        suits: whether a result is one for the layers of a cache, which has read a token.
    """

    def __init__(
        self,
        files: MeasuredFiles,
        *,
        measure: Callable[[Engine, OnProgress], T],
        packed: Callable[[T], MeasuredFile],
        unpacked: Callable[[MeasuredFile], T | None],
        suits: Callable[[T, SessionCache], bool],
    ) -> None:
        self.files = files
        self._measure, self._packed, self._unpacked, self._suits = measure, packed, unpacked, suits
        self._known: WeakKeyDictionary[Engine, T | None] = WeakKeyDictionary()
        self._measuring = threading.RLock()

    def known(self, engine: Engine, cache: SessionCache | None = None) -> T | None:
        """The result for an engine's model, unless it has yet to be measured.

        Args:
            cache: one of the engine's, to check a file against; None: the file is trusted.
        """
        if engine not in self._known:
            self._known[engine] = self._from_file(model_fingerprint(engine.info), cache)
        return self._known[engine]

    def of(self, engine: Engine, cache: SessionCache | None = None, on_progress: OnProgress = ignore_progress) -> T:
        """The result for an engine's model, which is measured now if it is not known.

        Who asks meanwhile waits. A new result goes to the user's folder for caches, if that can be written to.
        """
        found = self.known(engine, cache)
        if found is None:
            with self._measuring:
                found = self._known[engine]
                if found is None:
                    found = self._known[engine] = self._measure(engine, on_progress)
                    self.files.keep(model_fingerprint(engine.info), self._packed(found))
        return found

    def _from_file(self, fingerprint: str, cache: SessionCache | None) -> T | None:
        for content in self.files.found(fingerprint):
            try:
                found = self._unpacked(content)
            except (KeyError, ValueError, TypeError):
                continue
            if found is not None and (cache is None or self._suits(found, cache)):
                return found
        return None
