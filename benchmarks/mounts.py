"""Five documents mounted, against the five read in full.

    python benchmarks/mounts.py --model MODEL --trigger 1024

Five short documents of 500 to 800 tokens, with six questions each, and three questions on which two of them contradict
each other. Each question is a chat turn, on a branch that is thrown away. Right means: the greedy answer names an
accepted value. The log probability is that of the value behind "The answer is", in nats.

Rows: nothing but the question; the documents as compact texts, mounted at the start, with and without recall; all of
them read in full; and read in full under the default policy, which compacts them at the trigger. The time to the first
token is that of a new session: mounting or reading, and the question. The texts were made before; that time is said
apart. Seconds are those of the processor, all threads together, since others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from common import machine, mean_of, table, write_json

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.questions import PLAIN
from am_memory.engines.names import EngineName

FOLDER = Path(__file__).parent / "texts" / "mounts"
SYSTEM = "You answer questions about the documents that you were given. Answer with the exact name, number or words."
GREEDY = Sampling(temperature=0.0)
OPENING = "The answer is"
NOTHING, MOUNTED, RECALLED, FULL, COMPACTED = (
    "no documents",
    "mounted",
    "mounted, with recall",
    "read in full",
    "read in full, compacted",
)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        document: that the answer stands in.
        log_probability: of the accepted value, in nats.
        kv_tokens, kv_bytes: physical size while it was written, and the bytes on the device.
    """

    row: str
    document: str
    question: str
    right: bool
    log_probability: float
    kv_tokens: float
    kv_bytes: int
    text: str


def system_turn() -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}]


def asked(session: Session, question: str, values: Sequence[str], new_tokens: int) -> tuple[str, list[float], Session]:
    """The greedy answer, the log probability of each value, and the branch in which it was asked."""
    branch, engine = session.fork(), session.engine
    branch.append([{"role": "user", "content": question}])
    first, *_ = branch.generate(1, GREEDY)  # its lookup serves the values, too
    branch.rewind(len(branch.tokens) - len(first.token_ids))
    likely = []
    for value in values:
        opening, ids = engine.encode(OPENING), engine.encode(f" {value}")
        logits = branch.logits([*opening, *ids])[len(opening) :].log_softmax(-1)
        likely.append(float(logits[torch.arange(len(ids)), torch.tensor(ids)].sum()))
    text = "".join(piece.text for piece in branch.generate(new_tokens, GREEDY)).strip()
    return text, likely, branch


def names_one(text: str, accepted: Sequence[str]) -> bool:
    return any(value.casefold() in text.casefold() for value in accepted)


class Documents:
    """The documents, their questions, and sessions that have them in one way or another."""

    def __init__(self, memory: Memory, trigger: int, limit: int) -> None:
        content = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
        self.memory, self.trigger = memory, trigger
        asked: dict[str, list[tuple[str, list[str]]]] = content["documents"]
        self.questions = {name: questions[:limit] for name, questions in asked.items()}
        self.contradictions: list[tuple[str, dict[str, list[str]]]] = content["contradictions"]
        self.texts = {name: (FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in self.questions}

    def make(self) -> None:
        for name, text in self.texts.items():
            print(self.memory.compact_text(text, name, policy=MemoryPolicy(trigger_tokens=self.trigger)), flush=True)

    def session(self, row: str) -> Session:
        policies: dict[str, MemoryPolicy] = {
            NOTHING: PLAIN,
            FULL: PLAIN,
            COMPACTED: MemoryPolicy(trigger_tokens=self.trigger),
            MOUNTED: MemoryPolicy(trigger_tokens=self.trigger, recall_tokens=0),
            RECALLED: MemoryPolicy(trigger_tokens=self.trigger),
        }
        session = self.memory.scratch(policy=policies[row])
        for name in self.texts if row in (MOUNTED, RECALLED) else ():
            session.mount(name)
        session.append(system_turn())
        for text in self.texts.values() if row in (FULL, COMPACTED) else ():
            read = {"role": "assistant", "content": "Thank you, I have read it."}
            session.append([{"role": "user", "content": text}, read])
        return session


def seconds_of(do: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = do()
    return time.process_time() - started, result


def ask_all(documents: Documents, row: str, session: Session, new_tokens: int) -> list[Answer]:
    answers = []
    for document, questions in documents.questions.items():
        for question, accepted in questions:
            text, (likely, *_), branch = asked(session, question, accepted[:1], new_tokens)
            stats = branch.stats
            right = names_one(text, accepted)
            answers.append(Answer(row, document, question, right, likely, stats.kv_tokens, stats.kv_bytes, text))
    return answers


def contradicted(documents: Documents, row: str, session: Session, new_tokens: int) -> list[tuple[object, ...]]:
    """For each contradiction: which document the answer follows, and how likely each one's value is."""
    found = []
    for question, values in documents.contradictions:
        text, likely, _ = asked(session, question, [accepted[0] for accepted in values.values()], new_tokens)
        follows = [name for name, accepted in values.items() if names_one(text, accepted)]
        by_document = ", ".join(f"{name} {value:.1f}" for name, value in zip(values, likely, strict=True))
        found.append((row, question, " and ".join(follows) or "neither", by_document, text[:60].replace("\n", " ")))
    return found


def first_token(documents: Documents, row: str) -> float:
    """Seconds from nothing to the first token of an answer."""

    def answer() -> None:
        session = documents.session(row)
        session.append([{"role": "user", "content": "Who founded the observatory?"}])
        next(iter(session.generate(1, GREEDY)))

    return seconds_of(answer)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--trigger", type=int, default=1024, help="in tokens")
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer at most")
    rows = [NOTHING, MOUNTED, RECALLED, FULL, COMPACTED]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--limit", type=int, default=6, help="questions of each document")
    parser.add_argument("--out", help="write the answers as JSON")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, engine=args.engine, policy=PLAIN)
    documents = Documents(memory, args.trigger, args.limit)
    if {MOUNTED, RECALLED} & {*args.rows}:
        seconds, _ = seconds_of(documents.make)
        print(f"made in {seconds:.0f} s", flush=True)
    answers, overview, contradictions = list[Answer](), [], list[tuple[object, ...]]()
    for row in args.rows:
        seconds, session = first_token(documents, row), documents.session(row)
        group = ask_all(documents, row, session, args.new_tokens)
        contradictions += contradicted(documents, row, session, args.new_tokens)
        answers += group
        fields = [asdict(one) for one in group]
        by_document = [sum(one.right for one in group if one.document == name) for name in documents.questions]
        overview.append(
            (
                row,
                f"{sum(one.right for one in group)} of {len(group)}",
                f"{mean_of(fields, 'log_probability'):.2f}",
                *by_document,
                f"{mean_of(fields, 'kv_tokens'):,.0f}",
                f"{mean_of(fields, 'kv_bytes') / 2**20:.1f}",
                f"{seconds:.1f}",
            )
        )
        print(*overview[-1], sep="  ", flush=True)
        write_json(args.out, [asdict(answer) for answer in answers])
    header = ("documents", "right", "log probability", *documents.questions)
    print(f"\n{args.model}, {args.engine}, trigger {args.trigger}; {machine()}\n")
    print(table((*header, "tokens held", "MiB", "s to the first token"), overview))
    print(f"\n{table(('documents', 'question', 'follows', 'log probability', 'answer'), contradictions)}")


if __name__ == "__main__":
    main()
