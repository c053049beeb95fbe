"""A client of the server, and the tiny model in a folder."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from serving import Server
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model in a folder, for servers in other processes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder
