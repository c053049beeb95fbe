"""What one call asks for: its keyword arguments, over what the model was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from am_memory import MemoryPolicy, Sampling
from am_memory.conversations.chat_request import ChatRequest
from am_memory.errors import InvalidInput, require_flags, require_whole, unknown

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


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise InvalidInput for names of arguments that no call takes, and for values that are none of theirs."""
    if wrong := unknown(given, NAMES | OF_LANGCHAIN):
        raise InvalidInput(f"unknown arguments: {wrong}: see ChatAMMemory for what a call takes")
    require_flags(**{name: given.get(name) for name in ("strict", "parallel_tool_calls")})
    require_policy(memory_policy=given.get("memory_policy"))
    if (max_tokens := given.get("max_tokens")) is not None:
        require_whole(1, max_tokens=max_tokens)


def require_policy(**policies: object) -> None:
    """Raise InvalidInput for what is no policy, nor None, which leaves it to the model."""
    for name, policy in policies.items():
        if policy is not None and not isinstance(policy, MemoryPolicy):
            raise InvalidInput(f"{name} is {policy!r}: give a MemoryPolicy, such as MemoryPolicy(trigger_tokens=4096)")


class Call:
    """What one call asks for, beside its messages."""

    def __init__(self, model: ChatAMMemory, kwargs: dict[str, Any], stop: list[str] | None) -> None:
        kwargs = {**model.model_kwargs, **kwargs}
        check_arguments(kwargs)
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


def one_choice(choice: object, tools: list[dict[str, Any]]) -> str | None:
    """The choice in one form: None, "auto", "none", "any", or a tool's name.

    Args:
        choice: one of these, a truth value, or a mapping as the APIs of OpenAI or Anthropic have it.

    Raises:
        InvalidInput: the name of no tool, or none of these forms.
    """
    match choice:
        case None | False:
            return None
        case True | "any" | "required":
            return "any"
        case "auto" | "none":
            return choice
        case {"type": "auto" | "none" | "any" | "required" as kind, **others} if not others:
            return one_choice(kind, tools)
        case (
            str(name)
            | {"type": "function", "function": {"name": str(name)}}
            | {"type": "function" | "tool", "name": str(name)}
        ):
            names = [tool["function"]["name"] for tool in tools]
            if name not in names:
                raise InvalidInput(f"tool_choice {name!r} is none of the tools: {', '.join(names) or 'there are none'}")
            return name
    raise InvalidInput(
        f'tool_choice is {choice!r}: give "auto", "none", "any", the name of a tool, or '
        '{"type": "function", "function": {"name": ...}}'
    )
