"""Measurements of models: made once, also when two threads ask at the same time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from driven import another_process

from am_memory.engines.transformers import TransformersEngine
from am_memory.queries.measured_files import MeasuredFile, MeasuredFiles
from am_memory.queries.measurement import Measurement, OnProgress


class Counted:
    """A measurement that counts how often it was made, and waits for the test."""

    def __init__(self) -> None:
        self.num_made, self.fails = 0, False
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.measurement = Measurement(
            MeasuredFiles("counted", "a trial"),
            measure=self._measure,
            packed=lambda found: MeasuredFile({"found": found}, {}),
            unpacked=lambda content: content.tensors["found"],
            suits=lambda found, cache: True,
        )

    def _measure(self, engine: TransformersEngine, on_progress: OnProgress) -> torch.Tensor:
        self.num_made += 1
        self.has_begun.set()
        assert self.may_end.wait(10)
        on_progress(1, 1)
        if self.fails:
            raise MemoryError
        return torch.tensor([self.num_made])


@pytest.fixture
def counted(measured_folder: Path) -> Counted:
    return Counted()


def test_two_threads_that_ask_at_once_measure_once(engine: TransformersEngine, counted: Counted) -> None:
    twin, found = another_process(engine), list[torch.Tensor]()
    counted.may_end.clear()
    threads = [threading.Thread(target=lambda: found.append(counted.measurement.of(twin))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert counted.has_begun.wait(10)
    assert counted.measurement.known(twin) is None  # nobody waits who can do without
    counted.may_end.set()
    for thread in threads:
        thread.join(10)
    assert counted.num_made == 1
    assert found == [torch.tensor([1])] * 2


def test_a_measurement_that_fails_is_made_again(engine: TransformersEngine, counted: Counted) -> None:
    twin, counted.fails = another_process(engine), True
    with pytest.raises(MemoryError):
        counted.measurement.of(twin)
    counted.fails = False
    assert counted.measurement.of(twin) == 2
    assert counted.measurement.known(twin) == 2
    assert counted.measurement.known(another_process(engine)) == 2, "it was not kept in a file"
