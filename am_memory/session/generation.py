"""One answer while the model writes it, token by token: sample, append, decode, give out.

Each token is a step of its own that succeeds as a whole or changes nothing. A step has two halves: `prepare` before the
last token is read, and `choose` with its logits. Whoever iterates runs both; `batch.py` runs those of several answers,
and reads their tokens in one pass. Knows no chat template and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from am_memory.errors import UnsupportedOperation
from am_memory.events import Span
from am_memory.session import checkpoints
from am_memory.session.appending import ends_turn
from am_memory.session.context import Context
from am_memory.session.limits import limit_new_tokens
from am_memory.session.lookup import WRITING_TOKENS, recall_for_answer, recall_while_writing
from am_memory.session.pages import make_room
from am_memory.session.shared import Shared
from am_memory.session.stepwise import Stepwise
from am_memory.session.transaction import Restorable
from am_memory.text.sampling import Sampler, Sampling
from am_memory.text.text_stream import TextStream

if TYPE_CHECKING:
    from am_memory.text.constraints import Constraint

CLOSING_SHARE = 0.25
"""In this last share of `max_new_tokens` a constrained answer is steered to its end."""

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, before temperature, top-k, top-p and constraints.

    Attributes:
        top: the likeliest tokens at this position with their log probabilities, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of generated text.

    Attributes:
        text: whole characters; empty while a character is unfinished.
        token_ids: the tokens generated since the last piece.
        finish_reason: set in the last piece. "eos": the model ended its turn. "length": `max_new_tokens` was reached.
            "stop": a stop text appeared, or the constraint is complete.
        logprobs: one for each token, if they were asked for.
        looked_up: the compacted spans that the last message, or the answer so far, looks for; they are exact from this
            piece on.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    looked_up: tuple[Span, ...] = ()


@dataclass(eq=False)
class Generation(Stepwise[Piece]):
    """The model's answer: an iterator over its pieces, one for each token, made as they are asked for.

    `Memory.generate_many` makes those of several sessions together. A caller that stops iterating keeps the tokens
    given out so far.

    Attributes:
        shared: what the sessions of the memory share.
        context: the conversation that the answer is added to.
        max_new_tokens: the limit.
        sampling: how each token is chosen.
        constraint: limits which tokens may be chosen; None: any may.
        top_logprobs: likely tokens listed in each `TokenLogprob`; None: pieces have no log probabilities.
        num_tokens: tokens of the answer so far.
        is_finished: nothing more is made: the answer is complete, has failed, or was closed.
        error: why it has failed; None: it has not.
    """

    shared: Shared
    context: Context
    max_new_tokens: int
    sampling: Sampling
    constraint: Constraint | None
    top_logprobs: int | None

    def __post_init__(self) -> None:
        self._begin(self.shared, self.context)
        engine, self.num_tokens = self.context.engine, 0
        self._sampler = Sampler(self.sampling)
        self._stream = TextStream(lambda ids: engine.decode(ids, skip_special=True), self.sampling.stop)
        self._looked_up: tuple[Span, ...] = ()
        self._tokens: list[int] = []
        self._num_expected = 0

    def __iter__(self) -> Generation:
        return self

    def _step(self) -> Piece:
        self.prepare()
        return self.choose(self.context.next_logits(keeps_room=True))

    # The halves of a step: the caller holds the engine's lock, and has begun a transaction

    def prepare(self) -> None:
        """Begin the answer, or look back, before the conversation's last token is read."""
        if self.num_tokens:
            self._require_unchanged()
            self._looked_up = self._look_back(self.num_tokens + 1)
        else:
            self._looked_up = recall_for_answer(self.context)
            self._open_answer()

    def choose(self, logits: Tensor) -> Piece:
        """Choose the next token and add it to the conversation.

        Args:
            logits: (vocab_size,) float32, what the model expects after the conversation.
        """
        piece = replace(self._next_piece(logits, self.num_tokens + 1), looked_up=self._looked_up)
        self.num_tokens += 1
        self.is_finished = self.is_finished or piece.finish_reason is not None  # a listener may have closed it
        return piece

    # The parts of the halves

    @property
    def most_new_tokens(self) -> int:
        """How many tokens the answer may still have."""
        return self.max_new_tokens - self.num_tokens

    @property
    def _changed_too(self) -> tuple[Restorable, ...]:
        return () if self.constraint is None else (self.constraint,)

    def _open_answer(self) -> None:
        """Add the tokens with which the chat template opens the model's answer."""
        context = self.context
        history, opening = context.history.with_answer_begun(
            context.engine, len(context.tokens), ends_turn=ends_turn(context)
        )
        make_room(context, len(opening) + 1)  # before they are there: who asks again goes back to here
        checkpoints.keep(context)
        context.history = history
        context.tokens.extend(opening)
        self._tokens, self._num_expected = context.tokens, len(context.tokens)
        self.max_new_tokens = limit_new_tokens(context.engine.info, len(context.tokens), self.max_new_tokens)

    def _look_back(self, number: int) -> tuple[Span, ...]:
        """Recall, now and then, what the answer itself looks for."""
        return recall_while_writing(self.context) if number % WRITING_TOKENS == 1 else ()

    @property
    def _can_take_back(self) -> bool:
        """Whether no other call has changed the conversation since the last token."""
        return self.context.tokens is self._tokens and len(self._tokens) == self._num_expected

    def _require_unchanged(self) -> None:
        if not self._can_take_back:
            raise UnsupportedOperation(
                f"session {self.context.name!r} changed while it was generating: finish one generation before the next "
                "call, or fork the session"
            )

    def _next_piece(self, model_logits: Tensor, number: int) -> Piece:
        """Choose token `number` of the answer and add it to the conversation."""
        context, constraint, is_last = self.context, self.constraint, number == self.max_new_tokens
        logits = model_logits
        if constraint is not None:
            logits = constraint.mask(logits, is_closing=number > self.max_new_tokens * (1 - CLOSING_SHARE))
        token_id = self._sampler.choose(logits, context.tokens)
        text = "" if self._is_eos(token_id) else self._stream.push(token_id)
        context.tokens.append(token_id)
        self._num_expected += 1
        if constraint is not None:
            constraint.accept(token_id)
        finish_reason = self._finish_reason(token_id, is_last=is_last)
        if finish_reason is not None:
            text += self._stream.finish()
        logprobs = () if self.top_logprobs is None else (_token_logprob(model_logits, token_id, self.top_logprobs),)
        if context.history.is_answering:
            context.history = context.history.with_answer_text(text)
        return Piece(text, (token_id,), finish_reason, logprobs)

    def _is_eos(self, token_id: int) -> bool:
        return token_id in self.context.engine.info.eos_token_ids

    def _finish_reason(self, token_id: int, *, is_last: bool) -> FinishReason | None:
        if self._is_eos(token_id):
            return "eos"
        if self._stream.is_stopped or (self.constraint is not None and self.constraint.is_complete):
            return "stop"
        return "length" if is_last else None


def _token_logprob(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """The log probability of a token.

    Args:
        logits: (vocab_size,).
        num_top: likely tokens to list beside it.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
