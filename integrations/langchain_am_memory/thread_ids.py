"""The thread of a call. LangChain puts it in a different place for each way of calling a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig, ensure_config

THREAD_KEYS = ("thread_id", "session_id")
DEFAULT = "default"


def take_thread(kwargs: dict[str, Any], run_manager: Any) -> str:
    """Take `thread_id` out of a call's arguments and return the thread.

    Without an argument it is the thread of the running graph's config, then of the callbacks' metadata.
    """
    bound = kwargs.pop("thread_id", None)
    if bound is not None:
        return str(bound)
    found = _find(ensure_config().get("configurable")) or _find(getattr(run_manager, "metadata", None))
    return found or DEFAULT


def thread_of(config: RunnableConfig) -> str:
    """The thread that a config names."""
    return _find(config.get("configurable")) or DEFAULT


def _find(values: Mapping[str, Any] | None) -> str | None:
    return next((str(values[name]) for name in THREAD_KEYS if values and values.get(name) is not None), None)


def _with_thread(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the thread of its config."""
    found = _find((config or {}).get("configurable")) if "thread_id" not in kwargs else None
    return kwargs if found is None else {**kwargs, "thread_id": found}


class ThreadedChatModel(BaseChatModel):
    """A chat model whose methods pass the thread of their config on; LangChain's own do so inside a graph only."""

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return super().invoke(input, config, **_with_thread(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **_with_thread(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        yield from super().stream(input, config, **_with_thread(config, kwargs))

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        async for chunk in super().astream(input, config, **_with_thread(config, kwargs)):
            yield chunk

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **_with_thread(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().astream_events(input, config, **_with_thread(config, kwargs))
