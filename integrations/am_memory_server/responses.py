"""`/v1/responses`: OpenAI's newer API. A client may send only what is new, and name the response before it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from am_memory.conversations.chat_answer import ChatAnswer, Delta
from am_memory_server import sse
from am_memory_server.access import Owner
from am_memory_server.chat_completions import chat_request, usage_of
from am_memory_server.chat_job import chat_job
from am_memory_server.errors import ApiError
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.kept_responses import Exchange, KeptResponse
from am_memory_server.request_schemas import ChatCompletionRequest
from am_memory_server.requests import checked_name, conversation_of, require_model
from am_memory_server.responses_events import Event, ResponsesAnswer
from am_memory_server.responses_request import ResponsesRequest
from am_memory_server.service import Service
from am_memory_server.updates import Finished

router = APIRouter(route_class=JSONRoute, prefix="/v1/responses", tags=["OpenAI"])


class ResponseObject(BaseModel):
    """The response to `POST /v1/responses`, as OpenAI's API has it."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    status: str
    output: list[dict[str, Any]]


class DeletedResponse(BaseModel):
    """The response `id` is forgotten. The memory of its conversation stays."""

    id: str
    object: str = "response"
    deleted: bool = True


class _Run:
    """One request: its conversation, its answer as it is made, and what is kept of it."""

    def __init__(self, service: Service, body: ResponsesRequest, owner: str, headers: Any) -> None:
        self.service, self.body, self.owner = service, body, owner
        before = _before(service, body, owner)
        self.earlier: Sequence[Exchange] = before.exchanges if before else ()
        self.chat = _as_chat(body, before.messages if before else ())
        name = body.conversation_name or (before.conversation if before else None)
        self.conversation = checked_name(name, "conversation") if name else conversation_of(self.chat, headers)
        self.answer = ResponsesAnswer(body, service.settings.model_name)

        self.asked = chat_request(service, self.chat, (owner, self.conversation))
        self.call = service.threads.register_call(self.asked.thread)

    def updates(self) -> AsyncGenerator[object, None]:
        service, key = self.service, (self.owner, self.conversation)
        return service.scheduler.stream(
            key, chat_job(service, key), lambda: ChatAnswer(service.threads, self.asked, self.call)
        )

    async def events(self, updates: AsyncGenerator[object, None]) -> AsyncGenerator[Event, None]:
        """The events of the whole response; the last one has the response."""
        async with aclosing(updates):
            for event in self.answer.begin():
                yield event
            async for update in updates:
                for part in update.parts if isinstance(update, Delta) else ():
                    for event in self.answer.add(part):
                        yield event
                if isinstance(update, Finished):
                    for event in self._finished(update):
                        yield event

    def _finished(self, update: Finished) -> list[Event]:
        response = self.answer.response
        response["am_memory"] = {"conversation": self.conversation, "stats": update.stats.__dict__}
        events = [*self.answer.finish(update.answer.finish_reason, usage_of(update.answer))]
        if self.body.store:
            new = Exchange([*self.body.messages, update.answer.message])
            kept = KeptResponse(self.conversation, (*self.earlier, new), response)
            self.service.responses.keep(self.owner, kept)
            if self.call.is_deleted:  # the conversation, while it was answered
                self.service.responses.delete(self.owner, response["id"])
        return events

    def written(self, event: Event) -> str:
        """An event in a stream."""
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return f"event: {event['type']}\ndata: {data}\n\n"

    def failure(self, error: ApiError) -> str:
        """The end of a stream that fails after its HTTP status was sent."""
        return self.written(self.answer.failed(error.code, error.message, error.param))


def _before(service: Service, body: ResponsesRequest, owner: str) -> KeptResponse | None:
    if (id := body.previous_response_id) is None:
        return None
    if (kept := service.responses.get(owner, id)) is None:
        raise ApiError(
            400,
            f"there is no response {id!r}: it was not stored, or is forgotten; send the whole conversation as input",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return kept


def _as_chat(body: ResponsesRequest, earlier: Sequence[Mapping[str, Any]]) -> ChatCompletionRequest:
    try:
        return body.as_chat(earlier)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ApiError(400, f"input: {where}: {message}", code="invalid_request", param="input") from error


@router.post("", response_model=ResponseObject)
async def create_response(body: ResponsesRequest, request: Request, owner: Owner) -> Any:
    """Answer a conversation. Its earlier messages come with the request, or with `previous_response_id`."""
    service: Service = request.app.state.service
    require_model(service.settings, body.model)
    run = _Run(service, body, owner, request.headers)
    updates = run.updates()
    if not body.stream:
        return await sse.unless_disconnected(request, _whole(run, updates))
    await sse.unless_disconnected(request, anext(updates))  # an error before `Started` has an HTTP status of its own
    stream = sse.events(run.events(updates), sse.Form(run.written, run.failure))
    return StreamingResponse(stream, media_type="text/event-stream", headers=sse.HEADERS)


async def _whole(run: _Run, updates: AsyncGenerator[object, None]) -> dict[str, Any]:
    async for _ in run.events(updates):
        pass
    return run.answer.response


@router.get("/{id}", response_model=ResponseObject)
async def get_response(id: str, request: Request, owner: Owner) -> Any:
    """Show a response that was stored."""
    service: Service = request.app.state.service
    if (kept := service.responses.get(owner, id)) is None:
        raise _unknown(id)
    return kept.response


@router.delete("/{id}", response_model=DeletedResponse)
async def delete_response(id: str, request: Request, owner: Owner) -> Any:
    """Forget a response. The memory of its conversation stays: see `/v1/memory/sessions`."""
    service: Service = request.app.state.service
    if not service.responses.delete(owner, id):
        raise _unknown(id)
    return DeletedResponse(id=id)


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"there is no response {id!r}: it was not stored, or is forgotten", code="response_not_found")
