"""The request of one call of a chat API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from am_memory.engines.base import Message, Tool
from am_memory.policy import MemoryPolicy
from am_memory.text.sampling import Sampling

MAX_TOKENS = 512


@dataclass(frozen=True)
class ChatRequest:
    """A conversation, and how the model is to answer it.

    Attributes:
        messages: the whole conversation, as OpenAI's API has it.
        tools: functions that the model may call. A tool that is `strict`, as in OpenAI's API, gets arguments that
            follow its schema at every call.
        tool_choice: None or "auto" lets the model choose, "none" forbids calls, "required" forces a call, and a tool's
            name forces a call of that tool. Constrained decoding guarantees a forced call.
        response_format: as in OpenAI's API. Constrained decoding guarantees JSON.
        max_tokens: the longest answer.
        sampling: None: the memory's.
        top_logprobs: how many likely tokens to report beside each generated token; None: no log probabilities.
        parallel_calls: True: a forced answer may hold several calls. False: no answer holds more than one. None: only a
            forced answer is limited to one.
        text_of_invalid_calls: add calls that cannot be parsed to the answer's text.
        num_answers: so many answers are generated together. The conversation keeps the first one.
        thread: the name under which the conversation is saved, evicted and deleted, and which its events carry.
        owner: two owners share no cache, even for the same messages.
        policy: None: the memory's.
        mounts: names of compact texts that the conversation begins with. With other ones, it is another conversation.
        template_options: variables of the chat template, such as `enable_thinking`.
        continues_last: the last message is the beginning of the answer, and the model goes on from its last word.
        reasoning: where the `<think>...</think>` goes with which an answer opens. "text": it is text like the rest.
            "keep": the answer has it as `Reasoning`, and the memory keeps it. "drop": the memory forgets it once the
            answer is complete, unless the answer calls tools or a compaction has reached it.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    tool_choice: str | None = None
    response_format: Mapping[str, object] | None = None
    max_tokens: int = MAX_TOKENS
    sampling: Sampling | None = None
    top_logprobs: int | None = None
    parallel_calls: bool | None = None
    text_of_invalid_calls: bool = False
    num_answers: int = 1
    thread: str = "default"
    owner: str = ""
    policy: MemoryPolicy | None = None
    mounts: Sequence[str] = ()
    template_options: Mapping[str, object] = field(default_factory=dict)
    continues_last: bool = False
    reasoning: Literal["text", "keep", "drop"] = "text"

    @property
    def forces_call(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.tool_choice not in (None, "auto", "none")
