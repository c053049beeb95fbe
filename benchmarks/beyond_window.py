"""A conversation far longer than the model's window: its predictions, its recall, and whether its answers make sense.

    python benchmarks/beyond_window.py --model MODEL --tokens 61440

Turns of prose that comes with Python (`pydoc_data.topics`), some with a fact in them
(`am_memory.cli.letters.Ship`). After each stretch of it:

    NLL        of the last tokens of the stretch, predicted before they are read
    recent     facts of the last two stretches that are recalled; old: those from before
    answer     greedy, to a question that no turn is about; its NLL for a model that has read the question alone

"moved up" is the memory. "as written" is the same, but entries stay where they are. "window" reads again the first
tokens and as many of the last ones as the limit allows.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pydoc_data.topics import topics

import torch
from common import machine, table, write_json

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.letters import TOWNS, Ship
from am_memory.cli.questions import PLAIN, ask, question_turn
from am_memory.engines.transformers import TransformersEngine

SINKS, TURN_CHARS, FACT_EVERY = 4, 1200, 4
STRETCH, NUM_JUDGED, NUM_ANSWERED, RECENT = 4096, 512, 32, 2
QUESTION = "What is bread made of?"
MOVED, STAYING, WINDOW = "moved up", "as written", "window"
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Conversation:
    """All of its tokens, and which fact ends where."""

    tokens: list[int]
    facts: list[tuple[int, Ship]]


@dataclass(frozen=True)
class Measured:
    """How things stand after a stretch; facts as (recalled, asked)."""

    scheme: str
    tokens: int
    nll: float
    recent: tuple[int, int]
    old: tuple[int, int]
    answer: str
    answer_nll: float


def conversation(memory: Memory, num_tokens: int, seed: int) -> Conversation:
    """The same whatever reads it: what the user tells, and short answers."""
    engine, rng = memory.engine, random.Random(seed)
    names = iter(rng.sample(TOWNS, len(TOWNS)))
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens: list[int] = []
    facts: list[tuple[int, Ship]] = []
    for number, start in enumerate(range(0, len(text), TURN_CHARS)):
        told, town = text[start : start + TURN_CHARS], next(names, None) if number % FACT_EVERY == 1 else None
        if town is not None:
            ship = Ship(town, str(rng.randint(10, 99)))
            told = f"{told}\n{ship.sentence}\n"
        messages = [{"role": "user", "content": told}, {"role": "assistant", "content": "Thank you, go on."}]
        tokens += engine.encode(engine.render(messages))
        if town is not None:
            facts.append((len(tokens), ship))
        if len(tokens) >= num_tokens:
            return Conversation(tokens, [(end, ship) for end, ship in facts if end <= num_tokens])
    raise SystemExit(f"--tokens {num_tokens}: the text has {len(tokens)}")


def mean_nll(session: Session, token_ids: list[int]) -> float:
    expected = session.logits(token_ids).log_softmax(-1)
    return float(-expected[torch.arange(len(token_ids)), torch.tensor(token_ids)].mean())


def readings(
    memory: Memory, scheme: str, talk: Conversation, limit: int, stretch: int
) -> Iterator[tuple[int, float, Session]]:
    """After each stretch: where it ends, the NLL of its last tokens, and a session that has read up to there."""
    session = memory.session(scheme)
    for end in range(stretch, len(talk.tokens), stretch):
        judged = talk.tokens[end - NUM_JUDGED : end]
        if scheme == WINDOW:
            session = memory.scratch(policy=PLAIN)
            room = min(limit, end) - SINKS - NUM_JUDGED
            session.append([*talk.tokens[:SINKS], *talk.tokens[end - NUM_JUDGED - room : end - NUM_JUDGED]])
        else:
            session.append(talk.tokens[len(session.tokens) : end - NUM_JUDGED])
        nll = mean_nll(session, judged)
        session.append(judged)
        yield end, nll, session


def recalled(session: Session, facts: list[Ship]) -> tuple[int, int]:
    if not facts:
        return 0, 0
    return sum(said == fact.code for fact, said in ask(session, facts).items()), len(facts)


def answered(memory: Memory, session: Session) -> tuple[str, float]:
    """The answer of a branch, and its NLL for a model that has read the question alone."""
    asked = memory.engine.encode(question_turn(memory.engine, QUESTION, ""))
    branch, alone = session.fork(policy=PLAIN), memory.scratch(policy=PLAIN)
    branch.append(asked)
    ids = [token for piece in branch.generate(NUM_ANSWERED, GREEDY) for token in piece.token_ids]
    alone.append(asked)
    return memory.engine.decode(ids, skip_special=True).strip(), mean_nll(alone, ids)


def measured(memory: Memory, scheme: str, talk: Conversation, limit: int, stretch: int) -> Iterator[Measured]:
    for end, nll, session in readings(memory, scheme, talk, limit, stretch):
        told = [(place, ship) for place, ship in talk.facts if place <= end]
        recent = [ship for place, ship in told if place > end - RECENT * stretch]
        old = [ship for place, ship in told if place <= end - RECENT * stretch]
        yield Measured(scheme, end, nll, recalled(session, recent), recalled(session, old), *answered(memory, session))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=61_440)
    parser.add_argument("--stretch", type=int, default=STRETCH, help="of the conversation, in tokens")
    parser.add_argument("--limit", type=int, default=1024, help="of the cache, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="*", default=[MOVED, STAYING, WINDOW])
    parser.add_argument("--json", help="where to write all results")
    args = parser.parse_args()
    policy = MemoryPolicy(trigger_tokens=args.limit, pinned=SINKS, originals="drop")
    memory = Memory.from_pretrained(args.model, policy=policy)
    staying: TransformersEngine = copy.copy(memory.engine)
    staying.capabilities = replace(memory.engine.capabilities, can_rotate_keys=False, why_keys_stay="switched off")
    talk, rows, results = conversation(memory, args.tokens, args.seed), [], []
    for scheme in args.schemes:
        started = time.perf_counter()
        reader = Memory(staying, policy) if scheme == STAYING else memory
        for result in measured(reader, scheme, talk, args.limit, args.stretch):
            results.append(result)
            facts = (f"{hits} of {asked}" for hits, asked in (result.recent, result.old))
            rows.append((scheme, f"{result.tokens:,}", f"{result.nll:.3f}", *facts, f"{result.answer_nll:.2f}"))
            print(*rows[-1], repr(result.answer), f"{time.perf_counter() - started:.0f} s", sep="  ", flush=True)
    print(table(("scheme", "tokens", "NLL", "recent facts", "old facts", "NLL of the answer"), rows))
    write_json(args.json, [vars(result) for result in results])
    print(f"\n{args.model}, limit {args.limit}; {machine()}")


if __name__ == "__main__":
    main()
