"""Problems solved step by step in bounded memory, with compactions among the examples and in the middle of reasoning.

    python benchmarks/reasoning.py --model MODEL --limits 1024 640 448 256

Worked examples, then a problem, then the model's reasoning, in one context whose cache never passes a physical limit:
the lower it is, the more compactions there are. Any problems will do (`--problems`, `--examples`: JSON lines with
"problem" and "answer", examples with "solution" too); those beside this file were written for it. Solved means: the
answer that greedy decoding comes to is the right number.

Schemes: full cache; ours (whenever the limit is reached the oldest half is compacted); truncation (whenever the limit
is reached the oldest half is dropped, except for the system prompt and the problem, and the rest is read again); no
examples, which is also what a full cache comes to without them. All solve one problem after another side by side, so
that a run that is stopped has tried the same problems with each.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import get_args

from common import drawing, machine, table, write_json
from pydantic import TypeAdapter

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines.base import Engine, Message
from am_memory.engines.names import EngineName

PROBLEMS = Path(__file__).parent / "problems"
SYSTEM = "You solve problems step by step. Your last sentence says the answer, like this: The answer is 12."
ROOMY = MemoryPolicy(trigger_tokens=1.0)
"""Compacts nothing within the model's window: a plain cache."""
GREEDY = Sampling(temperature=0.0)
NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"
SAID = re.compile(r"(?:answer is(?:[^.\n]*=)?[^.]*?|\\boxed\{)" + NUMBER, re.IGNORECASE)
RESULT = re.compile(r"=[\s$]*" + NUMBER)


@dataclass(frozen=True)
class Problem:
    """A problem whose answer is an integer; an example has a solution, too."""

    problem: str
    answer: int
    solution: str = ""

    def worked(self) -> list[Message]:
        """The problem and its solution, as turns."""
        solution = f"{self.solution} The answer is {self.answer}."
        return [{"role": "user", "content": self.problem}, {"role": "assistant", "content": solution}]


def load(path: Path) -> list[Problem]:
    """The problems of a file of JSON lines.

    Raises:
        ValueError: a line that is none, naming it.
    """
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            problem = Problem(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}; give JSON with problem and answer") from error
        if type(problem.answer) is not int:
            raise ValueError(f"{path}, line {number}: answer {problem.answer!r} is not an integer; only those are read")
        problems.append(problem)
    return problems


def extract(text: str) -> int | None:
    """The number last said to be the answer, else the last result, else the last number; None if it is no integer."""
    for pattern in (SAID, RESULT, re.compile(NUMBER)):
        if numbers := pattern.findall(text):
            value = float(numbers[-1].replace(",", ""))
            return int(value) if value.is_integer() else None
    return None


@dataclass(frozen=True)
class Prompt:
    """The prompt for one problem, as token ids.

    Attributes:
        head: what comes before the first example; stays exact.
        examples: the same for all problems.
        question: the problem, to where the answer begins.
    """

    head: tuple[int, ...]
    examples: tuple[int, ...]
    question: tuple[int, ...]
    problem: Problem

    @property
    def num_kept(self) -> int:
        """Tokens that no truncation drops."""
        return len(self.head) + len(self.question)

    @property
    def num_tokens(self) -> int:
        return self.num_kept + len(self.examples)


