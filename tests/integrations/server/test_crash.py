"""kill -9 during a save and during a compaction: after a restart no finished turn is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
from serving import NewServer, until

from am_memory import MemoryPolicy

SERVE = dedent("""
    import os, signal, sys, uvicorn
    from am_memory import Memory, MemoryPolicy
    from am_memory_server import ServerSettings, create_app

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def dies_at(call, number):
        def counted(*args, **kwargs):
            nonlocal number
            number -= 1
            return call(*args, **kwargs) if number else die()
        return counted

    model, store, port_file, where, number = sys.argv[1:]
    if where == "save":
        os.link = dies_at(os.link, int(number))  # all is written, and does not have its name yet
    elif where == "compaction":
        import am_memory.compaction.job as order
        order.compact = dies_at(order.compact, int(number))
    policy = MemoryPolicy(trigger_tokens=200, keep_ratio=0.25, pinned=3, keep_recent=16)
    memory = Memory.from_pretrained(model, policy=policy, store=store, device="cpu")
    config = uvicorn.Config(create_app(memory, ServerSettings(max_tokens=8)), port=0, log_level="error")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    with open(port_file + ".new", "w") as file:
        file.write(str(socket.getsockname()[1]))
    os.rename(port_file + ".new", port_file)
    server.run([socket])
""")


@contextmanager
def serving(model: Path, folder: Path, where: str = "nowhere", number: int = 0) -> Iterator[httpx.Client]:
    """A server in a process of its own, which kills itself at the given call of `where`."""
    port_file = folder / "port"
    port_file.unlink(missing_ok=True)
    arguments = [str(model), str(folder / "store"), str(port_file), where, str(number)]
    process = subprocess.Popen([sys.executable, "-c", SERVE, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until(lambda: port_file.exists() or process.poll() is not None, seconds=120)
        with httpx.Client(base_url=f"http://127.0.0.1:{port_file.read_text()}", timeout=60) as http:
            until(lambda: _answers(http))
            yield http
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def say(http: httpx.Client, messages: list[Any], text: str) -> list[Any]:
    """The conversation with one more turn, and how many of its tokens were cached."""
    told = [*messages, {"role": "user", "content": text}]
    answer = http.post("/v1/chat/completions", json={"messages": told, "user": "ada", "temperature": 0}).json()
    return [*told, answer["choices"][0]["message"]]


@pytest.mark.parametrize(("where", "number"), [("save", 3), ("compaction", 2)])
def test_no_finished_turn_is_lost_by_a_kill(
    model_folder: Path, tmp_path: Path, new_server: NewServer, where: str, number: int
) -> None:
    """A parent's file was once deleted before its successor's was whole: a kill in between lost both."""
    messages: list[Any] = []
    with serving(model_folder, tmp_path, where, number) as http, pytest.raises(httpx.TransportError):
        for turn in range(100):
            messages = say(http, messages, f"turn {turn}, with a few words more")
    assert len(messages) >= 4
    policy = MemoryPolicy(trigger_tokens=200, keep_ratio=0.25, pinned=3, keep_recent=16)
    with new_server(store=tmp_path / "store", policy=policy) as server, server.http() as http:
        told = [*messages, {"role": "user", "content": "what did I say?"}]
        answer = http.post("/v1/chat/completions", json={"messages": told, "user": "ada", "temperature": 0}).json()
        view = http.get("/v1/memory/sessions/ada").json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert answer["usage"]["prompt_tokens"] - cached < 60  # only the new question was read
    assert view["num_messages"] == len(messages) + 2
