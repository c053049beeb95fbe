"""Attention Matching as a memory: the oldest half of a KV cache, compacted in latent space, again and again."""

from importlib import import_module
from typing import TYPE_CHECKING

from am_memory.errors import AMMemoryError

if TYPE_CHECKING:
    from am_memory.memory import Memory
    from am_memory.policy import Experiments, MemoryPolicy
    from am_memory.session.generation import Piece
    from am_memory.session.session import Session
    from am_memory.session.stats import Stats
    from am_memory.text.sampling import Sampling
else:
    _MODULES = {
        "Experiments": "policy",
        "Memory": "memory",
        "MemoryPolicy": "policy",
        "Piece": "session.generation",
        "Sampling": "text.sampling",
        "Session": "session.session",
        "Stats": "session.stats",
    }
    """Modules that import torch, by the public names in them; each is loaded when a name is first used."""

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["AMMemoryError", "Experiments", "Memory", "MemoryPolicy", "Piece", "Sampling", "Session", "Stats"]
