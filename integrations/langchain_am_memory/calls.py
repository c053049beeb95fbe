"""What one call asks for: its keyword arguments, over what the model was made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from am_memory import MemoryPolicy, Sampling
from am_memory.chat import ChatRequest
from am_memory.errors import InvalidInput, require_whole, unknown

if TYPE_CHECKING:
    from langchain_am_memory.chat_models import ChatAMMemory


NAMES = frozenset(
    {
        *("model", "memory_policy", "tools", "tool_choice", "parallel_tool_calls", "strict", "max_tokens"),
        *("response_format", *Sampling.model_fields),
    }
)
"""Of what a call takes."""
OF_LANGCHAIN = frozenset({"thread_id", "stream", "ls_structured_output_format", "structured_output_format"})
"""What LangChain and we take out of a call's arguments before it comes to be made."""


def check_names(given: Iterable[str]) -> None:
    """Raise InvalidInput for names of arguments that no call takes."""
    if wrong := unknown(given, NAMES | OF_LANGCHAIN):
        raise InvalidInput(f"unknown arguments: {wrong}: see ChatAMMemory for what a call takes")


class Call:
    """What one call asks for, beside its messages."""

    def __init__(self, model: ChatAMMemory, kwargs: dict[str, Any], stop: list[str] | None) -> None:
        kwargs = {**model.model_kwargs, **kwargs}
        check_names(kwargs)
        override = kwargs.pop("model", None)
        self.policy: MemoryPolicy = kwargs.pop("memory_policy", None) or model._memory_policy()
        self.model_name = str(override or model._model_name)
        self.threads = model.threads(override)
        self.tools: list[dict[str, Any]] = openai_tools(kwargs.pop("tools", None), strict=kwargs.pop("strict", None))
        self.parallel_calls: bool | None = kwargs.pop("parallel_tool_calls", None)
        choice = one_choice(kwargs.pop("tool_choice", None), self.tools)
        self.tool_choice: str | None = "required" if choice == "any" else choice
        max_tokens = kwargs.pop("max_tokens", None)
        self.max_tokens: int = model.max_tokens if max_tokens is None else max_tokens
        require_whole(1, max_tokens=self.max_tokens)
        self.response_format = kwargs.pop("response_format", None)
        self.sampling = self._sampling(model, kwargs, stop)

    def _sampling(self, model: ChatAMMemory, kwargs: dict[str, Any], stop: list[str] | None) -> Sampling:
        own = {name: getattr(model, name) for name in Sampling.model_fields}
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        values = {name: value for name, value in {**own, **asked}.items() if value is not None}
        if stop not in (None, []):
            values["stop"] = stop
        return Sampling(**{**self.threads.memory.sampling.model_dump(), **values})

    def request(self, messages: list[dict[str, Any]], thread: str) -> ChatRequest:
        return ChatRequest(
            messages,
            tools=self.tools,
            tool_choice=self.tool_choice,
            response_format=self.response_format,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            parallel_calls=self.parallel_calls,
            thread=thread,
            policy=self.policy,
        )


def openai_tools(tools: Sequence[Any] | None, *, strict: bool | None = None) -> list[dict[str, Any]]:
    """The tools as OpenAI's API has them.

    Args:
        strict: all of them, or none; None: each as it says itself.
    """
    converted = [convert_to_openai_tool(tool) for tool in tools or ()]
    if strict is None:
        return converted
    return [{**tool, "function": {**tool["function"], "strict": strict}} for tool in converted]


def one_choice(choice: dict[str, Any] | str | bool | None, tools: list[dict[str, Any]]) -> Any:
    """The choice in one form: None, "auto", "none", "any", or a tool's name.

    Raises:
        InvalidInput: the name of no tool.
    """
    if choice in (None, False, "auto", "none"):
        return choice or None
    if choice in ("any", "required", True):
        return "any"
    name = _name(choice)
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise InvalidInput(f"tool_choice {name!r} is none of the tools: {', '.join(names) or 'there are none'}")
    return name


def _name(choice: Any) -> str:
    return str(choice["function"]["name"] if isinstance(choice, dict) else choice)
