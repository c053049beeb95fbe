"""The answer of `POST /v1/responses`: its items, its events, and the response itself. Knows no memory and no HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from am_memory.conversations.chat_answer import Part, ToolCall
from am_memory.conversations.reasoning import Reasoning
from am_memory_server.response_schemas import Usage, new_id
from am_memory_server.responses_request import ResponsesRequest

Event = dict[str, Any]
Item = dict[str, Any]


def responses_id() -> str:
    """A new id of a response."""
    return new_id("resp").replace("-", "_")


class ResponsesAnswer:
    """One response as it is made: parts of the answer in, events out.

    Attributes:
        response: the response so far.
    """

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self._num_events = 0
        self._item: Item | None = None  # that is being written
        self.response = _response(body, model)

    @property
    def output(self) -> list[Item]:
        """The finished items."""
        output: list[Item] = self.response["output"]
        return output

    def begin(self) -> Iterator[Event]:
        """The events before the first item."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=dict(self.response, output=[]))

    def add(self, part: Part) -> Iterator[Event]:
        """The events of a part of the answer."""
        if isinstance(part, ToolCall):
            yield from self._end_item()
            yield from self._call(part)
        elif isinstance(part, Reasoning):
            yield from self._text("reasoning", part.text)
        elif isinstance(part, str):
            yield from self._text("message", part)

    def finish(self, finish_reason: str | None, usage: Usage) -> Iterator[Event]:
        """The last events."""
        was_cut = finish_reason == "length"
        yield from self._end_item("incomplete" if was_cut else "completed")
        self.response["status"] = status = "incomplete" if was_cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if was_cut else None
        cached = usage.prompt_tokens_details.cached_tokens
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": usage.prompt_tokens - cached,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        yield self._event(f"response.{status}", response=self.response)

    def failed(self, code: str | None, message: str, param: str | None) -> Event:
        """The event that ends a stream after an error."""
        return self._event("error", code=code, message=message, param=param)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _place(self, item: Item) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.output)}

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        """Text or reasoning: it goes on with the open item, or begins a new one."""
        if self._item is not None and self._item["type"] != kind:
            yield from self._end_item()
        if self._item is None:
            yield from self._begin_item(kind)
        item = self._item
        assert item is not None
        item["content"][0]["text"] += text
        name = "output_text" if kind == "message" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{name}.delta", **self._place(item), content_index=0, delta=text, **more)

    def _begin_item(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._item = {"id": new_id("msg"), "type": kind, "role": "assistant", "status": "in_progress"}
        else:
            part = {"type": "reasoning_text", "text": ""}
            self._item = {"id": new_id("rs"), "type": kind, "summary": [], "status": "in_progress"}
        shown = {**self._item, "content": []}
        yield self._event("response.output_item.added", output_index=len(self.output), item=shown)
        self._item["content"] = [part]
        place = self._place(self._item)
        yield self._event("response.content_part.added", **place, content_index=0, part=dict(part))

    def _end_item(self, status: str = "completed") -> Iterator[Event]:
        item, self._item = self._item, None
        if item is None:
            return
        item["status"] = status
        (part,) = item["content"]
        place = {**self._place(item), "content_index": 0}
        if item["type"] == "message":
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
        else:
            yield self._event("response.reasoning_text.done", **place, text=part["text"])
        yield self._event("response.content_part.done", **place, part=part)
        yield self._done(item)

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = {"id": new_id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        begun, place = {**item, "arguments": "", "status": "in_progress"}, self._place(item)
        arguments = call.arguments_json
        yield self._event("response.output_item.added", output_index=len(self.output), item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, arguments=arguments, name=call.name)
        yield self._done({**item, "arguments": arguments, "status": "completed"})

    def _done(self, item: Item) -> Event:
        event = self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        return event


def _response(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """A response without output yet."""
    tools = [{"description": None, "parameters": None, "strict": None, **tool.model_dump()} for tool in body.tools]
    return {
        "id": responses_id(),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": body.text.format.model_dump(by_alias=True, exclude_unset=True) or {"type": "text"}},
        "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
        "tools": tools,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata,
    }
