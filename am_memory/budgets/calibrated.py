"""The calibrated budget: slots go where a measurement of the model shows the largest gain, weighted by the scores.

Owns the measured curves, their file, and the ranking made from them. `compaction/sensitivity.py` measures them.
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
"""Smallest gain of a slot: it stands for 0, so that the gain has a logarithm."""
LEAST_STEP, MOST_LOSS = 1e-6, 1e6
"""Smallest ratio and smallest relative step between ratios; largest loss, in nats per token. They keep slopes in the
range of float32."""
MAX_FILE_BYTES = 16 * 2**20
"""About a hundred times the file of the largest models."""


Name = Annotated[str, Field(max_length=1000)]


class Calibration(BaseModel):
    """Sensitivity curves of a model's KV heads (arXiv:2602.16284, head budgets); frozen, kept as JSON.

    Attributes:
        fingerprint: of the measured model, as in `ModelInfo`.
        model: its name, for display.
        ratios: slots for each key of a block, ascending, between 0 and 1.
        losses: one curve for each KV head, layer after layer: the loss at each ratio when this head alone is compacted,
            as KL from the full cache in nats per token. At ratio 1 the loss is 0.
        weighs_scores: multiply the gains by the scores of each block.
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
        """The gain of each head's k-th slot in a block: the loss that it saves.

        Returns:
            (num_heads, seq_len) float32, in nats per token for each share of the block; descending along k.
        """
        ratio = np.arange(1, seq_len + 1) / seq_len
        return torch.from_numpy(np.stack([_gain(self.ratios, head, ratio) for head in self.losses])).float()


def _gain(ratios: tuple[float, ...], losses: tuple[float, ...], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes of one head's curve at some ratios. The curve is made convex; slopes are interpolated in log-log space."""
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
    """Rank the slots of all heads by their calibrated gain, times the score of the key that each would hold.

    With equal scores this is the result of the paper's greedy exchange (arXiv:2602.16284), for every total at once.
    Greedy exchange moves slots from the head that loses least to the head that gains most. With convex curves it ends
    when no slot left out has a larger gain than one kept. The scores adapt the gains to this block.

    Args:
        scores: (num_heads, seq_len), scores of all keys, for the KV heads of all layers. Only the shape counts if the
            calibration does not weigh scores.
        min_slots: each head gets its first `min_slots` before any head gets more.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of head h. Ascending along k.

    Raises:
        InvalidPolicy: the calibration and the model differ in their number of heads.
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
    """The calibration that a policy's `head_budget` asks for; None if it asks for none.

    Args:
        head_budget: "calibrated" or "auto" take the calibration that ships for the model; "auto" may find none. A path
            that ends in .json is read.
        info: of the model.

    Raises:
        InvalidPolicy: none ships; or the file does not exist, is no calibration, or belongs to another model.
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
    """The calibration that ships for a model, read once: every session and every branch asks for it."""
    file = resources.files(__package__) / "calibrations" / f"{fingerprint}.json"
    return Calibration.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_calibration(path: str | os.PathLike[str], info: ModelInfo) -> Calibration:
    """Read a file that `am-memory calibrate` wrote.

    Raises:
        InvalidPolicy: the file does not exist, is no calibration, or belongs to another model.
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
    """The bytes of a file; raises OSError if it is no regular file, or too large."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return content