def num_common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens they begin with that are the same in all."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def prompts(engine: Engine, problems: Sequence[Problem], examples: Sequence[Problem]) -> list[Prompt]:
    """One for each problem, cut where it differs from the others."""

    def token_ids(examples: Sequence[Problem], problem: str) -> list[int]:
        turns = [turn for example in examples for turn in example.worked()]
        messages = [{"role": "system", "content": SYSTEM}, *turns, {"role": "user", "content": problem}]
        return engine.encode(engine.render(messages, add_generation_prompt=True))

    whole = [token_ids(examples, problem.problem) for problem in problems]
    num_shared = num_common([token_ids(examples, ""), *whole])
    num_head = num_common([token_ids((), ""), *whole])
    return [
        Prompt(tuple(ids[:num_head]), tuple(ids[num_head:num_shared]), tuple(ids[num_shared:]), problem)
        for ids, problem in zip(whole, problems, strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """The answer of a scheme to one problem.

    Attributes:
        logical_tokens, kv_tokens: of the context with the answer, and of its cache.
        compactions: made in all, among the examples too; none where truncated.
        compactions_in_answer: of these, those made while the model answered.
        answer_tokens: how long the answer is.
        old_question, old_answer: tokens of the problem and of the answer that are compacted, or dropped, in the end.
    """

    text: str
    logical_tokens: int
    kv_tokens: float
    compactions: int
    compactions_in_answer: int
    answer_tokens: int
    old_question: int
    old_answer: int


Scheme = Callable[[Memory, Sequence[Prompt], int | None, int], Iterator[Answer]]
"""From the memory, the prompts, the physical limit and the longest answer, in tokens; an answer for each prompt."""


def reading(policy: MemoryPolicy, *, with_examples: bool = True) -> Scheme:
    """One session reads the examples, and forks of it the problems: the same as reading all for each, but faster."""

    def run(memory: Memory, prompts: Sequence[Prompt], limit: int | None, new_tokens: int) -> Iterator[Answer]:
        shared = prompts[0].head + (prompts[0].examples if with_examples else ())
        update = {"pinned": len(prompts[0].head)} | ({} if limit is None else {"trigger_tokens": limit})
        reader = memory.scratch(policy=policy.model_copy(update=update))
        reader.append(shared)
        for prompt in prompts:
            session = reader.fork()
            session.append(prompt.question)
            num_told = len(session.tokens)
            pieces = session.generate(new_tokens, GREEDY)
            first = next(pieces)  # reads the last of the prompt
            num_read = session.stats.num_compactions
            text = first.text + "".join(piece.text for piece in pieces)
            stats, num_old = session.stats, session.segments[-1].end if session.segments else 0
            yield Answer(
                text=text,
                logical_tokens=stats.logical_tokens,
                kv_tokens=stats.kv_tokens,
                compactions=stats.num_compactions,
                compactions_in_answer=stats.num_compactions - num_read,
                answer_tokens=stats.logical_tokens - num_told,
                old_question=min(max(num_old - len(shared), 0), len(prompt.question)),
                old_answer=max(num_old - num_told, 0),
            )

    return run


def window(prompt: Prompt, answer: Sequence[int], limit: int) -> list[int]:
    """The tokens that are left if the older half of the droppable ones goes whenever the limit is reached."""
    droppable, room = [*prompt.examples, *answer], limit - prompt.num_kept
    half = (room + 1) // 2
    num_dropped = half * max((len(droppable) - room) // half + 1, 0)
    rest = answer[max(num_dropped - len(prompt.examples), 0) :]
    return [*prompt.head, *prompt.examples[num_dropped:], *prompt.question, *rest]


def truncation(memory: Memory, prompts: Sequence[Prompt], limit: int | None, new_tokens: int) -> Iterator[Answer]:
    """At the limit, drop the oldest half except for the head and the problem, and read the rest again."""
    assert limit is not None
    for prompt in prompts:
        answer: list[int] = []
        finish_reason = None
        while finish_reason != "eos" and len(answer) < new_tokens:
            kept = window(prompt, answer, limit)
            num_dropped = prompt.num_tokens + len(answer) - len(kept)
            session = memory.scratch(policy=ROOMY)
            session.append(kept)
            for piece in session.generate(min(limit - len(kept), new_tokens - len(answer)), GREEDY):
                answer += piece.token_ids
                finish_reason = piece.finish_reason
        yield Answer(
            text=memory.engine.decode(answer, skip_special=True),
            logical_tokens=prompt.num_tokens + len(answer),
            kv_tokens=session.stats.kv_tokens,
            compactions=0,
            compactions_in_answer=0,
            answer_tokens=len(answer),
            old_question=0,
            old_answer=max(num_dropped - len(prompt.examples), 0),
        )


SCHEMES: dict[str, Scheme] = {
    "full cache": reading(ROOMY),
    "no examples": reading(ROOMY, with_examples=False),
    "ours": reading(MemoryPolicy()),
    "truncation": truncation,
}
LIMITED = ("ours", "truncation")


@dataclass(frozen=True)
class Attempt:
    """One problem, as one scheme solved it; `limit`: of the physical size, in tokens, None where there is none."""

    scheme: str
    limit: int | None
    problem: Problem
    answer: Answer

    @property
    def is_right(self) -> bool:
        return extract(self.answer.text) == self.problem.answer


def run(
    memory: Memory, prompts: Sequence[Prompt], earlier: Sequence[Attempt], args: argparse.Namespace
) -> list[Attempt]:
    """Each problem with all schemes that have not tried it earlier; the attempts of both."""
    tried = {(attempt.scheme, attempt.limit, attempt.problem) for attempt in earlier}
    settings = [(scheme, limit) for scheme in args.schemes for limit in (args.limits if scheme in LIMITED else [None])]
    solving = {}
    for scheme, limit in settings:
        pending = [prompt for prompt in prompts if (scheme, limit, prompt.problem) not in tried]
        solving[scheme, limit] = SCHEMES[scheme](memory, pending, limit, args.new_tokens)
    attempts = [*earlier]
    for prompt in prompts:
        for (scheme, limit), answers in solving.items():
            if (scheme, limit, prompt.problem) not in tried:
                attempts.append(Attempt(scheme, limit, prompt.problem, next(answers)))
                report(attempts[-1])
        write_json(args.out, [{**asdict(attempt), "is_right": attempt.is_right} for attempt in attempts])
    return attempts


def report(attempt: Attempt) -> None:
    answer, expected = attempt.answer, attempt.problem.answer
    print(
        f"{attempt.scheme:11s} {attempt.limit or '':5}  {'right' if attempt.is_right else 'wrong'}: "
        f"{extract(answer.text)} for {expected}  {answer.logical_tokens} tokens in {answer.kv_tokens:.0f}  "
        f"{answer.compactions} compactions, {answer.compactions_in_answer} of them in the answer",
        flush=True,
    )


def by_setting(attempts: Sequence[Attempt]) -> dict[tuple[str, int | None], list[Attempt]]:
    settings = dict.fromkeys((attempt.scheme, attempt.limit) for attempt in attempts)
    return {
        setting: [attempt for attempt in attempts if (attempt.scheme, attempt.limit) == setting] for setting in settings
    }


HEADER = ("scheme", "limit", "length", "compactions", "in answers", "old tokens", "solved", "of full", "flipped")


def summary(attempts: Sequence[Attempt]) -> str:
    """A line for each scheme and limit: means, and the range of the compactions.

    Length is logical; old tokens are those of the problem and of the answer that are compacted, or dropped, in the
    end; flipped are the problems that the full cache fails and this solves, and the other way round.
    """
    groups = by_setting(attempts)
    right = {attempt.problem for attempt in groups.get(("full cache", None), []) if attempt.is_right}
    lines = []
    for (scheme, limit), group in groups.items():
        answers, solved = [attempt.answer for attempt in group], sum(attempt.is_right for attempt in group)
        counts = [answer.compactions for answer in answers]
        gained = sum(attempt.is_right and attempt.problem not in right for attempt in group)
        lost = sum(not attempt.is_right and attempt.problem in right for attempt in group)
        old = [mean(answer.old_question for answer in answers), mean(answer.old_answer for answer in answers)]
        lines.append(
            (
                scheme,
                limit or "",
                f"{mean(answer.logical_tokens for answer in answers):.0f}",
                f"{mean(counts):.1f} ({min(counts)} to {max(counts)})" if any(counts) else "",
                f"{mean(answer.compactions_in_answer for answer in answers):.1f}" if any(counts) else "",
                f"{old[0]:.0f} + {old[1]:.0f}" if limit else "",
                f"{solved} of {len(group)}",
                f"{solved / (solved - gained + lost):.0%}" if solved - gained + lost else "",
                f"+{gained} -{lost}",
            )
        )
    return table(HEADER, lines)


def plot(attempts: Sequence[Attempt], path: str) -> None:
    """Share of problems solved by physical limit, with the number of compactions at each."""
    groups = by_setting(attempts)
    share = {setting: mean(attempt.is_right for attempt in group) for setting, group in groups.items()}
    with drawing(path, (7, 4)) as (axis,):
        for scheme in dict.fromkeys(scheme for scheme, _ in groups):
            if scheme in LIMITED:
                limits = sorted(limit for name, limit in groups if name == scheme and limit is not None)
                width = 2.5 if scheme == "ours" else 1.2
                axis.plot(limits, [share[scheme, limit] for limit in limits], marker="o", label=scheme, linewidth=width)
            else:
                color = "#555555" if scheme == "full cache" else "#bbbbbb"
                axis.axhline(share[scheme, None], linestyle=":", label=scheme, color=color)
        counts = {
            limit: f"{mean(attempt.answer.compactions for attempt in group):.1f} compactions"
            for (scheme, limit), group in groups.items()
            if scheme == "ours"
        }
        limits = sorted({limit for _, limit in groups if limit is not None})
        axis.set_xscale("log")
        axis.set_xticks(limits, [f"{limit}\n{counts.get(limit, '')}" for limit in limits], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("physical limit, tokens")
        axis.set_ylabel("problems solved")
        axis.set_ylim(-0.03, 1.05)
        axis.legend(frameon=False, fontsize=8)


def check_limits(limits: Sequence[int], prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for a limit that leaves no room to answer the longest problem."""
    longest = max(prompts, key=lambda prompt: prompt.num_kept)
    for limit in limits:
        if limit < longest.num_kept + 2:
            raise ValueError(
                f"--limits {limit}: {longest.num_kept} tokens are taken by the system prompt and the longest problem "
                f"({longest.problem.problem[:40]!r}...); give {longest.num_kept + 2} or more, or leave that problem out"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--problems", type=Path, default=PROBLEMS / "grade_school.jsonl")
    parser.add_argument("--examples", type=Path, default=PROBLEMS / "grade_school_examples.jsonl")
    parser.add_argument("--num-problems", type=int, help="only the first ones")
    parser.add_argument("--num-examples", type=int, help="only the first ones; 0: none")
    parser.add_argument("--limits", type=int, nargs="+", default=[1024, 640, 448], help="of the cache, in tokens")
    parser.add_argument("--new-tokens", type=int, default=200, help="of the longest answer")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--out", help="write the answers and figures as JSON")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="--out of runs, which are not repeated")
    parser.add_argument("--plot", help="draw what is solved by physical limit to this file")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, engine=args.engine, policy=ROOMY)
    try:
        problems, examples = load(args.problems)[: args.num_problems], load(args.examples)[: args.num_examples]
        told = prompts(memory.engine, problems, examples)
        check_limits(args.limits, told)
    except ValueError as error:
        parser.error(str(error))
    earlier = [one for path in args.earlier for one in TypeAdapter(list[Attempt]).validate_json(path.read_bytes())]
    attempts = run(memory, told, earlier, args)
    if args.plot:
        plot(attempts, args.plot)
    caption = (
        f"{args.model}, {len(told)} problems after {len(examples)} examples, answers of up to {args.new_tokens} tokens"
    )
    print(f"\n{caption}; {machine()}\n\n{summary(attempts)}")


if __name__ == "__main__":
    main()
