"""Chooses the next token from logits with the logits processors of transformers. Knows no session and no text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from am_memory.errors import InvalidInput, problems

TEMPERATURES = 1e-30, 1e30
"""Dividing logits by temperatures outside of these would leave the range of float32; the limits are used instead."""


MAX_BIASES = 1_024
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    Mapping[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)
]
"""What is added to the logits of some tokens, by token id."""

MAX_STOPS, MAX_STOP_CHARS = 16, 1_000
"""Limits of stop texts: each is searched for at every token, and text that may begin one is held back."""


class Sampling(BaseModel):
    """How the next token is chosen; names and meaning are those of `GenerationConfig` of transformers.

    `presence_penalty`, `frequency_penalty` and `logit_bias` are those of OpenAI's API.

    Attributes:
        temperature: 0 is greedy decoding.
        top_k, top_p, min_p: keep only the likeliest tokens; None keeps all.
        repetition_penalty: a value above 1 makes tokens of the context less likely.
        presence_penalty: is subtracted from the logit of every token that the answer has already; -2 to 2.
        frequency_penalty: is subtracted once for each time that the answer has the token; -2 to 2.
        logit_bias: is added to the logits of these token ids; -100 to 100, for 1,024 tokens at most.
        stop: texts that end the generation; they are not returned. At most 16, of 1,000 characters each.
        seed: makes sampling repeatable.

    Raises:
        InvalidInput: a value is out of its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    stop: Annotated[tuple[Annotated[str, Field(max_length=MAX_STOP_CHARS)], ...], Field(max_length=MAX_STOPS)] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidInput(problems(error.errors(), type(self).model_fields)) from error

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> Sampling:
        """Read the sampling from a model's generation config."""
        penalty = config.repetition_penalty or 1.0
        if not config.do_sample:
            return cls(repetition_penalty=penalty)
        return cls(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=(50 if config.top_k is None else config.top_k) or None,  # the default of generate() is 50
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=penalty,
        )

    def processors(self) -> LogitsProcessorList:
        """The processors in the order in which transformers applies them."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0.0:
            return processors
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(min(max(self.temperature, TEMPERATURES[0]), TEMPERATURES[1])))
        if self.top_k is not None:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors


class Sampler:
    """Chooses the tokens of one generation; owns its random generator, and counts the tokens that it has chosen."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._processors = sampling.processors()
        self._generator: torch.Generator | None = None
        self._chosen: Counter[int] = Counter()

    def choose(self, logits: Tensor, token_ids: Sequence[int]) -> int:
        """Choose the next token.

        Args:
            logits: (vocab_size,) float32.
            token_ids: the tokens of the context.

        Raises:
            InvalidInput: `logit_bias` names a token that is not in the vocabulary.
        """
        token_id = self._choose(self._adjusted(logits), token_ids)
        self._chosen[token_id] += 1
        return token_id

    def _adjusted(self, logits: Tensor) -> Tensor:
        """The logits with the biases and the penalties of the answer so far; shape as `logits`."""
        sampling, added = self.sampling, defaultdict[int, float](float)
        for token_id, bias in sampling.logit_bias.items():
            if token_id >= len(logits):
                raise InvalidInput(
                    f"logit_bias names token {token_id}, and the model has tokens 0 to {len(logits) - 1}: leave it out"
                )
            added[token_id] += bias
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token_id, count in self._chosen.items():
                added[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
        if not added:
            return logits
        ids = torch.tensor([*added], device=logits.device)
        return logits.index_add(0, ids, torch.tensor([*added.values()], dtype=logits.dtype, device=logits.device))

    def _choose(self, logits: Tensor, token_ids: Sequence[int]) -> int:
        scores = logits[None]
        if self._processors:
            # Only the repetition penalty needs the whole context, which is expensive to copy at each token.
            context = token_ids if self.sampling.repetition_penalty != 1.0 else token_ids[-1:]
            ids = torch.tensor([list(context)]).to(logits.device, non_blocking=True)  # does not wait for the GPU
            scores = self._processors(ids, scores)  # type: ignore[arg-type]  # annotated narrower than they are
        if self.sampling.temperature == 0.0:
            return int(scores.argmax())
        if self._generator is None:
            self._generator = torch.Generator(device=logits.device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        return int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=self._generator))
