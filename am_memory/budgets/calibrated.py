"""Slots go where a measurement on the model says that they are needed, weighed by the scores of each block.

Owns the measured curves, their file, and the way from curves to a ranking; `compaction/sensitivity.py` measures them.
"""

from __future__ import annotations

import functools
import os
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from am_memory.budgets.adaptive import adaptive_ranks
from am_memory.engines.base import ModelInfo
from am_memory.errors import InvalidPolicy

LEAST_GAIN = 1e-12
"""What a slot of a head that loses nothing is taken to save, so that it has a logarithm."""
LEAST_STEP, MOST_LOSS = 1e-6, 1e6
"""Of a ratio, and of it above the one before; in nats per token. Slopes are then numbers that float32 can say."""
MAX_FILE_BYTES = 16 * 2**20
"""Some hundred times what the largest models take."""


Name = Annotated[str, Field(max_length=1000)]


class Calibration(BaseModel):
    """Sensitivity curves of a model's KV heads (arXiv:2602.16284, head budgets); frozen, kept as JSON.

    Attributes:
        fingerprint: of the model that they were measured on, as `ModelInfo` has it.
        model: its name, for people.
        ratios: slots for each key of a block, ascending, between 0 and 1.
        losses: of each KV head of all compactable layers, layer after layer, what is lost at each of the ratios where
            only this head is compacted: KL against the full cache, in nats per token. With all slots, nothing is.
        weighs_scores: whether a block's own scores count beside the curves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fingerprint: Name
    model: Name
    ratios: Annotated[tuple[float, ...], Field(min_length=1)]
    losses: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)]
    weighs_scores: bool = True

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        for low, high in pairwise([0.0, *self.ratios, 1.0]):
            if high < LEAST_STEP or high - low < LEAST_STEP * high:
                raise ValueError(
                    f"ratios must ascend between {LEAST_STEP:g} and 1, each by a share of {LEAST_STEP:g} at least, "
                    f"not from {low} to {high}"
                )
        for index, head in enumerate(self.losses):
            if len(head) != len(self.ratios) or not 0 <= min(head) <= max(head) <= MOST_LOSS:
                raise ValueError(
                    f"losses of head {index} must be {len(self.ratios)} numbers between 0 and {MOST_LOSS:g}"
                )
        return self

    def gains(self, seq_len: int) -> Tensor:
        """What each head's k-th slot of a block saves.

        Returns:
            (num_heads, seq_len) float32, in nats per token and share of the block; falls along k.
        """
        ratio = np.arange(1, seq_len + 1) / seq_len
        return torch.from_numpy(np.stack([_gain(self.ratios, head, ratio) for head in self.losses])).float()


def _gain(ratios: tuple[float, ...], losses: tuple[float, ...], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The slope of one head's curve, made convex, at some ratios; between its pieces it falls as a power."""
    points: list[tuple[float, float]] = []
    for point in zip((*ratios, 1.0), (*losses, 0.0), strict=True):
        while len(points) >= 2 and _slope(points[-1], point) <= _slope(points[-2], points[-1]):
            points.pop()  # above the line between its neighbours
        points.append(point)
    middles = [(left[0] + right[0]) / 2 for left, right in pairwise(points)]
    slopes = [max(-_slope(left, right), LEAST_GAIN) for left, right in pairwise(points)]
    return np.exp(np.interp(np.log(at), np.log(middles), np.log(slopes)))


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def calibrated_ranks(calibration: Calibration, scores: Tensor, min_slots: int) -> Tensor:
    """Rank the slots of all heads by what each saves by the calibration, times the score of the key that it would hold.

    With scores that are all alike this is where greedy exchange (arXiv:2602.16284) ends, at every total at once: with
    convex curves, moving a slot from the head that it costs least to the head that it helps most goes on until no slot
    that is out saves more than one that is in. The scores say what this block needs of each head.

    Args:
        scores: (num_heads, seq_len), of every key, over all layers and KV heads; for their shape alone, where the
            calibration does not weigh them.
        min_slots: each head gets its first `min_slots` before any head gets more.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of head h. Ascending along k.

    Raises:
        InvalidPolicy: the calibration has other heads than the model.
    """
    if len(calibration.losses) != len(scores):
        raise InvalidPolicy(
            f"the calibration of {calibration.model} has curves of {len(calibration.losses)} heads, and the model has "
            f"{len(scores)}: run am-memory calibrate again"
        )
    gains = calibration.gains(scores.shape[1]).to(scores.device)
    if calibration.weighs_scores:
        gains *= scores.float().sort(dim=1, descending=True).values
    return adaptive_ranks(gains, min_slots)


def calibration_for(head_budget: str, info: ModelInfo) -> Calibration | None:
    """The curves that a policy's `head_budget` asks for; None where it asks for none.

    Args:
        head_budget: "calibrated" is what ships for the model, and so is "auto" where something does; what ends in .json
            is a file.
        info: of the model.

    Raises:
        InvalidPolicy: there is no such file, it is none of ours, or another model's.
    """
    if head_budget.endswith(".json"):
        return load_calibration(head_budget, info)
    shipped = _shipped(info.fingerprint) if head_budget in ("auto", "calibrated") else None
    if head_budget == "calibrated" and shipped is None:
        raise InvalidPolicy(
            f"head_budget 'calibrated': no calibration ships for model {info.fingerprint} ({info.name}): "
            "measure one with am-memory calibrate, and give the path of its file"
        )
    return shipped


@functools.cache
def _shipped(fingerprint: str) -> Calibration | None:
    """What ships for a model, read once: every session and every branch asks for it."""
    file = resources.files(__package__) / "calibrations" / f"{fingerprint}.json"
    return Calibration.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_calibration(path: str | os.PathLike[str], info: ModelInfo) -> Calibration:
    """Read a file of `am-memory calibrate` for a model.

    Raises:
        InvalidPolicy: there is no such file, it is none of ours, or another model's.
    """
    try:
        calibration = Calibration.model_validate_json(_content(Path(path)))
    except (OSError, ValueError) as error:
        problem = error.errors(include_input=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise InvalidPolicy(
            f"head_budget {os.fspath(path)!r} cannot be read ({problem}): give a file that am-memory calibrate wrote"
        ) from error
    if calibration.fingerprint != info.fingerprint:
        raise InvalidPolicy(
            f"head_budget {os.fspath(path)!r} was measured on model {calibration.fingerprint} ({calibration.model}), "
            f"this one is {info.fingerprint} ({info.name}): run am-memory calibrate on this one, in the same dtype"
        )
    return calibration


def _content(path: Path) -> bytes:
    """Of a file that may be one of ours; raises OSError."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return content
