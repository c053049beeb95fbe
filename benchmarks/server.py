"""Many clients at once on one server: latency by percentile, no cross-talk, memory bounded. Loopback only.

Each client holds a conversation of its own, and checks at each answer that the server knew exactly the tokens of this
conversation so far, no more and no less.

    python benchmarks/server.py --clients 32 --seconds 600
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import httpx
import numpy as np
import psutil
import uvicorn
from am_memory_server import ServerSettings, create_app

from am_memory import Memory, MemoryPolicy

MIB = 2**20
PARTS = "the weather", "bread", "owls", "the sea", "a bicycle", "old maps", "tea", "the night train"


@dataclass
class Figures:
    """The measurements of all clients."""

    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    most_bytes: int = 0
    most_resident: int = 0


async def client(number: int, http: httpx.AsyncClient, until: float, max_tokens: int, figures: Figures) -> None:
    """One conversation, question after question."""
    messages: list[dict[str, str]] = [{"role": "system", "content": f"The code word is {number}-{number * 7919}."}]
    known = 0
    while time.monotonic() < until:
        messages.append({"role": "user", "content": f"{number}: tell me about {PARTS[len(messages) % len(PARTS)]}."})
        started, text, usage, first = time.monotonic(), "", None, 0.0
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body(number, messages, max_tokens)) as answer:
                async for line in answer.aiter_lines():
                    chunk = parsed(line)
                    if "error" in chunk or answer.status_code != 200:
                        raise RuntimeError(line)
                    usage = chunk.get("usage") or usage
                    delta = chunk["choices"][0]["delta"].get("content") if chunk.get("choices") else None
                    first = first or (time.monotonic() - started if delta else 0.0)
                    text += delta or ""
        except (httpx.HTTPError, RuntimeError) as error:
            figures.errors.append(f"{number}: {error!r}")
            return
        assert usage is not None
        figures.first_token.append(first)
        figures.whole.append(time.monotonic() - started)
        figures.tokens += usage["completion_tokens"]
        if usage["prompt_tokens_details"]["cached_tokens"] != known:
            figures.mixed_up.append(f"{number}: {usage} after {known}")
        known = usage["total_tokens"]
        messages.append({"role": "assistant", "content": text})


def body(number: int, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    options = {"include_usage": True}
    named = {"conversation_id": f"client {number}"}
    asked = {"messages": messages, "max_tokens": max_tokens, "stream": True, "stream_options": options}
    return {**asked, "metadata": named, "seed": number}


def parsed(line: str) -> dict[str, Any]:

    return json.loads(line[6:]) if line.startswith("data: {") else {}


async def watch(http: httpx.AsyncClient, figures: Figures) -> None:
    """The largest size of all caches, and of the process."""
    process = psutil.Process()
    while True:
        lines = (await http.get("/metrics")).text.splitlines()
        held = next(line for line in lines if line.startswith("am_memory_kv_bytes "))
        figures.most_bytes = max(figures.most_bytes, int(float(held.split()[1])))
        figures.most_resident = max(figures.most_resident, process.memory_info().rss)
        await asyncio.sleep(1)


async def run(url: str, arguments: argparse.Namespace) -> Figures:
    figures, until = Figures(), time.monotonic() + arguments.seconds
    limits = httpx.Limits(max_connections=arguments.clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        watching = asyncio.ensure_future(watch(http, figures))
        await asyncio.gather(
            *(client(number, http, until, arguments.max_tokens, figures) for number in range(arguments.clients))
        )
        watching.cancel()
    return figures


def report(figures: Figures, seconds: float) -> None:
    def row(name: str, values: list[float]) -> str:
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return f"| {name} | {p50:.1f} | {p90:.1f} | {p99:.1f} | {max(values):.1f} |"

    print(f"{len(figures.whole)} answers, {figures.tokens} tokens in {seconds:.0f} s: {figures.tokens / seconds:.1f}/s")
    print("\n| seconds | median | 90 % | 99 % | most |\n| --- | --- | --- | --- | --- |")
    print(row("to the first token", figures.first_token))
    print(row("to the end of the answer", figures.whole))
    print(f"\ncaches {figures.most_bytes / MIB:.0f} MiB at most, process {figures.most_resident / MIB:.0f} MiB at most")
    print(
        f"{len(figures.errors)} errors, {len(figures.mixed_up)} mixed up", *figures.errors, *figures.mixed_up, sep="\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--max-active", type=int, default=4)
    parser.add_argument("--trigger-tokens", type=int, default=384)
    parser.add_argument("--max-session-mib", type=int, default=1024)
    arguments = parser.parse_args()
    memory = Memory.from_pretrained(arguments.model, policy=MemoryPolicy(trigger_tokens=arguments.trigger_tokens))
    settings = ServerSettings(
        max_active=arguments.max_active, max_session_bytes=arguments.max_session_mib * MIB, max_sessions=64
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(memory, settings), log_level="warning"))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.05)
        started = time.monotonic()
        figures = asyncio.run(run(f"http://127.0.0.1:{listener.getsockname()[1]}", arguments))
        report(figures, time.monotonic() - started)
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
