"""A server of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import NewServer, Server, servers_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory.engines.transformers import TransformersEngine


@pytest.fixture(scope="session")
def new_server(engine: TransformersEngine) -> NewServer:
    return servers_of(engine)


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
