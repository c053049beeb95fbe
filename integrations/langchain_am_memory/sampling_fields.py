"""How a chat model chooses tokens, as fields of LangChain's class; None leaves a value to the memory's sampling."""

from __future__ import annotations

from pydantic import BaseModel, Field

from am_memory.text.sampling import LogitBias, Penalty, Sampling


class SamplingFields(BaseModel):
    """The fields of `am_memory.Sampling`."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, gt=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, validation_alias="stop_sequences")

    def over(self, sampling: Sampling) -> Sampling:
        """The sampling with the fields that are set."""
        own = {name: value for name in Sampling.model_fields if (value := getattr(self, name)) is not None}
        return Sampling(**{**sampling.model_dump(), **own})
