"""The problems that `benchmarks/reasoning.py` comes with, and how it reads answers and drops tokens."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HEAD, EXAMPLES, QUESTION = tuple(range(4)), tuple(range(100, 120)), tuple(range(200, 206))


@pytest.fixture
def reasoning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module; scripts find each other in their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("reasoning")


def test_there_are_a_hundred_different_problems_with_integers_as_answers(reasoning: ModuleType) -> None:
    problems = reasoning.load(reasoning.PROBLEMS / "grade_school.jsonl")
    assert len({problem.problem for problem in problems}) == len(problems) >= 100
    assert all(type(problem.answer) is int for problem in problems)


def test_the_examples_are_solved_and_none_of_them_is_a_problem(reasoning: ModuleType) -> None:
    examples = reasoning.load(reasoning.PROBLEMS / "grade_school_examples.jsonl")
    problems = reasoning.load(reasoning.PROBLEMS / "grade_school.jsonl")
    assert not {example.problem for example in examples} & {problem.problem for problem in problems}
    for example in examples:
        assert str(example.answer) in example.solution
        assert reasoning.extract(example.worked()[1]["content"]) == example.answer


@pytest.mark.parametrize(
    "line", ['{"problem": "How many?"}', '{"problem": "How many?", "answer": "12"}', '{"problem": "How', "12"]
)
def test_a_line_that_is_no_problem_is_named(reasoning: ModuleType, tmp_path: Path, line: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "One and one?", "answer": 2}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        reasoning.load(path)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 3 * 4 = 12. The answer is 12.", 12),
        ("The answer is $1,200. That is for 30 days.", 1200),
        ("The answer is **-4** degrees.", -4),
        ("The answer is 12.00 dollars.", 12),
        ("The answer is:\n\\[ \\boxed{204} \\]", 204),
        ("First, the answer is 5. No, wait: the answer is 7.", 7),
        ("So 6 * 7 = 42 apples", 42),
        ("The answer is clear: 9 - 2 = 7", 7),
        ("The answer is 2.5.", None),
        ("I do not know.", None),
    ],
)
def test_the_answer_is_read_from_what_a_model_says(reasoning: ModuleType, text: str, answer: int | None) -> None:
    assert reasoning.extract(text) == answer


def test_a_window_drops_half_as_soon_as_it_is_full_and_never_the_problem(reasoning: ModuleType) -> None:
    prompt = reasoning.Prompt(HEAD, EXAMPLES, QUESTION, reasoning.Problem("How many?", 1))
    whole = [*HEAD, *EXAMPLES, *QUESTION]
    assert reasoning.window(prompt, (), 31) == whole  # room for one token
    assert reasoning.window(prompt, (), 30) == [*HEAD, *EXAMPLES[10:], *QUESTION]
    answer = tuple(range(300, 310))
    assert reasoning.window(prompt, answer, 31) == [*HEAD, *EXAMPLES[11:], *QUESTION, *answer]
    assert reasoning.window(prompt, answer, 18) == [*HEAD, *QUESTION, *answer[4:]]
    for limit in range(12, 60):
        kept = reasoning.window(prompt, answer, limit)
        assert len(kept) < limit
        assert set(HEAD + QUESTION) <= set(kept)


def test_a_limit_without_room_for_the_longest_problem_is_refused(reasoning: ModuleType) -> None:
    prompt = reasoning.Prompt(HEAD, EXAMPLES, QUESTION, reasoning.Problem("How many?", 1))
    reasoning.check_limits([12], [prompt])
    with pytest.raises(ValueError, match=r"--limits 11: 10 tokens are taken .* give 12 or more"):
        reasoning.check_limits([11], [prompt])
