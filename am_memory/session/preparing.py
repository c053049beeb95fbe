"""What is measured of a model, before anybody waits for it. Knows no session."""

from __future__ import annotations

import logging
import time
from typing import Any

from am_memory.compaction.plan import completed, trigger_in_tokens
from am_memory.policy import MemoryPolicy
from am_memory.queries.measurement import Measurement
from am_memory.queries.query_maps import measured as measured_query_maps
from am_memory.recall.search_heads import measured as measured_search_heads
from am_memory.session.limits import recall_room
from am_memory.session.shared import Shared

logger = logging.getLogger("am_memory")


def prepare(shared: Shared, policy: MemoryPolicy) -> None:
    """Measure what compactions and lookups under a policy need of the model, unless it is known."""
    engine = shared.engine
    room = recall_room(policy, engine, trigger_in_tokens(policy, engine.info.window_tokens), policy.num_sinks)
    needed: list[Measurement[Any]] = [measured_search_heads()] if room else []
    if "predicted" in (completed(policy, engine).reference_queries or ()) and engine.capabilities.can_rotate_keys:
        needed.append(measured_query_maps())
    with shared.engine_lock:
        cache = engine.new_cache()
        cache.restore(shared.cache_of_one_token)
        started, missing = time.monotonic(), [one for one in needed if one.known(engine, cache) is None]
        if missing:
            logger.info("measuring %s, once for each model: it reads some thousand tokens", engine.info.name)
            for one in missing:
                one.of(engine, cache)
            logger.info("measured %s in %.0f s", engine.info.name, time.monotonic() - started)
