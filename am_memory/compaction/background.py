"""A compaction under way beside decoding: in a thread, and on a GPU in a stream, of its own.

It works on a branch of the cache, so that it sees nothing of what is read meanwhile, and what comes of it does not
depend on the clock. Knows not when it is due, nor how it is swapped in.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from queue import SimpleQueue

import torch

from am_memory.compaction.job import CompactionJob, CompactionResult
from am_memory.kv_cache.cache import CacheState, KVCache
from am_memory.kv_cache.layers import SlidingState, TailState
from am_memory.queries import Progress


class BackgroundCompaction:
    """What a job will have made; its contexts may share it, as branches of each other.

    Args:
        job: its cache is nobody else's.

    Attributes:
        at_tokens: logical tokens in the cache when it was begun.
        is_shared: branches have it too, so that none of them may stop it.
        has_failed: and somebody was told so.
    """

    def __init__(self, job: CompactionJob) -> None:
        assert isinstance(job.cache, KVCache)
        for layer in job.cache.compactable:
            layer.slots = layer.slots and layer.slots.apart()
        self.at_tokens = job.cache.num_tokens
        self.is_shared = self.has_failed = False
        self._windows = [state for state in job.cache.state().layers if isinstance(state, SlidingState)]
        self._told: SimpleQueue[tuple[str, int, int] | None] = SimpleQueue()
        self._is_stopped = False
        self._stream = _beside(job.engine.info.device)
        self._job = job
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="am-memory-ahead")
        self._future: Future[CompactionResult]

    def start(self) -> None:
        """Begin the work."""
        self._future = self._worker.submit(self._run, self._job)
        del self._job  # with its cache
        self._worker.shutdown(wait=False)  # the thread ends with its work
        self._future.add_done_callback(lambda _: self._told.put(None))

    def _run(self, job: CompactionJob) -> CompactionResult:
        with self._stream:
            return job.run(self._tell)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self._is_stopped:
            raise CancelledError
        self._told.put((stage, done, total))

    def _next_told(self) -> tuple[str, int, int] | None:
        """Wait for it; None, again and again, when the work is done."""
        if (told := self._told.get()) is None:
            self._told.put(None)
        return told

    def relay(self, progress: Progress) -> None:
        """Tell what the thread has told since, in the caller's."""
        while not self._told.empty() and (told := self._next_told()) is not None:
            progress(*told)

    def result(self, progress: Progress) -> CompactionResult:
        """Wait for the end of it, and tell of its progress meanwhile.

        Raises:
            CompactionFailed, StorageError: as `CompactionJob.run` does, each time that it is asked for.
        """
        while (told := self._next_told()) is not None:
            progress(*told)
        if (error := self._future.exception()) is not None:
            self.has_failed = True
            raise error
        made = self._future.result()
        for slots in made.result.slots:
            for tensor in slots.tensors:
                if tensor.is_cuda:  # made in another stream, whose next tensors must not be put in its place too early
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return made

    def stop(self) -> None:
        """Give it up and wait until its thread has ended; nothing where a branch has it too."""
        if not self.is_shared:
            self._is_stopped = True
            self._worker.shutdown()

    def began_from(self, state: CacheState) -> CacheState:
        """The state of the cache when it was begun, from a later one that has no other segments."""
        windows = iter(self._windows)
        layers = (
            layer._replace(length=self.at_tokens - layer.start) if isinstance(layer, TailState) else next(windows)
            for layer in state.layers
        )
        return replace(state, layers=tuple(layers))


def _beside(device: torch.device) -> AbstractContextManager[object]:
    """A place for work in another thread, behind what is queued on the device by now; done when it is left."""
    if device.type != "cuda":
        return nullcontext()
    stream = _second_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return _in_stream(stream)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, as torch keeps memory for each stream that ever needed some."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _in_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # what it reads may go only then, and whoever waits for the result need not wait for more
