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
    policy: MemoryPolicy | None,
    own_policy: MemoryPolicy,
    *,
    trusts_messages: bool,
) -> Session:
    """A session that goes on where it was saved.

    Args:
        policy: the policy that the caller asked for; None: none.
        own_policy: the session's policy if none was asked for.

    Raises:
        InvalidPolicy: the session cannot go on under `policy`.
        StorageError: it does not fit the model, or cannot go on under its own policy.
    """
    info = shared.engine.info
    check_content(name, saved, info, shared.cache_of_one_token)
    try:
        context = restored(shared, name, saved, policy or own_policy, trusts_messages=trusts_messages)
    except InvalidPolicy as error:
        if policy is not None:
            raise
        raise StorageError(
            f"session {name!r} cannot go on under its policy: {error}; give it another one: "
            f"memory.session({name!r}, policy=...)"
        ) from error
    session = Session(shared, context, has_own_policy=policy is not None or saved.has_own_policy)
    session.metadata, session._saved_copy = saved.metadata, SavedCopy(saved.version)
    if unknown := check_origin(name, saved, info):
        shared.notify(OriginUnknown(name, unknown))
    if policy is None and (changes := changes_of(saved, session.policy)):
        shared.notify(PolicyChanged(name, changes))
    return session
