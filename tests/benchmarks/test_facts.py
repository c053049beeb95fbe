"""The chats of `benchmarks/facts.py`, its scoring, and its rows on a tiny model."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import facts
import facts_files
import pytest
from facts_files import Chat, Fact, last_place, lengthened, load, load_all, normalised

from am_memory import Memory
from am_memory.cli.questions import PLAIN
from am_memory.engines.transformers import TransformersEngine

CHATS = load_all()
EVERY_FACT = [pytest.param(chat, fact, id=f"{chat.name}, {fact.kind}") for chat in CHATS for fact in chat.facts]
EVERY_PLACES = [pytest.param(chat, fact, id=f"{chat.name}, {fact.kind}") for chat in CHATS for fact in chat.places]
SHORT = Chat(
    "short",
    (
        ("My owl is called Bella. " * 20, "Fine."),
        ("The match is on Monday. " * 20, "I see."),
        ("On Sunday, then.", "Yes."),
    ),
    (
        Fact("owl", (0,), "Which name has the bird?", "It is", ("Bella",)),
        Fact("match", (2,), "When do we play?", "We play on", ("Sunday",), ("Monday",)),
    ),
    (Fact("list", (0, 2), "Who flies, and when do we play?", "These are", ("Bella and Sunday",)),),
)


def spoken(chat: Chat) -> str:
    return "\n".join(text for turn in chat.turns for text in turn)


def runs_of_words(text: str, length: int) -> set[tuple[str, ...]]:
    words = normalised(text)
    return set(zip(*(words[start:] for start in range(length)), strict=False))


def test_five_chats_ask_for_the_same_twenty_kinds() -> None:
    kinds = [sorted(fact.kind for fact in chat.facts) for chat in CHATS]
    assert len(CHATS) == 5
    assert all(len(set(one)) == 20 and one == kinds[0] for one in kinds)


@pytest.mark.parametrize(("chat", "fact"), EVERY_FACT)
def test_an_answer_is_told_once_and_an_earlier_value_before_it(chat: Chat, fact: Fact) -> None:
    said = spoken(chat)
    places = [place for place in range(len(said)) if said.startswith(fact.answer, place)]
    assert len(places) == 1
    assert fact.answer in chat.turns[fact.turns[0]][0]
    assert fact.is_right(said)
    for earlier in fact.wrong:
        assert -1 < last_place(normalised(said), earlier) < last_place(normalised(said), fact.answer)


@pytest.mark.parametrize(("chat", "fact"), EVERY_FACT + EVERY_PLACES)
def test_a_question_has_words_of_its_own(chat: Chat, fact: Fact) -> None:
    """It neither repeats four words in a row of the chat, nor gives the answer away."""
    asked = f"{fact.question} {fact.opening}"
    assert not runs_of_words(asked, 4) & runs_of_words(spoken(chat), 4)
    assert not fact.is_right(asked)


def test_five_chats_ask_for_the_same_eight_kinds_over_several_places() -> None:
    kinds = [sorted(fact.kind for fact in chat.places) for chat in CHATS]
    assert all(len(set(one)) == 8 and one == kinds[0] for one in kinds)


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat.name)
def test_every_place_stands_in_one_turn_and_nowhere_else(chat: Chat) -> None:
    lines = (facts_files.FOLDER / f"{chat.name}.txt").read_text().partition("\nSeveral places\n")[2].split("\n")
    for line, fact in zip(filter(None, lines), chat.places, strict=True):
        places = line.split(" | ")[-1].split(" ; ")
        assert [spoken(chat).count(place) for place in places] == [1] * len(places)
        assert {turn for turn, (user, _) in enumerate(chat.turns) for place in places if place in user} == {*fact.turns}


@pytest.mark.parametrize(("chat", "fact"), EVERY_PLACES)
def test_places_lie_apart_and_every_accepted_answer_is_right(chat: Chat, fact: Fact) -> None:
    assert len(fact.turns) >= 2
    assert min(later - earlier for earlier, later in pairwise(fact.turns)) >= 2
    assert all(fact.is_right(accepted.replace(" + ", " and ")) for accepted in fact.accepted)
    assert not any(fact.is_right(other.answer) for other in chat.places if other.answer != fact.answer)
    assert fact.token_f1(fact.answer) == 1


@pytest.mark.parametrize(("chat", "fact"), [param for param in EVERY_PLACES if param.values[1].kind == "list"])
def test_no_turn_tells_a_whole_list(chat: Chat, fact: Fact) -> None:
    assert not any(fact.is_right("\n".join(turn)) for turn in chat.turns)
    assert fact.is_right(spoken(chat))


def test_plans_change_once_in_every_chat() -> None:
    for chat in CHATS:
        plan = next(fact for fact in chat.facts if fact.kind == "plan")
        assert plan.wrong
        assert not plan.is_right(plan.wrong[0])


def test_facts_lie_all_over_a_chat() -> None:
    for chat in CHATS:
        turns = sorted(fact.turns[0] for fact in chat.facts)
        assert all(sum(start <= 4 * turn // len(chat.turns) < start + 1 for turn in turns) >= 3 for start in range(4))
        assert max(later - earlier for earlier, later in pairwise(turns)) <= 6


def test_chats_share_no_answer_and_hardly_a_phrase() -> None:
    for number, chat in enumerate(CHATS):
        for other in CHATS[number + 1 :]:
            assert len(runs_of_words(spoken(chat), 6) & runs_of_words(spoken(other), 6)) <= 5
            told = {fact.answer for fact in chat.facts if fact.kind != "plan"}
            assert not told & {fact.answer for fact in other.facts}
            assert not {fact.question for fact in chat.facts} & {fact.question for fact in other.facts}
            assert not {fact.question for fact in chat.places} & {fact.question for fact in other.places}


def test_a_longer_chat_tells_the_same_facts_once() -> None:
    for chat in CHATS:
        longer = lengthened(chat, CHATS, 12_000, lambda text: len(text.split()))
        assert 12_000 <= len(spoken(longer).split()) < 12_400
        assert len(set(longer.turns)) == len(longer.turns)
        assert all(spoken(longer).count(fact.answer) == 1 for fact in longer.facts)
        for before, fact in zip(chat.facts + chat.places, longer.facts + longer.places, strict=True):
            assert [longer.turns[turn] for turn in fact.turns] == [chat.turns[turn] for turn in before.turns]


@pytest.mark.parametrize(
    ("accepted", "wrong", "text", "right"),
    [
        (("2.08 metres", "2.08 m"), (), "It is 2.08m wide.", True),
        (("2.08 metres", "2.08 m"), (), "It is 12.08 m wide.", False),
        (("2.5 milligrams", "2.5 mg"), (), "You take 25 mg.", False),
        (("07700 900 418",), (), "Call 07700-900418 after ten.", True),
        (("07700 900 418",), (), "Call 07700 900 481.", False),
        (("Perpetua",), (), "Her name is Perpétua.", True),
        (("17 July", "July 17"), (), "It is on the 17th of July.", True),
        (("17 July", "July 17"), (), "It is on July 7.", False),
        (("1240 euros",), (), "It costs 1,240 euros.", True),
        (("read(port, samples=12)",), (), "`read(port, samples=12)`", True),
        (("read(port, samples=12)",), (), "read(port, samples=2)", False),
        (("/srv/bilge/watchman",), (), "In /srv/bilge/watchman.", True),
        (("/srv/bilge/watchman",), (), "In /srv/bilge.", False),
        (("ropes + grease",), (), "Grease, and some ropes.", True),
        (("ropes + grease",), (), "Ropes and paint.", False),
        (("Wednesday",), ("Saturday",), "It went from Saturday to Wednesday.", True),
        (("Wednesday",), ("Saturday",), "On Saturday.", False),
        (("Wednesday",), ("Saturday",), "On Wednesday or Saturday.", False),
        (("egg", "eggs"), (), "Eggs!", True),
        (("egg", "eggs"), (), "Eggplant.", False),
    ],
)
def test_scoring(accepted: tuple[str, ...], wrong: tuple[str, ...], text: str, right: bool) -> None:
    assert Fact("kind", (0,), "What?", "It is", accepted, wrong).is_right(text) is right


@pytest.mark.parametrize(
    ("text", "f1"),
    [
        ("11 days", 1.0),
        ("The eleven days.", 1.0),
        ("It took eleven days in all.", 0.5),
        ("Nine days.", 0.5),
        ("A week.", 0.0),
        ("", 0.0),
    ],
)
def test_f1_counts_the_words_shared_with_the_nearest_accepted_answer(text: str, f1: float) -> None:
    assert Fact("sum", (0, 2), "How long?", "It took", ("11 days", "eleven days")).token_f1(text) == f1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("User: Hello.\n\nAnna: Hello.\n\nFacts\n", "a turn needs"),
        ("User: It is red.\n\nModel: Yes.\n\nFacts\n\ncolour | Which? | red\n", "3 fields"),
        ("User: It is red.\n\nModel: Yes.\n\nFacts\n\ncolour | Which? | It is | blue\n", "nobody says 'blue'"),
        (
            "User: It is red.\n\nModel: Yes.\n\nFacts\n\nSeveral places\n\nsum | Which? | It is | red\n",
            "4 fields, not 5",
        ),
    ],
)
def test_a_file_that_is_no_chat_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "chat.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load(path)


@pytest.mark.parametrize("questions", facts_files.QUESTIONS)
def test_every_row_answers_every_question_and_is_not_run_twice(
    engine: TransformersEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], questions: str
) -> None:
    out = tmp_path / "answers.json"
    args = argparse.Namespace(
        triggers=[512], rows=[facts.FULL, *facts.CHANGES, facts.TRUNCATED], policy=['{"keep_ratio": 0.3}'],
        new_tokens=2, out=str(out), questions=questions, refine=None,
    )  # fmt: skip
    memory = Memory(engine=engine, policy=PLAIN)
    run = facts.Run(memory, args)
    run.run(SHORT, facts.rows_of(args))
    found = facts.groups(run.answers)
    assert all(len(answers) == len(SHORT.asked(questions)) for answers in found.values())
    assert {name for _, name in found} == {row.name for row in facts.rows_of(args)}
    assert found[512, facts.OURS][0].compactions > 0
    assert all(answer.log_probability < 0 for answer in run.answers)
    assert found[512, facts.TRUNCATED][0].chat_tokens == pytest.approx(found[512, facts.OURS][0].chat_tokens, abs=8)
    assert all(answer.kv_tokens <= 512 for answer in run.answers if answer.trigger)
    assert found[512, facts.OURS][0].originals_bytes > 0
    written = json.loads(out.read_text())
    facts.Run(memory, args).run(SHORT, facts.rows_of(args))
    assert json.loads(out.read_text()) == written
    assert "| 512 | ours |" in facts.summary(run.answers)
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("when", facts.REFINED)
def test_with_refine_the_compacted_rows_are_refined(engine: TransformersEngine, when: str) -> None:
    changes = json.dumps({"self_study_tokens": 8})
    args = argparse.Namespace(
        triggers=[512], rows=[facts.FULL], policy=[changes], new_tokens=2, out=None, questions=facts_files.PLACES,
        refine=when,
    )  # fmt: skip
    run = facts.Run(Memory(engine=engine, policy=PLAIN), args)
    run.run(SHORT, facts.rows_of(args))
    assert [(answer.row, answer.seconds_to_refine > 0) for answer in run.answers] == [
        (facts.FULL, False),
        (f"{facts.OURS} {changes}, {facts.REFINED[when]}", True),
    ]


def first_row(summary: str) -> dict[str, str]:
    header, _, row, *_ = ([cell.strip() for cell in line.split("|")] for line in summary.splitlines())
    return dict(zip(header, row, strict=True))


def test_a_file_holds_the_answers_to_both_sets_and_to_older_runs(engine: TransformersEngine, tmp_path: Path) -> None:
    out, memory = tmp_path / "answers.json", Memory(engine=engine, policy=PLAIN)

    def run(questions: str) -> list[facts.Answer]:
        args = argparse.Namespace(
            triggers=[512], rows=[facts.FULL, facts.OURS], policy=[], new_tokens=2, out=str(out),
            questions=questions, refine=None,
        )  # fmt: skip
        one = facts.Run(memory, args)
        one.run(SHORT, facts.rows_of(args))
        return one.asked()

    run(facts_files.FACTS)
    older = json.loads(out.read_text())
    for answer in older:
        del answer["questions"], answer["token_f1"]
    out.write_text(json.dumps(older))

    places = run(facts_files.PLACES)
    assert [(one.row, one.kind, one.quarter) for one in places] == [(facts.FULL, "list", 0), (facts.OURS, "list", 0)]
    assert first_row(facts.summary(places))["F1"] == f"{places[0].token_f1:.3f}"
    told_once = run(facts_files.FACTS)
    assert [one.text for one in told_once] == [answer["text"] for answer in older]
    assert first_row(facts.summary(told_once))["F1"] == ""
