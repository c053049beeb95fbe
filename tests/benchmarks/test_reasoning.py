"""The problems that `benchmarks/reasoning.py` comes with, how it reads answers, and what its schemes hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from am_memory import Memory
from am_memory.engines.transformers import TransformersEngine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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
        ("So 6 * 7 = 42 apples for 3 of us", 42),
        ("\\[ \\text{Time} = 15 \\]\nIt takes 15 minutes for 270 pages.", 15),
        ("That leaves 8 of 12, so 8", 8),
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


def tell(reasoning: ModuleType, engine: TransformersEngine, num_examples: int = 4) -> list:
    """Three problems after some examples of 86 tokens; every byte is one."""
    problems = [reasoning.Problem(f"What is {number} and one?", number + 1) for number in range(3)]
    examples = [
        reasoning.Problem(f"What is {number} and two?", number + 2, "One counts on.") for number in range(num_examples)
    ]
    return reasoning.prompts(engine, problems, examples)


def test_a_prompt_is_cut_before_the_examples_and_before_the_problem(
    reasoning: ModuleType, engine: TransformersEngine
) -> None:
    prompt = tell(reasoning, engine)[1]
    head, examples, question = (engine.decode(ids) for ids in (prompt.head, prompt.examples, prompt.question))
    assert reasoning.SYSTEM in head
    assert "What" not in head
    assert examples.count("The answer is") == 4
    assert question.startswith("What is 1 and one?")


def test_every_scheme_answers_every_problem_within_its_limit(reasoning: ModuleType, engine: TransformersEngine) -> None:
    told, memory = tell(reasoning, engine), Memory(engine, reasoning.ROOMY)
    for name, scheme in reasoning.SCHEMES.items():
        is_limited = name in reasoning.LIMITED
        answers = list(scheme(memory, told, 300 if is_limited else None, 200))
        assert len(answers) == len(told)
        assert all(answer.kv_tokens <= 300 for answer in answers) or not is_limited
        assert all((answer.compactions > 0) == (name == "ours") for answer in answers)


def test_reasoning_that_is_compacted_is_counted(reasoning: ModuleType, engine: TransformersEngine) -> None:
    """The third problem's answer is the one of the random model that does not end at once."""
    told, memory = tell(reasoning, engine, num_examples=2), Memory(engine, reasoning.ROOMY)
    *_, answer = reasoning.SCHEMES["ours"](memory, told, 300, 200)
    assert answer.answer_tokens == 200
    assert answer.compactions == answer.compactions_in_answer > 0
    assert answer.old_question == len(told[2].question)
    assert 0 < answer.old_answer < 200


def test_a_fork_of_what_has_read_the_examples_answers_as_if_it_had_read_all(
    reasoning: ModuleType, engine: TransformersEngine
) -> None:
    told, memory = tell(reasoning, engine), Memory(engine, reasoning.ROOMY)
    for prompt, answer in zip(told, reasoning.SCHEMES["ours"](memory, told, 300, 100), strict=True):
        policy = reasoning.MemoryPolicy(trigger_tokens=300, pinned=len(prompt.head))
        session = memory.scratch(policy=policy)
        session.append(prompt.head + prompt.examples + prompt.question)
        assert "".join(piece.text for piece in session.generate(100, reasoning.GREEDY)) == answer.text
        assert session.stats.num_compactions == answer.compactions
        assert session.stats.kv_tokens == answer.kv_tokens
