"""`/tokenize` and `/detokenize`, as vLLM has them: texts and chats as token ids, and back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from am_memory_server.access import Owner
from am_memory_server.bodies import Body
from am_memory_server.errors import ApiError
from am_memory_server.json_bodies import JSONRoute
from am_memory_server.memory_endpoints import run_on_host
from am_memory_server.message_schemas import ChatMessage, ChatTool
from am_memory_server.request_schemas import TemplateOptions, TokenId, not_too_many
from am_memory_server.requests import require_model
from am_memory_server.service import Service

router = APIRouter(route_class=JSONRoute, tags=["Tokens"])


class TokenizeBody(Body):
    """A `prompt`, or `messages` with the tools and the options of their template."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(not_too_many)] | None
    ) = None
    tools: Annotated[list[ChatTool], Field(max_length=128)] = Field(default_factory=list)
    chat_template_kwargs: TemplateOptions = Field(default_factory=dict)
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _has_one_content(self) -> TokenizeBody:
        if (self.prompt is None) is (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


class Tokens(BaseModel):
    """Token ids. `max_model_len` is the context window that the model was trained on; a conversation may be longer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeBody, request: Request, owner: Owner) -> Any:
    """Count and list the tokens of a text or of a chat."""
    require_model(request.app.state.service.settings, body.model)
    return await run_on_host(request, owner, lambda service: _tokens(service, body))


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeBody, request: Request, owner: Owner) -> Any:
    """The text of token ids, special tokens included."""
    service: Service = request.app.state.service
    require_model(service.settings, body.model)
    vocab_size = service.memory.engine.info.vocab_size
    if (last := max(body.tokens, default=0)) >= vocab_size:
        raise ApiError(400, f"token {last}: this model has tokens 0 to {vocab_size - 1}", param="tokens")
    return await run_on_host(
        request, owner, lambda service: Detokenized(prompt=service.memory.engine.decode(body.tokens))
    )


def _tokens(service: Service, body: TokenizeBody) -> Tokens:
    engine = service.memory.engine
    if body.messages is None:
        token_ids = engine.encode(body.prompt or "", add_special=body.add_special_tokens)
    else:
        token_ids = service.threads.encode(
            [message.as_message() for message in body.messages],
            [tool.as_tool() for tool in body.tools],
            opens_answer=body.add_generation_prompt,
            options=body.chat_template_kwargs,
        )
    strings = [engine.decode([token_id]) for token_id in token_ids] if body.return_token_strs else None
    return Tokens(count=len(token_ids), max_model_len=engine.info.window_tokens, tokens=token_ids, token_strs=strings)
