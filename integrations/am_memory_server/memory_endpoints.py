"""The memory of a key's conversations over HTTP: list, look, compact, fork, delete. Nobody else's is ever seen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from am_memory.errors import CompactionFailed, InvalidInput
from am_memory.session import Session, Stats
from am_memory.threads import Branch
from am_memory_server.access import Owner
from am_memory_server.chat_completions import checked_name, thread_of
from am_memory_server.errors import ApiError
from am_memory_server.memory_view import CompactionView, MemoryView, view
from am_memory_server.service import Compactions, Service, last_used, report_dict

router = APIRouter(prefix="/v1/memory/sessions", tags=["Memory"])


class SessionEntry(BaseModel):
    """One conversation; `stats` are those of the branch used last, None while it lies in the store alone."""

    id: str
    object: Literal["memory.session"] = "memory.session"
    num_branches: int
    stats: Stats | None


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SessionEntry]


class CompactBody(BaseModel):
    """`fraction` of the cache without its pinned tokens, oldest first; null: as the server's policy says."""

    model_config = ConfigDict(extra="forbid")

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None


class ForkBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1)]


class Deleted(BaseModel):
    id: str
    object: Literal["memory.session"] = "memory.session"
    deleted: Literal[True] = True


class Conversations:
    """The conversations of one owner; its methods run on the scheduler's thread."""

    def __init__(self, service: Service, owner: str) -> None:
        self.service, self.threads, self.owner = service, service.threads, owner

    def entries(self) -> list[SessionEntry]:
        begin = thread_of((self.owner, ""))
        names = [name for name in self.threads.names() if name.startswith(begin)]
        return [self._entry(name, name.removeprefix(begin)) for name in names]

    def _entry(self, thread: str, id: str) -> SessionEntry:
        branches = self.threads.branches(thread)
        newest = max(branches, key=last_used, default=None)
        stats = newest.session.stats if newest else None
        return SessionEntry(id=id, num_branches=len(branches), stats=stats)

    def view(self, id: str) -> MemoryView:
        newest, count = self._newest(id)
        return view(id, newest.session, count, self.service.memory.trigger_tokens)

    def compact(self, id: str, fraction: float | None) -> CompactionView:
        session = self._newest(id)[0].session
        compactions = Compactions()
        with self.service.memory.listening(compactions.hear), self.service.memory.listening(self.service.metrics.hear):
            try:
                report = session.compact(fraction)
            except CompactionFailed as error:
                raise ApiError(409, str(error), code="nothing_to_compact") from error
        compactions.write(session)
        self._save(session)
        return CompactionView.model_validate(report_dict(report))

    def fork(self, id: str, new_id: str) -> MemoryView:
        self._newest(id)
        new = thread_of((self.owner, checked_name(new_id)))
        if new in self.threads.names():
            raise ApiError(409, f"there is a session {new_id!r} already: choose another id", code="session_exists")
        try:
            self.threads.copy(thread_of((self.owner, id)), new)
        except InvalidInput as error:
            raise _unknown(id) from error
        return self.view(new_id)

    def delete(self, id: str) -> Deleted:
        if not self.threads.delete(thread_of((self.owner, id))):
            raise _unknown(id)
        return Deleted(id=id)

    def _newest(self, id: str) -> tuple[Branch, int]:
        """The branch that was used last, and how many there are."""
        thread = thread_of((self.owner, id))
        branches = self.threads.open(thread)
        if not branches and thread in self.threads.names():
            raise ApiError(409, f"what is saved of {id!r} cannot be read: DELETE forgets it", code="session_unreadable")
        if not branches:
            raise _unknown(id)
        return max(branches, key=last_used), len(branches)

    def _save(self, session: Session) -> None:
        if self.service.memory.store is not None:
            self.service.saving(session.save)


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"there is no session {id!r}: GET /v1/memory/sessions lists them", code="session_not_found")


async def _on_device(request: Request, owner: str, method: Any, *args: Any) -> Any:
    service: Service = request.app.state.service
    conversations = Conversations(service, owner)
    return await service.scheduler.call(lambda: method(conversations, *args))


@router.get("", response_model=SessionList)
async def list_sessions(request: Request, owner: Owner) -> Any:
    """All conversations of this key."""
    return SessionList(data=await _on_device(request, owner, Conversations.entries))


@router.get("/{id:path}", response_model=MemoryView)
async def inspect_session(id: str, request: Request, owner: Owner) -> Any:
    """What the memory of a conversation holds: segments, compactions, slots and bytes by layer and head."""
    return await _on_device(request, owner, Conversations.view, id)


@router.post("/{id:path}/compact", response_model=CompactionView)
async def compact_session(id: str, body: CompactBody, request: Request, owner: Owner) -> Any:
    """Compact now, whatever the trigger says."""
    return await _on_device(request, owner, Conversations.compact, id, body.fraction)


@router.post("/{id:path}/fork", response_model=MemoryView, status_code=201)
async def fork_session(id: str, body: ForkBody, request: Request, owner: Owner) -> Any:
    """Give a conversation a second name, under which it goes its own way; memory is shared until the two differ."""
    return await _on_device(request, owner, Conversations.fork, id, body.id)


@router.delete("/{id:path}", response_model=Deleted)
async def delete_session(id: str, request: Request, owner: Owner) -> Any:
    """Forget a conversation, in memory and in the store; an answer to it that is under way is not kept."""
    return await _on_device(request, owner, Conversations.delete, id)
