"""How long a generation pauses where it goes past a compaction, waited for or made beside decoding; for speed.py.

Wall time, as what another thread does would count as CPU time. Nothing waits for the device but what takes a token from
it: it would wait for a compaction in another stream, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from am_memory import Memory, MemoryPolicy


def pauses(
    memory: Memory, ids: Sequence[int], trigger_tokens: int, ahead_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Medians of what `generating` says, for a compaction that is begun at the trigger and for one that is earlier."""
    changes = {"trigger_tokens": trigger_tokens, "max_compact_tokens": None}
    policies = [memory.policy.model_copy(update={**changes, "ahead_tokens": each}) for each in (0, ahead_tokens)]
    first, last = trigger_tokens - ahead_tokens - 4, trigger_tokens + 4
    rounds = [[generating(memory, policy, ids[:first], last) for policy in policies] for _ in range(repeats + 1)]
    waited, early = (
        [statistics.median(of) for of in zip(*each, strict=True)] for each in zip(*rounds[1:], strict=True)
    )
    return {"at the trigger": waited, f"{ahead_tokens:,} tokens before": early}


def generating(memory: Memory, policy: MemoryPolicy, ids: Sequence[int], last: int) -> tuple[float, float, float]:
    """Seconds of the longest, of the median and of all tokens that are generated behind some, up to `last` of both."""
    session, times = memory.scratch(policy=policy), []
    session.append(ids)
    for _ in range(len(ids), last):
        started = time.perf_counter()
        list(session.generate(1))
        times.append(time.perf_counter() - started)
    assert session.stats.num_compactions == 1
    return max(times), statistics.median(times), sum(times)
