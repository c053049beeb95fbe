"""The policy of a memory: when its contexts are compacted, how much of them, and to how many slots.

Only the fields and their checks. `am_memory.compaction.plan` turns a policy into the plan of a compaction.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from am_memory.errors import InvalidInput, InvalidPolicy, problems
from am_memory.solver import HighestAttention, KeySelection, as_selection, parameters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

QuerySource = Literal["predicted", "repeat", "self_study", "live"]
"""Where reference queries come from: `am_memory.queries`, a file each."""

MIN_PAGE_TOKENS = 16
"""Tokens of the smallest page that recall brings back."""

SINK_TOKENS = 4
"""Attention sinks: models put spare attention on the first tokens of a text, so these always stay exact."""


class _Settings(BaseModel):
    """A frozen set of fields; a wrong value or an unknown name raises InvalidPolicy."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidPolicy(problems(error.errors(), type(self).model_fields)) from error

    def with_changes(self, /, **changes: Any) -> Self:
        """A copy with some fields changed and checked; fields that were never set stay unset.

        Raises:
            InvalidPolicy: a value is out of range, or there is no such field.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Only the fields that differ from their defaults."""
        fields = type(self).model_fields
        return [(name, value) for name, value in super().__repr_args__() if value != fields[name or ""].default]

    def __str__(self) -> str:
        return repr(self)


class Experiments(_Settings):
    """Settings for ablations and experiments. The defaults are recommended; frozen and serialisable.

    Attributes:
        fit: what is fitted after the keys are chosen: "bias_and_values", "bias", "values" or "nothing" (eviction).
            "no_slots": nothing is kept at all, so that compacted tokens are only there while they are recalled.
        recompaction: "segments" (each token is compacted once, from its exact entry) or "refit" (each compaction covers
            the oldest part of the cache, compact slots included, as in the online AIME runs of arXiv:2602.16284).
        on_policy: fit each layer to queries that have passed through the compacted layers below. The model repeats the
            block in one pass, however long it is, and each layer is compacted when the pass reaches it. The budgets of
            the heads come from reference_queries: None, ("predicted",) or ("repeat",), which takes one more pass.
            Not with max_error, and not with shared heads on llama.cpp.
        summary_tokens: before each compaction, the model writes a summary of the block, of at most this many tokens, in
            one forward pass per token. The summary is then compacted instead of the block, to the number of slots that
            the block would get; a summary that needs no more slots than that stays whole. If the model writes nothing,
            the block itself is compacted and `CompactionReport.summary_tokens` is 0. What the summary leaves out is
            lost, unless the policy keeps originals: recall then restores the block. Not with recompaction="refit" or
            max_error. None: no summary.
        min_slots: number of slots of a new segment that every head gets before any head gets more.

    Raises:
        InvalidPolicy: a value is out of range, or there is no such field.
    """

    fit: Literal["bias_and_values", "bias", "values", "nothing", "no_slots"] = "bias_and_values"
    recompaction: Literal["segments", "refit"] = "segments"
    on_policy: bool = False
    summary_tokens: Annotated[int, Field(gt=0)] | None = None
    min_slots: Annotated[int, Field(gt=0)] = 1


