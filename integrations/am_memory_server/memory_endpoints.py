"""`/v1/memory/sessions`: list, inspect, search, recall, compact, fork and delete the conversations of one key alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from am_memory.conversations.branch import Branch
from am_memory.errors import CompactionFailed, InvalidInput
from am_memory.session.saving import pack, write
from am_memory.session.session import Session
from am_memory.session.stats import Stats
from am_memory_server.access import Owner
from am_memory_server.bodies import StrictBody
from am_memory_server.errors import ApiError
from am_memory_server.jobs import Steps, on_host
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.memory_view import CompactionView, MemoryView, SpanView, memory_view, span_view, text_view
from am_memory_server.requests import checked_name, thread_of
from am_memory_server.service import CompactionLog, Service, last_used, report_dict

T = TypeVar("T")
CALLS = "memory"
"""The name under which these calls take turns with the conversations of their owner."""
MAX_QUERY_CHARS = 4000
"""The model reads the whole query of a search."""
MAX_FOUND = 20
"""Spans that one search returns at most."""

router = APIRouter(route_class=JSONRoute, prefix="/v1/memory/sessions", tags=["Memory"])


class SessionEntry(BaseModel):
    """One conversation. `stats` are those of the branch used last; null if the conversation is in the store only."""

    id: str
    object: Literal["memory.session"] = "memory.session"
    num_branches: int
    stats: Stats | None


class SessionList(BaseModel):
    """The conversations of one key."""

    object: Literal["list"] = "list"
    data: list[SessionEntry]


class CompactBody(StrictBody):
    """Compact this `fraction` of the cache without its pinned tokens, oldest first; null: the policy's fraction."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None


