"""Servers on free ports of this machine, each in its own thread, and their clients."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Thread
from time import monotonic, sleep
from typing import Any

import httpx
import openai
import uvicorn
from am_memory_server import ServerSettings, create_app
from am_memory_server.serve import uvicorn_config
from am_memory_server.service import Service

from am_memory import Memory, MemoryPolicy
from am_memory.engines.base import Engine

POLICY = MemoryPolicy(trigger_tokens=300, keep_ratio=0.25, pinned=3, keep_recent=16, chunk_tokens=64)


@dataclass
class Server:
    """A running server."""

    url: str
    service: Service

    def client(self, key: str = "no key") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


NewServer = Callable[..., AbstractContextManager[Server]]


def servers_of(engine: Engine) -> NewServer:
    """A function that starts a server: `with new_server(store=..., api_keys=[...]) as server`."""

    @contextmanager
    def start(*, store: Any = None, policy: MemoryPolicy = POLICY, **settings: Any) -> Iterator[Server]:
        with running(Memory(engine, policy, store=store), **settings) as server:
            yield server

    return start


@contextmanager
def running(memory: Memory, **settings: Any) -> Iterator[Server]:
    own = {"model_name": "tiny", "max_tokens": 8, "shutdown_seconds": 10}
    app = create_app(memory, ServerSettings(**{**own, **settings}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn_config(app, app.state.service.settings, log_level="warning"))
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.service)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def say(http: httpx.Client, text: str, conversation: str = "tea", **options: Any) -> httpx.Response:
    """Say one thing in a new conversation."""
    asked = {"messages": [{"role": "user", "content": text}], "metadata": {"conversation_id": conversation}}
    return http.post("/v1/chat/completions", json={**asked, "temperature": 0, **options})


def until(holds: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds; on a busy machine that can take long."""
    end = monotonic() + seconds
    while not holds():
        assert monotonic() < end, "it did not happen"
        sleep(0.01)
