"""benchmarks/qa.py: both formats, the samples, the letters, and every scheme on a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import qa
import torch
from qa_files import LETTERS, Document, Question, load, plain_text
from repetition import OBSERVED_TOKENS, SINKS, Size

from am_memory import Memory, Session
from am_memory.budgets import calibrated_ranks
from am_memory.cli.questions import question_turn
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, PromptTooLong

QUALITY_QUESTION = {"question": "Who?", "options": ["A cat", "A dog", "An owl", "A hen"], "gold_label": 3}
LONGHEALTH_QUESTION = {
    "question": "Which drug?",
    **{f"answer_{letter.lower()}": f"Drug {number}" for number, letter in enumerate(LETTERS)},
    "correct": "Drug 4",
}
TEXT = "The owl sleeps in the barn. " * 12
DOCUMENT = Document("a text", TEXT, (Question("Who sleeps?", ("The cat", "The owl"), 1),))


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine=engine, policy=qa.POLICY)


@pytest.fixture
def full(memory: Memory) -> Session:
    return qa.read_document(memory, DOCUMENT.text)


def test_lines_of_quality_are_read_and_those_of_one_article_put_together(tmp_path: Path) -> None:
    other = {**QUALITY_QUESTION, "question": "Where?", "gold_label": 1, "difficult": 0}
    path = written(
        tmp_path / "some.dev",
        {"article": "An owl.", "questions": [QUALITY_QUESTION]},
        {"article": "A hen.", "questions": [other]},
        {"article": "An owl.", "questions": [other], "title": "Owls"},
    )
    owls, hens = load(path)
    assert (owls.name, owls.text, [each.text for each in owls.questions]) == (
        "some.dev, line 1",
        "An owl.",
        ["Who?", "Where?"],
    )
    assert [each.right for each in owls.questions] == [2, 0]
    assert (hens.name, len(hens.questions)) == ("some.dev, line 2", 1)


def test_html_is_left_out_and_plain_text_left_alone() -> None:
    article = "<html> <h1>\n Owls </h1>\n<p>They sleep\nby <i>day</i>,<br/> and hunt&nbsp;&amp; eat.</p></html>"
    assert plain_text(article) == "Owls\nThey sleep by day,\nand hunt\xa0& eat."
    assert plain_text(" 1 < 2\n\nand 3 > 2 ") == "1 < 2\n\nand 3 > 2"


def test_patients_of_longhealth_are_read_with_all_their_reports(tmp_path: Path) -> None:
    texts = {"text_0": "First report.", "text_1": "Second report."}
    patient = {"name": "Ada", "texts": texts, "questions": [LONGHEALTH_QUESTION]}
    (document,) = load(written(tmp_path / "patients.json", {"patient_01": patient}))
    assert document.name == "patients.json, patient_01"
    assert document.text == "First report.\n\nSecond report."
    assert document.questions[0].options[document.questions[0].right] == "Drug 4"


def test_a_file_of_neither_format_is_refused_with_the_place_and_what_is_expected(tmp_path: Path) -> None:
    without_label = {key: value for key, value in QUALITY_QUESTION.items() if key != "gold_label"}
    good = {"article": "An owl.", "questions": [QUALITY_QUESTION]}
    bad = {"article": "An owl.", "questions": [QUALITY_QUESTION, without_label]}
    too_high = {"article": "An owl.", "questions": [{**QUALITY_QUESTION, "gold_label": 5}]}
    patient = {"texts": {"text_0": "A report."}, "questions": [{**LONGHEALTH_QUESTION, "correct": "Drug 9"}]}
    for lines, place in (
        ((good, bad), "line 2, questions.1.gold_label: Field required"),
        ((too_high,), "line 1, questions.0: .*gold_label 5 is above the 4 options"),
        ((good, ["no", "article"]), "line 2: .*object"),
        (({"patient_01": patient},), "patient_01, questions.0: .*'Drug 9' is none of answer_a to answer_e"),
        (({"patient_01": {"questions": []}},), "patient_01, texts: Field required"),
        ((), "is empty"),
    ):
        with pytest.raises(InvalidInput, match=f"some.file.*{place}.*expected lines of QuALITY"):
            load(written(tmp_path / "some.file", *lines))
    with pytest.raises(InvalidInput, match="missing.jsonl cannot be read"):
        load(tmp_path / "missing.jsonl")


def test_the_samples_are_whole_and_their_right_answers_are_spread() -> None:
    for path, num_options in zip(qa.SAMPLES, (4, 5), strict=True):
        documents = load(path)
        assert [len(document.questions) for document in documents] == [4, 4]
        for document in documents:
            assert 450 < len(document.text.split()) < 950
            assert "<" not in document.text
            assert len({question.right for question in document.questions}) == 4
            for question in document.questions:
                assert len(set(question.options)) == num_options


def test_letters_are_compared_where_the_answer_is_opened(full: Session) -> None:
    """The log probabilities are those of the model's own next token, and the session stays as it was."""
    question, before = DOCUMENT.questions[0], full.tokens
    log_probs = qa.letter_log_probs(full, question)
    branch = full.fork()
    opened = question_turn(full.engine, "Who sleeps?\nA. The cat\nB. The owl\nWhich answer is right?", "The answer is ")
    branch.append(full.engine.encode(opened))
    expected = branch.logits("A")[0, [ord("A"), ord("B")]].log_softmax(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
    assert full.tokens == before


def test_letters_of_several_tokens_are_refused(full: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qa, "LETTERS", ("one", "two"))
    with pytest.raises(InvalidInput, match="not one last token each"):
        qa.letter_log_probs(full, DOCUMENT.questions[0])


@pytest.mark.parametrize("scheme", [name for name in qa.SCHEMES if name not in (*qa.WITHOUT_RATIO, "summary")])
def test_a_scheme_keeps_as_much_as_the_ratio_says(memory: Memory, full: Session, scheme: str) -> None:
    size = Size(4.0, OBSERVED_TOKENS)
    session = qa.SCHEMES[scheme](full, memory, size)
    assert session.tokens == full.tokens
    assert full.stats.num_compactions == 0
    assert session.stats.num_compactions == 1
    assert session.stats.exact_tokens == SINKS + OBSERVED_TOKENS
    assert session.stats.kv_tokens == pytest.approx(size.tokens(full), abs=SINKS)


def test_slots_in_a_pyramid_fall_linearly_from_layer_to_layer(engine: TransformersEngine) -> None:
    """Two heads in each of three layers: the shares are 1.95, 1 and 0.05 of the mean."""
    seq_len, ratio = 4000, 0.1
    ranks = calibrated_ranks(qa.pyramid(engine), torch.rand(6, seq_len), min_slots=1)
    slots = (ranks < ratio * ranks.numel()).sum(1).float() / seq_len / ratio
    expected = torch.tensor([1.95, 1.95, 1.0, 1.0, 0.05, 0.05])
    torch.testing.assert_close(slots, expected, atol=0.03, rtol=0)


def test_a_run_answers_every_question_with_every_scheme_and_nothing_twice(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = str(tmp_path / "qa.json"), []
    args = argparse.Namespace(model="tiny", schemes=list(qa.SCHEMES), ratios=[4.0, 8.0], out=out)
    qa.run(memory, DOCUMENT, args, rows)
    assert [(row["scheme"], row["ratio"]) for row in rows] == [
        (scheme, ratio) for scheme in qa.SCHEMES for ratio in ([None] if scheme in qa.WITHOUT_RATIO else [4.0, 8.0])
    ]
    for row in rows:
        assert len(row["is_right"]) == 1
        assert row["log_prob"][0] < 0
        assert row["is_right"][0] == (row["log_prob"][0] > torch.tensor(0.5).log())
    sizes = {row["scheme"]: row["kv_tokens"] for row in rows if row["ratio"] != 8.0}
    assert sizes["no context"] < sizes["ours"] < sizes["full context"]
    assert sizes["summary"] < sizes["full context"]

    read = qa.read_json(out)
    assert read == rows
    monkeypatch.setattr(qa, "read_document", None)  # nothing is left to do, so nothing is read
    qa.run(memory, DOCUMENT, args, read)
    assert read == rows


def test_a_document_that_does_not_fit_the_window_twice_is_refused(memory: Memory) -> None:
    long = Document("a long text", "owl " * 500, ())
    with pytest.raises(PromptTooLong, match="a long text takes 4512 tokens.* has 4096"):
        qa.check_window(memory, [DOCUMENT, long])
