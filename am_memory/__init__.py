"""Attention Matching as a memory: the oldest half of a KV cache, compacted in latent space, again and again.

Every public name is here: what users write, whatever their calls return, the events and the errors.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from am_memory.errors import (
    AMMemoryError,
    BudgetTooSmall,
    CompactionFailed,
    CorruptSession,
    EncodingNotFound,
    EngineFailed,
    InvalidInput,
    InvalidPolicy,
    ModelMismatch,
    ModelNotFound,
    NewerFormat,
    OlderFormat,
    OriginalLost,
    PromptTooLong,
    SessionChanged,
    SessionDeleted,
    SessionNotFound,
    StorageError,
    TextNotFound,
    UnsupportedModel,
    UnsupportedOperation,
)
from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionReport,
    CompactionStarted,
    Event,
    GateMissed,
    Listener,
    LittleKept,
    MemoryConsulted,
    OriginalsDropped,
    OriginalsLost,
    OriginUnknown,
    PolicyChange,
    PolicyChanged,
    ReadProgress,
    SearchHeadsProgress,
    SegmentRefined,
    SessionRebuilt,
    Span,
    SpanPutAway,
    SpanRecalled,
    TextMounted,
    TextUnmounted,
    WindowExceeded,
)

if TYPE_CHECKING:
    from am_memory.kv_cache.cache import KVCache
    from am_memory.kv_cache.slots import Segment
    from am_memory.memory import Memory
    from am_memory.policy import Experiments, MemoryPolicy
    from am_memory.recall.paging import Page
    from am_memory.session.generation import Generation, Piece, TokenLogprob
    from am_memory.session.mounts import Mount
    from am_memory.session.progress import ProgressBars
    from am_memory.session.session import Session
    from am_memory.session.stats import Stats
    from am_memory.storage.compact_text import CompactText, TextCache
    from am_memory.storage.session_file import SavedSession
    from am_memory.text.sampling import Sampling
else:
    _MODULES = {
        "CompactText": "storage.compact_text",
        "Experiments": "policy",
        "KVCache": "kv_cache.cache",
        "Memory": "memory",
        "MemoryPolicy": "policy",
        "Mount": "session.mounts",
        "Generation": "session.generation",
        "Piece": "session.generation",
        "ProgressBars": "session.progress",
        "Sampling": "text.sampling",
        "SavedSession": "storage.session_file",
        "Segment": "kv_cache.slots",
        "Session": "session.session",
        "Page": "recall.paging",
        "Stats": "session.stats",
        "TextCache": "storage.compact_text",
        "TokenLogprob": "session.generation",
    }
    """Modules that import torch, by the public names in them; each is loaded when a name is first used."""

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted(__all__)


__all__ = [
    "AMMemoryError",
    "BudgetTooSmall",
    "CompactText",
    "CompactionFailed",
    "CompactionFinished",
    "CompactionProgress",
    "CompactionReport",
    "CompactionStarted",
    "CorruptSession",
    "EncodingNotFound",
    "EngineFailed",
    "Event",
    "Experiments",
    "GateMissed",
    "Generation",
    "InvalidInput",
    "InvalidPolicy",
    "KVCache",
    "Listener",
    "LittleKept",
    "Memory",
    "MemoryConsulted",
    "MemoryPolicy",
    "ModelMismatch",
    "ModelNotFound",
    "Mount",
    "NewerFormat",
    "OlderFormat",
    "OriginUnknown",
    "OriginalLost",
    "OriginalsDropped",
    "OriginalsLost",
    "Page",
    "Piece",
    "PolicyChange",
    "PolicyChanged",
    "ProgressBars",
    "PromptTooLong",
    "ReadProgress",
    "Sampling",
    "SavedSession",
    "SearchHeadsProgress",
    "Segment",
    "SegmentRefined",
    "Session",
    "SessionChanged",
    "SessionDeleted",
    "SessionNotFound",
    "SessionRebuilt",
    "Span",
    "SpanPutAway",
    "SpanRecalled",
    "Stats",
    "StorageError",
    "TextCache",
    "TextMounted",
    "TextNotFound",
    "TextUnmounted",
    "TokenLogprob",
    "UnsupportedModel",
    "UnsupportedOperation",
    "WindowExceeded",
]
