"""Chat templates: rendering one without a tokenizer of transformers, and what to say when one does not render."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from am_memory.engines.base import ControlTokens, Message, Tool
from am_memory.errors import InvalidInput


def render_template(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """What transformers' own `apply_chat_template` writes with this template."""
    told = [{key: value for key, value in message.items() if value is not None} for message in messages]
    options: dict[str, Any] = {
        "conversations": [told],
        "tools": [dict(tool) for tool in tools] if tools else None,
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
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
    """What a chat template alone may write.

    Args:
        special: tokens that the tokenizer calls special, by their text.
        added: others that it finds in a text before anything else: some models tell turns apart by such.
        unknown: what the tokenizer gives for text that its vocabulary cannot spell.
        render: by the template.
    """
    special = {text: id for text, id in special.items() if not text.isspace()}  # anybody may write a line's end
    added = {text: id for text, id in added.items() if not text.isspace()}
    chats = list(_rendered_trials(render)) if added else []
    written = {text: id for text, id in added.items() if any(text in shown for shown in [template or "", *chats])}
    # What no trial tells to be within a turn is taken for what begins or ends one.
    turns = {text: id for text, id in written.items() if not chats or any(text in chat for chat in chats)}
    tags = {text: id for text, id in written.items() if text not in turns}
    return ControlTokens({**special, **turns}, tags, unknown)


def _rendered_trials(render: Callable[[Sequence[Message]], str]) -> Iterator[str]:
    """Chats of every role, as far as the template takes them; none ends with an answer, which some begin with a tag."""
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
    """What a template raises, as InvalidInput that says which messages it was given."""
    try:
        yield
    except (TemplateError, TypeError, RecursionError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InvalidInput(
            f"the chat template of {model_name} does not take messages of roles {roles}: {error}; see which "
            "roles, in which order, and what content it takes"
        ) from error
