"""What a policy asks of an engine and its caches, refused where it cannot be had."""

from __future__ import annotations

from am_memory.engines.base import ModelInfo, SessionCache
from am_memory.errors import InvalidPolicy
from am_memory.kv_cache.cache import KVCache
from am_memory.policy import MemoryPolicy


def require(policy: MemoryPolicy, info: ModelInfo, cache: SessionCache) -> None:
    """Check a policy against a model and the kind of cache that holds what it reads.

    Raises:
        InvalidPolicy: it asks for what they cannot do.
    """
    is_ours = isinstance(cache, KVCache)
    if policy.head_budget not in ("auto", "uniform") and not cache.has_ragged_heads:
        raise InvalidPolicy(
            f"head_budget {policy.head_budget!r} needs a cache whose heads can differ in their slots; this engine's "
            "heads share every cell: leave it at 'auto'"
        )
    if policy.originals != "drop" and not is_ours:
        raise InvalidPolicy(
            f"originals {policy.originals!r} needs a cache that exact entries can come back into; this engine's cells "
            "are shared by all heads: leave it at 'drop'"
        )
    if policy.segment_dtype != "model" and not is_ours:
        raise InvalidPolicy(
            f"segment_dtype {policy.segment_dtype!r} is for engine='transformers'; this engine keeps all cells in one "
            "type: leave it at 'model', and give the engine kv_type='q8_0'"
        )
    if policy.experiments.on_policy and not is_ours:
        raise InvalidPolicy(
            "experiments.on_policy needs a cache whose layers can be compacted one by one in the midst of a pass, "
            "which is engine='transformers': leave it at False"
        )
    if policy.experiments.summary_tokens is not None and info.immovable is not None:
        raise InvalidPolicy(
            f"experiments.summary_tokens {policy.experiments.summary_tokens} needs keys that can be moved to where "
            f"the block stood: {info.immovable}; leave it at None"
        )
    if policy.ahead_tokens and not (info.is_reentrant and is_ours):
        raise InvalidPolicy(
            f"ahead_tokens {policy.ahead_tokens} needs an engine that reads into two caches at once, which is "
            "engine='transformers': leave it at 0"
        )
