"""`POST /v1/chat/completions`: answers a conversation, which the client sends whole at every call."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from am_memory.conversations.chat_answer import ChatAnswer, Delta, ToolCall
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.reasoning import Reasoning
from am_memory.engines.base import Engine
from am_memory.session.generation import TokenLogprob
from am_memory_server import sse
from am_memory_server.access import Owner
from am_memory_server.chat_job import chat_job
from am_memory_server.jobs import TurnKey
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.message_schemas import MessageToolCall
from am_memory_server.request_schemas import ChatCompletionRequest
from am_memory_server.requests import conversation_of, max_tokens_of, require_model, sampling_of, text_of, thread_of
from am_memory_server.response_schemas import (
    LOWEST_LOGPROB,
    AnswerMemory,
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    TopLogprob,
    Usage,
    new_id,
)
from am_memory_server.service import Service
from am_memory_server.updates import Finished, MemoryUpdate

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, response_model_exclude_none=False, tags=["OpenAI"])
async def create_chat_completion(body: ChatCompletionRequest, request: Request, owner: Owner) -> Any:
    """Answer a conversation. Only its new messages are read."""
    service: Service = request.app.state.service
    require_model(service.settings, body.model)
    conversation = conversation_of(body, request.headers)
    key = (owner, conversation)
    asked = chat_request(service, body, key)
    call = service.threads.register_call(asked.thread)  # now: it may be deleted while the request waits
    updates = service.scheduler.stream(key, chat_job(service, key), lambda: ChatAnswer(service.threads, asked, call))
    if not body.stream:
        return await sse.unless_disconnected(request, _whole(service, body, conversation, updates))
    await sse.unless_disconnected(request, anext(updates))  # an error before `Started` has an HTTP status of its own
    return StreamingResponse(
        sse.events(_chunks(service, body, conversation, updates)), media_type="text/event-stream", headers=sse.HEADERS
    )


def chat_request(service: Service, body: ChatCompletionRequest, key: TurnKey) -> ChatRequest:
    """The request as the memory takes it.

    Raises:
        ApiError: a limit or a token id is beyond what this server has.
    """
    return ChatRequest(
        messages=[message.as_message() for message in body.messages],
        tools=[tool.as_tool() for tool in body.tools or ()],
        tool_choice=body.choice,
        response_format=body.response_format.as_format() if body.response_format else None,
        max_tokens=max_tokens_of(service.settings, body.max_completion_tokens, body.max_tokens),
        sampling=sampling_of(service.memory, body),
        num_answers=body.n or 1,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        parallel_calls=body.parallel_tool_calls is not False,
        text_of_invalid_calls=True,
        thread=thread_of(key),
        owner=key[0],
        mounts=[text_of(key[0], id) for id in body.mounts],
        template_options=body.template_options,
        continues_last=body.continue_final_message,
        reasoning=service.settings.reasoning,
    )


async def _whole(
    service: Service, body: ChatCompletionRequest, conversation: str, updates: AsyncGenerator[object, None]
) -> ChatCompletion:
    """The answer as one response."""
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(body.n or 1)]
    finished: Finished | None = None
    async with aclosing(updates):
        async for update in updates:
            if isinstance(update, Delta):
                logprobs[update.index] += update.logprobs
            elif isinstance(update, Finished):
                finished = update
    assert finished is not None
    answer, engine = finished.answer, service.memory.engine
    choices = [
        _choice(each, _logprobs(engine, tokens) if body.logprobs else None)
        for each, tokens in zip((answer, *answer.others), logprobs, strict=True)
    ]
    memory = AnswerMemory(conversation=conversation, stats=finished.stats, looked_up=answer.looked_up)
    return ChatCompletion(model=service.settings.model_name, choices=choices, usage=usage_of(answer), am_memory=memory)


def _choice(answer: ChatAnswer, logprobs: ChatLogprobs | None) -> ChatChoice:
    """One of the answers."""
    assert answer.finish_reason is not None
    calls = [MessageToolCall.model_validate(call.as_message()) for call in answer.tool_calls]
    message = AnswerMessage(
        content=answer.content or (None if calls else ""),
        reasoning_content=answer.reasoning or None,
        tool_calls=calls or None,
    )
    return ChatChoice(index=answer.index, message=message, logprobs=logprobs, finish_reason=answer.finish_reason)


def usage_of(answer: ChatAnswer) -> Usage:
    """The tokens of an answer."""
    usage = answer.usage
    return Usage.of(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


async def _chunks(
    service: Service, body: ChatCompletionRequest, conversation: str, updates: AsyncGenerator[object, None]
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer as a stream of chunks."""
    frame = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": service.settings.model_name,
    }
    usage = {"usage": None} if body.includes_usage else {}
    includes_memory = body.stream_options is not None and body.stream_options.include_memory

    def chunk(
        index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**frame, "choices": [choice], **usage}

    async with aclosing(updates):
        for index in range(body.n or 1):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for update in updates:
            if isinstance(update, Delta):
                for delta, logprobs in _deltas(service.memory.engine, update):
                    yield chunk(update.index, delta, logprobs=logprobs)
            elif isinstance(update, MemoryUpdate) and includes_memory:
                yield {**frame, "choices": [], "am_memory": {"conversation": conversation, **update.data}}
            elif isinstance(update, Finished):
                for each in (update.answer, *update.answer.others):
                    yield chunk(each.index, {}, each.finish_reason)
                if body.includes_usage:
                    yield {**frame, "choices": [], "usage": usage_of(update.answer).model_dump()}


def _deltas(engine: Engine, update: Delta) -> list[tuple[dict[str, Any], Any]]:
    """One delta of OpenAI's API for each part of the answer; the first one carries the log probabilities."""
    deltas: list[dict[str, Any]] = []
    for part in update.parts:
        if isinstance(part, ToolCall):
            deltas.append({"tool_calls": [{"index": part.index, **part.as_message()}]})
        elif isinstance(part, Reasoning):
            deltas.append({"reasoning_content": part.text})
        elif isinstance(part, str):
            deltas.append({"content": part})
    if not update.logprobs:
        return [(delta, None) for delta in deltas]
    logprobs = _logprobs(engine, update.logprobs).model_dump()
    return [(delta, None if number else logprobs) for number, delta in enumerate(deltas or [{}])]


def _logprobs(engine: Engine, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    def fields(token_id: int, logprob: float) -> dict[str, Any]:
        text = engine.decode([token_id])
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(text.encode("utf-8", "replace"))}

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **fields(token.token_id, token.logprob), top_logprobs=[TopLogprob(**fields(*top)) for top in token.top]
            )
            for token in tokens
        ]
    )
