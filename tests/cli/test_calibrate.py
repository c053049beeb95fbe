"""`am-memory calibrate` on the tiny model: the file, its use in a policy, the plot, and errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from am_memory import Memory, MemoryPolicy
from am_memory.cli.main import app
from am_memory.engines.transformers import TransformersEngine

TEXT = "The quick brown fox jumps over the lazy dog, and 27 hens look on. " * 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> Path:
    """A folder with a text; the tiny model is loaded instead of every other one."""
    tiny = engine
    monkeypatch.setattr(Memory, "from_pretrained", lambda model, *, engine, policy: Memory(tiny, policy))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(folder: Path, *options: str, text: str = "text.txt", out: str = "curves.json") -> Result:
    fixed = ["calibrate", "tiny", "--text", str(folder / text), "--out", str(folder / out), "--block-tokens", "100"]
    return CliRunner().invoke(app, [*fixed, *options], env={"COLUMNS": "100"})


def test_a_policy_takes_the_file(folder: Path, engine: TransformersEngine) -> None:
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert "6 heads" in result.output
    policy = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, keep_recent=8, head_budget=folder / "curves.json")
    session = Memory(engine, policy).session()
    session.append(TEXT)
    assert session.stats.num_compactions > 1


def test_the_curves_can_be_drawn(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(folder, "--plot", str(folder / "curves.png"))
    assert result.exit_code == 0, result.output
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_nothing_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(folder, "--plot", str(folder / "curves.png"))
    assert result.exit_code == 1
    assert "--plot needs matplotlib: install attention-matching-memory[bench]" in result.output
    assert not (folder / "curves.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": "none.txt"}, "none.txt cannot be read"),
        ({"out": "curves.txt"}, "name it"),
        ({"out": "nowhere/curves.json"}, "there is no folder"),
    ],
)
def test_files_are_checked_before_the_measurement(folder: Path, wrong: dict[str, str], message: str) -> None:
    result = run(folder, **wrong)
    assert result.exit_code == 1
    assert message in result.output
