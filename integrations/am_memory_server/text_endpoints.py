"""`/v1/memory/texts`: make, list, inspect and delete the compact texts of one key, and of no other key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from am_memory.conversations.tool_calls import prepare
from am_memory.session.text_making import TextMaking
from am_memory.storage.compact_text import CompactText
from am_memory_server.access import Owner
from am_memory_server.bodies import StrictBody
from am_memory_server.errors import ApiError
from am_memory_server.jobs import Steps, on_host
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.memory_endpoints import Conversations, run, run_on_host
from am_memory_server.message_schemas import ChatMessage, ChatTool
from am_memory_server.requests import checked_name, text_of
from am_memory_server.service import Service

T = TypeVar("T")

router = APIRouter(route_class=JSONRoute, prefix="/v1/memory/texts", tags=["Memory"])


class TextBody(StrictBody):
    """Make a compact text under the name `id`, of one of three things.

    Attributes:
        text: read as a user's message.
        messages: with the `tools` that the template tells of.
        session: the id of a conversation: all that it remembers. Nothing is read again.
        keep_ratio: slots per token; null: the server's.
    """

    id: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    session: str | None = None
    tools: Annotated[list[ChatTool], Field(max_length=128)] | None = None
    keep_ratio: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _has_one_content(self) -> TextBody:
        if sum(content is not None for content in (self.text, self.messages, self.session)) != 1:
            raise ValueError("give one of text, messages and session")
        return self


class TextEntry(BaseModel):
    """One compact text. `num_slots` is the mean over the heads: what it takes of the trigger where it is mounted."""

    id: str
    object: Literal["memory.text"] = "memory.text"
    num_tokens: int
    num_slots: float
    num_bytes: int
    preview: str

    @classmethod
    def of(cls, id: str, text: CompactText) -> TextEntry:
        return cls(id=id, **text.model_dump(exclude={"name"}))


class TextList(BaseModel):
    """The compact texts of one key."""

    object: Literal["list"] = "list"
    data: list[TextEntry]


class DeletedText(BaseModel):
    """The compact text `id` is deleted. Conversations that have mounted it keep it."""

    id: str
    object: Literal["memory.text"] = "memory.text"
    deleted: Literal[True] = True


class CompactTexts:
    """The compact texts of one owner. A method that returns `Steps` is a job; the others need no device."""

    def __init__(self, service: Service, owner: str) -> None:
        self.service, self.memory, self.owner = service, service.memory, owner

    def entries(self) -> list[TextEntry]:
        prefix = text_of(self.owner, "")
        texts = [text for text in self.memory.compact_texts() if text.name.startswith(prefix)]
        return [TextEntry.of(text.name.removeprefix(prefix), text) for text in texts]

    def entry(self, id: str) -> TextEntry:
        return TextEntry.of(id, self.memory.text(text_of(self.owner, id)).about)

    def make(self, body: TextBody) -> Steps[TextEntry]:
        name = text_of(self.owner, checked_name(body.id, "id"))
        others = [entry for entry in (yield from on_host(self.entries)) if entry.id != body.id]
        if len(others) >= (most := self.service.settings.max_texts):
            raise ApiError(
                409, f"this key has {len(others)} compact texts, and the limit is {most}: delete one", code="too_many"
            )
        making = yield from self._begun(name, body)
        while making.read():
            yield None
        text = making.compact()
        yield from on_host(lambda: making.keep(text))
        return TextEntry.of(body.id, text.about)

    def _begun(self, name: str, body: TextBody) -> Steps[TextMaking]:
        if body.session is not None:
            newest, _ = yield from Conversations(self.service, self.owner).newest(body.session)
            return TextMaking.of(self.memory.scratch(), name, newest.session)
        policy = self.memory.policy
        policy = policy if body.keep_ratio is None else policy.with_changes(keep_ratio=body.keep_ratio)
        content: Any = body.text
        tools: Any = [tool.as_tool() for tool in body.tools or ()]
        if body.messages is not None:
            content, tools = prepare(self.memory.engine, [message.as_message() for message in body.messages], tools)
        scratch = self.memory.scratch(policy=policy)
        return (yield from on_host(lambda: TextMaking.of(scratch, name, content, tools or ())))

    def delete(self, id: str) -> DeletedText:
        self.memory.delete_compact_text(text_of(self.owner, id))
        return DeletedText(id=id)


@router.post("", response_model=TextEntry, status_code=201)
async def make_text(body: TextBody, request: Request, owner: Owner) -> Any:
    """Read a text once, and compact it. It takes the place of the one of that name."""
    return await run(request, owner, lambda service: CompactTexts(service, owner).make(body))


@router.get("", response_model=TextList)
async def list_texts(request: Request, owner: Owner) -> Any:
    """List the compact texts of this key."""
    return TextList(data=await run_on_host(request, owner, lambda service: CompactTexts(service, owner).entries()))


@router.get("/{id:path}", response_model=TextEntry)
async def inspect_text(id: str, request: Request, owner: Owner) -> Any:
    """Show a compact text."""
    return await run_on_host(request, owner, lambda service: CompactTexts(service, owner).entry(id))


@router.delete("/{id:path}", response_model=DeletedText)
async def delete_text(id: str, request: Request, owner: Owner) -> Any:
    """Delete a compact text, in memory and in the store. Conversations that have mounted it keep it."""
    return await run_on_host(request, owner, lambda service: CompactTexts(service, owner).delete(id))
