"""A saved session becomes a session of a memory again, under its own policy or another one."""

from __future__ import annotations

from am_memory.errors import InvalidPolicy, StorageError
from am_memory.events import OriginUnknown, PolicyChanged
from am_memory.policy import MemoryPolicy
from am_memory.session.resuming import changes_of, check_content, check_origin
from am_memory.session.saving import SavedCopy, restored
from am_memory.session.session import Session
from am_memory.session.shared import Shared
from am_memory.storage.session_file import SavedSession


def reopened(
    shared: Shared,
    name: str,
    saved: SavedSession,
    policy: MemoryPolicy,
    *,
    is_given: bool,
    trusts_messages: bool,
) -> Session:
    """A session that goes on where it was saved.

    Args:
        policy: the session's policy from now on.
        is_given: the caller has asked for this policy.

    Raises:
        InvalidPolicy: the session cannot go on under the policy that the caller has asked for.
        StorageError: it does not fit the model, or cannot go on under its own policy.
    """
    info = shared.engine.info
    check_content(name, saved, info, shared.cache_of_one_token)
    try:
        context = restored(shared, name, saved, policy, trusts_messages=trusts_messages)
    except InvalidPolicy as error:
        if is_given:
            raise
        raise StorageError(
            f"session {name!r} cannot go on under its policy: {error}; give it another one: "
            f"memory.session({name!r}, policy=...)"
        ) from error
    session = Session(shared, context, has_own_policy=is_given or saved.has_own_policy)
    session.metadata, session._saved_copy = saved.metadata, SavedCopy(saved.version)
    if unknown := check_origin(name, saved, info):
        shared.notify(OriginUnknown(name, unknown))
    if not is_given and (changes := changes_of(saved, session.policy)):
        shared.notify(PolicyChanged(name, changes))
    return session
