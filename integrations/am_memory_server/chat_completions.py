"""`POST /v1/chat/completions`: one conversation, whole, at every call; whole or in pieces back."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from am_memory.conversations.chat import HostWork, PromptProgress, answer_chat
from am_memory.conversations.chat_answer import ChatAnswer, Delta, ToolCall
from am_memory.conversations.chat_request import ChatRequest
from am_memory.engines.base import Engine
from am_memory.events import CompactionFinished, CompactionStarted, Event, SessionRebuilt
from am_memory.session.session import TokenLogprob
from am_memory.text.sampling import Sampling
from am_memory_server import schemas, sse
from am_memory_server.access import Owner
from am_memory_server.errors import ApiError
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.memory_view import view
from am_memory_server.scheduler import Job, Path, Post, Steps, aside
from am_memory_server.service import Compactions, Service, report_dict

CONVERSATION_HEADERS = ("x-conversation-id", "x-openwebui-chat-id")
STATS_EVERY = 8
"""Tokens between two looks at the memory's size."""

router = APIRouter(route_class=JSONRoute)


@dataclass(frozen=True)
class Started:
    """The request is sound, and its first step is done."""


@dataclass(frozen=True)
class Memory:
    """Something for who watches the memory."""

    told: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    answer: ChatAnswer


@router.post(
    "/v1/chat/completions", response_model=schemas.ChatCompletion, response_model_exclude_none=False, tags=["OpenAI"]
)
async def create_chat_completion(body: schemas.ChatCompletionRequest, request: Request, owner: Owner) -> Any:
    """The model's answer to a conversation, of which only what is new is read."""
    service: Service = request.app.state.service
    require_model(service, body.model)
    conversation = conversation_of(body, request.headers)
    path = (owner, conversation)
    asked = _chat_request(service, body, path)
    call = service.threads.register_call(asked.thread)  # now: it may be deleted while this waits for its place
    items = service.scheduler.stream(path, _job(service, path), lambda: ChatAnswer(service.threads, asked, call))
    if not body.stream:
        return await sse.unless_disconnected(request, _whole(service, body, items))
    await sse.unless_disconnected(request, anext(items))  # an error before the answer begins has a status of its own
    return StreamingResponse(
        sse.events(_chunks(service, body, conversation, items)), media_type="text/event-stream", headers=sse.HEADERS
    )


def require_model(service: Service, model: str | None) -> None:
    """Raise ApiError for another model than the one that is served."""
    name = service.settings.model_name
    if model is not None and model != name:
        raise ApiError(
            404, f"there is no model {model!r} here: ask for {name!r}", code="model_not_found", param="model"
        )


def conversation_of(body: schemas.ChatCompletionRequest, headers: Mapping[str, str]) -> str:
    """The name of the conversation: as the client calls it, else a digest of how it begins.

    Raises:
        ApiError: a name that cannot be one.
    """
    given = (headers.get(name) for name in CONVERSATION_HEADERS)
    name = (body.metadata or {}).get(schemas.CONVERSATION_KEYS[0]) or next(filter(None, given), body.conversation_hint)
    if name is not None:
        return checked_name(name)
    opening = []
    for message in body.messages:
        opening.append(message.model_dump_json())
        if message.role == "user":
            break
    return f"auto-{sha256(''.join(opening).encode()).hexdigest()[:16]}"


def checked_name(name: str, param: str = "metadata") -> str:
    """The name of a conversation, if it can be one; raises ApiError, which says where it was given."""
    limit = schemas.MAX_CONVERSATION_CHARS
    if not 0 < len(name) <= limit or not name.isprintable():
        raise ApiError(
            400, f"{name[:50]!r} cannot name a conversation: give 1 to {limit} printable characters", param=param
        )
    return name


def thread_of(path: Path) -> str:
    """The thread of an owner's conversation."""
    return "/".join(path)


def _chat_request(service: Service, body: schemas.ChatCompletionRequest, path: Path) -> ChatRequest:
    settings = service.settings
    max_tokens = body.max_completion_tokens or body.max_tokens or settings.max_tokens
    check_max_tokens(service, max_tokens)
    return ChatRequest(
        messages=[message.as_message() for message in body.messages],
        tools=[tool.as_tool() for tool in body.tools or ()],
        tool_choice=body.choice,
        response_format=body.response_format.as_format() if body.response_format else None,
        max_tokens=max_tokens,
        sampling=sampling_of(service, body.sampling()),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        parallel_calls=body.parallel_tool_calls is not False,
        text_of_invalid_calls=True,
        thread=thread_of(path),
        owner=path[0],
    )


def check_max_tokens(service: Service, max_tokens: int) -> None:
    """Raise ApiError for a longer answer than the server writes."""
    if max_tokens > (limit := service.settings.max_answer_tokens):
        raise ApiError(400, f"{max_tokens} tokens are above this server's limit of {limit} for one answer")


def sampling_of(service: Service, asked: Mapping[str, Any]) -> Sampling:
    """What a request asks for, over what the model's own configuration says."""
    return Sampling(**{**service.memory.sampling.model_dump(), **asked})