class MemoryPolicy(_Settings):
    """When a memory compacts a context, and how; frozen, validated and serialisable.

    Attributes:
        trigger_tokens: size of the cache at which a compaction is due, in tokens: exact tokens plus compact slots (mean
            over heads). A float is a fraction of the model's context window.
        compact_fraction: share of the cache that one compaction covers, oldest tokens first. More than 512 of them
            become several segments, each fitted by itself.
        keep_ratio: slots kept for each compacted token, mean over heads.
        max_compact_tokens: upper bound on the slots of all segments together, mean over heads. When a new segment would
            exceed it, the segments with the most slots per token shrink to an equal level. None: half of what one
            compaction covers, so with compact_fraction 0.5 a quarter of the trigger, less the room for recalled pages.
            With the defaults, a chat reaches the bound at a length of about 2.5 triggers. From there on the bound alone
            decides how much is kept, and keep_ratio no longer matters.
        pinned: tokens at the start of the context that are never compacted: "sinks" (the first 4), "system" (the system
            prompt; the sinks if there is none), "first_message" (the system prompt and the first message), or a number
            of tokens.
        keep_recent: number of newest tokens that stay exact when the trigger fires.
        reference_queries: queries that a compaction is fitted to, any of "predicted" (those with which the model would
            repeat the block, by linear maps from the block's keys; no extra pass), "repeat" (the model reads the block
            again), "self_study" (the model answers questions about the context, in one forward pass per token of the
            longest answer) and "live" (queries of the tokens read since the block, rotated to later positions; no extra
            pass). On engines and models whose keys cannot be rotated, and for summaries, "predicted" is "repeat". None:
            ("predicted",) where pages are recalled for questions, else ("repeat",).
        self_study_tokens: upper bound on the tokens of all self-study answers together.
        tool_result_weight: weight of tool results relative to all other messages, in the scores and in the fits.
            Below 1, they leave more slots to what users and the model wrote.
        key_selection: how the kept keys are chosen: "highest_attention", "omp", "omp_fast", or a `KeySelection` object.
            A saved policy stores its name and fields (`am_memory.solver.parameters`).
        head_budget: how slots are divided among heads: "adaptive" (to the highest scores of all layers and heads),
            "uniform" (equally), "calibrated" (scores are weighted by a measurement on the model, for models that one
            ships with), or the path of a .json file from `am-memory calibrate`. "auto" is calibrated where a
            measurement ships, else adaptive; on engines whose heads share every cell, all heads keep the same tokens.
        originals: where the exact entries of compacted tokens are kept, so that they can be recalled: "host" (host
            memory, and disk once the memory's bound is reached), "disk", or "drop" (nowhere). "auto" is "host" on
            engines whose caches exact entries can come back into, else "drop".
        recall_tokens: upper bound on the compacted tokens that are exact again at one time, because a message or the
            model's own text looks for them. While an answer is written, this room below the trigger is kept free for
            them; text that is only read may take it. 0: nothing is recalled by itself. None: an eighth of the trigger,
            but at least 256 tokens where that is at most a quarter of it; less, down to 0, where compactions would
            become too small, and 0 where originals are dropped. A page takes about 50 tokens, or all of the room where
            that is less; 16 are the least. Models with a table of positions recall nothing by themselves.
        segment_dtype: type in which compact segments store keys and values: "model" (the model's dtype) or "int8" (one
            scale per channel of each segment and head, decoded for every attention). Biases, pinned tokens and recalled
            tokens keep the model's dtype. Reported errors are measured before rounding.
        max_error: quality gate. One of eight reference queries is held out of the fits. While the relative error of the
            attention output on them is above max_error, the new segment gets twice the slots, up to
            max_compact_tokens. If that leaves no room, the compaction is made all the same, because the conversation
            could not go on without it, and `GateMissed` is emitted. The gate checks a new segment, not one that
            shrinks later. None: no gate, and no query is held out.
        ahead_tokens: begin a compaction this many tokens below the trigger, in a thread and, on a GPU, a stream of its
            own. Reading and decoding go on with the old cache. The new one is swapped in at the trigger, which waits
            for it if necessary: the result depends on the tokens alone, not on timing. Must be below the smallest block
            that is compacted this way. Takes the memory of one more exact tail. Not with shared heads on llama.cpp, nor
            with a RoPE that depends on the length of the text. 0: compact at the trigger, while decoding waits.
        refine: "idle": while no session works, a thread of the memory fits compact segments again, to
            `refine_queries`, and swaps the better slots in. It stops at once when a session works, and begins with the
            segment again later. "off": only `Session.refine` does so. Needs originals; not with shared heads on
            llama.cpp, nor on models with sliding windows.
        refine_queries: queries that a refinement is fitted to, as in `reference_queries`; "live" are queries of up to
            512 tokens behind the segment, which are read again. A segment that was fitted to all of them is refined
            only after it has shrunk by a quarter.
        ridge: strength that pulls the fitted values toward the original ones, as a fraction of the mean diagonal. A low
            one serves questions, a high one serves a text that goes on. None: 0.5 where pages are recalled for
            questions, else 0.001.
        chunk_tokens: tokens read in one forward pass, at most. None: as many as suit the device, `Engine.chunk_tokens`.
        experiments: settings for ablations and experiments.

    Raises:
        InvalidPolicy: a value is out of range, there is no such field, or two fields exclude each other.
    """

    trigger_tokens: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)] = 8192
    compact_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    keep_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_compact_tokens: Annotated[int, Field(gt=0)] | None = None
    pinned: Literal["sinks", "system", "first_message"] | Annotated[int, Field(ge=0)] = "system"
    keep_recent: Annotated[int, Field(ge=0)] = 64
    reference_queries: Annotated[tuple[QuerySource, ...], Field(min_length=1)] | None = None
    self_study_tokens: Annotated[int, Field(gt=0)] = 512
    tool_result_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    key_selection: Any = HighestAttention()
    head_budget: Literal["auto", "adaptive", "uniform", "calibrated"] | Annotated[str, Field(pattern=r"\.json$")] = (
        "auto"
    )
    originals: Literal["auto", "drop", "host", "disk"] = "auto"
    recall_tokens: Annotated[int, Field(ge=0)] | None = None
    segment_dtype: Literal["model", "int8"] = "model"
    max_error: Annotated[float, Field(gt=0)] | None = None
    ahead_tokens: Annotated[int, Field(ge=0)] = 0
    refine: Literal["off", "idle"] = "off"
    refine_queries: Annotated[tuple[QuerySource, ...], Field(min_length=1)] = (
        "repeat",
        "self_study",
    )
    ridge: Annotated[float, Field(ge=0)] | None = None
    chunk_tokens: Annotated[int, Field(gt=0)] | None = None
    experiments: Experiments = Experiments()

    @property
    def num_sinks(self) -> int:
        """Tokens that stay exact in every context; a system prompt or first message may pin more."""
        return self.pinned if isinstance(self.pinned, int) else SINK_TOKENS

    @model_validator(mode="before")
    @classmethod
    def _experiments_stand_apart(cls, values: object) -> object:
        given = [name for name in Experiments.model_fields if isinstance(values, dict) and name in values]
        if given:
            raise ValueError(f"{given[0]} is a field of Experiments: give experiments=Experiments({given[0]}=...)")
        return values

    @field_validator("head_budget", mode="before")
    @classmethod
    def _path_as_text(cls, budget: object) -> object:
        return os.fspath(budget) if isinstance(budget, os.PathLike) else budget

    @field_validator("key_selection")
    @classmethod
    def _named_selection(cls, selection: object) -> object:
        try:
            return as_selection(selection)
        except InvalidInput as error:
            raise ValueError(str(error)) from error

    @field_serializer("key_selection")
    def _selection_parameters(self, selection: KeySelection) -> str | dict[str, object]:
        return parameters(selection)

    @field_validator("recall_tokens")
    @classmethod
    def _holds_a_page(cls, recall_tokens: int | None) -> int | None:
        if recall_tokens is not None and 0 < recall_tokens < MIN_PAGE_TOKENS:
            raise ValueError(
                f"{recall_tokens} tokens hold no page: set it to {MIN_PAGE_TOKENS} or more, or to 0 to recall nothing"
            )
        return recall_tokens

    @field_validator("refine")
    @classmethod
    def _has_originals(cls, refine: str, info: ValidationInfo) -> str:
        if refine == "idle" and info.data.get("originals") == "drop":
            raise ValueError("refine 'idle' fits the originals again: leave originals at 'auto', or refine at 'off'")
        return refine

    @field_validator("experiments")
    @classmethod
    def _agrees_with_other_fields(cls, experiments: Experiments, info: ValidationInfo) -> Experiments:
        sources, max_error = info.data.get("reference_queries"), info.data.get("max_error")
        if experiments.on_policy and sources not in (None, ("predicted",), ("repeat",)):
            raise ValueError("on_policy takes its queries from a repeat of the block: leave reference_queries at None")
        if experiments.on_policy and max_error is not None:
            raise ValueError("max_error may fit a layer twice, and on_policy fits it once: leave one of them out")
        if experiments.summary_tokens is not None and max_error is not None:
            raise ValueError("max_error would measure the summary and not the text: leave it or summary_tokens at None")
        if info.data.get("refine") == "idle" and experiments.recompaction == "refit":
            raise ValueError("recompaction 'refit' compacts every segment again anyway: leave refine at 'off'")
        if experiments.summary_tokens is not None and experiments.recompaction == "refit":
            raise ValueError("recompaction 'refit' would summarise summaries: leave it at 'segments'")
        return experiments
