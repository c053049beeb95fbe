"""One answer in LangChain's form: a chunk for each part, and one message of all chunks. Knows no model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator
from dataclasses import asdict
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from am_memory.conversations.chat import HostWork, answer_chat
from am_memory.conversations.chat_answer import ChatAnswer, Delta, Part
from am_memory.conversations.reasoning import Reasoning
from am_memory.conversations.tool_calls import InvalidCall
from am_memory.errors import PromptTooLong
from am_memory.session.stepwise import Stepwise

PROVIDER = "am_memory"


AnswerStep = ChatGenerationChunk | tuple[Stepwise[Any], ...]
"""A chunk; or what may be read or generated next together with others."""


def generate_chunks(
    answer: ChatAnswer, model_name: str, *, timeout: float | None, max_retries: int
) -> Generator[AnswerStep, None, None]:
    """Generate an answer as chunks; the last one holds usage and figures. The conversation is kept at the end.

    Args:
        timeout: in seconds; None: no limit.
        max_retries: how often a failed compaction is tried again while the prompt is read.

    Raises:
        ContextOverflowError: the prompt does not fit.
        TimeoutError: the answer took too long; the conversation is not kept.
    """
    started, chunks = time.monotonic(), Chunks()
    try:
        for step in answer_chat(answer, max_retries=max_retries):
            if isinstance(step, HostWork):
                step.run()
                continue
            if timeout is not None and time.monotonic() - started > timeout:
                max_tokens = answer.request.max_tokens
                raise TimeoutError(
                    f"no complete answer after {timeout} s: raise timeout, or lower max_tokens ({max_tokens})"
                )
            if isinstance(step, Delta):
                yield from map(chunks.chunk, step.parts)
            yield answer.next_steps
    except PromptTooLong as error:
        raise ContextOverflowError(str(error)) from error
    yield chunks.last(answer, model_name)


class Chunks:
    """The chunks of one answer, under one id."""

    def __init__(self) -> None:
        self.id = f"run-{uuid.uuid4()}"
        self._num_invalid = 0

    def chunk(self, part: Part) -> ChatGenerationChunk:
        """One part of the answer."""
        if isinstance(part, str):
            return self._chunk(content=part)
        if isinstance(part, Reasoning):
            return self._chunk(additional_kwargs={"reasoning_content": part.text})
        if isinstance(part, InvalidCall):
            # The error comes first: LangChain would complete broken JSON to a call that nobody made.
            args, call_id = f"{part.error}: {part.text}", f"call_{uuid.uuid4().hex[:24]}"
            self._num_invalid += 1
            invalid = tool_call_chunk(name=None, args=args, id=call_id, index=1000 + self._num_invalid)
            return self._chunk(tool_call_chunks=[invalid])
        call = tool_call_chunk(name=part.name, args=part.arguments_json, id=part.id, index=part.index)
        return self._chunk(tool_call_chunks=[call])

    def _chunk(self, **fields: Any) -> ChatGenerationChunk:
        fields.setdefault("content", "")
        return ChatGenerationChunk(message=AIMessageChunk(id=self.id, **fields))

    def last(self, answer: ChatAnswer, model_name: str) -> ChatGenerationChunk:
        """The end of a complete answer: finish reason, usage, and the figures of its memory."""
        stats, usage = answer.session.stats, answer.usage
        metadata = {
            "model_name": model_name,
            "model_provider": PROVIDER,
            "finish_reason": answer.finish_reason,
            "am_memory": {
                "logical_tokens": stats.logical_tokens,
                "kv_tokens": round(stats.kv_tokens, 1),
                "kv_bytes": stats.kv_bytes,
                "compactions": stats.num_compactions,
                "compactions_in_answer": answer.num_compactions,
                "recalled_tokens": stats.recalled_tokens,
                "looked_up": [asdict(span) for span in answer.looked_up],
                "rebuilt": answer.turn.rebuilt,
                "schema_error": answer.schema_error,
            },
        }
        usage_metadata = UsageMetadata(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            input_token_details={"cache_read": usage.cached_tokens},
        )
        message = AIMessageChunk(
            content="", id=self.id, response_metadata=metadata, usage_metadata=usage_metadata, chunk_position="last"
        )
        return ChatGenerationChunk(message=message, generation_info={"finish_reason": answer.finish_reason})


def merged(chunks: list[ChatGenerationChunk]) -> ChatResult:
    """All chunks of an answer as one message."""
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    chunk_message = total.message
    assert isinstance(chunk_message, AIMessageChunk)
    message = AIMessage(
        content=chunk_message.content,
        id=chunk_message.id,
        tool_calls=chunk_message.tool_calls,
        invalid_tool_calls=chunk_message.invalid_tool_calls,
        response_metadata=chunk_message.response_metadata,
        usage_metadata=chunk_message.usage_metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=total.generation_info)])
