"""Answers that follow a grammar: whatever the model would rather say, at every token."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_zoo import zoo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.text import constraints as module
from am_memory.text.constraints import Constraint, json_schema, lark, regex
from am_memory.text.json_schemas import SchemaCheck

EOS = 257
VOCAB = 260
POLICY = MemoryPolicy(trigger_tokens=2000, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=64)
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.5, repetition_penalty=1.4, top_k=20, min_p=0.05, seed=3)
SHIP = {
    "type": "object",
    "properties": {"kind": {"enum": ["brig", "sloop"]}, "guns": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "guns"],
}


@pytest.fixture(scope="module")
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


def answer(memory: Memory, constraint: Constraint | None, sampling: Sampling = GREEDY, count: int = 400) -> str:
    session = memory.session()
    session.append("An owl. ")
    return "".join(piece.text for piece in session.generate(count, sampling, constraint))


def allowed(constraint: Constraint, vocab_size: int = VOCAB) -> set[int]:
    return set(torch.isfinite(constraint.mask(torch.zeros(vocab_size))).nonzero()[:, 0].tolist())


def follow(constraint: Constraint, text: str) -> Constraint:
    for byte in text.encode():
        constraint.accept(byte)
    return constraint


# One token after the other


def test_only_what_the_grammar_takes_is_left(engine: TransformersEngine) -> None:
    assert allowed(regex(engine, "[ab]c")) == {*b"ab"}


def test_what_is_left_keeps_its_logit(engine: TransformersEngine) -> None:
    logits = torch.randn(VOCAB)
    assert torch.equal(regex(engine, "[ab]").mask(logits)[[*b"ab"]], logits[[*b"ab"]])


def test_the_logits_given_are_not_changed(engine: TransformersEngine) -> None:
    logits = torch.zeros(VOCAB)
    regex(engine, "[ab]").mask(logits)
    assert torch.equal(logits, torch.zeros(VOCAB))


@pytest.mark.parametrize("vocab_size", [100, 260, 261, 320, 1000])
def test_logits_may_be_padded_or_cut(engine: TransformersEngine, vocab_size: int) -> None:
    assert allowed(regex(engine, "[ab]"), vocab_size) == {*b"ab"}


def test_the_turn_ends_only_where_the_text_may(engine: TransformersEngine) -> None:
    constraint, may_end = regex(engine, "a{1,3}"), []
    for _ in range(3):
        may_end.append(EOS in allowed(constraint))
        constraint.accept(ord("a"))
    assert may_end == [False, True, True]


def test_nothing_but_the_end_follows_a_complete_text(engine: TransformersEngine) -> None:
    constraint = follow(regex(engine, "a{1,3}"), "aaa")
    assert (constraint.is_complete, allowed(constraint)) == (True, {EOS})


def test_the_end_of_the_turn_follows_a_complete_text(engine: TransformersEngine) -> None:
    constraint = follow(regex(engine, "ab"), "ab")
    constraint.accept(EOS)
    assert constraint.is_complete


def test_a_text_that_may_go_on_is_not_complete(engine: TransformersEngine) -> None:
    assert not follow(regex(engine, "a{1,3}"), "aa").is_complete


def test_ending_the_turn_completes_a_text_that_may_go_on(engine: TransformersEngine) -> None:
    constraint = follow(regex(engine, "a{1,3}"), "a")
    constraint.accept(EOS)
    assert constraint.is_complete


@pytest.mark.parametrize("token_id", [ord("x"), EOS, 256, 5000])
def test_a_refused_token_changes_nothing(engine: TransformersEngine, token_id: int) -> None:
    constraint = regex(engine, "abc")
    with pytest.raises(InvalidInput, match=f"token id {token_id} does not follow the grammar: take one that mask"):
        constraint.accept(token_id)
    assert allowed(constraint) == {ord("a")}


def test_a_character_of_several_tokens_is_never_broken(engine: TransformersEngine) -> None:
    constraint = regex(engine, "[éè]!")
    constraint.accept("é".encode()[0])
    assert allowed(constraint) == {"é".encode()[1], "è".encode()[1]}


# Grammars


def test_a_grammar_has_rules(engine: TransformersEngine) -> None:
    constraint = lark(engine, 'start: owl ("," owl)*\nowl: "hoo"')
    assert allowed(follow(constraint, "hoo,hoo")) == {ord(","), EOS}


def test_a_grammar_may_name_a_special_token(engine: TransformersEngine) -> None:
    assert allowed(lark(engine, "start: <[256]>")) == {256}


def test_json_is_written_on_one_line(engine: TransformersEngine) -> None:
    """Free whitespace is what a small model repeats until its limit."""
    constraint = follow(json_schema(engine, SHIP), '{"kind": ')
    assert allowed(constraint) == {ord('"')}


def test_an_object_has_no_properties_that_its_schema_does_not_name(engine: TransformersEngine) -> None:
    assert follow(json_schema(engine, SHIP), '{"kind": "brig", "guns": 20}').is_complete


def test_further_properties_that_the_schema_mentions_are_allowed(engine: TransformersEngine) -> None:
    schema = {**SHIP, "additionalProperties": {"type": "integer"}}
    assert allowed(follow(json_schema(engine, schema), '{"kind": "brig", "guns": 20')) == {ord(","), ord("}")}


def test_an_object_composed_of_parts_has_the_properties_of_all(engine: TransformersEngine) -> None:
    """Were each part closed, no object could satisfy both."""
    parts = [{"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name]} for name in "ab"]
    follow(json_schema(engine, {"allOf": parts}), '{"a": true, "b": false')


def test_a_property_named_like_a_keyword_is_a_property(engine: TransformersEngine) -> None:
    properties = {"allOf": {"type": "boolean"}, "properties": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["allOf", "properties"]}
    assert follow(json_schema(engine, schema), '{"allOf": true, "properties": false}').is_complete


def test_references_are_followed(engine: TransformersEngine) -> None:
    schema = {"type": "array", "items": {"$ref": "#/$defs/ship"}, "maxItems": 1, "minItems": 1, "$defs": {"ship": SHIP}}
    assert follow(json_schema(engine, schema), '[{"kind": "brig", "guns": 20}]').is_complete


def test_the_schema_given_is_not_changed(engine: TransformersEngine) -> None:
    before = json.dumps(SHIP)
    json_schema(engine, SHIP)
    assert json.dumps(SHIP) == before


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "ship"}, "does not take this grammar: the JSON schema: Invalid type: ship$"),
        ({"type": "integer", "minimum": 10**18}, "a number with the minimum 10{18}: give bounds of 18 digits at most"),
        ({"type": "integer", "maximum": -(10**18)}, "a grammar cannot hold a number with the maximum -10{18}"),
        ({"type": "number", "maximum": 1e300}, "a grammar cannot hold a number with the maximum 1e300"),
        ({"$ref": "#/$defs/ship"}, "Pointer '/\\$defs/ship' does not exist$"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"const": {1, 2}}, "the schema cannot be written as JSON: Object of type set"),
        ({"const": float("nan")}, "the schema cannot be written as JSON"),
        ("string", "'string' is not a JSON schema: give a mapping"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(engine: TransformersEngine, schema: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        json_schema(engine, schema)


def test_an_unknown_format_is_an_annotation(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    """As JSON Schema has it; pydantic writes "path" of a Path, and OpenAPI "int64" of a number."""
    constraint = json_schema(engine, {"type": "string", "format": "path"})
    assert (constraint.left_out, caplog.messages) == (frozenset(), [])
    assert follow(constraint, '"/tmp"').is_complete


def test_what_no_grammar_holds_is_left_out_and_said_once(
    engine: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    module._warn_of.cache_clear()
    schema = {"type": "array", "items": {"type": "string", "pattern": "(?=a)."}, "uniqueItems": True}
    for _ in range(2):
        constraint = json_schema(engine, schema)
    assert constraint.left_out == {"pattern", "uniqueItems"}
    assert [message.partition(":")[0] for message in caplog.messages] == ["no grammar holds pattern, uniqueItems"]
    assert follow(constraint, '["b", "b"]').is_complete


def test_a_grammar_that_is_no_schema_leaves_nothing_out(engine: TransformersEngine) -> None:
    assert regex(engine, "a").left_out == lark(engine, 'start: "a"').left_out == frozenset()


def test_names_of_properties_that_are_listed_are_enforced(engine: TransformersEngine) -> None:
    """pydantic writes them of dict[Literal["a", "b"], int], and llguidance knows nothing of `propertyNames`."""
    schema = {"type": "object", "propertyNames": {"$ref": "#/$defs/names"}, "additionalProperties": {"type": "integer"}}
    constraint = json_schema(engine, {**schema, "$defs": {"names": {"enum": ["a", "b"]}}})
    assert constraint.left_out == frozenset()
    assert allowed(follow(constraint, '{"')) == {*b"ab"}


def test_an_object_with_conditions_is_open_to_what_they_ask_for(engine: TransformersEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "if": {}, "then": {"required": ["b"]}}
    follow(json_schema(engine, schema), '{"a": 1, "b": 2')


@pytest.mark.parametrize("pattern", ["[0-9]+(", "(?=a)b"])
def test_a_pattern_that_cannot_be_enforced_is_refused(engine: TransformersEngine, pattern: str) -> None:
    with pytest.raises(InvalidInput, match="does not take this grammar: .*regex parse error"):
        regex(engine, pattern)


def test_a_grammar_that_is_none_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match='does not take this grammar: .*unknown name: "owl"'):
        lark(engine, "start: owl")


# The tokenizer


def test_the_vocabulary_is_built_once(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    regex(engine, "a")
    monkeypatch.delattr(module, "from_tokenizer")
    assert allowed(regex(engine, "b")) == {ord("b")}


def test_an_engine_is_not_kept_alive(tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    class Bare:
        tokenizer = byte_tokenizer

        def __init__(self) -> None:
            self.info = TransformersEngine(tiny_model, byte_tokenizer).info

    bare = Bare()
    regex(bare, "a")
    reference = weakref.ref(bare)
    del bare
    gc.collect()
    assert reference() is None


def test_an_engine_without_such_a_tokenizer_is_refused(engine: TransformersEngine) -> None:
    class Bare:
        info = engine.info

    with pytest.raises(UnsupportedOperation, match="takes a fast tokenizer of transformers, and this Bare has none"):
        regex(Bare(), "a")


# Sessions


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_follows_its_schema(memory: Memory, sampling: Sampling) -> None:
    ship = json.loads(answer(memory, json_schema(memory.engine, SHIP), sampling))
    assert [*ship] == ["kind", "guns"]
    assert ship["kind"] in ("brig", "sloop")
    assert ship["guns"] in range(100)


def test_without_a_constraint_the_same_model_writes_no_json(memory: Memory) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer(memory, None, count=40))


def test_a_complete_answer_is_stopped(memory: Memory) -> None:
    session = memory.session()
    session.append("An owl. ")
    *_, last = session.generate(9, GREEDY, regex(memory.engine, "hoo"))
    assert (last.finish_reason, bytes(session.tokens[-3:])) == ("stop", b"hoo")


def test_an_answer_that_the_model_may_end_ends_its_turn(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory.session()
    session.append("An owl. ")
    monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: max(finite(logits)))
    pieces = list(session.generate(9, GREEDY, regex(memory.engine, "a{1,3}")))
    assert [piece.finish_reason for piece in pieces] == [None, "eos"]


def finite(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero()[:, 0].tolist()


def test_an_answer_that_is_cut_goes_on_with_its_constraint(memory: Memory) -> None:
    whole = answer(memory, regex(memory.engine, "[a-z]{5} [0-9]{5}"))
    session, constraint = memory.session(), regex(memory.engine, "[a-z]{5} [0-9]{5}")
    session.append("An owl. ")
    parts = [piece.text for _ in range(2) for piece in session.generate(7, GREEDY, constraint)]
    assert "".join(parts) == whole


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("schema", [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}])
def test_json_that_would_not_end_is_brought_to_an_end(memory: Memory, schema: dict, sampling: Sampling) -> None:
    """Near the limit, brackets were taken before quotes, although within a string they are text like any other."""
    json.loads(answer(memory, json_schema(memory.engine, schema), sampling, count=40))


def test_a_complete_constraint_is_refused(memory: Memory) -> None:
    constraint = follow(regex(memory.engine, "a"), "a")
    session = memory.session()
    session.append("An owl. ")
    with pytest.raises(InvalidInput, match="the constraint is complete, .*: make a new one for each answer"):
        session.generate(5, GREEDY, constraint)


def test_a_refused_token_leaves_the_session_as_it_was(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory.session()
    session.append([{"role": "user", "content": "?"}])
    before = session.tokens, session.messages, session.stats
    monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: ord("x"))
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        list(session.generate(5, GREEDY, regex(memory.engine, "a")))
    assert (session.tokens, session.messages, session.stats) == before


def test_a_chat_goes_on_after_a_constrained_answer(memory: Memory) -> None:
    session = memory.session()
    session.append([{"role": "user", "content": "?"}])
    list(session.generate(9, GREEDY, regex(memory.engine, "hoo")))
    session.append([{"role": "user", "content": "!"}])
    text = session.engine.decode(session.tokens)
    assert text.endswith("<|im_start|>assistant\nhoo<|im_end|>\n<|im_start|>user\n!<|im_end|>\n")


# A wide choice of schemas

ZOO = zoo()


@pytest.mark.parametrize("name", ZOO)
def test_a_schema_that_programs_send_gives_a_grammar_whose_answers_follow_it(
    engine: TransformersEngine, name: str
) -> None:
    """Those that pydantic writes of its own types were refused; what is left out is all that can be missed."""
    for seed in range(2):
        constraint = json_schema(engine, ZOO[name])
        answer = any_answer(constraint, seed)
        is_leap_second = isinstance(answer, str) and ":60" in answer  # at any time, says the grammar
        if answer is not None and not constraint.left_out and not is_leap_second:
            assert SchemaCheck(ZOO[name]).problem_with(answer) is None


def any_answer(constraint: Constraint, seed: int) -> object | None:
    """Of all that a grammar allows, something; None where it comes to no end, or to a number that JSON has not."""
    choose, said = random.Random(seed), bytearray()
    for number in range(300):
        token_id = choose.choice(sorted(allowed_near_the_end(constraint, number > 40)))
        constraint.accept(token_id)
        said += bytes([token_id] if token_id != EOS else [])
        if constraint.is_complete:
            return None if "Infinity" in json.dumps(value := json.loads(said)) else value
    return None


def allowed_near_the_end(constraint: Constraint, is_closing: bool) -> set[int]:
    return {*finite(constraint.mask(torch.zeros(VOCAB), is_closing=is_closing))}


# Any schema

Checked = tuple[dict, Callable[[object], bool]]
"""A schema, and whether a value is of it: written beside each other, so that neither is read off the other."""

NAMES = st.text('abcé_ "', min_size=1, max_size=4)


def _enum(values: list[object]) -> Checked:
    return {"enum": values}, lambda value: any(value == one and type(value) is type(one) for one in values)


def _integer(low: int, span: int) -> Checked:
    schema = {"type": "integer", "minimum": low, "maximum": low + span}
    return schema, lambda value: type(value) is int and low <= value <= low + span


def _string(length: int) -> Checked:
    return {"type": "string", "maxLength": length}, lambda value: isinstance(value, str) and len(value) <= length


def _array(item: Checked, low: int, span: int) -> Checked:
    schema = {"type": "array", "items": item[0], "minItems": low, "maxItems": low + span}
    return (
        schema,
        lambda value: isinstance(value, list) and low <= len(value) <= low + span and all(map(item[1], value)),
    )


def _object(parts: dict[str, Checked], required: set[str]) -> Checked:
    required &= parts.keys()
    properties = {name: part[0] for name, part in parts.items()}
    return (
        {"type": "object", "properties": properties, "required": sorted(required)},
        lambda value: (
            isinstance(value, dict)
            and required <= value.keys() <= parts.keys()
            and all(parts[name][1](item) for name, item in value.items())
        ),
    )


def _union(one: Checked, other: Checked) -> Checked:
    return {"anyOf": [one[0], other[0]]}, lambda value: one[1](value) or other[1](value)


LEAVES = st.one_of(
    st.just(({"type": "boolean"}, lambda value: isinstance(value, bool))),
    st.just(({"type": "null"}, lambda value: value is None)),
    st.builds(_enum, st.lists(NAMES | st.integers(-50, 50) | st.booleans() | st.none(), min_size=1, max_size=3)),
    st.builds(_integer, st.integers(-200, 200), st.integers(0, 300)),
    st.builds(_string, st.integers(0, 6)),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 1)),
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.sets(NAMES, max_size=3)),
        st.builds(_union, inner, inner),
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checked=SCHEMAS)
def test_an_answer_follows_any_schema(memory: Memory, sampling: Sampling, checked: Checked) -> None:
    schema, is_valid = checked
    assert is_valid(json.loads(answer(memory, json_schema(memory.engine, schema), sampling)))


# The demo model


@pytest.mark.model
def test_the_demo_model_fills_in_a_form(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    memory = Memory(TransformersEngine(*demo), POLICY)
    session = memory.session()
    session.append([{"role": "user", "content": "The sloop Fairlea carries 12 guns. Describe it as JSON."}])
    pieces = session.generate(60, GREEDY, json_schema(memory.engine, SHIP))
    ship = json.loads("".join(piece.text for piece in pieces))
    assert ship["kind"] in ("brig", "sloop")
    assert ship["guns"] in range(100)


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}],
    ids=str,
)
def test_a_schema_that_refers_to_itself_alone_is_refused_in_words(engine: TransformersEngine, schema: dict) -> None:
    with pytest.raises(InvalidInput, match="nothing can follow: a schema or rule that refers to itself alone"):
        json_schema(engine, schema).mask(torch.zeros(engine.info.vocab_size))
