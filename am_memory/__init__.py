"""Attention Matching as a memory: the oldest half of a KV cache, compacted in latent space, again and again."""

from am_memory.errors import AMMemoryError
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.session.session import Piece, Session, Stats
from am_memory.text.sampling import Sampling

__all__ = ["AMMemoryError", "Memory", "MemoryPolicy", "Piece", "Sampling", "Session", "Stats"]
