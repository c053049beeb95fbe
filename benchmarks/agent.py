"""A LangChain agent reads codes among long tool results, and is then asked for each of them.

    python benchmarks/agent.py --model MODEL --turns 30 --facts 60

In each turn the user tells some codes, a tool returns a page of prose, and the model answers in up to 24 tokens. The
tool's call and result are put in as messages, so that a model's skill in choosing tools does not decide. All schemes
run the same weights through `create_agent`, and find what they have read before as `ChatAMMemory` does; all but the
full history may hold a quarter of its tokens. Recalled means: greedy decoding of the answer to the question contains
the code. Each question is asked of the same history; it may be summarised once more before them, not between them.

Schemes: full history; ours; SummarizationMiddleware as it comes, and with trim_tokens_to_summarize=None, both with a
summariser that reads whatever it is given (which is more than that quarter); langchain_core's trim_messages.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common import machine, table, write_json
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, SummarizationMiddleware, wrap_model_call
from langchain_am_memory import AMMemoryMiddleware, ChatAMMemory
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages

from am_memory import Memory, MemoryPolicy
from am_memory.cli.letters import TOWNS, Fact, prose

SYSTEM = "You keep the codes of the valley's gates. Answer in one short sentence."
Middleware = AgentMiddleware[Any, Any, Any]
ROOMY = MemoryPolicy(trigger_tokens=1.0)
"""Compacts nothing within the model's window: a plain cache."""
ANSWER_TOKENS = 24
NO_SAMPLING = {"temperature": 0, "repetition_penalty": 1.0}
MORE_TOWNS = [
    "Aldermoor",
    "Birchover",
    "Cawdene",
    "Dorrington",
    "Evenlode",
    "Farrowdale",
    "Glaston",
    "Hexmoor",
    "Inverlay",
    "Jesmond",
    "Kirkwell",
    "Lanrick",
    "Melbury",
    "Norwold",
    "Oakhanger",
    "Penrose",
    "Quenby",
    "Ravensby",
    "Saltash",
    "Tolland",
    "Uffcott",
    "Vernham",
    "Wendron",
    "Yelland",
]
"""am_memory.cli.letters has 36, and its seeds depend on their number."""


@dataclass(frozen=True)
class Row:
    """One scheme.

    Attributes:
        by_turn: codes recalled of each turn's.
        seconds, read_tokens, kv_tokens: of each turn: wall time, tokens that were read (a summariser's among them; not
            those found in the cache), and the cache after the answer.
    """

    scheme: str
    limit_tokens: int
    asked: int
    by_turn: list[int]
    seconds: list[float]
    read_tokens: list[int]
    kv_tokens: list[float]

    @property
    def recalled(self) -> int:
        return sum(self.by_turn)


@dataclass(frozen=True)
class Turn:
    """One turn: the facts in the user's message, and the page that the tool returns."""

    facts: tuple[Fact, ...]
    page: str

    def messages(self, number: int) -> list[BaseMessage]:
        call = {"name": "read_page", "args": {"number": number}, "id": f"call_{number}", "type": "tool_call"}
        told = " ".join(fact.sentence for fact in self.facts)
        return [
            HumanMessage(f"{told} Keep this in mind, and read page {number} of the chronicle."),
            AIMessage("", tool_calls=[call]),
            ToolMessage(self.page, tool_call_id=f"call_{number}", name="read_page"),
        ]


def write_turns(seed: int, num_turns: int, num_facts: int, num_sentences: int) -> list[Turn]:
    rng = random.Random(seed)
    names = rng.sample([*TOWNS, *MORE_TOWNS], num_facts)
    told = [Fact(name, str(rng.randint(1000, 9999))) for name in names]
    by_turn = [tuple(told[number::num_turns]) for number in range(num_turns)]
    return [Turn(facts, " ".join(prose(rng, num_sentences))) for facts in by_turn]


def trimming(model: ChatAMMemory, limit_tokens: int) -> Middleware:
    """Shows the model the last messages that fit, from one of the user's on."""

    @wrap_model_call
    def trim(request: ModelRequest[Any], handler: Callable[..., Any]) -> Any:
        messages = [SystemMessage(SYSTEM), *request.messages]
        kept = trim_messages(
            messages, max_tokens=limit_tokens, token_counter=model, include_system=True, start_on="human"
        )
        return handler(request.override(messages=kept[1:]))

    return trim


def summarising(model: ChatAMMemory, limit_tokens: int, args: argparse.Namespace, **options: Any) -> Middleware:
    summariser = ChatAMMemory(model=model.memory, max_tokens=args.summary_tokens, **NO_SAMPLING)
    keep = ("messages", args.keep_messages)
    return SummarizationMiddleware(summariser, trigger=("tokens", limit_tokens), keep=keep, **options)


SCHEMES: dict[str, Callable[[ChatAMMemory, int, argparse.Namespace], list[Middleware]]] = {
    "full": lambda model, limit, args: [],
    "ours": lambda model, limit, args: [
        AMMemoryMiddleware(
            policy=MemoryPolicy(
                trigger_tokens=limit,
                keep_ratio=args.keep_ratio,
                compact_fraction=args.compact_fraction,
                max_compact_tokens=int(args.max_compact * limit),
                tool_result_weight=args.tool_result_weight,
                ridge=args.ridge,
            )
        )
    ],
    "summary": lambda model, limit, args: [summarising(model, limit, args)],
    "summary-untrimmed": lambda model, limit, args: [summarising(model, limit, args, trim_tokens_to_summarize=None)],
    "trimming": lambda model, limit, args: [trimming(model, limit)],
}


def run(memory: Memory, scheme: str, turns: Sequence[Turn], limit_tokens: int, args: argparse.Namespace) -> Row:
    model = ChatAMMemory(model=memory, max_tokens=ANSWER_TOKENS, **NO_SAMPLING)
    middleware = SCHEMES[scheme](model, limit_tokens, args)
    agent = create_agent(model, [], system_prompt=SYSTEM, middleware=middleware)
    messages: list[BaseMessage] = []
    seconds, read_tokens, kv_tokens = [], [], []
    for number, turn in enumerate(turns, 1):
        usage = UsageMetadataCallbackHandler()
        started = time.perf_counter()
        state = agent.invoke({"messages": [*messages, *turn.messages(number)]}, {"callbacks": [usage]})
        seconds.append(time.perf_counter() - started)
        messages = state["messages"]
        read_tokens.append(num_read(usage))
        kv_tokens.append(messages[-1].response_metadata["am_memory"]["kv_tokens"])
        print(
            f"{scheme:18s} turn {number:3d}  {seconds[-1]:6.1f} s  {read_tokens[-1]:6,} read  {kv_tokens[-1]:6,.0f} in "
            f"the cache  {len(messages)} messages",
            flush=True,
        )
    by_turn = ask(model, middleware, messages, turns)
    for name in memory.names():
        memory.delete(name)
    asked = sum(len(turn.facts) for turn in turns)
    row = Row(scheme, limit_tokens, asked, by_turn, seconds, read_tokens, kv_tokens)
    print(f"{scheme:18s} {row.recalled} of {asked} recalled, by turn {by_turn}", flush=True)
    return row


def ask(
    model: ChatAMMemory, middleware: list[Middleware], messages: list[BaseMessage], turns: Sequence[Turn]
) -> list[int]:
    """How many codes of each turn are recalled."""
    agent = create_agent(model, [], system_prompt=SYSTEM, middleware=middleware)
    settled = agent.invoke({"messages": [*messages, HumanMessage(turns[0].facts[0].question)]})["messages"][:-2]
    # A summariser goes by the size that the last answer reported, so that it would run again for every question.
    others = [one for one in middleware if not isinstance(one, SummarizationMiddleware)]
    agent = create_agent(model, [], system_prompt=SYSTEM, middleware=others)
    by_turn = []
    for turn in turns:
        asked = ([*settled, HumanMessage(fact.question)] for fact in turn.facts)
        answers = [agent.invoke({"messages": messages})["messages"][-1].text for messages in asked]
        by_turn.append(sum(fact.code in answer for fact, answer in zip(turn.facts, answers, strict=True)))
    return by_turn


def num_read(usage: UsageMetadataCallbackHandler) -> int:
    used = usage.usage_metadata.values()
    return sum(one["input_tokens"] - one["input_token_details"]["cache_read"] for one in used)


def history_tokens(memory: Memory, turns: Sequence[Turn]) -> int:
    """The number of tokens of the whole conversation, with a short answer in each turn."""
    messages: list[BaseMessage] = [SystemMessage(SYSTEM)]
    for number, turn in enumerate(turns, 1):
        messages += [*turn.messages(number), AIMessage("I have read the page, and I keep the codes in mind.")]
    return ChatAMMemory(model=memory).get_num_tokens_from_messages(messages)


def summary(rows: Sequence[Row]) -> str:
    header = (
        "scheme",
        "recalled",
        "s / turn, first third",
        "last third",
        "tokens read / turn, first third",
        "last third",
        "cache at most, tokens",
    )
    return table(
        header,
        [
            (
                row.scheme,
                f"{row.recalled} of {row.asked}",
                *(f"{value:.1f}" for value in thirds(row.seconds)),
                *(f"{value:,.0f}" for value in thirds(row.read_tokens)),
                f"{max(row.kv_tokens):,.0f}",
            )
            for row in rows
        ],
    )


def thirds(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last third."""
    count = max(len(values) // 3, 1)
    return statistics.median(values[:count]), statistics.median(values[-count:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--sentences", type=int, default=16, help="of each page that the tool returns")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--keep-ratio", type=float, default=0.2, help="ours")
    parser.add_argument("--compact-fraction", type=float, default=0.8, help="ours")
    parser.add_argument("--max-compact", type=float, default=0.55, help="ours; a fraction of the limit")
    parser.add_argument("--tool-result-weight", type=float, default=0.02, help="ours")
    parser.add_argument("--ridge", type=float, default=0.5, help="ours")
    parser.add_argument("--keep-messages", type=int, default=20, help="SummarizationMiddleware's keep; 20 is its own")
    parser.add_argument("--summary-tokens", type=int, default=512, help="of a summary at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    if args.facts < args.turns:
        parser.error(f"--facts {args.facts} is fewer than --turns {args.turns}: each turn tells at least one")
    if args.facts > len(TOWNS) + len(MORE_TOWNS):
        parser.error(f"--facts {args.facts}: there are {len(TOWNS) + len(MORE_TOWNS)} towns")
    memory = Memory.from_pretrained(args.model, policy=ROOMY)
    turns = write_turns(args.seed, args.turns, args.facts, args.sentences)
    num_tokens = history_tokens(memory, turns)
    if num_tokens > memory.engine.info.window_tokens:
        parser.error(
            f"the full history is {num_tokens} tokens, the model's window {memory.engine.info.window_tokens}: give "
            "fewer --turns or --sentences"
        )
    rows = []
    for scheme in args.schemes:
        rows.append(run(memory, scheme, turns, num_tokens // 4, args))
        write_json(args.out, [asdict(row) for row in rows])
    print(f"\n{args.model}, {num_tokens:,} tokens in {args.turns} turns, limit {num_tokens // 4:,}; {machine()}\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
