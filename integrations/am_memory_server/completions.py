"""`POST /v1/completions`: continues plain prompts. Only the tokens that are not in a kept cache are read."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from am_memory.conversations.chat_answer import FINISH_REASONS
from am_memory.engines.base import Engine
from am_memory.events import ignore
from am_memory.session.generation import Piece
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
    """The completion of one prompt, so far."""

    index: int
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: TextLogprobs = field(
        default_factory=lambda: TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    )
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


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
    texts = [_Text(index) for index in range(len(body.prompts))]
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


def _job(service: Service, body: CompletionRequest, texts: list[_Text], owner: str) -> Job:
    """The job of one request: its prompts, one after the other."""
    max_tokens = max_tokens_of(service.settings, body.max_tokens)
    sampling, metrics = sampling_of(service.memory, body), service.metrics
    arrived = time.monotonic()

    def start(publish: Publish, prompts: list[list[int]]) -> Steps[None]:
        for text, token_ids in zip(texts, prompts, strict=True):
            turn = service.texts.start(token_ids, owner=owner)
            if turn.is_short:
                turn.encode()
            else:
                yield from on_host(turn.encode)
            text.prompt_tokens, text.cached_tokens = len(token_ids), turn.num_cached_tokens
            try:
                for left_tokens in service.with_events(turn.read(), ignore):
                    publish(None)
                    if left_tokens:
                        yield from service.awaiting(turn.reading, ignore)
                generation = turn.session.generate(max_tokens, sampling, top_logprobs=body.logprobs)
                yield from service.awaiting(generation, ignore)
                with closing(service.with_events(generation, ignore)) as pieces:
                    for piece in pieces:
                        if not text.completion_tokens:
                            metrics.first_token_seconds.observe(time.monotonic() - arrived)
                        publish(_add(service.memory.engine, text, piece, body.logprobs is not None))
                        yield from service.awaiting(None if generation.is_finished else generation, ignore)
            except BaseException:
                turn.abandon()
                raise
            service.texts.keep(turn)
            metrics.prompt_tokens.inc(text.prompt_tokens)
            metrics.cached_tokens.inc(text.cached_tokens)
            metrics.generated_tokens.inc(text.completion_tokens)
            metrics.answers.labels(text.finish_reason).inc()
        metrics.answer_seconds.observe(time.monotonic() - arrived)

    return start


def _add(engine: Engine, completion: _Text, piece: Piece, has_logprobs: bool) -> _Added:
    """Add a piece to its completion."""
    completion.completion_tokens += len(piece.token_ids)
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
    service: Service, body: CompletionRequest, texts: list[_Text], updates: AsyncGenerator[object, None]
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
        for text in texts
    ]
    return Completion(model=service.settings.model_name, choices=choices, usage=_usage(texts))


def _usage(texts: list[_Text]) -> Usage:
    return Usage.of(
        sum(text.prompt_tokens for text in texts),
        sum(text.completion_tokens for text in texts),
        sum(text.cached_tokens for text in texts),
    )


async def _chunks(
    service: Service, body: CompletionRequest, texts: list[_Text], updates: AsyncGenerator[object, None]
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
            yield {**frame, "choices": [], "usage": _usage(texts).model_dump()}
