"""`am-memory serve`: how its options become settings, and errors before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import am_memory_server.serve
import pytest
from am_memory_server import ServerSettings
from inside import shared_of
from typer.testing import CliRunner

from am_memory import Memory, MemoryPolicy
from am_memory.cli.main import app
from am_memory.cli.serve import KEYS_VARIABLE, OPERATOR_KEYS_VARIABLE, name_of
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> list[tuple[Memory, ServerSettings]]:
    """The memory and the settings that would have been served; every model is the tiny one."""
    found: list[tuple[Memory, ServerSettings]] = []

    def from_pretrained(model: str, *, policy: MemoryPolicy, store: str | None, **_: Any) -> Memory:
        return Memory(engine, policy, store=store)

    monkeypatch.setattr(Memory, "from_pretrained", from_pretrained)
    monkeypatch.setattr(am_memory_server.serve, "serve", lambda memory, settings: found.append((memory, settings)))
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    return found


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_every_option_reaches_the_server(started: list[tuple[Memory, ServerSettings]], tmp_path: Path) -> None:
    options = (
        "--trigger-tokens 300 --keep-ratio 0.5 --host 0.0.0.0 --port 9000 --api-key first-key --api-key second-key "
        "--operator-key third-key --max-pending-mib 8 --max-connections 9 --body-seconds 10 --idle-seconds 11 "
    )
    options += "--cors-origin https://a.example --max-tokens 7 --max-active 2 --max-queued 3 --max-sessions 5 "
    options += "--max-answer-mib 7 "
    options += f"--max-session-mib 6 --max-body-mib 1 --max-body-values 999 --shutdown-seconds 1.5 --store {tmp_path}"
    result = run(*options.split())
    assert result.exit_code == 0, result.output
    ((memory, settings),) = started
    assert (memory.policy.trigger_tokens, memory.policy.keep_ratio) == (300, 0.5)
    assert shared_of(memory).require_store().url == str(tmp_path)
    assert settings == ServerSettings(
        model_name="demo",
        host="0.0.0.0",
        port=9000,
        api_keys=("first-key", "second-key"),
        cors_origins=("https://a.example",),
        max_tokens=7,
        max_active=2,
        max_answer_bytes=7 * 2**20,
        max_queued=3,
        max_sessions=5,
        max_session_bytes=6 * 2**20,
        max_body_bytes=2**20,
        max_body_values=999,
        operator_keys=("third-key",),
        max_pending_bytes=8 * 2**20,
        max_connections=9,
        body_seconds=10,
        idle_seconds=11,
        shutdown_seconds=1.5,
    )


def test_keys_are_read_from_the_environment(
    started: list[tuple[Memory, ServerSettings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "first-key,second-key")
    monkeypatch.setenv(OPERATOR_KEYS_VARIABLE, "third-key")
    assert run("--host", "0.0.0.0").exit_code == 0
    assert started[0][1].api_keys == ("first-key", "second-key")
    assert started[0][1].operator_keys == ("third-key",)


def test_a_server_for_other_machines_without_a_key_does_not_start(
    started: list[tuple[Memory, ServerSettings]],
) -> None:
    result = run("--host", "0.0.0.0")
    assert result.exit_code == 1
    assert "there is no API key" in result.output
    assert started == []


def test_a_model_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    assert name_of("demo") == "demo"
    assert name_of("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert name_of(str(tmp_path / "tiny.gguf")) == "tiny"


def test_an_unknown_setting_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidInput, match=r"there is no max_session \(did you mean max_sessions\?\)$"):
        ServerSettings(max_session=3)
    with pytest.raises(InvalidInput) as refused:
        ServerSettings(api_keys=("secret",))
    assert "secret" not in str(refused.value)
