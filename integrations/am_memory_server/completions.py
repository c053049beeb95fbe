"""`POST /v1/completions`: plain prompts, of which only the tokens that are new are read."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from am_memory.conversations.chat_answer import FINISH_REASONS
from am_memory.engines.base import Engine
from am_memory.session.session import Piece
from am_memory.text.sampling import Sampling
from am_memory_server import schemas, sse
from am_memory_server.access import Owner
from am_memory_server.chat_completions import check_max_tokens, require_model, sampling_of
from am_memory_server.errors import ApiError
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.scheduler import Job, Post, Steps, aside
from am_memory_server.service import Service

router = APIRouter(route_class=JSONRoute)


@dataclass
class _Text:
    """One prompt's completion as it comes."""

    index: int
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: schemas.TextLogprobs = field(
        default_factory=lambda: schemas.TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    )
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class _Piece:
    text: _Text
    added: str
    logprobs: dict[str, Any] | None


@router.post("/v1/completions", response_model=schemas.Completion, tags=["OpenAI"])
async def create_completion(body: schemas.CompletionRequest, request: Request, owner: Owner) -> Any:
    """How plain prompts go on."""
    service: Service = request.app.state.service
    require_model(service, body.model)
    max_tokens = body.max_tokens or service.settings.max_tokens
    check_max_tokens(service, max_tokens)
    if any(not prompt for prompt in body.prompts):
        raise ApiError(400, "an empty prompt cannot be completed: give at least one token", param="prompt")
    texts = [_Text(index) for index in range(len(body.prompts))]
    sampling = sampling_of(service, body.sampling())
    items = service.scheduler.stream(
        (owner, "completions"),
        _job(service, body, texts, sampling, owner),
        lambda: [service.texts.encode(prompt) for prompt in body.prompts],
    )
    if not body.stream:
        return await sse.unless_disconnected(request, _whole(service, body, texts, items))
    await sse.unless_disconnected(request, anext(items))  # an error before the first token has a status of its own
    return StreamingResponse(
        sse.events(_chunks(service, body, texts, items)), media_type="text/event-stream", headers=sse.HEADERS
    )


def _job(service: Service, body: schemas.CompletionRequest, texts: list[_Text], sampling: Sampling, owner: str) -> Job:
    """The job of one request; its prompts one after the other."""
    max_tokens, metrics = body.max_tokens or service.settings.max_tokens, service.metrics
    started = time.monotonic()

    def steps(post: Post, prompts: list[list[int]]) -> Steps[None]:
        for text, token_ids in zip(texts, prompts, strict=True):
            turn = service.texts.start(token_ids, owner=owner)
            if turn.is_short:
                turn.encode()
            else:
                yield from aside(turn.encode)
            session = turn.session
            text.prompt_tokens, text.cached_tokens = len(token_ids), turn.num_cached_tokens
            for left in service.heard(turn.read(), lambda event: None):
                post(None)
                if left:
                    yield None
            pieces = session.generate(max_tokens, sampling, top_logprobs=body.logprobs)
            for piece in service.heard(pieces, lambda event: None):
                if not text.completion_tokens:
                    metrics.first_token_seconds.observe(time.monotonic() - started)
                post(_taken(service.memory.engine, text, piece, body.logprobs is not None))
                yield None
            service.texts.keep(turn)
            metrics.prompt_tokens.inc(text.prompt_tokens)
            metrics.cached_tokens.inc(text.cached_tokens)
            metrics.generated_tokens.inc(text.completion_tokens)
            metrics.answers.labels(text.finish_reason).inc()
        metrics.answer_seconds.observe(time.monotonic() - started)

    return steps


def _taken(engine: Engine, text: _Text, piece: Piece, has_logprobs: bool) -> _Piece:
    """One piece, added to its text."""
    text.completion_tokens += len(piece.token_ids)
    if piece.finish_reason is not None:
        reason = FINISH_REASONS[piece.finish_reason]
        text.finish_reason = "length" if reason == "length" else "stop"
    said = () if piece.finish_reason == "eos" else piece.logprobs
    new: dict[str, Any] = {
        "tokens": [engine.decode([token.token_id]) for token in said],
        "token_logprobs": [max(token.logprob, -9999.0) for token in said],
        "top_logprobs": [{engine.decode([top]): max(value, -9999.0) for top, value in token.top} for token in said],
        "text_offset": [len(text.text) for _ in said],
    }
    for name, values in new.items():
        getattr(text.logprobs, name).extend(values)
    text.text += piece.text
    return _Piece(text, piece.text, new if has_logprobs else None)


async def _whole(
    service: Service, body: schemas.CompletionRequest, texts: list[_Text], items: AsyncGenerator[object, None]
) -> schemas.Completion:
    async with aclosing(items):
        async for _ in items:
            pass
    choices = [
        schemas.TextChoice(
            index=text.index,
            text=text.text,
            logprobs=text.logprobs if body.logprobs is not None else None,
            finish_reason=text.finish_reason or "length",
        )
        for text in texts
    ]
    return schemas.Completion(model=service.settings.model_name, choices=choices, usage=_usage(texts))


def _usage(texts: list[_Text]) -> schemas.Usage:
    return schemas.Usage.of(
        sum(text.prompt_tokens for text in texts),
        sum(text.completion_tokens for text in texts),
        sum(text.cached_tokens for text in texts),
    )


async def _chunks(
    service: Service, body: schemas.CompletionRequest, texts: list[_Text], items: AsyncGenerator[object, None]
) -> AsyncGenerator[dict[str, Any], None]:
    frame = {
        "id": schemas.new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.settings.model_name,
    }
    usage = {"usage": None} if body.includes_usage else {}
    async with aclosing(items):
        async for item in items:
            if isinstance(item, _Piece):
                choice = {"index": item.text.index, "text": item.added, "logprobs": item.logprobs}
                yield {**frame, "choices": [{**choice, "finish_reason": item.text.finish_reason}], **usage}
        if body.includes_usage:
            yield {**frame, "choices": [], "usage": _usage(texts).model_dump()}
