"""The examples run as they stand, on the bundled model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

SAYS = {
    "unbounded_chat.py": "tokens of conversation in",
    "reasoning_loop.py": "compactions on the way",
    "new_key_selection.py": "largest_values",
    "langchain_agent.py": "tokens of the agent's conversation in",
    "research_loop.py": "read through a cache of 768",
    "message_history.py": "my name is Bob",
    "hand_over.py": "with ['the letters']",
}
ARGUMENTS = {"langchain_agent.py": ["--turns", "5"], "research_loop.py": ["--pages", "4"]}


def test_every_example_is_run() -> None:
    assert set(SAYS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.model
@pytest.mark.parametrize("name", list(SAYS))
def test_the_example_runs_and_says_what_it_shows(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [name, *ARGUMENTS.get(name, [])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
