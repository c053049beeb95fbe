"""Content that is appended to a conversation, as tokens: text, token ids, or chat messages.

`Session.append` is three steps in one call. A scheduler takes them one by one, so that other sessions use the engine
in between: `encode` (tokenise; needs no engine), `add` (short), `read` (a bounded number of tokens each time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from am_memory.engines.base import Message
from am_memory.errors import InvalidInput, InvalidPolicy, PromptTooLong, UnsupportedOperation, require_whole
from am_memory.session import checkpoints
from am_memory.session.chat_history import ChatHistory
from am_memory.session.context import Context
from am_memory.session.limits import require_positions, require_token_ids

if TYPE_CHECKING:
    from am_memory.session.session import Session

Content = str | Sequence[int] | Sequence[Message]

MEDIA_PARTS = ("image", "input_image", "audio", "input_audio", "video", "file", "input_file", "document", "media")
"""Prefixes of the types of message parts that are not text."""


@dataclass(frozen=True)
class Encoded:
    """Content as tokens, ready for `add`. It is valid until the session changes.

    Attributes:
        token_ids: the tokens to append.
        num_pinned: tokens at the start that stay exact from then on; None: as before.
        before: the history and the number of tokens of the session that it was encoded for.
        after: the history once it is added.
    """

    token_ids: list[int]
    num_pinned: int | None
    before: tuple[ChatHistory, int]
    after: ChatHistory


def encode(session: Session, content: Content) -> Encoded:
    """Turn content into tokens; the session stays as it is.

    This takes long for a long text, but it needs no engine: another thread may do it while sessions go on.

    Raises:
        InvalidInput: empty content, content of another kind, or token ids outside the vocabulary.
        PromptTooLong: the model has no positions for so many tokens.
    """
    context, engine = session._context, session.engine
    history, num_tokens = context.history, len(context.tokens)
    after, token_ids = _tokens_of(context, content)
    if not token_ids:
        raise InvalidInput(f"empty input {content!r}: append at least one token")
    require_token_ids(context.engine.info, token_ids)
    require_positions(context.engine.info, num_tokens + len(token_ids))
    if after is history and history.messages:
        after = history.with_plain_text(engine.decode(token_ids, skip_special=True), num_tokens)
    return Encoded(token_ids, _num_pinned(context, after), (history, num_tokens), after)


def add(session: Session, encoded: Encoded) -> int:
    """Add encoded content to the conversation; nothing is read yet.

    Returns:
        The number of tokens added.

    Raises:
        PromptTooLong: the policy's pinned tokens leave no room below its trigger.
        UnsupportedOperation: the session has changed since the content was encoded.
    """
    with session._shared.engine_lock, session._context.transaction():
        return extend(session._context, encoded)


def set_template_options(session: Session, options: Mapping[str, object]) -> None:
    """Give the chat template these variables for what is added and answered from now on."""
    context = session._context
    context.history = replace(context.history, options=options)


def begin_answer(session: Session, text: str) -> None:
    """Add the tokens that open the model's answer, and its first words; nothing is read yet.

    Raises:
        InvalidInput: the last answer is complete, and no message has been appended since.
    """
    context, engine = session._context, session.engine
    with session._shared.engine_lock, context.transaction():
        history, opening = context.history.with_answer_begun(engine, len(context.tokens), ends_turn=ends_turn(context))
        token_ids = [*opening, *engine.encode(text)]
        require_positions(engine.info, len(context.tokens) + len(token_ids))
        context.history = history.with_answer_text(text)
        context.tokens.extend(token_ids)


def is_answering(session: Session) -> bool:
    """Whether the last message is an answer that was cut: generating goes on from its last word."""
    return session._context.history.is_answering and not ends_turn(session._context)


def read(session: Session, max_tokens: int | None = None) -> int:
    """Read tokens that were added, oldest first, and compact on the way.

    The last token of the conversation is left for `generate`, and is not counted.

    Args:
        max_tokens: read no more than this; None: one chunk, which is one forward pass, or a part of one while answers
            are generated together.

    Returns:
        The number of tokens still to be read.

    Raises:
        InvalidInput: `max_tokens` is no whole number, or below 0.
        CompactionFailed: a compaction on the way failed; nothing of this call was read.
    """
    if max_tokens is not None:
        require_whole(0, max_tokens=max_tokens)
    context = session._context
    with session._shared.engine_lock, context.transaction():
        end, num_cached = context.num_readable, context.cache.num_tokens
        if max_tokens is None:
            max_tokens = session._shared.pass_tokens(context.chunk_tokens)
        context.read(min(end, num_cached + max_tokens))
        return max(end - context.cache.num_tokens, 0)


def extend(context: Context, encoded: Encoded) -> int:
    """`add`, inside a step of the session that holds the engine."""
    if encoded.before != (context.history, len(context.tokens)):
        raise UnsupportedOperation(
            f"session {context.name!r} changed since this was encoded: encode it again, or fork the session"
        )
    context.history = encoded.after
    if encoded.num_pinned not in (None, context.num_pinned):
        _pin(context, encoded.num_pinned)
    checkpoints.keep(context)
    context.tokens.extend(encoded.token_ids)
    return len(encoded.token_ids)


def ends_turn(context: Context) -> bool:
    """Whether the last token is one with which the model ends its turn."""
    return bool(context.tokens) and context.tokens[-1] in context.engine.info.eos_token_ids


def checked_token_ids(given: Sequence[Any]) -> list[Any]:
    """Token ids as a list. Booleans are refused here, because Python takes them for 1 and 0.

    Raises:
        InvalidInput: one of them is a boolean.
    """
    for position, token_id in enumerate(given):
        if isinstance(token_id, bool):
            raise InvalidInput(f"{token_id} at position {position} is not a token id: give whole numbers, or text")
    return list(given)


def _tokens_of(context: Context, content: Content) -> tuple[ChatHistory, list[int]]:
    """The history once the content is added, and the tokens that it adds."""
    history, num_tokens = context.history, len(context.tokens)
    if isinstance(content, str):
        return history, context.engine.encode(content, add_special=not num_tokens) if content else []
    token_ids, messages = ids_or_messages(content)
    if not messages:
        return history, token_ids
    return history.with_messages(context.engine, messages, num_tokens, ends_turn=ends_turn(context))


def ids_or_messages(content: Sequence[int] | Sequence[Message]) -> tuple[list[int], Sequence[Message]]:
    """Content that is no text, as token ids or as chat messages; one of the two is empty.

    Raises:
        InvalidInput: it is neither, or both are mixed, or a message holds a part that is not text.
    """
    if not isinstance(content, Sequence):
        raise InvalidInput(
            f"{type(content).__name__} cannot be read: give text, or a list of token ids or chat messages"
        )
    if all(isinstance(item, int) for item in content):
        return checked_token_ids(content), ()
    if any(isinstance(item, int) for item in content):
        raise InvalidInput("token ids and messages are mixed: append them one after the other")
    messages: Sequence[Message] = content  # type: ignore[assignment]
    _require_text(messages)
    return [], messages


def _require_text(messages: Sequence[Message]) -> None:
    """Raise InvalidInput for parts that are not text: a chat template would write a mere placeholder for them."""
    for message in messages:
        parts = message.get("content") if isinstance(message, Mapping) else None
        for part in parts if isinstance(parts, list | tuple) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind.startswith(MEDIA_PARTS):
                raise InvalidInput(
                    f"a message holds a part of type {kind!r}, but a memory holds only text: describe it in words"
                )


def _num_pinned(context: Context, history: ChatHistory) -> int | None:
    """How many tokens at the start stay exact; None after the first compaction, which has settled it."""
    if context.records:
        return None
    policy = context.policy
    if policy.pinned in ("system", "first_message"):
        return history.num_pinned_tokens(context.engine, policy.pinned) or policy.num_sinks
    return policy.num_sinks


def _pin(context: Context, num_pinned: int) -> None:
    try:
        context.pin(num_pinned)
    except InvalidPolicy as error:
        raise PromptTooLong(
            f"the first {num_pinned} tokens are to stay exact (pinned={context.policy.pinned!r}), and no compaction "
            f"can make room beside them: raise trigger_tokens from {context.trigger_tokens}, or pin less ({error})"
        ) from error
