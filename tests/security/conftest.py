"""Servers of the tiny model, which are attacked; the tools for it are those of the server's own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import NewServer, Server, servers_of

from am_memory.engines.transformers import TransformersEngine


@pytest.fixture(scope="session")
def new_server(engine: TransformersEngine) -> NewServer:
    return servers_of(engine)


@pytest.fixture(scope="session")
def server(new_server: NewServer) -> Iterator[Server]:
    """One for all tests that leave it as it is; everybody may call it."""
    with new_server() as server:
        yield server
