"""A server of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import POLICY, NewServer, Server, running
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine


@pytest.fixture(scope="session")
def new_server(engine: TransformersEngine) -> NewServer:
    """Starts servers of their own: `with new_server(store=..., api_keys=[...]) as server`."""

    @contextmanager
    def start(*, store: Any = None, policy: MemoryPolicy = POLICY, **settings: Any) -> Iterator[Server]:
        with running(Memory(engine, policy, store=store), **settings) as server:
            yield server

    return start


@pytest.fixture(scope="session")
def server(new_server: NewServer) -> Iterator[Server]:
    """One for all tests that leave it as it is; everybody may call it."""
    with new_server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model, for servers that are processes of their own."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder
