"""Chat templates: rendering without a transformers tokenizer, their control tokens, and errors if one fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from am_memory.engines.base import ControlTokens, Message, Tool
from am_memory.errors import InvalidInput

RESERVED = frozenset(
    {
        "messages",
        *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
        *inspect.signature(render_jinja_template).parameters,
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    }
)
"""Names that a render has itself: as variables of a template they would change more than the template's text."""


def is_template_option(name: str) -> bool:
    """Whether a caller may set a variable of this name for a chat template."""
    return name.isidentifier() and not name.startswith("_") and name not in RESERVED


def render_template(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    template_options: Mapping[str, object],
) -> str:
    """The text that transformers' `apply_chat_template` gives for this template."""
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    options: dict[str, Any] = {
        "conversations": [chat],
        "tools": [dict(tool) for tool in tools] if tools else None,
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
        **template_options,
    }
    rendered, _ = cast("tuple[list[str], object]", render_jinja_template(**options))
    return rendered[0]


def control_tokens(
    template: str | None,
    special: Mapping[str, int],
    added: Mapping[str, int],
    unknown: int | None,
    render: Callable[[Sequence[Message]], str],
) -> ControlTokens:
    """The tokens that only the chat template may write.

    Args:
        special: the tokenizer's special tokens, by their text.
        added: its other added tokens, which it finds before it splits a text; some models mark turns with them.
        unknown: the token for text that the vocabulary cannot spell.
        render: renders messages with the template.
    """
    special = {text: id for text, id in special.items() if not text.isspace()}  # messages may have line ends
    added = {text: id for text, id in added.items() if not text.isspace()}
    chats = list(_rendered_trials(render)) if added else []
    written = {text: id for text, id in added.items() if any(text in shown for shown in [template or "", *chats])}
    # A token counts as one that begins or ends a turn, unless a trial shows that it stands within one.
    turns = {text: id for text, id in written.items() if not chats or any(text in chat for chat in chats)}
    tags = {text: id for text, id in written.items() if text not in turns}
    return ControlTokens({**special, **turns}, tags, unknown)


def _rendered_trials(render: Callable[[Sequence[Message]], str]) -> Iterator[str]:
    """Chats of all roles that the template takes. None ends with an answer, as some templates put a tag there."""
    for roles in (
        "user",
        "system user",
        "user assistant user",
        "system user assistant user",
        "user assistant tool user",
    ):
        with suppress(InvalidInput):
            yield render([{"role": role, "content": "0", "tool_call_id": "000000000"} for role in roles.split()])


@contextmanager
def template_errors(model_name: str, messages: Sequence[Message]) -> Iterator[None]:
    """Raise the errors of a template as InvalidInput, with the roles of the messages."""
    try:
        yield
    except (TemplateError, TypeError, RecursionError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InvalidInput(
            f"the chat template of {model_name} does not take messages of roles {roles}: {error}; look up which "
            "roles, in which order, and which content it takes"
        ) from error
