"""The ways to hold a conversation that a comparison puts side by side. Each gives a session to ask.

The memory's own policies, and what users would do without it: keep everything, evict, keep a window, let the model
write summaries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from am_memory.cli.comparison.material import READ, Turn
from am_memory.cli.questions import GREEDY, PLAIN
from am_memory.engines.base import Message
from am_memory.memory import Memory
from am_memory.policy import Experiments, MemoryPolicy
from am_memory.session.session import Session

FULL, OURS, WINDOW, SUMMARY = "full cache", "am-memory", "sliding window", "summary"
ABLATIONS: Mapping[str, Mapping[str, object]] = {
    "recall alone": {"experiments": Experiments(fit="no_slots")},
    "eviction": {"experiments": Experiments(fit="nothing"), "recall_tokens": 0},
}
"""The memory's policy with one part taken away: no slots but recall, or slots with nothing fitted and no recall."""
SUMMARY_REQUEST = "Sum up our conversation so far, with every name and every number, as briefly as you can."
LEAST_SUMMARY_TOKENS = 32

OnTurn = Callable[[int, int], None]
"""Called with the turns read so far, and the number of all turns."""


@dataclass(frozen=True)
class Held:
    """A conversation that was read.

    Attributes:
        seconds: wall time of reading, compacting and summarising.
    """

    name: str
    session: Session
    seconds: float


def held_in_all_ways(
    memory: Memory, turns: Sequence[Turn], policies: Mapping[str, MemoryPolicy], on_turn: Callable[[str], OnTurn]
) -> Iterator[Held]:
    """Read the turns once for each way: the full cache first, then the first policy, whose size the window has.

    Args:
        policies: by the name of the row; eviction and the summary follow the first one.
        on_turn: gives what is called while a row of that name is read.
    """
    started = time.perf_counter()
    full = read(memory, turns, PLAIN, on_turn(FULL))
    yield Held(FULL, full, time.perf_counter() - started)
    own = next(iter(policies.values()))
    ablations = {name: own.with_changes(**changes) for name, changes in ABLATIONS.items()}
    sizes: list[int] = []
    for name, policy in {**policies, **ablations}.items():
        started = time.perf_counter()
        session = read(memory, turns, policy, on_turn(name))
        sizes.append(round(session.stats.kv_tokens))
        yield Held(name, session, time.perf_counter() - started)
    started = time.perf_counter()
    cut = last_tokens(memory, full, sizes[0])
    yield Held(WINDOW, cut, time.perf_counter() - started)
    started = time.perf_counter()
    summed_up = summarised(memory, turns, own, on_turn(SUMMARY))
    yield Held(SUMMARY, summed_up, time.perf_counter() - started)


def read(memory: Memory, turns: Sequence[Turn], policy: MemoryPolicy, on_turn: OnTurn) -> Session:
    """A session that has read all turns under a policy."""
    session = memory.scratch(policy=policy)
    for number, turn in enumerate(turns, 1):
        session.append(list(turn))
        on_turn(number, len(turns))
    return session


def last_tokens(memory: Memory, full: Session, num_tokens: int) -> Session:
    """The attention sinks and the last tokens of the full session, read again."""
    session, num_recent = memory.scratch(policy=PLAIN), max(num_tokens - PLAIN.num_sinks, 1)
    session.append([*full.tokens[: PLAIN.num_sinks], *full.tokens[PLAIN.num_sinks :][-num_recent:]])
    return session


def summarised(memory: Memory, turns: Sequence[Turn], policy: MemoryPolicy, on_turn: OnTurn) -> Session:
    """Whenever the trigger is passed, the model's own summary takes the place of the oldest half of the messages."""
    session, trigger_tokens = memory.scratch(policy=PLAIN), memory.scratch(policy=policy).trigger_tokens
    for number, turn in enumerate(turns, 1):
        session.append(list(turn))
        if len(session.tokens) > trigger_tokens:
            session = with_summary(memory, session, policy.keep_ratio)
        on_turn(number, len(turns))
    return session


def with_summary(memory: Memory, session: Session, keep_ratio: float) -> Session:
    """A session that begins with a summary of this one's oldest half, in as many tokens as a compaction keeps slots.

    A system prompt stays before it.
    """
    messages, starts = session.messages, session.message_starts
    cut = half_of(messages, starts, len(session.tokens))
    max_tokens = max(round(keep_ratio * starts[cut]), LEAST_SUMMARY_TOKENS)
    writer = session.fork()
    writer.rewind(starts[cut])
    writer.append([{"role": "user", "content": SUMMARY_REQUEST}])
    summary = "".join(piece.text for piece in writer.generate(max_tokens, GREEDY)).strip()
    system = [message for message in messages[:1] if message["role"] == "system"]
    begun: list[Message] = [{"role": "user", "content": summary or "-"}, {"role": "assistant", "content": READ}]
    shorter = memory.scratch(policy=PLAIN)
    shorter.append([*system, *begun, *messages[cut:]])
    return shorter


def half_of(messages: Sequence[Mapping[str, object]], starts: Sequence[int], num_tokens: int) -> int:
    """The number of messages in the oldest half of the tokens: whole turns, at least one and not the last."""
    ends = [number for number, message in enumerate(messages) if message["role"] == "user" and number > 1]
    return max((cut for cut in ends if starts[cut] <= num_tokens / 2), default=ends[0] if ends else len(messages) - 1)
