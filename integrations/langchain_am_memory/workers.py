"""The worker thread of a memory, on which asynchronous calls run, so that no event loop waits for the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from weakref import WeakKeyDictionary

from am_memory import Memory

_workers: WeakKeyDictionary[Memory, ThreadPoolExecutor] = WeakKeyDictionary()
_starting = Lock()


def worker_of(memory: Memory) -> ThreadPoolExecutor:
    """The memory's worker: one thread, as the engine does one thing at a time."""
    with _starting:
        if memory not in _workers:
            _workers[memory] = ThreadPoolExecutor(1, thread_name_prefix="am_memory")
        return _workers[memory]
