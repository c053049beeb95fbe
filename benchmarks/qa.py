"""Multiple-choice questions over long documents: how many are answered right, by method and ratio.

    python benchmarks/qa.py --model MODEL --files QuALITY.v1.0.1.dev benchmark_v5.json --ratios 10 20

Files are the user's own, in the formats of QuALITY and LongHealth (`qa_files.py` says what is read of them). Two
samples of our own, in benchmarks/texts, are the default, and far too small to decide anything. A document is read as a
user's turn, and the model says that it has read it. All but the first 4 and the last 32 tokens is compacted, before any
question is known. Then each question is asked on that cache, and no question sees another.

Its options are lettered, the answer is opened by "The answer is", and the likeliest letter counts: letters and not the
options' own text, since then the model sees all options before it chooses, their lengths do not matter, and a question
takes one pass. The log probability is that of the right letter, normalised over the letters.

Schemes: ours; ours with the same number of slots for every head; eviction by the queries of the last 32 tokens, as many
for every head (SnapKV style), or fewer by layer, linearly from 1.95 to 0.05 of the mean (PyramidKV style); eviction by
the largest attention while the text is repeated, slots shared by all heads (KVzip style); a summary by the model itself
in as many tokens; no document; all of it. "Style": the published way to choose what stays, on our cache. Scores are not
smoothed over neighbours, and nothing else of those methods is reproduced; the package kvpress (0.5.5), which has them,
needs a transformers below 5.3 and cannot run beside this library. H2O is left out: it sums up the attention that each
key gets while the document itself is read, and a compaction is made with queries that all come after the keys.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from common import drawing, machine, read_json, table, write_json
from qa_files import LETTERS, Document, Question, load
from repetition import GREEDY, KVZIP, OBSERVED_TOKENS, READ, SNAPKV, SUMMARY_REQUEST, Size, compact_but_last
from torch import Tensor

from am_memory import Memory, MemoryPolicy, Session
from am_memory.budgets import Calibration
from am_memory.cli.questions import question_turn
from am_memory.engines.base import Engine
from am_memory.errors import InvalidInput, PromptTooLong

SAMPLES = [str(Path(__file__).parent / "texts" / name) for name in ("quality_sample.jsonl", "longhealth_sample.json")]
POLICY = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", originals="drop")
OPENING = "The answer is"
ROOM_TOKENS = 512
"""Tokens of the model's window that are left for a request and a question."""
LEAST_SHARE = 0.05
"""The share of the last layer in a pyramid, relative to the mean layer (arXiv:2406.02069: beta is 20)."""
Scheme = Callable[[Session, Memory, Size], Session]
"""From the session that has read the document, the memory and the size to come to."""


def read_document(memory: Memory, text: str) -> Session:
    session = memory.scratch()
    session.append([{"role": "user", "content": f"Read this.\n\n{text}"}, {"role": "assistant", "content": READ}])
    return session


def letter_log_probs(session: Session, question: Question) -> Tensor:
    """Log probability of each option's letter, normalised over them: (num_options,) float32.

    Raises:
        InvalidInput: the model's tokenizer does not write the letters as one last token each.
    """
    asked = question_turn(session.engine, question.asked, OPENING)
    answers = [session.engine.encode(f"{asked} {letter}") for letter, _ in zip(LETTERS, question.options, strict=False)]
    if len({tuple(answer[:-1]) for answer in answers}) > 1 or len({answer[-1] for answer in answers}) < len(answers):
        raise InvalidInput(
            f"the letters {LETTERS[: len(answers)]} are not one last token each after {OPENING!r} for "
            f"{session.engine.info.name}: their log probabilities cannot be compared; take another model"
        )
    return session.logits(answers[0])[-1, [answer[-1] for answer in answers]].log_softmax(-1)


def compacted(**options: object) -> Scheme:
    """Compact everything between the first and the last tokens, once; the last tokens are the observation window."""

    def run(full: Session, memory: Memory, size: Size) -> Session:
        sizes = {"keep_ratio": 1 / size.ratio, "max_compact_tokens": size.tokens(full)}
        session = full.fork(policy=POLICY.model_copy(update={**sizes, **options}))
        session.rewind(len(full.tokens) - size.recent_tokens)
        session.append(full.tokens[-size.recent_tokens :])
        compact_but_last(session, size.recent_tokens)
        return session

    return run