def _job(service: Service, key: Path) -> Job:
    """The job of one answer."""
    started = time.monotonic()

    def steps(post: Post, answer: ChatAnswer) -> Steps[None]:
        compactions = Compactions()

        def listener(event: Event) -> None:
            compactions.hear(event)
            if (told := _event(event)) is not None:
                post(Memory(told))

        def remember() -> None:
            compactions.write(answer.session)
            looked = view(key[1], answer.session, 1, service.memory.trigger_tokens)
            post(Memory({"event": "memory", "memory": looked.model_dump()}))

        is_started = is_complete = False
        num_deltas = 0
        try:
            for step in service.heard(answer_chat(answer), listener):
                if isinstance(step, HostWork):
                    yield from aside(partial(service.saving, step.run))
                    continue
                if isinstance(step, PromptProgress):
                    if not is_started:
                        post(Started())
                    is_started = True
                    left, total = step.left_tokens, step.total_tokens
                    post(Memory({"event": "reading", "left_tokens": left, "total_tokens": total, **_stats(answer)}))
                else:
                    if num_deltas == 0:
                        service.metrics.first_token_seconds.observe(time.monotonic() - started)
                    if num_deltas % STATS_EVERY == 0:
                        post(Memory({"event": "size", **_stats(answer)}))
                    num_deltas += 1
                    post(step)
                if compactions.new or answer.finish_reason is not None:
                    remember()
                if (
                    not isinstance(step, PromptProgress) or step.left_tokens
                ):  # the last chunk's turn has the first token
                    yield None
            is_complete = True
            post(Finished(answer))
        finally:
            _measure(service, answer, is_complete, time.monotonic() - started)

    return steps


def _measure(service: Service, answer: ChatAnswer, is_complete: bool, seconds: float) -> None:
    metrics = service.metrics
    metrics.generated_tokens.inc(answer.num_tokens)
    if not is_complete:
        metrics.cancelled.inc()
        return
    usage = answer.usage
    metrics.prompt_tokens.inc(usage.prompt_tokens)
    metrics.cached_tokens.inc(usage.cached_tokens)
    metrics.answers.labels(answer.finish_reason).inc()
    metrics.answer_seconds.observe(seconds)


def _stats(answer: ChatAnswer) -> dict[str, Any]:
    return {"stats": asdict(answer.session.stats)}


def _event(event: Event) -> dict[str, Any] | None:
    match event:
        case CompactionStarted(_, start, end):
            return {"event": "compacting", "start": start, "end": end}
        case CompactionFinished(_, report):
            return {"event": "compacted", "report": report_dict(report)}
        case SessionRebuilt(_, num_tokens, reason):
            return {"event": "rebuilt", "num_tokens": num_tokens, "reason": reason}
    return None


async def _whole(
    service: Service, body: schemas.ChatCompletionRequest, items: AsyncGenerator[object, None]
) -> schemas.ChatCompletion:
    logprobs: list[TokenLogprob] = []
    answer: ChatAnswer | None = None
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Delta):
                logprobs += item.logprobs
            elif isinstance(item, Finished):
                answer = item.answer
    assert answer is not None
    assert answer.finish_reason is not None
    calls = [schemas.MessageToolCall.model_validate(call.as_message()) for call in answer.tool_calls]
    message = schemas.AnswerMessage(content=answer.content or (None if calls else ""), tool_calls=calls or None)
    choice = schemas.ChatChoice(
        message=message,
        logprobs=_logprobs(service.memory.engine, logprobs) if body.logprobs else None,
        finish_reason=answer.finish_reason,
    )
    return schemas.ChatCompletion(model=service.settings.model_name, choices=[choice], usage=_usage(answer))


def _usage(answer: ChatAnswer) -> schemas.Usage:
    usage = answer.usage
    return schemas.Usage.of(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


async def _chunks(
    service: Service,
    body: schemas.ChatCompletionRequest,
    conversation: str,
    items: AsyncGenerator[object, None],
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer as chunks of OpenAI's API."""
    frame = {
        "id": schemas.new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": service.settings.model_name,
    }
    usage = {"usage": None} if body.includes_usage else {}
    tells_memory = body.stream_options is not None and body.stream_options.include_memory

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**frame, "choices": [choice], **usage}

    async with aclosing(items):
        yield chunk({"role": "assistant", "content": ""})
        async for item in items:
            if isinstance(item, Delta):
                for delta, logprobs in _deltas(service.memory.engine, item):
                    yield chunk(delta, logprobs=logprobs)
            elif isinstance(item, Memory) and tells_memory:
                yield {**frame, "choices": [], "am_memory": {"conversation": conversation, **item.told}}
            elif isinstance(item, Finished):
                yield chunk({}, item.answer.finish_reason)
                if body.includes_usage:
                    yield {**frame, "choices": [], "usage": _usage(item.answer).model_dump()}


def _deltas(engine: Engine, item: Delta) -> list[tuple[dict[str, Any], Any]]:
    """Each part as a delta; log probabilities go with the first of them."""
    deltas: list[dict[str, Any]] = []
    for part in item.parts:
        if isinstance(part, ToolCall):
            deltas.append({"tool_calls": [{"index": part.index, **part.as_message()}]})
        elif isinstance(part, str):
            deltas.append({"content": part})
    if not item.logprobs:
        return [(delta, None) for delta in deltas]
    logprobs = _logprobs(engine, item.logprobs).model_dump()
    return [(delta, None if number else logprobs) for number, delta in enumerate(deltas or [{}])]


def _logprobs(engine: Engine, found: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> schemas.ChatLogprobs:
    def told(token_id: int, logprob: float) -> dict[str, Any]:
        text = engine.decode([token_id])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    return schemas.ChatLogprobs(
        content=[
            schemas.TokenLogprob(
                **told(token.token_id, token.logprob),
                top_logprobs=[schemas.TopLogprob(**told(*top)) for top in token.top],
            )
            for token in found
        ]
    )
