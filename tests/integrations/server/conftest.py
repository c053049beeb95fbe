"""A client of the server, and the tiny model in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serving import NewServer, Server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def http(new_server: NewServer, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a server with a store of its own."""
    with new_server(store=tmp_path) as server, server.http() as http:
        yield http
