"""The command line with a store of its own, on the tiny model where a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from am_memory import Memory, MemoryPolicy
from am_memory.cli.main import app
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import Listener, ignore
from am_memory.storage.store import Store

CommandLine = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Runs the command line with a fresh store and typed input."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str, typed: str = "") -> Result:
        return CliRunner().invoke(app, [*arguments], input=typed)

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store of the command line."""
    return Store(str(tmp_path / "am_memory" / "sessions"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> TransformersEngine:
    """Loads the tiny model instead of every other one."""

    tiny_engine = engine

    def from_pretrained(
        model: str,
        *,
        engine: str,
        policy: MemoryPolicy,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
        store: str | None = None,
        on_event: Listener = ignore,
        trust_messages: bool = False,
        originals_bytes: int | None = None,
        originals_disk_bytes: int | None = None,
        window_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> Memory:
        return Memory(tiny_engine, policy, store=store, on_event=on_event, trust_messages=trust_messages)

    monkeypatch.setattr(Memory, "from_pretrained", from_pretrained)
    return engine