def pyramid(engine: Engine) -> Calibration:
    """Budgets that fall linearly from the first layer to the last.

    A head that loses -w log(ratio) saves w / ratio with its next slot; so all heads save the same where each has slots
    in proportion to its w.
    """
    cache = engine.new_cache()
    engine.forward(cache, [0])
    num_layers = len(cache.compactable)
    weights = torch.linspace(2 - LEAST_SHARE, LEAST_SHARE, num_layers).repeat_interleave(cache.num_heads // num_layers)
    ratios = torch.logspace(-5, -0.001, 400, dtype=torch.float64)
    return Calibration(
        fingerprint=engine.info.fingerprint,
        model="a pyramid",
        ratios=ratios.tolist(),
        losses=(-weights[:, None] * ratios.log()).tolist(),
        weighs_scores=False,
    )


def in_a_pyramid(full: Session, memory: Memory, size: Size) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pyramid.json"
        path.write_text(pyramid(full.engine).model_dump_json(), encoding="utf-8")
        return compacted(**{**SNAPKV, "head_budget": str(path)})(full, memory, size)


def summarised(full: Session, memory: Memory, size: Size) -> Session:
    """The model's own summary, in all the tokens that the others hold, in place of the document."""
    writer = full.fork()
    writer.append([{"role": "user", "content": SUMMARY_REQUEST}])
    return read_document(memory, "".join(piece.text for piece in writer.generate(size.tokens(full), GREEDY)))


def without(full: Session, memory: Memory, size: Size) -> Session:
    session = memory.scratch()
    session.append([{"role": "user", "content": "I have some questions."}, {"role": "assistant", "content": "Ask."}])
    return session


SCHEMES: dict[str, Scheme] = {
    "full context": lambda full, memory, size: full,
    "ours": compacted(),
    "ours, uniform": compacted(head_budget="uniform"),
    "eviction, observed (SnapKV style)": compacted(**SNAPKV),
    "eviction, pyramid (PyramidKV style)": in_a_pyramid,
    "eviction, repeated (KVzip style)": compacted(**KVZIP),
    "summary": summarised,
    "no context": without,
}
WITHOUT_RATIO = ("full context", "no context")


def check_window(memory: Memory, documents: Sequence[Document]) -> None:
    """Every document must fit the model's window twice, as it is repeated.

    Raises:
        PromptTooLong: one does not.
    """
    window = memory.engine.info.window_tokens
    for document in documents:
        needed = 2 * len(memory.tokenize(document.text)) + ROOM_TOKENS
        if needed > window:
            raise PromptTooLong(
                f"{document.name} takes {needed} tokens, read and repeated with a question after it, and the window of "
                f"{memory.engine.info.name} has {window}: take a model with a longer one, or leave the document out"
            )


def run(memory: Memory, document: Document, args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Add what is not among the rows yet."""
    done = {(row["scheme"], row["ratio"]) for row in rows if is_of(row, args.model, [document])}
    ratios = {scheme: (None,) if scheme in WITHOUT_RATIO else args.ratios for scheme in args.schemes}
    wanted = [(scheme, ratio) for scheme in args.schemes for ratio in ratios[scheme] if (scheme, ratio) not in done]
    if not wanted:
        return
    full = read_document(memory, document.text)
    for scheme, ratio in wanted:
        started = time.perf_counter()
        session = SCHEMES[scheme](full, memory, Size(ratio or 1, OBSERVED_TOKENS))
        seconds = time.perf_counter() - started
        answers = [letter_log_probs(session, question) for question in document.questions]
        right = [question.right for question in document.questions]
        rows.append(
            {
                "model": args.model,
                "document": document.name,
                "scheme": scheme,
                "ratio": ratio,
                "is_right": [int(each.argmax()) == label for each, label in zip(answers, right, strict=True)],
                "log_prob": [float(each[label]) for each, label in zip(answers, right, strict=True)],
                "kv_tokens": session.stats.kv_tokens,
                "seconds": seconds,
            }
        )
        write_json(args.out, rows)
        print(f"{document.name}\n{table(HEADER, [line(scheme, ratio, rows[-1:])])}\n", flush=True)


def is_of(row: dict[str, object], model: str, documents: Sequence[Document]) -> bool:
    return row["model"] == model and row["document"] in [document.name for document in documents]


HEADER = ("scheme", "ratio", "right", "log probability of the right answer", "cache, tokens", "seconds")


def line(scheme: str, ratio: float | None, group: Sequence[dict[str, object]]) -> tuple[object, ...]:
    """One line of the table: a scheme at one ratio, over the questions of some documents."""
    is_right, log_prob = (list(chain.from_iterable(row[name] for row in group)) for name in ("is_right", "log_prob"))
    return (
        scheme,
        f"{ratio:g}x" if ratio else "",
        f"{sum(is_right)} of {len(is_right)} ({fmean(is_right):.0%})",
        f"{fmean(log_prob):.3f}",
        f"{fmean(row['kv_tokens'] for row in group):.0f}",
        f"{fmean(row['seconds'] for row in group):.1f}",
    )


def grouped(rows: Sequence[dict[str, object]]) -> dict[tuple[str, float | None], list[dict[str, object]]]:
    """The rows of all documents by scheme and ratio, in the order of SCHEMES."""
    groups: dict[tuple[str, float | None], list[dict[str, object]]] = {}
    for row in sorted(rows, key=lambda row: (list(SCHEMES).index(row["scheme"]), row["ratio"] or 0)):
        groups.setdefault((row["scheme"], row["ratio"]), []).append(row)
    return groups


def plot(rows: Sequence[dict[str, object]], path: str) -> None:
    """Accuracy by ratio."""
    points: dict[str, dict[float | None, float]] = {}
    for (scheme, ratio), group in grouped(rows).items():
        points.setdefault(scheme, {})[ratio] = fmean(chain.from_iterable(row["is_right"] for row in group))
    with drawing(path, (7, 4)) as (axis,):
        for scheme, by_ratio in points.items():
            if None in by_ratio:
                axis.axhline(
                    by_ratio[None], linestyle=":", label=scheme, color="#555555" if "full" in scheme else "#bbbbbb"
                )
            else:
                width = 2.5 if scheme == "ours" else 1.2
                axis.plot(list(by_ratio), list(by_ratio.values()), marker="o", label=scheme, linewidth=width)
        ratios = sorted({row["ratio"] for row in rows if row["ratio"]})
        axis.set_xscale("log")
        axis.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios])
        axis.set_xlabel("compacted")
        axis.set_ylabel("questions answered right")
        axis.set_ylim(-0.03, 1.03)
        axis.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--files", nargs="+", default=SAMPLES, help="of QuALITY (lines) or LongHealth (one object)")
    parser.add_argument("--documents", type=int, help="only the first so many of each file")
    parser.add_argument("--ratios", type=float, nargs="+", default=[10.0, 20.0])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--out", help="write the figures as JSON; what is in it already is not run again")
    parser.add_argument("--plot", help="draw accuracy by ratio to this file")
    args = parser.parse_args()
    if min(args.ratios) < 1:
        parser.error(f"--ratios {min(args.ratios):g}: a document can only be made smaller; give 1 or more")
    documents = [document for path in args.files for document in load(path)[: args.documents]]
    memory = Memory.from_pretrained(args.model, policy=POLICY)
    check_window(memory, documents)
    rows: list[dict[str, object]] = read_json(args.out)
    for document in documents:
        run(memory, document, args, rows)
    rows = [row for row in rows if is_of(row, args.model, documents)]
    if args.plot:
        plot(rows, args.plot)
    lines = (line(scheme, ratio, group) for (scheme, ratio), group in grouped(rows).items())
    print(f"{args.model}, {len(documents)} documents; {machine()}\n\n{table(HEADER, lines)}")


if __name__ == "__main__":
    main()
