"""Facts told in an ordinary chat, asked for afterwards in other words.

    python benchmarks/facts.py --model MODEL --triggers 512 1024
    python benchmarks/facts.py --model MODEL --triggers 1024 --tokens 20000
    python benchmarks/facts.py --model MODEL --triggers 512 1024 --questions places
    python benchmarks/facts.py --model MODEL --triggers 512 1024 --contexts d80_C1.json d60_C1.json d40_C1.json

In each of five chats a person tells 20 facts of 20 kinds among small talk and prose, in 3,000 to 3,300 tokens. Then
each fact is asked for as a chat turn, on a branch that is thrown away. With --questions places, each chat gets 8
questions instead whose answers need two turns or more. Right means: the greedy answer names an accepted value. The log
probability is that of the whole right answer after the opening of an answer, in nats. F1 is that of the greedy answer's
words and the accepted value's; a whole sentence lowers it.

With --contexts, the chats and questions are those of the repository profff/lost-in-compaction (`contexts_files.py` says
which): others wrote them, and nothing here was ever tuned on them.

Rows: the full cache; ours; ours with each --policy; the same keys with nothing fitted; a uniform budget; everything
compacted again each time ("refit"); the system prompt and the last tokens read again, as many as ours holds; and the
last tokens with recall, but without slots ("pages alone"). Only ours and that row recall. With --refine, the segments
of all compacted rows are refined, in the pauses of the chat or at its end; the row's name says so. A row that the
engine refuses is left out, and the reason is printed. All rows of a table are means over the same chats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from common import machine, mean_of, read_json, table, write_json
from contexts_files import load_contexts
from facts_files import FACTS, QUESTIONS, Chat, Fact, lengthened, load_all

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.questions import PLAIN, open_answer, question_turn
from am_memory.engines.names import DtypeName, EngineName
from am_memory.errors import InvalidInput, InvalidPolicy, UnsupportedOperation

SYSTEM = (
    "You are a helpful assistant. The user tells you about their life. When they ask you about it, look up what they "
    "said and answer with the exact name, number or words."
)
GREEDY = Sampling(temperature=0.0)
FULL, OURS, TRUNCATED = "full cache", "ours", "truncated"
PAUSES, END = "pauses", "end"
REFINED = {PAUSES: "refined in the pauses", END: "refined"}
CHANGES: dict[str, dict[str, object]] = {
    OURS: {},
    "pages alone": {"experiments": Experiments(fit="no_slots")},
    "no recall": {"recall_tokens": 0},
    "nothing fitted": {"experiments": Experiments(fit="nothing"), "recall_tokens": 0},
    "uniform budget": {"head_budget": "uniform", "recall_tokens": 0},
    "refit": {"experiments": Experiments(recompaction="refit"), "recall_tokens": 0},
}
REFUSALS = (InvalidInput, InvalidPolicy, UnsupportedOperation)
QUARTERS = 4


@dataclass(frozen=True)
class Row:
    """One way to hold a chat: the changes to the policy, and when the segments are refined.

    Attributes:
        refine: PAUSES, END, or None: not at all.
    """

    name: str
    changes: dict[str, object]
    refine: str | None = None


class Seconds(NamedTuple):
    """Wall time of a chat before the questions."""

    to_read: float
    to_refine: float = 0.0


@dataclass(frozen=True)
class Answer:
    """One answer, and the cache that it was written with.

    Attributes:
        quarter: of the chat, 0 the oldest, where the fact was told last; of several places, the oldest one's.
        log_probability: of the whole right answer, in nats.
        chat_tokens: physical size of the chat, before the question.
        kv_tokens, kv_bytes: the largest physical size while it was written, and the bytes on the device.
        seconds_to_read: the whole chat, its compactions among it.
        seconds_to_refine: all segments, after it was read; 0 without --refine.
        questions: the set that was asked.
        token_f1: of the text; None if the file was written before there was one.
    """

    chat: str
    trigger: int
    row: str
    kind: str
    quarter: int
    right: bool
    log_probability: float
    chat_tokens: float
    kv_tokens: float
    kv_bytes: int
    originals_bytes: int
    compactions: int
    seconds_to_read: float
    seconds: float
    text: str
    questions: str = FACTS
    token_f1: float | None = None
    seconds_to_refine: float = 0.0


def read(memory: Memory, chat: Chat, policy: MemoryPolicy, refine: str | None = None) -> tuple[Session, Seconds]:
    """Read a chat turn by turn, and refine its segments in the pauses or at its end."""
    session, first, *others = memory.scratch(policy=policy), *chat.messages()
    to_read = to_refine = 0.0
    for turn in ([{"role": "system", "content": SYSTEM}, *first], *others):
        started = time.perf_counter()
        session.append(list(turn))
        to_read, started = to_read + time.perf_counter() - started, time.perf_counter()
        if refine == PAUSES or (refine == END and turn is others[-1]):
            session.refine()
            to_refine += time.perf_counter() - started
    return session, Seconds(to_read, to_refine)


def truncated(memory: Memory, full: Session, num_tokens: int) -> Session:
    """The system prompt and the last tokens of the full session, read again."""
    session, num_system = memory.scratch(policy=PLAIN), full.message_starts[1]
    session.append([*full.tokens[:num_system], *full.tokens[num_system - num_tokens :]])
    return session


def asked(session: Session, fact: Fact, new_tokens: int) -> tuple[float, str, float]:
    """Ask for a fact, as a chat turn.

    Returns:
        The log probability of the right answer, behind its opening and beside what was recalled for the question; the
        greedy answer; and the largest size of the cache on the way.
    """
    if session.messages:
        open_answer(session, fact.question)
    else:
        session.append(question_turn(session.engine, fact.question, ""))
    engine, pieces, largest = session.engine, list[str](), session.stats.kv_tokens
    opening, answer = engine.encode(fact.opening), engine.encode(f" {fact.answer}")
    logits = session.logits([*opening, *answer])[len(opening) :].log_softmax(-1)
    probability = float(logits[torch.arange(len(answer)), torch.tensor(answer)].sum())
    for piece in session.generate(new_tokens, GREEDY):
        pieces.append(piece.text)
        largest = max(largest, session.stats.kv_tokens)
    return probability, "".join(pieces).strip(), largest


def ask_all(
    session: Session, chat: Chat, trigger: int, row: Row, seconds: Seconds, args: argparse.Namespace
) -> list[Answer]:
    """Ask for each fact on a branch; `seconds` are those that the session has taken so far."""
    answers = []
    for fact in chat.asked(args.questions):
        started = time.perf_counter()
        branch = session.fork()
        probability, text, kv_tokens = asked(branch, fact, args.new_tokens)
        answers.append(
            Answer(
                chat=chat.name,
                trigger=trigger,
                row=row.name,
                kind=fact.kind,
                quarter=QUARTERS * fact.turns[0] // len(chat.turns),
                right=fact.is_right(text),
                log_probability=probability,
                chat_tokens=session.stats.kv_tokens,
                kv_tokens=kv_tokens,
                kv_bytes=branch.stats.kv_bytes,
                originals_bytes=branch.stats.originals_bytes,
                compactions=session.stats.num_compactions,
                seconds_to_read=seconds.to_read,
                seconds_to_refine=seconds.to_refine,
                seconds=time.perf_counter() - started,
                text=text,
                questions=args.questions,
                token_f1=fact.token_f1(text),
            )
        )
    return answers


class Run:
    """Runs the rows of each chat that are not in the file yet, and keeps what several of them need."""

    def __init__(self, memory: Memory, args: argparse.Namespace) -> None:
        self.memory = memory
        self.args = args
        self.answers: list[Answer] = [Answer(**fields) for fields in read_json(args.out)]
        self.full: Session | None = None

    def run(self, chat: Chat, rows: Sequence[Row]) -> None:
        """All rows of one chat, at every trigger. The full cache does not depend on it, and is asked once."""
        self.full = None
        for row in rows:
            for trigger in (0,) if row.name == FULL else self.args.triggers:
                if any((one.chat, one.trigger, one.row) == (chat.name, trigger, row.name) for one in self.asked()):
                    continue
                try:
                    self.run_row(chat, trigger, row)
                except REFUSALS as error:
                    print(f"{chat.name}, trigger {trigger}, {row.name}: left out: {error}", flush=True)

    def asked(self) -> list[Answer]:
        """The answers to the questions of this run. The file may hold both sets."""
        return [answer for answer in self.answers if answer.questions == self.args.questions]

    def run_row(self, chat: Chat, trigger: int, row: Row) -> None:
        started = time.perf_counter()
        if row.name in (FULL, TRUNCATED):
            self.full = session = self.full or read(self.memory, chat, PLAIN)[0]
            if row.name == FULL and session.stats.num_compactions:
                raise InvalidInput(f"{len(session.tokens):,} tokens are more than the model's context window")
            if row.name == TRUNCATED:
                session = truncated(self.memory, session, self.truncated_size(chat, trigger))
            seconds = Seconds(time.perf_counter() - started)
        else:
            policy = MemoryPolicy(trigger_tokens=trigger, **row.changes)
            session, seconds = read(self.memory, chat, policy, row.refine)
        answers = ask_all(session, chat, trigger, row, seconds, self.args)
        self.answers += answers
        write_json(self.args.out, [asdict(answer) for answer in self.answers])
        print(
            f"{chat.name:10s} trigger {trigger:5d}  {row.name:30s} {sum(one.right for one in answers):2d} of "
            f"{len(answers)}  {len(session.tokens):,} tokens, {session.stats.kv_tokens:,.0f} held  "
            f"{seconds.to_read:.0f} s to read, {seconds.to_refine:.0f} s to refine, "
            f"{sum(one.seconds for one in answers):.0f} s to answer",
            flush=True,
        )

    def truncated_size(self, chat: Chat, trigger: int) -> int:
        """Tokens of the truncated chat: as many as ours holds, or fewer so that question and answer fit."""
        engine, new_tokens = self.memory.engine, self.args.new_tokens
        turns = [engine.encode(question_turn(engine, fact.question, "")) for fact in chat.asked(self.args.questions)]
        most = trigger - max(len(turn) for turn in turns) - new_tokens
        rows = ((one.chat, one.trigger, one.row, one.chat_tokens) for one in self.answers)
        return min(next((round(size) for *row, size in rows if row == [chat.name, trigger, OURS]), most), most)


def groups(answers: Sequence[Answer]) -> dict[tuple[int, str], list[Answer]]:
    """Answers by trigger and row, in the order of the first ones."""
    found: dict[tuple[int, str], list[Answer]] = {}
    for answer in answers:
        found.setdefault((answer.trigger, answer.row), []).append(answer)
    return found


def paired(answers: Sequence[Answer], full: dict[tuple[str, str], Answer]) -> tuple[str, str]:
    """Right answers over the full cache's on the same questions, and how many only one of the two has right."""
    pairs = [(one.right, full[one.chat, one.kind].right) for one in answers if (one.chat, one.kind) in full]
    if not pairs or len(pairs) < len(answers):
        return "", ""
    more, less = (sum(pair == wanted for pair in pairs) for wanted in ((True, False), (False, True)))
    share = sum(ours for ours, _ in pairs) / max(sum(theirs for _, theirs in pairs), 1)
    return f"{share:.2f}", f"+{more} -{less}"


def summary(answers: Sequence[Answer]) -> str:
    """Three tables: all rows, right answers by kind, and by the quarter of the chat in which the fact was told."""
    found = groups(answers)
    full = {(one.chat, one.kind): one for one in answers if one.row == FULL}
    overview, by_age = [], []
    for (trigger, name), group in found.items():
        fields, num_chats = [asdict(one) for one in group], len({one.chat for one in group})
        of_full, flipped = paired(group, full)
        by_quarter = [[one.right for one in group if one.quarter == number] for number in range(QUARTERS)]
        overview.append(
            (
                trigger or "",
                name,
                f"{sum(one.right for one in group) / num_chats:.1f} of {len(group) // num_chats}",
                of_full,
                flipped,
                f"{mean_of(fields, 'log_probability'):.2f}",
                "" if any(one.token_f1 is None for one in group) else f"{mean_of(fields, 'token_f1'):.3f}",
                f"{mean_of(fields, 'kv_tokens'):,.0f}",
                f"{max(one.kv_tokens for one in group):,.0f}",
                f"{mean_of(fields, 'kv_bytes') / 2**20:.1f}",
                f"{mean_of(fields, 'originals_bytes') / 2**20:.1f}",
                f"{mean_of(fields, 'compactions'):.1f}",
                f"{mean_of(fields, 'seconds_to_read'):.0f}",
                f"{mean_of(fields, 'seconds_to_refine'):.0f}",
                f"{mean_of(fields, 'seconds'):.1f}",
            )
        )
        by_age.append((trigger or "", name, *(f"{sum(some)} of {len(some)}" for some in by_quarter)))
    header = ("trigger", "cache", "right", "of full", "flipped", "log probability", "F1")
    header += ("tokens held, mean", "at most", "MiB on the device", "MiB of originals")
    header += ("compactions", "s to read", "s to refine", "s / answer")
    kinds = dict.fromkeys(one.kind for one in answers)
    columns = [f"{name} {trigger or ''}".strip() for trigger, name in found]
    by_kind = [
        (kind, *(sum(one.right for one in group if one.kind == kind) for group in found.values())) for kind in kinds
    ]
    oldest_first = [f"quarter {number}" for number in range(1, QUARTERS + 1)]
    return "\n\n".join(
        [
            table(header, overview),
            table(("right, by kind", *columns), by_kind),
            table(("trigger", "right, by age (1 is the oldest)", *oldest_first), by_age),
        ]
    )


def rows_of(args: argparse.Namespace) -> list[Row]:
    given = [Row(f"{OURS} {text}", json.loads(text)) for text in args.policy]
    named = [Row(name, CHANGES.get(name, {})) for name in args.rows]
    return [_refined(row, args.refine) if args.refine else row for row in (*named, *given)]


def _refined(row: Row, when: str) -> Row:
    """The row with its segments refined; what is not compacted stays as it is."""
    return row if row.name in (FULL, TRUNCATED) else Row(f"{row.name}, {REFINED[when]}", row.changes, when)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--dtype", choices=get_args(DtypeName), help="of weights and cache; default: the engine's")
    parser.add_argument("--triggers", type=int, nargs="+", default=[512, 1024], help="in tokens")
    parser.add_argument("--questions", choices=QUESTIONS, default=FACTS, help="told in one place, or in several")
    parser.add_argument("--contexts", type=Path, nargs="+", help="of lost-in-compaction, instead of our chats")
    parser.add_argument("--chats", nargs="+", help="only these, by name")
    parser.add_argument("--tokens", type=int, default=0, help="make each chat about so long; 0: as it is")
    names = [FULL, *CHANGES, TRUNCATED]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--policy", action="append", default=[], help="JSON; ours with these fields, a row of its own")
    parser.add_argument("--refine", choices=REFINED, help="refine ours, after each turn or before the questions")
    parser.add_argument("--new-tokens", type=int, default=40, help="of an answer at most")
    parser.add_argument("--out", help="write the answers as JSON; what is in it already is not run again")
    args = parser.parse_args()
    chats = load_contexts(args.contexts) if args.contexts else load_all()
    if unknown := set(args.chats or ()) - {chat.name for chat in chats}:
        parser.error(f"--chats {' '.join(sorted(unknown))}: there are {' '.join(chat.name for chat in chats)}")
    memory = Memory.from_pretrained(args.model, engine=args.engine, dtype=args.dtype, policy=PLAIN)
    run = Run(memory, args)
    for chat in chats:
        if args.chats is None or chat.name in args.chats:
            longer = (
                lengthened(chat, chats, args.tokens, lambda text: len(memory.tokenize(text))) if args.tokens else chat
            )
            run.run(longer, rows_of(args))
    answers = run.asked()
    num_chats = len({answer.chat for answer in answers})
    run_with = f"{args.model}, {args.engine}, {args.dtype or 'default dtype'}, {args.questions}, {num_chats} chats"
    print(f"\n{run_with}; {machine()}\n\n{summary(answers)}")


if __name__ == "__main__":
    main()