class SpanBody(StrictBody):
    """The tokens [`start`, `end`) of the conversation."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(gt=0)]


class SearchBody(StrictBody):
    """Find the compacted tokens that the `query` is about: at most `top` spans, the best first."""

    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)]
    top: Annotated[int, Field(ge=1, le=MAX_FOUND)] = 5


class Found(BaseModel):
    """The spans that a search found, the best first."""

    object: Literal["list"] = "list"
    data: list[SpanView]


class ForkBody(StrictBody):
    """Copy the conversation to the name `id`."""

    id: Annotated[str, Field(min_length=1)]


class Deleted(BaseModel):
    """The conversation `id` is deleted."""

    id: str
    object: Literal["memory.session"] = "memory.session"
    deleted: Literal[True] = True


class Conversations:
    """The conversations of one owner. A method that returns `Steps` is a job; the others need no device."""

    def __init__(self, service: Service, owner: str) -> None:
        self.service, self.threads, self.owner = service, service.threads, owner

    def entries(self) -> list[SessionEntry]:
        """All conversations, in memory and in the store."""
        prefix, branches = thread_of((self.owner, "")), defaultdict[str, list[Branch]](list)
        for branch in self.threads.all_branches():
            branches[branch.thread].append(branch)
        names = [name for name in self.threads.names() if name.startswith(prefix)]
        return [_entry(name.removeprefix(prefix), branches[name]) for name in names]

    def view(self, id: str) -> Steps[MemoryView]:
        newest, count = yield from self.newest(id)
        return memory_view(id, newest.session, count)

    def compact(self, id: str, fraction: float | None) -> Steps[CompactionView]:
        session = (yield from self.newest(id))[0].session
        log = CompactionLog(session.name)
        with self.service.listening(log.on_event):
            try:
                report = session.compact(fraction)
            except CompactionFailed as error:
                raise ApiError(409, str(error), code="nothing_to_compact") from error
        log.write(session)
        yield from self._save(session)
        return CompactionView.model_validate(report_dict(report))

    def text(self, id: str, span: SpanBody) -> Steps[SpanView]:
        return text_view((yield from self.newest(id))[0].session, span.start, span.end)

    def search(self, id: str, query: str, top: int) -> Steps[Found]:
        session = (yield from self.newest(id))[0].session
        with self.service.listening(lambda _: None):
            return Found(data=[span_view(found) for found in session.search(query, top)])

    def recall(self, id: str, span: SpanBody) -> Steps[MemoryView]:
        session = (yield from self.newest(id))[0].session
        log = CompactionLog(session.name)
        with self.service.listening(log.on_event):  # exact tokens may be compacted to make room
            session.recall((span.start, span.end))
        log.write(session)
        yield from self._save(session)
        return (yield from self.view(id))

    def fork(self, id: str, new_id: str) -> Steps[MemoryView]:
        thread, new = (thread_of((self.owner, name)) for name in (id, checked_name(new_id, "id")))
        yield from self.newest(id)
        if new in (yield from on_host(self.threads.names)):
            raise ApiError(409, f"there is a session {new_id!r} already: choose another id", code="session_exists")
        try:
            saved = yield from on_host(lambda: self.threads.load(thread))
            for save in self.threads.copying(thread, new, saved):
                yield from on_host(save)
        except InvalidInput as error:
            raise _unknown(id) from error
        return (yield from self.view(new_id))

    def delete(self, id: str) -> Deleted:
        was_there = self.threads.delete(thread_of((self.owner, id)))
        self.service.responses.delete_conversation(self.owner, id)
        if not was_there:
            raise _unknown(id)
        return Deleted(id=id)

    def _save(self, session: Session) -> Steps[None]:
        if self.service.memory.store is not None:
            packed = pack(session)
            yield from on_host(lambda: self.service.save_or_log(lambda: write(session, packed)))

    def newest(self, id: str) -> Steps[tuple[Branch, int]]:
        """The branch that was used last, and the number of branches."""
        thread = thread_of((self.owner, id))
        saved = yield from on_host(lambda: self.threads.load(thread))
        branches = self.threads.open(thread, saved)
        if not branches and thread in (yield from on_host(self.threads.names)):
            raise ApiError(
                409, f"the saved session {id!r} cannot be read: DELETE removes it", code="session_unreadable"
            )
        if not branches:
            raise _unknown(id)
        return max(branches, key=last_used), len(branches)


def _entry(id: str, branches: list[Branch]) -> SessionEntry:
    newest = max(branches, key=last_used, default=None)
    return SessionEntry(id=id, num_branches=len(branches), stats=newest.session.stats if newest else None)


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"there is no session {id!r}: GET /v1/memory/sessions lists them", code="session_not_found")


async def run(request: Request, owner: str, start: Callable[[Service], Steps[T]]) -> T:
    """Run a job about the conversations or the texts of an owner."""
    service: Service = request.app.state.service
    return await service.scheduler.call((owner, CALLS), lambda: start(service))


async def run_on_host(request: Request, owner: str, call: Callable[[Service], T]) -> T:
    """The same for a function that needs no device."""
    service: Service = request.app.state.service
    return await service.scheduler.call_on_host((owner, CALLS), lambda: call(service))


@router.get("", response_model=SessionList)
async def list_sessions(request: Request, owner: Owner) -> Any:
    """List the conversations of this key."""
    return SessionList(data=await run_on_host(request, owner, lambda service: Conversations(service, owner).entries()))


@router.get("/{id:path}", response_model=MemoryView)
async def inspect_session(id: str, request: Request, owner: Owner) -> Any:
    """Show the memory of a conversation: segments, compactions, slots and bytes by layer and head."""
    return await run(request, owner, lambda service: Conversations(service, owner).view(id))


@router.post("/{id:path}/compact", response_model=CompactionView)
async def compact_session(id: str, body: CompactBody, request: Request, owner: Owner) -> Any:
    """Compact now, whatever the size of the cache."""
    return await run(request, owner, lambda service: Conversations(service, owner).compact(id, body.fraction))


@router.post("/{id:path}/text", response_model=SpanView)
async def show_text(id: str, body: SpanBody, request: Request, owner: Owner) -> Any:
    """Show the text of some tokens. A longer span ends earlier: `end` says where."""
    return await run(request, owner, lambda service: Conversations(service, owner).text(id, body))


@router.post("/{id:path}/search", response_model=Found)
async def search_session(id: str, body: SearchBody, request: Request, owner: Owner) -> Any:
    """Find compacted tokens by the model's own attention, and by rare words. Nothing is added to the conversation."""
    return await run(request, owner, lambda service: Conversations(service, owner).search(id, body.query, body.top))


@router.post("/{id:path}/recall", response_model=MemoryView)
async def recall_span(id: str, body: SpanBody, request: Request, owner: Owner) -> Any:
    """Make compacted tokens exact again, until others need their room. A span must fit below the trigger."""
    return await run(request, owner, lambda service: Conversations(service, owner).recall(id, body))


@router.post("/{id:path}/fork", response_model=MemoryView, status_code=201)
async def fork_session(id: str, body: ForkBody, request: Request, owner: Owner) -> Any:
    """Copy a conversation to a new name. The two share memory until they differ."""
    return await run(request, owner, lambda service: Conversations(service, owner).fork(id, body.id))


@router.delete("/{id:path}", response_model=Deleted)
async def delete_session(id: str, request: Request, owner: Owner) -> Any:
    """Delete a conversation, in memory and in the store. An answer that is being generated is not kept."""
    return await run_on_host(request, owner, lambda service: Conversations(service, owner).delete(id))
