"""The policy of a memory: when its contexts are compacted, how much of them, and to how many slots.

Only the fields and their checks. `am_memory.compaction.plan` turns a policy into the plan of a compaction.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from am_memory.errors import InvalidInput, InvalidPolicy, problems
from am_memory.solver import HighestAttention, KeySelection, as_selection, parameters

SINK_TOKENS = 4
"""The first tokens of a text, on which models rest the attention that they need nowhere else."""


class MemoryPolicy(BaseModel):
    """What a memory does when a context grows; frozen, typed, serialisable.

    Attributes:
        trigger_tokens: physical size (exact tokens + mean compact slots per head) that fires a compaction; a float is
            a fraction of the model's window.
        compact_fraction: how much of the cache, oldest first, a compaction covers.
        keep_ratio: slots kept for each compacted token, mean over heads.
        max_compact_tokens: bound on the mean slots per head of all segments together; older segments shrink to fit,
            to equal shares for each of their tokens. None: half of what a compaction covers.
        pinned: what stays exact for ever, at the start of the context: the first 4 tokens ("sinks"), the system
            prompt ("system"; the sinks where there is none), that and the first message ("first_message"), or a
            number of tokens.
        keep_recent: the last tokens, which no trigger compacts.
        reference_queries: the sample that a compaction is fitted on, any of "repeat" (one extra pass over the block),
            "self_study" (the model answers prompts about what it was told: a pass for each token of the longest answer)
            and "live" (queries that passed since, turned to later positions; free).
        self_study_tokens: how long these answers may be, all together.
        on_policy: each layer's slots are fitted to queries that come through the layers below as compacted. The block
            is repeated in one pass, however long, and layers are compacted as it goes through them; no layer is run
            twice, but where the budget is not uniform: it needs the scores of all layers, from a pass of their own.
            With reference_queries ("repeat",) alone; not with `max_error` or llama.cpp.
        tool_result_weight: how much it counts that a tool's result can be repeated, beside what people and the model
            say; 1 is as much. Slots and fits follow it.
        key_selection: "highest_attention", "omp", "omp_fast", or any `KeySelection`. It is written, and told from
            others, by its name and its fields (`am_memory.solver.parameters`).
        head_budget: "adaptive" (slots go where the scores are, over all layers and heads), "uniform", "calibrated"
            (scores are weighed by what a measurement on the model says that slots save, for models that one ships for)
            or the path of such a measurement, a .json file of `am-memory calibrate`; or "auto": calibrated where one
            ships, else adaptive where heads can differ in their slots, else as many for all heads as there are cells.
        recompaction: "segments" (each token is compacted once, from its exact entry) or "refit" (the oldest half as it
            is, compact entries too, again and again: arXiv:2602.16284, online AIME).
        originals: the exact entries of compacted tokens: "drop", or kept off the device, in "host" memory or on
            "disk", so that `Session.recall` can bring them back.
        segment_dtype: what keys and values of compact segments are kept in: "model", its own dtype, or "int8", with a
            scale for each channel of each segment and head, and decoded whenever they are attended to. Biases, and
            pinned and recalled entries, keep the model's; reported errors are those before rounding.
        max_error: the gate: an eighth of the reference queries is held out of the fits, and while the relative error of
            the attention output on them is above this, a new segment gets twice the slots, as far as
            `max_compact_tokens` leaves room. Where it does not, the compaction is made all the same, since the
            conversation could not go on, and `GateMissed` says so. It holds at birth: later, segments shrink. None: no
            gate, and nothing held out.
        summary_tokens: before a compaction the model sums up the block, in so many tokens at most, a forward pass for
            each. The summary takes the block's place and is what is compacted, to the slots that the block would get;
            where it is no longer than these, it stays whole, and where the model writes nothing, the block is compacted
            as ever (`CompactionReport.summary_tokens` says 0). What it leaves out is lost, unless there are
            `originals`: recall brings back the block. Not with recompaction "refit" or `max_error`. None: no summary.
        ahead_tokens: a compaction is begun when the physical size is so many tokens below the trigger, in a thread and,
            on a GPU, a stream of its own. Reading and decoding go on with the cache as it is; it is swapped in where
            they reach the trigger, and wait for it if they must: what comes out depends on the tokens alone, not on the
            clock. To be less than the smallest block that is compacted so. Takes the memory of one more exact tail; not
            on llama.cpp, nor where a RoPE changes with the length of the text. 0: decoding stands still meanwhile.
        min_slots: slots that every head gets of a new segment before any head gets more.
        fit: what is fitted beside the choice of keys; all but "bias_and_values" is for ablations.
        ridge: pull of the fitted values toward the originals, as a fraction of the mean diagonal. With 0.5 what follows
            is nearer to the full cache where a long text only goes on, and less is recalled of what is asked for.
        chunk_tokens: tokens in one forward pass, at most; None: `Engine.chunk_tokens`.

    Raises:
        InvalidPolicy: a value out of its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    trigger_tokens: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)] = 8192
    compact_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    keep_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_compact_tokens: Annotated[int, Field(gt=0)] | None = None
    pinned: Literal["sinks", "system", "first_message"] | Annotated[int, Field(ge=0)] = "system"
    keep_recent: Annotated[int, Field(ge=0)] = 64
    reference_queries: Annotated[tuple[Literal["repeat", "self_study", "live"], ...], Field(min_length=1)] = ("repeat",)
    self_study_tokens: Annotated[int, Field(gt=0)] = 512
    on_policy: bool = False
    tool_result_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    key_selection: Any = HighestAttention()
    head_budget: Literal["auto", "adaptive", "uniform", "calibrated"] | Annotated[str, Field(pattern=r"\.json$")] = (
        "auto"
    )
    recompaction: Literal["segments", "refit"] = "segments"
    originals: Literal["drop", "host", "disk"] = "drop"
    segment_dtype: Literal["model", "int8"] = "model"
    max_error: Annotated[float, Field(gt=0)] | None = None
    summary_tokens: Annotated[int, Field(gt=0)] | None = None
    ahead_tokens: Annotated[int, Field(ge=0)] = 0
    min_slots: Annotated[int, Field(gt=0)] = 1
    fit: Literal["bias_and_values", "bias", "values", "nothing"] = "bias_and_values"
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    chunk_tokens: Annotated[int, Field(gt=0)] | None = None

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidPolicy(problems(error.errors(), type(self).model_fields)) from error

    def with_changes(self, **changes: Any) -> MemoryPolicy:
        """The policy with some fields changed and checked; what was never set stays unset.

        Raises:
            InvalidPolicy: a value out of its range.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    @property
    def num_sinks(self) -> int:
        """Tokens that stay exact whatever the conversation; a system prompt or first message may pin more."""
        return self.pinned if isinstance(self.pinned, int) else SINK_TOKENS

    @field_validator("head_budget", mode="before")
    @classmethod
    def _path_as_text(cls, budget: object) -> object:
        return os.fspath(budget) if isinstance(budget, os.PathLike) else budget

    @field_validator("on_policy")
    @classmethod
    def _repeat_alone(cls, on_policy: bool, info: ValidationInfo) -> bool:
        if on_policy and info.data.get("reference_queries", ("repeat",)) != ("repeat",):
            raise ValueError('takes its queries from the repeat pass alone: set reference_queries to ("repeat",)')
        return on_policy

    @field_validator("max_error")
    @classmethod
    def _gate_off_policy(cls, max_error: float | None, info: ValidationInfo) -> float | None:
        if max_error is not None and info.data.get("on_policy"):
            raise ValueError("would fit layers twice that on_policy fits once: leave one of them out")
        return max_error

    @field_validator("key_selection")
    @classmethod
    def _named_selection(cls, selection: object) -> object:
        try:
            return as_selection(selection)
        except InvalidInput as error:
            raise ValueError(str(error)) from error

    @field_validator("summary_tokens")
    @classmethod
    def _summary_alone(cls, num_tokens: int | None, info: ValidationInfo) -> int | None:
        if num_tokens is not None and info.data.get("recompaction") == "refit":
            raise ValueError("recompaction 'refit' would sum up summaries: leave it at 'segments'")
        if num_tokens is not None and info.data.get("max_error") is not None:
            raise ValueError(
                "max_error would be held against the summary, not what was said: leave one of them at None"
            )
        return num_tokens

    @field_serializer("key_selection")
    def _selection_parameters(self, selection: KeySelection) -> str | dict[str, object]:
        return parameters(selection)
