"""A compaction that runs while tokens are still read and generated: in its own thread, and on a GPU its own stream.

It works on a branch of the cache and never sees tokens that are read meanwhile. Its result is therefore the same
however fast it runs. It does not know when a compaction is due, nor how the result is swapped in.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from queue import SimpleQueue

import torch

from am_memory.compaction.job import BlockJob, CompactionResult
from am_memory.kv_cache.cache import CacheState, Snapshot
from am_memory.kv_cache.layers import TailState
from am_memory.queries import Progress


class BackgroundCompaction:
    """A job in a worker thread, and later its result. Contexts that are branches of each other may share it.

    Args:
        job: nothing else may use its cache.

    Attributes:
        at_tokens: logical tokens in the cache when the job began.
        is_shared: branches have it too, so that none of them may stop it.
        has_failed: the job raised an error, and `result` has raised it to a caller.
    """

    def __init__(self, job: BlockJob) -> None:
        self.at_tokens = job.cache.num_tokens
        self.is_shared = self.has_failed = False
        self._others = [state for state in job.cache.state().layers if not isinstance(state, TailState)]
        self._progress: SimpleQueue[tuple[str, int, int] | None] = SimpleQueue()  # None: the job has ended
        self._is_stopped = False
        self._stream = _second_stream(job.engine.info.device)
        self._job = job
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="am-memory-ahead")
        self._future: Future[list[CompactionResult]]

    @property
    def is_done(self) -> bool:
        """Whether the job has ended, so that `result` need not wait."""
        return self._future.done()

    def wait(self, seconds: float) -> None:
        """Wait for the job to end, for so long at most."""
        wait([self._future], seconds)

    def start(self) -> None:
        """Begin the work."""
        self._future = self._worker.submit(self._run, self._job)
        del self._job  # with its cache
        self._worker.shutdown(wait=False)  # the thread ends with its work
        self._future.add_done_callback(lambda _: self._progress.put(None))

    def _run(self, job: BlockJob) -> list[CompactionResult]:
        with self._stream:
            return job.run(self._report)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._is_stopped:
            raise CancelledError
        self._progress.put((stage, done, total))

    def _next_progress(self) -> tuple[str, int, int] | None:
        """Wait for the next report of the worker; None from when the job has ended."""
        if (report := self._progress.get()) is None:
            self._progress.put(None)
        return report

    def relay(self, progress: Progress) -> None:
        """Pass on, in the caller's thread, the progress that the worker has reported so far."""
        while not self._progress.empty() and (report := self._next_progress()) is not None:
            progress(*report)

    def result(self, progress: Progress) -> list[CompactionResult]:
        """Wait for the job to end, and pass on its progress meanwhile.

        Raises:
            CompactionFailed: as `BlockJob.run` does; at every call.
        """
        while (report := self._next_progress()) is not None:
            progress(*report)
        if (error := self._future.exception()) is not None:
            self.has_failed = True
            raise error
        results = self._future.result()
        for tensor in (tensor for result in results for slots in result.slots for tensor in slots.tensors):
            if tensor.is_cuda:  # allocated in another stream: keeps that stream from reusing the memory too early
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return results

    def stop(self) -> None:
        """Cancel the job and wait for its thread to end. Does nothing if branches share the job."""
        if not self.is_shared:
            self._is_stopped = True
            self._worker.shutdown()

    def began_from(self, state: Snapshot) -> Snapshot:
        """The state of the cache when the job began.

        Args:
            state: a later one, with the same segments.
        """
        others = iter(self._others)
        layers = (
            layer._replace(length=self.at_tokens - layer.start) if isinstance(layer, TailState) else next(others)
            for layer in state.layers
        )
        return CacheState(tuple(layers), state.segments, state.num_pinned_slots)


def _second_stream(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA stream for the worker, behind all work queued on the device by now; nothing on other devices."""
    if device.type != "cuda":
        return nullcontext()
    stream = _shared_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return _in_stream(stream)


@cache
def _shared_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all jobs: torch's allocator keeps a memory pool for each stream that was ever used."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _in_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # before the tensors that it reads are freed, and so that a waiter need not synchronize
