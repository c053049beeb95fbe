"""`am-memory compare`: what it reads and asks, and the rows that it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import Result

from am_memory import Memory, MemoryPolicy
from am_memory.cli.comparison import material
from am_memory.cli.comparison.judge import Answer, Outcome
from am_memory.cli.comparison.picture import NAME_WIDTH, PANEL_WIDTH, draw
from am_memory.cli.comparison.ways import half_of, summarised
from am_memory.cli.letters import letters
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput

CommandLine = Callable[..., Result]
TEXT = " ".join(letter.text for letter in letters(0, 3))
ROWS = ["full cache", "am-memory", "recall alone", "eviction", "sliding window", "summary"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def lines_of(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# What is read and asked


def test_a_text_is_cut_at_its_sentences_and_loses_no_word(text: Path) -> None:
    found = [*material.pieces(TEXT)]
    assert " ".join(found).split() == TEXT.split()
    assert all(piece.endswith(".") and len(piece) <= material.PIECE_CHARS for piece in found)


def test_a_text_without_spaces_is_cut_all_the_same() -> None:
    assert "".join(material.pieces("x" * 2000)) == "x" * 2000


def test_sentences_to_finish_lie_all_over_the_text_and_begin_nowhere_else() -> None:
    questions = material.to_finish([TEXT, "Short one."], 4)
    places = [TEXT.index(question.opening) for question in questions]
    assert len(questions) == 4
    assert places == sorted(places)
    assert places[-1] > len(TEXT) / 2
    for question, place in zip(questions, places, strict=True):
        assert TEXT[place:].startswith(f"{question.opening} {question.accepted[0]}")
        assert TEXT.count(question.opening) == 1


def test_a_text_of_one_repeated_sentence_has_nothing_to_ask() -> None:
    assert material.to_finish(["The harbour master kept a careful record of the changing tides. " * 9], 4) == ()


@pytest.mark.parametrize("said", ["It is the Vesper.", "the  VESPER, I think", "Vesper"])
def test_an_answer_is_right_if_it_holds_the_accepted_words(said: str) -> None:
    assert material.Question("?", ("Carrow", "vesper")).is_right(said)


def test_part_of_a_word_is_not_the_word() -> None:
    assert not material.Question("?", ("22",)).is_right("It was 221.")


def test_a_chat_has_a_turn_for_each_message_of_the_user(tmp_path: Path) -> None:
    said = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    system = {"role": "system", "content": "Be kind."}
    chat = material.of_chat(lines_of(tmp_path / "chat.jsonl", system, *said), 0)
    whole = material.of_chat(lines_of(tmp_path / "whole.jsonl", {"messages": [system, *said]}), 0)
    assert chat == whole
    assert chat.continuation == said[-1]
    assert chat.turns == ((system, *said[:2]), tuple(said[2:4]), (said[4],))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"chat.jsonl, line 1: .*one JSON object a line"),
        ('\n{"role": "user"}\n{"role": "user", "content": "a"}', r"line 2: a message is"),
        ("[1]", r"line 1: \[1\] is not a JSON object"),
        ('{"role": "user", "content": "a"}', r"fewer than two messages"),
        ("", r"fewer than two messages"),
    ],
)
def test_what_is_no_chat_is_refused_by_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match=message):
        material.of_chat(path, 4)


def test_a_line_of_json_may_hold_other_line_ends(tmp_path: Path) -> None:
    """Clients write U+2028 and U+0085 as they are: lines were cut there, and a right file was refused."""
    said = [{"role": "user", "content": f"one\u2028two\x85{number}"} for number in range(3)]
    path = tmp_path / "chat.jsonl"
    path.write_text("\r\n".join(json.dumps(message, ensure_ascii=False) for message in said), encoding="utf-8")
    assert material.of_chat(path, 0).continuation == said[-1]


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"chat.jsonl, line 1: "):
        material.of_chat(path, 0)


def test_questions_of_a_file_take_one_answer_or_several(tmp_path: Path) -> None:
    one, several = (
        {"question": "Who?", "answer": "Ada"},
        {"question": "When?", "answer": ["May", "5/"], "opening": "In"},
    )
    path = lines_of(tmp_path / "questions.jsonl", one, several)
    assert material.with_questions(material.of_letters(), path).questions == (
        material.Question("Who?", ("Ada",)),
        material.Question("When?", ("May", "5/"), "In"),
    )


@pytest.mark.parametrize("answer", [None, [], "", ["Ada", 5]])
def test_a_question_without_an_answer_is_refused(tmp_path: Path, answer: object) -> None:
    path = lines_of(tmp_path / "questions.jsonl", {"question": "Who?", "answer": answer})
    with pytest.raises(InvalidInput, match=r"questions.jsonl, line 1: "):
        material.with_questions(material.of_letters(), path)


# The summary


def test_a_summary_takes_the_place_of_whole_turns_and_spares_the_last() -> None:
    messages = [{"role": role} for _ in range(3) for role in ("user", "assistant")]
    starts = [0, 10, 40, 50, 80, 90]
    assert half_of(messages, starts, 120) == 2
    assert half_of(messages, starts, 200) == 4
    assert half_of(messages, [0, 90, 100, 110, 120, 130], 140) == 2


def test_a_summarised_conversation_stays_small_and_keeps_its_system_prompt(engine: TransformersEngine) -> None:
    said = [letter.messages for letter in letters(0, 4, num_sentences=3)]
    turns = [({"role": "system", "content": "Be kind."}, *said[0]), *map(tuple, said[1:])]
    policy = MemoryPolicy(trigger_tokens=512)
    session = summarised(Memory(engine, policy), turns, policy, lambda done, total: None)
    assert len(session.tokens) < 1000
    assert session.messages[0] == turns[0][0]
    assert session.messages[-2:] == list(turns[-1])


# The command


@pytest.mark.usefixtures("tiny")
def test_a_row_for_each_way_and_each_policy_with_a_picture(run: CommandLine, text: Path, tmp_path: Path) -> None:
    roomy = tmp_path / "roomy.json"
    roomy.write_text('{"keep_ratio": 0.5}', encoding="utf-8")
    plot, out = tmp_path / "table.svg", tmp_path / "table.json"
    options = ("--num-questions", "2", "--policy", str(roomy), "--plot", str(plot), "--out", str(out))
    result = run("compare", "--text", str(text), *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    names = [*ROWS[:2], "roomy", *ROWS[2:]]
    assert [row["name"] for row in rows] == names
    assert all(re.search(rf"│ {name} +│ +\d of 2 │", result.output) for name in names)
    full, ours, *_ = rows
    assert full["kl"] < 1e-6 < ours["kl"]
    assert full["kv_tokens"] > 1024
    assert ours["kv_tokens"] < 400
    assert "am-memory holds" in result.output
    assert not re.search("compacted tokens|less than 5 %", result.output + result.stderr)
    shown = [element.text for element in ElementTree.parse(plot).getroot().iter()]
    assert set(names) <= set(shown)


@pytest.mark.usefixtures("tiny")
def test_without_questions_there_is_still_a_table(run: CommandLine, text: Path) -> None:
    result = run("compare", "--text", str(text), "--num-questions", "0")
    assert result.exit_code == 0, result.output
    assert re.search(r"am-memory holds \d+% of the full cache's tokens\.", result.output)


@pytest.mark.usefixtures("tiny")
def test_a_text_beyond_the_window_is_refused(run: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    result = run("compare", "--text", str(path))
    assert result.exit_code == 1
    assert re.fullmatch(r"InvalidInput: .* are more than the 4,096 .*: give a shorter text\n", result.stderr)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("content", "message"),
    [('{"keep": 1}', r"InvalidPolicy: .*keep"), ("{", r"InvalidInput: .*JSON object"), ("[]", r"InvalidInput: .*JSON")],
)
def test_a_policy_file_that_is_none_is_refused(run: CommandLine, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content, encoding="utf-8")
    result = run("compare", "--policy", str(path))
    assert result.exit_code == 1
    assert re.match(message, result.stderr)


@pytest.mark.usefixtures("tiny")
def test_two_policies_of_one_name_are_refused(run: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "am-memory.json"
    path.write_text("{}", encoding="utf-8")
    assert "there is a row 'am-memory' already" in run("compare", "--policy", str(path)).stderr


def test_panels_stand_side_by_side() -> None:
    """Bars and their figures never reach the next panel."""
    answers = (Answer("x", True, -1.0, 100.0, 1, 1.0),)
    outcomes = [Outcome(f"<{n}>", n, -1.0, n / 7, 10.0**n, 2**n, 3.0 * n, 1.0, answers) for n in range(4)]
    svg = ElementTree.fromstring(draw(outcomes, "a & b"))
    bars = [element.attrib for element in svg.iter() if "rx" in element.attrib]
    starts = sorted({float(bar["x"]) for bar in bars})
    assert starts[0] == NAME_WIDTH
    assert all(right - left == PANEL_WIDTH for left, right in pairwise(starts))
    assert all(float(bar["width"]) <= PANEL_WIDTH - 60 for bar in bars)
