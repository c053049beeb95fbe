"""Progress of long work: an event as a step, and steps as bars of tqdm, in a notebook or a terminal."""

from __future__ import annotations

from typing import Any, NamedTuple

from am_memory.events import CompactionProgress, Event, ReadProgress, SearchHeadsProgress

COMPACTING = "compacting: "
STAGES = {
    "read": "reading what came behind the block",
    "measure": "measuring how the model repeats a text (once for each model)",
    "predict": "predicting how it would repeat the block",
    "repeat": "repeating the block",
    "self_study": "generating self-study answers",
    "summary": "summarizing the block",
    "score": "scoring its keys",
    "fit": "fitting its heads",
}


class Step(NamedTuple):
    """How far some work has come: `done` of `total`."""

    name: str
    done: int
    total: int


def step_of(event: Event) -> Step | None:
    """The step that an event reports; None if it is not about progress."""
    match event:
        case ReadProgress(_, done, total):
            return Step("reading tokens", done, total)
        case SearchHeadsProgress(_, done, total):
            return Step("measuring search heads", done, total)
        case CompactionProgress(_, stage, done, total):
            return Step(f"{COMPACTING}{STAGES[stage]}", done, total)
    return None


class ProgressBars:
    """A listener that shows how far reading and compacting are: `Memory.from_pretrained(..., on_event=ProgressBars())`.

    A notebook gets widgets where ipywidgets is installed, else lines of text; a terminal gets bars. A bar disappears
    when its work is done. If a compaction fails, its bar shows how far it came until the next work begins.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if not isinstance(event, CompactionProgress):
            for name in [name for name in self._bars if name.startswith(COMPACTING)]:
                self._bars.pop(name).close()
        if (step := step_of(event)) is not None:
            self._show(*step)

    def _show(self, name: str, done: int, total: int) -> None:
        from tqdm.auto import tqdm  # transformers needs it anyway

        if name not in self._bars:
            self._bars[name] = tqdm(total=total, desc=name, leave=False)
        bar = self._bars[name]
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(name).close()
