"""The options of one call: its keyword arguments over the defaults of the model. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from am_memory import MemoryPolicy, Sampling
from am_memory.conversations.chat_request import ChatRequest
from am_memory.errors import InvalidInput, require_flags, require_whole, unknown

ARGUMENTS = frozenset(
    {
        *("model", "memory_policy", "tools", "tool_choice", "parallel_tool_calls", "strict", "max_tokens"),
        *("response_format", "mounts", *Sampling.model_fields),
    }
)
"""Arguments that a call takes."""
TAKEN_BEFORE = frozenset({"thread_id", "stream", "ls_structured_output_format", "structured_output_format"})
"""Arguments that LangChain or `take_thread` removes before the options are made."""


@dataclass(frozen=True)
class CallOptions:
    """The options of one call.

    Attributes:
        model: another model than the chat model's own; None: its own.
        tools: as OpenAI's API has them.
        tool_choice: as `ChatRequest` has it.
        response_format: as OpenAI's API has it.
        mounts: names of compact texts that the conversation begins with.
    """

    policy: MemoryPolicy
    sampling: Sampling
    max_tokens: int
    tools: list[dict[str, Any]]
    tool_choice: str | None = None
    parallel_calls: bool | None = None
    response_format: Any = None
    model: str | None = None
    mounts: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any], *, policy: MemoryPolicy, sampling: Sampling, max_tokens: int) -> CallOptions:
        """The options in a call's arguments.

        Args:
            given: keyword arguments, checked by `check_arguments`.
            policy, sampling, max_tokens: the defaults.

        Raises:
            InvalidInput: a tool choice that names no tool, or a value out of its range.
        """
        tools = openai_tools(given.get("tools"), strict=given.get("strict"))
        choice = one_choice(given.get("tool_choice"), tools)
        max_tokens = max_tokens if given.get("max_tokens") is None else given["max_tokens"]
        require_whole(1, max_tokens=max_tokens)
        asked = {name: given[name] for name in Sampling.model_fields if given.get(name) is not None}
        return cls(
            policy=given.get("memory_policy") or policy,
            sampling=Sampling(**{**sampling.model_dump(), **asked}),
            max_tokens=max_tokens,
            tools=tools,
            tool_choice="required" if choice == "any" else choice,
            parallel_calls=given.get("parallel_tool_calls"),
            response_format=given.get("response_format"),
            model=given.get("model"),
            mounts=tuple(given.get("mounts") or ()),
        )

    def request(self, messages: list[dict[str, Any]], thread: str) -> ChatRequest:
        """The request for an answer to these messages."""
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
            mounts=self.mounts,
        )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise InvalidInput for an argument that no call takes, or for a value of the wrong type."""
    if wrong := unknown(given, ARGUMENTS | TAKEN_BEFORE):
        raise InvalidInput(f"unknown arguments: {wrong}: see ChatAMMemory for what a call takes")
    require_flags(**{name: given.get(name) for name in ("strict", "parallel_tool_calls")})
    require_policy(memory_policy=given.get("memory_policy"))
    if (max_tokens := given.get("max_tokens")) is not None:
        require_whole(1, max_tokens=max_tokens)
    mounts = given.get("mounts") or ()
    is_list = isinstance(mounts, Sequence) and not isinstance(mounts, str)
    if not (is_list and all(isinstance(name, str) for name in mounts)):
        raise InvalidInput(f"mounts is {mounts!r}: give a list of names of compact texts")


def require_policy(**policies: object) -> None:
    """Raise InvalidInput for a value that is neither a policy nor None."""
    for name, policy in policies.items():
        if policy is not None and not isinstance(policy, MemoryPolicy):
            raise InvalidInput(f"{name} is {policy!r}: give a MemoryPolicy, such as MemoryPolicy(trigger_tokens=4096)")


def openai_tools(tools: Sequence[Any] | None, *, strict: bool | None = None) -> list[dict[str, Any]]:
    """The tools as OpenAI's API has them.

    Args:
        strict: for all of them; None: each tool says it itself.
    """
    converted = [convert_to_openai_tool(tool) for tool in tools or ()]
    if strict is None:
        return converted
    return [{**tool, "function": {**tool["function"], "strict": strict}} for tool in converted]


def one_choice(choice: object, tools: list[dict[str, Any]]) -> str | None:
    """The tool choice in one form: None, "auto", "none", "any", or a tool's name.

    Args:
        choice: one of these, True, False, or a mapping as in the APIs of OpenAI and Anthropic.

    Raises:
        InvalidInput: an unknown form, or a name that none of the tools has.
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
