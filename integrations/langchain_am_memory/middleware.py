"""The memory of an agent, for the agent: a policy of its own, figures in its state, events in its stream, a tool.

None of this is needed to remember: `ChatAMMemory` does that by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.agents.middleware.types import ExtendedModelResponse
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, tool
from langgraph.config import get_stream_writer
from langgraph.types import Command
from typing_extensions import NotRequired

from am_memory import MemoryPolicy
from am_memory.errors import CompactionFailed, InvalidInput, SessionChanged, SessionDeleted, require_flags, unknown
from langchain_am_memory.call_options import require_policy
from langchain_am_memory.chat_models import ChatAMMemory
from langchain_am_memory.compactions import listener
from langchain_am_memory.thread_ids import take_thread, thread_of

logger = logging.getLogger("am_memory.langchain")

Response = ModelResponse[Any] | AIMessage | ExtendedModelResponse[Any]


class MemoryState(AgentState[Any]):
    """The agent's state, with the figures of its memory after the last answer."""

    am_memory: NotRequired[dict[str, Any]]


class AMMemoryMiddleware(AgentMiddleware[MemoryState, Any, Any]):
    """Shows an agent its memory, and gives its conversations a policy of their own.

    The state gets `am_memory`: tokens of the conversation and of the cache, bytes, compactions, and what the last
    answer looked up. A stream in mode "custom" gets {"type": "am_memory.compaction", "event": "started" | "progress" |
    "finished", ...}, and {"type": "am_memory.lookup", "spans": [{"start", "end", "score", "text"}, ...], ...}.

    Args:
        policy: for this agent's conversations; None: the model's.
        compact_tool: give the agent a tool, `compact_memory`, that compacts its own memory.
        name: a name under which it replaces another middleware, such as "SummarizationMiddleware" of deep agents.

    Raises:
        InvalidInput: an unknown argument, or a value of the wrong type.
    """

    state_schema = MemoryState

    def __init__(
        self,
        *,
        policy: MemoryPolicy | None = None,
        compact_tool: bool = False,
        name: str = "AMMemoryMiddleware",
        **others: Any,
    ) -> None:
        super().__init__()
        if wrong := unknown(others, ("policy", "compact_tool", "name")):
            raise InvalidInput(f"AMMemoryMiddleware takes no {wrong}")
        require_flags(compact_tool=compact_tool)
        require_policy(policy=policy)
        self.policy = policy
        self.tools: list[BaseTool] = [self._compact_tool()] if compact_tool else []
        self._name = name
        self._model: ChatAMMemory | None = None
        self._has_warned = False

    def __repr__(self) -> str:
        policy = "the model's policy" if self.policy is None else repr(self.policy)
        return f"AMMemoryMiddleware({policy}{', compact_memory' if self.tools else ''})"

    @property
    def name(self) -> str:
        return self._name

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> Response:
        model = self._prepare(request)
        with self._streaming(model):
            return self._with_figures(handler(self._with_policy(request)))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> Response:
        model = self._prepare(request)
        await asyncio.to_thread(lambda: model.memory)  # the first call loads the model
        with self._streaming(model):
            return self._with_figures(await handler(self._with_policy(request)))

    def _prepare(self, request: ModelRequest[Any]) -> ChatAMMemory:
        model = request.model
        if not isinstance(model, ChatAMMemory):
            raise InvalidInput(
                f"AMMemoryMiddleware is for ChatAMMemory, not {type(model).__name__}: give the agent one"
            )
        self._model = model
        self._warn_of_rewritten_history(request)
        return model

    def _with_policy(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if self.policy is None:
            return request
        return request.override(model_settings={**request.model_settings, "memory_policy": self.policy})

    def _warn_of_rewritten_history(self, request: ModelRequest[Any]) -> None:
        history: list[BaseMessage] = list(request.state["messages"])
        is_summarised = any(message.additional_kwargs.get("lc_source") == "summarization" for message in history)
        is_edited = [message.content for message in history] != [message.content for message in request.messages]
        if (is_summarised or is_edited) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: the cache of the old messages is useless now; leave the history to ChatAMMemory, and remove the "
                "summarising or context-editing middleware",
                "a summary replaces messages" if is_summarised else "messages are edited before the call",
            )

    @staticmethod
    def _with_figures(response: ModelResponse[Any]) -> Response:
        answers = [message for message in response.result if isinstance(message, AIMessage)]
        figures = answers[-1].response_metadata.get("am_memory") if answers else None
        if figures is None:
            return response
        return ExtendedModelResponse(response, Command(update={"am_memory": figures}))

    @contextmanager
    def _streaming(self, model: ChatAMMemory) -> Iterator[None]:
        """Write this thread's compactions and lookups to the agent's stream."""
        try:
            write = get_stream_writer()
        except RuntimeError:  # outside of a graph
            yield
            return
        with model.memory.listening(listener(take_thread({}, None), write)):
            yield

    def _compact_tool(self) -> BaseTool:
        @tool
        def compact_memory(config: RunnableConfig) -> str:
            """Compact the older part of the conversation's memory now, before a long piece of work."""
            return self._compact(thread_of(config))

        return compact_memory

    def _compact(self, thread: str) -> str:
        """Compact the branch of a thread that was used last, and report it to the agent."""
        branches = self._model.threads().branches(thread) if self._model is not None else []
        if self._model is None or not branches:
            return "There is nothing in memory yet."
        session = branches[-1].session
        try:
            report = session.compact()
        except CompactionFailed as error:
            return f"Nothing was compacted: {error}"
        if self._model.memory.store is not None:
            with suppress(SessionChanged, SessionDeleted):  # the saved one says the same, or is to stay deleted
                session.save()
        return f"Compacted {report.end - report.start} tokens; the cache is now {report.kv_tokens_after:.0f} tokens."
