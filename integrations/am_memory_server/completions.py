"""`POST /v1/completions`: continues plain prompts. Only the tokens that are not in a kept cache are read."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from am_memory.conversations.chat_answer import FINISH_REASONS, numbered
from am_memory.conversations.texts import TextTurn
from am_memory.engines.base import Engine
from am_memory.events import ignore
from am_memory.session.generation import Generation, Piece
from am_memory_server import sse
from am_memory_server.access import Owner
from am_memory_server.errors import ApiError
from am_memory_server.jobs import Job, Publish, Steps, on_host
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.request_schemas import CompletionRequest
from am_memory_server.requests import max_tokens_of, require_model, sampling_of
from am_memory_server.response_schemas import LOWEST_LOGPROB, Completion, TextChoice, TextLogprobs, Usage, new_id
from am_memory_server.service import Service

router = APIRouter(route_class=JSONRoute)


@dataclass
class _Text:
    """One completion of a prompt, so far."""

    index: int
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: TextLogprobs = field(
        default_factory=lambda: TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    )
    scores: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The mean log probability of its tokens, with the one that ends it."""
        return sum(self.scores) / max(len(self.scores), 1)


@dataclass
class _Texts:
    """The completions of one request, so far, and their tokens."""

    chosen: list[_Text] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def usage(self) -> Usage:
        return Usage.of(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


@dataclass(frozen=True)
class _Added:
    """An update: the part of a completion that one token adds."""

    completion: _Text
    text: str
    logprobs: dict[str, Any] | None


@router.post("/v1/completions", response_model=Completion, tags=["OpenAI"])
async def create_completion(body: CompletionRequest, request: Request, owner: Owner) -> Any:
    """Continue one or more plain prompts."""
    service: Service = request.app.state.service
    require_model(service.settings, body.model)
    if any(not prompt for prompt in body.prompts):
        raise ApiError(400, "an empty prompt cannot be completed: give at least one token", param="prompt")
    texts = _Texts()
    updates = service.scheduler.stream(
        (owner, "completions"),
        _job(service, body, texts, owner),
        lambda: [service.texts.encode(prompt) for prompt in body.prompts],
    )
    if not body.stream:
        return await sse.unless_disconnected(request, _whole(service, body, texts, updates))
    await sse.unless_disconnected(request, anext(updates))  # an error before the first update has an HTTP status
    return StreamingResponse(
        sse.events(_chunks(service, body, texts, updates)), media_type="text/event-stream", headers=sse.HEADERS
    )


def _job(service: Service, body: CompletionRequest, texts: _Texts, owner: str) -> Job:
    """The job of one request: its prompts, one after the other."""
    run = _Run(service, body, texts)
    arrived, metrics = time.monotonic(), service.metrics

    def start(publish: Publish, prompts: list[list[int]]) -> Steps[None]:
        for token_ids in prompts:
            turn = service.texts.start(token_ids, owner=owner)
            if turn.is_short:
                turn.encode()
            else:
                yield from on_host(turn.encode)
            texts.prompt_tokens += len(token_ids)
            texts.cached_tokens += turn.num_cached_tokens
            try:
                for left_tokens in service.with_events(turn.read(), ignore):
                    publish(None)
                    if left_tokens:
                        yield from service.awaiting([turn.reading] if turn.reading else [], ignore)
                yield from run.generate(turn, publish, arrived)
            except BaseException:
                turn.abandon()
                raise
            service.texts.keep(turn)
            metrics.prompt_tokens.inc(len(token_ids))
            metrics.cached_tokens.inc(turn.num_cached_tokens)
        metrics.answer_seconds.observe(time.monotonic() - arrived)

    return start


class _Run:
    """One request: generates the completions of its prompts."""

    def __init__(self, service: Service, body: CompletionRequest, texts: _Texts) -> None:
        self.service, self.body, self.texts = service, body, texts
        self.num_choices, self.num_candidates = body.n or 1, body.num_candidates
        self.max_tokens = max_tokens_of(service.settings, body.max_tokens)
        self.sampling = sampling_of(service.memory, body)
        is_chosen = self.num_candidates > self.num_choices
        self.top_logprobs = 0 if is_chosen and body.logprobs is None else body.logprobs

    def generate(self, turn: TextTurn, publish: Publish, arrived: float) -> Steps[None]:
        """Generate the completions of a prompt together. The turn goes on with the best one."""
        if self.num_candidates > 1:
            turn.read_rest()
        sessions = [turn.session, *(turn.session.fork() for _ in range(self.num_candidates - 1))]
        first = len(self.texts.chosen)
        texts = [_Text(first + number) for number in range(self.num_candidates)]
        going = {
            session.generate(self.max_tokens, numbered(self.sampling, number), top_logprobs=self.top_logprobs): text
            for number, (session, text) in enumerate(zip(sessions, texts, strict=True))
        }
        try:
            while going:
                yield from self.service.awaiting([*going], ignore)
                for generation, text in list(going.items()):
                    if generation.is_ready:
                        self._take(generation, text, publish, arrived)
                    if generation.is_finished:
                        del going[generation]
        finally:
            with self.service.listening(ignore):
                for generation in going:
                    generation.close()
        best = sorted(texts, key=lambda text: -text.score) if self.num_candidates > self.num_choices else texts
        turn.session = sessions[texts.index(best[0])]
        for number, text in enumerate(best[: self.num_choices]):
            text.index = first + number
            self.texts.chosen.append(text)
            self.service.metrics.answers.labels(text.finish_reason).inc()

    def _take(self, generation: Generation, text: _Text, publish: Publish, arrived: float) -> None:
        metrics = self.service.metrics
        with self.service.listening(ignore):
            piece = next(generation, None)
        if piece is None:
            return
        text.scores += [token.logprob for token in piece.logprobs]
        if not self.texts.completion_tokens:
            metrics.first_token_seconds.observe(time.monotonic() - arrived)
        self.texts.completion_tokens += len(piece.token_ids)
        metrics.generated_tokens.inc(len(piece.token_ids))
        publish(_add(self.service.memory.engine, text, piece, self.body.logprobs is not None))


def _add(engine: Engine, completion: _Text, piece: Piece, has_logprobs: bool) -> _Added:
    """Add a piece to its completion."""
    if piece.finish_reason is not None:
        reason = FINISH_REASONS[piece.finish_reason]
        completion.finish_reason = "length" if reason == "length" else "stop"
    tokens = () if piece.finish_reason == "eos" else piece.logprobs
    logprobs: dict[str, Any] = {
        "tokens": [engine.decode([token.token_id]) for token in tokens],
        "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
        "top_logprobs": [
            {engine.decode([top]): max(value, LOWEST_LOGPROB) for top, value in token.top} for token in tokens
        ],
        "text_offset": [len(completion.text) for _ in tokens],
    }
    for name, values in logprobs.items():
        getattr(completion.logprobs, name).extend(values)
    completion.text += piece.text
    return _Added(completion, piece.text, logprobs if has_logprobs else None)


async def _whole(
    service: Service, body: CompletionRequest, texts: _Texts, updates: AsyncGenerator[object, None]
) -> Completion:
    """The completions as one response."""
    async with aclosing(updates):
        async for _ in updates:
            pass
    choices = [
        TextChoice(
            index=text.index,
            text=text.text,
            logprobs=text.logprobs if body.logprobs is not None else None,
            finish_reason=text.finish_reason or "length",
        )
        for text in texts.chosen
    ]
    return Completion(model=service.settings.model_name, choices=choices, usage=texts.usage)


async def _chunks(
    service: Service, body: CompletionRequest, texts: _Texts, updates: AsyncGenerator[object, None]
) -> AsyncGenerator[dict[str, Any], None]:
    """The completions as a stream of chunks."""
    frame = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.settings.model_name,
    }
    usage = {"usage": None} if body.includes_usage else {}
    async with aclosing(updates):
        async for update in updates:
            if isinstance(update, _Added):
                choice = {"index": update.completion.index, "text": update.text, "logprobs": update.logprobs}
                yield {**frame, "choices": [{**choice, "finish_reason": update.completion.finish_reason}], **usage}
        if body.includes_usage:
            yield {**frame, "choices": [], "usage": texts.usage.model_dump()}
