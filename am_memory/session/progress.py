"""Progress bars of tqdm, in a notebook or a terminal, as a listener of a memory."""

from __future__ import annotations

from typing import Any

from am_memory.events import CompactionFinished, CompactionProgress, Event, ReadProgress, SearchHeadsProgress


class ProgressBars:
    """A listener that shows how far reading and compacting are: `Memory.from_pretrained(..., on_event=ProgressBars())`.

    A notebook gets widgets where ipywidgets is installed, else lines of text; a terminal gets bars. A bar disappears
    when its work is done.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case ReadProgress(_, done, total):
                self._step("reading", done, total)
            case SearchHeadsProgress(_, done, total):
                self._step("measuring search heads", done, total)
            case CompactionProgress(_, stage, done, total):
                self._step(f"compacting: {stage}", done, total)
            case CompactionFinished():
                for name in [name for name in self._bars if name.startswith("compacting")]:
                    self._bars.pop(name).close()

    def _step(self, name: str, done: int, total: int) -> None:
        from tqdm.auto import tqdm  # transformers needs it anyway

        if name not in self._bars:
            self._bars[name] = tqdm(total=total, desc=name, leave=False)
        bar = self._bars[name]
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(name).close()
