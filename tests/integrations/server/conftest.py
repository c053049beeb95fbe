"""A client of the server, and the tiny model in a folder."""

from __future__ import annotations

import openai
import pytest
from serving import Server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()
