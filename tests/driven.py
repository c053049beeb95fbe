"""Contexts driven by tokens, as sessions drive theirs, and sessions token by token."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from inside import context_of
from torch import Tensor

from am_memory import Memory
from am_memory.session.context import Context
from am_memory.session.limits import require_token_ids


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def another_process(engine: Any, fingerprint: str = "a model") -> Any:
    """The engine in another process, as it were; of a model that nobody has measured."""
    twin = copy.copy(engine)
    twin.info = replace(engine.info, fingerprint=fingerprint)
    return twin


def read(context: Context, token_ids: list[int]) -> None:
    """What `Session.append` does."""
    with context.transaction():
        require_token_ids(context.engine.info, token_ids)
        context.tokens.extend(token_ids)
        context.read_all()


def write(context: Context, count: int) -> None:
    """What `Session.generate` does, greedily."""
    for _ in range(count):
        with context.transaction():
            context.tokens.append(int(context.next_logits().argmax()))


def logits_in_turn(memory: Memory, token_ids: Sequence[int], least_compactions: int) -> Tensor:
    """Logits at each token, told one by one to one of two sessions in turn; both are compacted on the way."""
    sessions = [memory.session() for _ in range(2)]
    rows = []
    for number, token in enumerate(token_ids):
        session = sessions[number % 2]
        session.append([token])
        rows.append(context_of(session).next_logits())
    assert all(session.stats.num_compactions >= least_compactions for session in sessions)
    return torch.stack(rows).cpu()
