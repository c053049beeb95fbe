"""One answer in LangChain's form: the parts of it as chunks, and all of them as one message. Knows no model."""

from __future__ import annotations

import uuid
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from am_memory.conversations.chat_answer import ChatAnswer, Part
from am_memory.conversations.tool_calls import InvalidCall

PROVIDER = "am_memory"


class Chunks:
    """One answer in LangChain's form."""

    def __init__(self) -> None:
        self.id = f"run-{uuid.uuid4()}"
        self._num_invalid = 0

    def chunk(self, part: Part) -> ChatGenerationChunk:
        if isinstance(part, str):
            return self._chunk(content=part)
        if isinstance(part, InvalidCall):  # LangChain has a place for those
            # With the error first it is no JSON, which LangChain would complete to a call that nobody made.
            args, call_id = f"{part.error}: {part.text}", f"call_{uuid.uuid4().hex[:24]}"
            self._num_invalid += 1
            invalid = tool_call_chunk(name=None, args=args, id=call_id, index=1000 + self._num_invalid)
            return self._chunk(tool_call_chunks=[invalid])
        call = tool_call_chunk(name=part.name, args=part.arguments_json, id=part.id, index=part.index)
        return self._chunk(tool_call_chunks=[call])

    def _chunk(self, **fields: Any) -> ChatGenerationChunk:
        fields.setdefault("content", "")
        message = AIMessageChunk(id=self.id, **fields)
        return ChatGenerationChunk(message=message)

    def last(self, answer: ChatAnswer, model_name: str) -> ChatGenerationChunk:
        """What is said of the answer when it is complete."""
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
                "rebuilt": answer.turn.rebuilt,
                "schema_error": answer.schema_error,
            },
        }
        said = UsageMetadata(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            input_token_details={"cache_read": usage.cached_tokens},
        )
        last = AIMessageChunk(
            content="", id=self.id, response_metadata=metadata, usage_metadata=said, chunk_position="last"
        )
        return ChatGenerationChunk(message=last, generation_info={"finish_reason": answer.finish_reason})


def whole(chunks: list[ChatGenerationChunk]) -> ChatResult:
    """One message of all chunks."""
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    said = merged.message
    assert isinstance(said, AIMessageChunk)
    message = AIMessage(
        content=said.content,
        id=said.id,
        tool_calls=said.tool_calls,
        invalid_tool_calls=said.invalid_tool_calls,
        response_metadata=said.response_metadata,
        usage_metadata=said.usage_metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=merged.generation_info)])
