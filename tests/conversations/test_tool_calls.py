"""Tool calls as text: shown to a model through any template, enforced by a grammar, and parsed from answers."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.conversations.tool_calls import (
    InvalidCall,
    ParsedAnswer,
    ParsedCall,
    ToolCallStream,
    ToolFormat,
    answer_text,
    calls_or_json_constraint,
    calls_or_text_constraint,
    no_call_constraint,
    parse,
    prepare,
    tool_call_constraint,
    tool_format,
)
from am_memory.conversations.tool_calls.formats import HERMES, JSON, LLAMA3, MISTRAL, MISTRAL_ARGS
from am_memory.conversations.tool_calls.prompt import _one_call_each
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput
from am_memory.session.chat_history import IS_TOOL_RESULT
from am_memory.text.constraints import Constraint

POLICY = MemoryPolicy(trigger_tokens=2000, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=64)
FORMATS = (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, JSON)
EACH = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.5, seed=3)

HAIL = {
    "type": "function",
    "function": {
        "name": "hail",
        "description": "Call a ship.",
        "parameters": {
            "type": "object",
            "properties": {
                "ship": {"enum": ["Fairlea", "Vesper"]},
                "times": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["ship", "times"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
TOOLS = [HAIL, NOW]
CALL = {"id": "call_1", "type": "function", "function": {"name": "hail", "arguments": {"ship": "Fairlea", "times": 2}}}
WRITTEN = '<tool_call>\n{"name": "hail", "arguments": {"ship": "Fairlea", "times": 2}}\n</tool_call>'
SYSTEM = {"role": "system", "content": "You are an owl."}
USER = {"role": "user", "content": "Hail the Fairlea."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "hail", "content": "Ahoy."}

CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}" + CHATML_END
)
LLAMA = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    '{"name": "{{ message.tool_calls[0].function.name }}", '
    '"parameters": {{ message.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ message.content }}{% endif %}{% if loop.first and tools %}{{ tools | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}" + CHATML_END
)
SHORT_IDS = "{% if id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}"
OLD_MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for message in messages %}"
    "{% if message.tool_calls %}[TOOL_CALLS] [{% for call in message.tool_calls %}{% set id = call.id %}"
    + SHORT_IDS
    + "{{ call.function | tojson }}{% endfor %}]{% elif message.role == 'tool' %}{% set id = message.tool_call_id %}"
    + SHORT_IDS
    + "[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]"
    "{% else %}[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}"
)
NEW_MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for message in messages %}"
    "{{ message.content }}{% for call in message.tool_calls %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
PLAIN_JSON = LLAMA.replace("parameters", "arguments")
CODER = QWEN.replace(
    '{"name": "{{ call.function.name }}", "arguments": ', "<function={{ call.function.name }}>{# "
).replace("| tojson }}}\n</tool_call>", "#}</function></tool_call>")
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
)

DEAF = LLAMA.replace("{% else %}", "{% elif message.role != 'tool' %}")

NewEngine = Callable[..., TransformersEngine]


@pytest.fixture(scope="module")
def new_engine(tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> NewEngine:
    """The tiny model with another chat template and more special tokens."""

    def make(template: str | None, *special: str) -> TransformersEngine:
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = template
        tokenizer.add_tokens(
            [AddedToken(mark, special=True, normalized=False) for mark in special], special_tokens=True
        )
        return TransformersEngine(tiny_model, tokenizer)

    return make


def call(name: str = "hail", **arguments: object) -> ParsedCall:
    return ParsedCall(name, arguments)


def streamed(pieces: Sequence[str], format: ToolFormat) -> ParsedAnswer:
    stream = ToolCallStream(format)
    events = [event for piece in pieces for event in stream.push(piece)] + stream.finish()
    kinds = [[event for event in events if isinstance(event, kind)] for kind in (str, ParsedCall, InvalidCall)]
    return ParsedAnswer("".join(kinds[0]), kinds[1], kinds[2])


# Formats


@pytest.mark.parametrize(
    ("template", "format"),
    [
        (QWEN, HERMES),
        (LLAMA, LLAMA3),
        (OLD_MISTRAL, MISTRAL),
        (NEW_MISTRAL, MISTRAL_ARGS),
        (PLAIN_JSON, JSON),
        (NO_SYSTEM, HERMES),
        (CODER, HERMES),
        (DEAF, HERMES),
        (None, HERMES),
    ],
    ids=[
        "qwen",
        "llama",
        "mistral",
        "new mistral",
        "json",
        "no tools",
        "a format of its own",
        "no results",
        "no template",
    ],
)
def test_the_format_is_the_one_that_the_template_writes(
    new_engine: NewEngine, template: str | None, format: ToolFormat
) -> None:
    assert tool_format(new_engine(template)) is format


@EACH
def test_what_is_written_is_read_again(format: ToolFormat) -> None:
    calls = [call(ship='"Fair\\lea" {é}\n', times=[1, {"a": None}]), call("now")]
    written = format.write((one.name, one.arguments) for one in calls)
    assert parse(written, format) == ParsedAnswer("", calls, [])


# Prompts: templates that know tools


def test_a_template_that_knows_tools_gets_them(new_engine: NewEngine) -> None:
    engine = new_engine(QWEN)
    messages, tools = prepare(engine, [USER], TOOLS)
    assert json.dumps(HAIL) in engine.render(messages, tools=tools)


def test_no_tools_are_as_none(new_engine: NewEngine) -> None:
    engine = new_engine(QWEN)
    assert engine.render([USER], tools=[]) == engine.render([USER])


def test_arguments_told_as_text_are_written_as_an_object(new_engine: NewEngine) -> None:
    engine = new_engine(QWEN)
    told = {
        **CALLING,
        "tool_calls": [{**CALL, "function": {"name": "hail", "arguments": '{"ship": "Fairlea", "times": 2}'}}],
    }
    assert WRITTEN in engine.render(prepare(engine, [USER, told], TOOLS)[0])


def test_content_that_is_none_is_not_written(new_engine: NewEngine) -> None:
    engine = new_engine(QWEN)
    assert "None" not in engine.render(prepare(engine, [USER, CALLING, RESULT], TOOLS)[0])


def test_ids_are_shortened_where_the_template_insists(new_engine: NewEngine) -> None:
    engine = new_engine(OLD_MISTRAL)
    messages, _ = prepare(engine, [USER, CALLING, RESULT], TOOLS)
    engine.render(messages)
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"]


def test_several_calls_are_told_one_by_one_where_the_template_insists(new_engine: NewEngine) -> None:
    engine = new_engine(LLAMA)
    second = {**CALL, "id": "call_2"}
    answers = [RESULT, {**RESULT, "tool_call_id": "call_2", "content": "Aye."}]
    messages, _ = prepare(engine, [USER, {**CALLING, "tool_calls": [CALL, second]}, *answers, USER], TOOLS)
    engine.render(messages)
    assert [message["content"] for message in messages] == [USER["content"], "", "Ahoy.", "", "Aye.", USER["content"]]


class Counted(dict[str, object]):
    """A message that counts how often it is read."""

    num_looks = 0

    def get(self, key: str, default: object = None) -> object:
        Counted.num_looks += 1
        return super().get(key, default)


def test_telling_calls_one_by_one_takes_a_time_in_proportion_to_the_messages() -> None:
    """Each message with several calls searched all messages after it."""
    calls = [{**CALL, "id": f"call_{number}"} for number in (1, 2)]
    results = [{**RESULT, "tool_call_id": call["id"]} for call in calls]
    for num_turns in (10, 400):
        Counted.num_looks = 0
        told = [
            Counted(message) for _ in range(num_turns) for message in (USER, {**CALLING, "tool_calls": calls}, *results)
        ]
        assert len(list(_one_call_each(told))) == 5 * num_turns
        assert Counted.num_looks < 40 * num_turns


def test_messages_without_tools_stay_as_they_are(new_engine: NewEngine) -> None:
    messages = [SYSTEM, USER, {"role": "assistant", "content": "Hoo."}]
    assert prepare(new_engine(QWEN), messages) == (messages, None)


def test_the_messages_given_are_not_changed(new_engine: NewEngine) -> None:
    messages = [USER, copy.deepcopy(CALLING), RESULT]
    for template in (QWEN, LLAMA, OLD_MISTRAL, None):
        prepare(new_engine(template), messages, TOOLS)
    assert messages == [USER, CALLING, RESULT]


# Prompts: templates that know none


def test_tools_are_told_after_the_system_prompt(engine: TransformersEngine) -> None:
    (system, _), tools = prepare(engine, [SYSTEM, USER], TOOLS)
    assert tools is None
    assert system["content"].startswith("You are an owl.\n\n# Tools\n")
    assert all(json.dumps(tool) in system["content"].splitlines() for tool in TOOLS)


def test_tools_are_told_in_a_system_prompt_of_their_own(engine: TransformersEngine) -> None:
    messages, _ = prepare(engine, [USER], TOOLS)
    assert [message["role"] for message in messages] == ["system", "user"]


def test_tools_are_told_to_the_user_where_the_template_has_no_system(new_engine: NewEngine) -> None:
    (message,), _ = prepare(new_engine(NO_SYSTEM), [USER], TOOLS)
    assert re.fullmatch(r"# Tools\n.*</tool_call>\n\nHail the Fairlea\.", message["content"], re.DOTALL)


def test_a_call_is_told_as_the_model_wrote_it(engine: TransformersEngine) -> None:
    answer = parse(f"Well.\n{WRITTEN}", HERMES)
    told = {**CALLING, "content": answer.content}
    messages, _ = prepare(engine, [USER, told], TOOLS)
    assert messages[-1] == {"role": "assistant", "content": f"Well.\n{WRITTEN}"}


def test_results_in_a_row_are_one_message_of_the_user(engine: TransformersEngine) -> None:
    messages, _ = prepare(engine, [USER, CALLING, RESULT, {**RESULT, "content": "Aye."}])
    content = "<tool_response>\nAhoy.\n</tool_response>\n<tool_response>\nAye.\n</tool_response>"
    assert messages[2:] == [{"role": "user", "content": content, IS_TOOL_RESULT: True}]


def test_a_result_may_be_text_parts(engine: TransformersEngine) -> None:
    parts = [{"type": "text", "text": "Ah"}, {"type": "text", "text": "oy."}]
    messages, _ = prepare(engine, [USER, CALLING, {**RESULT, "content": parts}])
    assert messages[2]["content"] == "<tool_response>\nAhoy.\n</tool_response>"


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([USER], [{"type": "function", "function": {}}], "is no tool: give"),
        ([USER], ["hail"], "'hail' is no tool: give"),
        ([USER, {**CALLING, "tool_calls": [{"name": "hail"}]}], [], "is no tool call: give"),
        ([USER, {**CALLING, "tool_calls": 3}], [], "tool_calls is 3: give a list"),
        ([USER, CALLING, {**RESULT, "content": [{"type": "image"}]}], [], "is not text: a message beside tools"),
    ],
)
def test_what_cannot_be_told_is_refused(engine: TransformersEngine, messages: list, tools: list, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        prepare(engine, messages, tools)


BROKEN = (
    '{"ship": "Fair',
    '{"ship": "the "Fairlea""}',
    "[1, 2]",
    "null",
    "now",
    '"{}"',
    '{"a": ' * 5000,
    '{"a": ' * 99 + "1" + "}" * 99,
)


@pytest.mark.parametrize("arguments", BROKEN, ids=lambda text: text[:9])
@pytest.mark.parametrize(
    "template",
    [QWEN, LLAMA, OLD_MISTRAL, NEW_MISTRAL, NO_SYSTEM],
    ids=["qwen", "llama", "mistral", "new mistral", "no tools"],
)
def test_arguments_that_are_no_object_are_told_as_they_were_written(
    new_engine: NewEngine, template: str, arguments: str
) -> None:
    """A call that the model had cut off made every later request of its conversation fail."""
    engine = new_engine(template)
    broken = {**CALL, "function": {"name": "hail", "arguments": arguments}}
    told = [USER, {**CALLING, "content": "Well.", "tool_calls": [CALL, broken]}, RESULT]
    messages, tools = prepare(engine, told, TOOLS)
    written = engine.render(messages, tools=tools)
    assert "tool_calls" not in messages[-2]
    assert "Well." in written
    assert arguments in written
    assert "Ahoy." in written


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ([1, 2], "[1, 2]"),
        (3, "3"),
        ('{"a":"\\ud800"}', '{"a":"\\ud800"}'),
        ({"a": "\ud800"}, '{"a": "\\ud800"}'),
        ("\ud800", "\\ud800"),
    ],
)
def test_arguments_of_another_type_are_told_as_json(
    engine: TransformersEngine, arguments: object, written: str
) -> None:
    calling = {**CALLING, "tool_calls": [{**CALL, "function": {"name": "hail", "arguments": arguments}}]}
    assert f'"arguments": {written}}}' in str(prepare(engine, [USER, calling])[0][1]["content"])


# Parsing

ONE = '{"name": "hail", "arguments": {"ship": "Fairlea"}}'
PARSED = call(ship="Fairlea")


@EACH
def test_an_answer_without_calls_is_content(format: ToolFormat) -> None:
    text = '  The owl said: {"hoo": [1, {"x": "<b>"}]} <tool> {'
    assert parse(text, format) == ParsedAnswer(text, [], [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>{ONE}</tool_call>", "", [PARSED]),
        (f"Well.\n\n<tool_call>\n{ONE}\n</tool_call>\n", "Well.", [PARSED]),
        (f"A <tool_call>{ONE}</tool_call> B", "A B", [PARSED]),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "", [PARSED, PARSED]),
        (f"<tool_call>{ONE}", "", [PARSED]),
        (f"<tool_call>{ONE}\n</tool", "", [PARSED]),
        (f"<tool_call>{ONE}<tool_call>{ONE}</tool_call>", "", [PARSED, PARSED]),
        (f"<tool_call>[{ONE}, {ONE}]</tool_call>", "", [PARSED, PARSED]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [call("now")]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [call("now")]),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [call("now")]),
        ('<tool_call>{"type": "function", "function": {"name": "now"}}</tool_call>', "", [call("now")]),
        (
            '<tool_call>{"name": "hail", "arguments": {"ship": "}\\"</tool_call>{"}}</tool_call>',
            "",
            [call(ship='}"</tool_call>{')],
        ),
        ('<tool_call>{"name": "hail", "arguments": {"ship": "a\nb"}}</tool_call>', "", [call(ship="a\nb")]),
    ],
)
def test_calls_of_hermes_are_read(text: str, content: str, calls: list[ParsedCall]) -> None:
    assert parse(text, HERMES) == ParsedAnswer(content, calls, [])


NATIVE = '{"name": "hail", "parameters": {"ship": "Fairlea"}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (NATIVE, "", [PARSED]),
        (f"<|python_tag|>{NATIVE}", "", [PARSED]),
        (f"{NATIVE}; {NATIVE}", "", [PARSED, PARSED]),
        (f"{NATIVE}\n{NATIVE}", "", [PARSED, PARSED]),
        (f"Well: {NATIVE} So.", "Well: So.", [PARSED]),
        ('{"type": "function", "name": "now", "parameters": {}}', "", [call("now")]),
        ('{"name": "Fairlea", "guns": 12}', '{"name": "Fairlea", "guns": 12}', []),
        ("int main() { return 0; }", "int main() { return 0; }", []),
    ],
)
def test_calls_of_llama_are_read(text: str, content: str, calls: list[ParsedCall]) -> None:
    assert parse(text, LLAMA3) == ParsedAnswer(content, calls, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"[TOOL_CALLS][{ONE}]", "", [PARSED]),
        (f"Well.[TOOL_CALLS] [{ONE}, {ONE}]", "Well.", [PARSED, PARSED]),
        ('[TOOL_CALLS]hail[ARGS]{"ship": "Fairlea"}', "", [PARSED]),
        ('[TOOL_CALLS]hail[CALL_ID]abc123def[ARGS]{"ship": "Fairlea"}', "", [PARSED]),
        ('[TOOL_CALLS]hail{"ship": "Fairlea"}[TOOL_CALLS]now[ARGS]{}', "", [PARSED, call("now")]),
    ],
)
@pytest.mark.parametrize("format", [MISTRAL, MISTRAL_ARGS], ids=["mistral", "mistral_args"])
def test_calls_of_mistral_are_read(text: str, content: str, calls: list[ParsedCall], format: ToolFormat) -> None:
    assert parse(text, format) == ParsedAnswer(content, calls, [])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('<tool_call>{"name": "hail", "arguments": {"ship": "Fairlea",}}</tool_call>', "not JSON: "),
        ("<tool_call>{'name': 'now'}</tool_call>", "not JSON: "),
        ('<tool_call>{"name": "hail", "arguments": {"times": NaN}}</tool_call>', "not JSON: NaN is no JSON"),
        ('<tool_call>{"name": "hail", "arguments": {"ship": "\\ud800"}}</tool_call>', "not JSON: .*surrogates"),
        (
            '<tool_call>{"name": "hail", "arguments": {"a": ' + "[" * 100000 + "]" * 100000 + "}}</tool_call>",
            "not JSON: ",
        ),
        ('<tool_call>{"arguments": {}}</tool_call>', 'there is no "name"'),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', 'there is no "name"'),
        ('<tool_call>{"name": "hail", "arguments": [1]}</tool_call>', r"the arguments are \[1\], not an object"),
        ("<tool_call>hail(Fairlea)</tool_call>", "this is no JSON object"),
        ("<tool_call></tool_call>", "this is no JSON object"),
        ("<tool_call>", "nothing follows <tool_call>"),
        ('<tool_call>{"name": "hail", "argu', "the call is cut off"),
        ('<tool_call>{"name": "hail", "arguments": {"ship": "Fair}}</tool_call>', "the call is cut off, or a string"),
    ],
)
def test_a_broken_call_is_kept_with_its_error(text: str, error: str) -> None:
    answer = parse(f"Well. {text}", HERMES)
    (invalid,) = answer.invalid
    assert re.match(error, invalid.error)
    assert (answer.content, answer.tool_calls) == ("Well.", [])
    assert invalid.text == text.removeprefix("<tool_call>").removesuffix("</tool_call>")


def test_what_follows_a_broken_call_is_still_read() -> None:
    broken = '<tool_call>{"name": "hail", "arguments": {"ship": "Fair}}</tool_call>'
    assert parse(f"{broken} Again: <tool_call>{ONE}</tool_call>", HERMES).tool_calls == [PARSED]


@pytest.mark.parametrize("text", ['{"name": "hail", "param', '{"name": "hail", "parameters": {"a": 1,}}'])
def test_a_broken_call_without_markers_is_kept_with_its_error(text: str) -> None:
    answer = parse(text, LLAMA3)
    assert [invalid.text for invalid in answer.invalid] == [text]
    assert answer.content == ""


def test_the_whole_calls_of_a_list_that_is_cut_off_are_read() -> None:
    answer = parse(f'[TOOL_CALLS][{ONE}, {{"name": "now', MISTRAL)
    assert (answer.tool_calls, [invalid.text for invalid in answer.invalid]) == ([PARSED], ['{"name": "now'])


def test_reasoning_before_a_call_is_content() -> None:
    answer = parse(f"<think>\nHail it?\n</think>\n\n<tool_call>{ONE}</tool_call>", HERMES)
    assert answer == ParsedAnswer("<think>\nHail it?\n</think>", [PARSED], [])


def test_a_call_that_is_only_thought_of_is_not_made() -> None:
    text = f"<think>I could say <tool_call>{ONE}</tool_call>.</think> No."
    assert parse(text, HERMES) == ParsedAnswer(text, [], [])


# Streaming


def test_content_is_given_out_as_it_comes() -> None:
    stream = ToolCallStream(HERMES)
    assert [stream.push(text) for text in ("The owl", " sat", " < 3")] == [["The owl"], [" sat"], [" < 3"]]


def test_what_may_begin_a_marker_waits() -> None:
    stream = ToolCallStream(HERMES)
    assert [stream.push(text) for text in ("Hoo <tool", "_ca", "bin>")] == [["Hoo"], [], [" <tool_cabin>"]]


def test_a_call_is_given_out_before_its_closing_marker() -> None:
    assert ToolCallStream(HERMES).push(f"<tool_call>{ONE}") == [PARSED]


def test_code_in_braces_does_not_wait_for_its_end() -> None:
    assert ToolCallStream(LLAMA3).push("int main() { return") == ["int main() { return"]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *(ONE, NATIVE, '{"name": "f", "arguments": {"s": "}{\\"[ARGS]"}}', '{"a": 1,}', '{"name": "f', "hail", "é"),
    *(" ", "\n", "\\", '"', "{", "}", "[", "]", ",", ";", "<", "Well.", "id"),
]
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=9).map("".join)


@EACH
@settings(max_examples=150, deadline=None)
@given(text=ANSWERS, cuts=st.lists(st.integers(0, 200), max_size=12))
@example(text=f"A\n<tool_call>\n{ONE}\n</tool_call>\n\nB", cuts=list(range(200)))
@example(text=HERMES.write([("f", {"a": '\\"}', "b": "\\"})]), cuts=list(range(200)))
@example(text=f"A [TOOL_CALLS] [{ONE}, {ONE}] B", cuts=list(range(200)))
@example(text=f"A <|python_tag|>{NATIVE} ; {NATIVE} B", cuts=list(range(200)))
def test_a_stream_reads_what_is_read_at_once(format: ToolFormat, text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert streamed(pieces, format) == parse(text, format)


@pytest.mark.parametrize("format", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda format: format.name)
@settings(max_examples=100, deadline=None)
@given(text=ANSWERS.filter(lambda text: "<think>" not in text))
def test_no_marker_is_shown(format: ToolFormat, text: str) -> None:
    stream = ToolCallStream(format)
    shown = [event for event in [*stream.push(text), *stream.finish()] if isinstance(event, str)]
    assert not [event for event in shown for marker in format.markers if marker in event]


def test_a_marker_without_a_call_is_not_shown() -> None:
    assert parse("Well. <|python_tag|>", LLAMA3).content == "Well."


@EACH
@settings(max_examples=100, deadline=None)
@given(text=ANSWERS)
def test_nothing_that_is_said_is_lost(format: ToolFormat, text: str) -> None:
    """Content, calls and invalid calls together hold every letter except the marks of calls."""
    answer = parse(text, format)
    kept = answer.content + "".join(one.name + json.dumps(one.arguments) for one in answer.tool_calls)
    kept += "".join(one.text for one in answer.invalid)
    assert text.count("Well.") <= kept.count("Well.")


# Forced calls


def forced(
    engine: TransformersEngine, format: ToolFormat, sampling: Sampling = GREEDY, count: int = 600, **how: object
) -> str:
    """The answer of a model that must call a tool."""
    session = Memory(engine, POLICY).session()
    session.append("Hail the Fairlea. ")
    text = answer_text(engine, format.markers)
    constraint = tool_call_constraint(engine, TOOLS, format, **how)
    pieces = session.generate(count, sampling, constraint)
    return "".join(text.push(id) for piece in pieces for id in piece.token_ids) + text.finish()


@EACH
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_forced_call_is_one_of_the_named_tool(
    engine: TransformersEngine, format: ToolFormat, sampling: Sampling
) -> None:
    answer = parse(forced(engine, format, sampling, name="hail"), format)
    (made,) = answer.tool_calls
    assert (answer.content, answer.invalid, made.name) == ("", [], "hail")
    assert made.arguments["ship"] in ("Fairlea", "Vesper")
    assert made.arguments["times"] in range(1, 10)


@EACH
def test_a_forced_call_is_written_as_the_format_writes_it(engine: TransformersEngine, format: ToolFormat) -> None:
    text = forced(engine, format, name="hail")
    assert text == format.write((made.name, made.arguments) for made in parse(text, format).tool_calls)


@EACH
@pytest.mark.parametrize("before", ["", "Well. ", "\n "], ids=repr)
def test_a_call_that_is_forbidden_cannot_be_written(
    engine: TransformersEngine, format: ToolFormat, before: str
) -> None:
    """The tools were taken out of the prompt, so the whole conversation was read again."""
    written = before + format.write([("hail", {"ship": "Fairlea", "times": 2})])
    constraint, accepted = no_call_constraint(engine, format), []
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        for token_id in engine.encode(written):
            constraint.accept(token_id)
            accepted.append(token_id)
        if not parse(written, format).tool_calls:
            raise InvalidInput("no call, so it does not follow the grammar of one")
    assert not parse(engine.decode(accepted), format).tool_calls


@EACH
def test_where_calls_are_forbidden_other_text_is_not(engine: TransformersEngine, format: ToolFormat) -> None:
    constraint = no_call_constraint(engine, format)
    for token_id in engine.encode('Hail the "Fairlea" <twice> [in all].\n'):
        constraint.accept(token_id)
    assert not constraint.is_complete


@EACH
def test_any_tool_may_be_called_if_none_is_named(engine: TransformersEngine, format: ToolFormat) -> None:
    for name, arguments in (("hail", {"ship": "Vesper", "times": 3}), ("now", {})):
        constraint = tool_call_constraint(engine, TOOLS, format)
        for byte in format.write([(name, arguments)]).encode():
            constraint.accept(byte)
        assert constraint.is_complete


@EACH
def test_several_calls_may_follow_each_other_if_asked_for(engine: TransformersEngine, format: ToolFormat) -> None:
    constraint = tool_call_constraint(engine, TOOLS, format, parallel=True)
    for byte in format.write([("now", {}), ("hail", {"ship": "Vesper", "times": 3}), ("now", {})]).encode():
        constraint.accept(byte)


def test_arguments_may_refer_to_definitions_of_their_schema(engine: TransformersEngine) -> None:
    parameters = {
        "type": "object",
        "properties": {"ship": {"$ref": "#/$defs/Ship"}},
        "required": ["ship"],
        "$defs": {"Ship": {"enum": ["Vesper"]}},
    }
    tools = [{"type": "function", "function": {"name": "find", "parameters": parameters}}]
    constraint = tool_call_constraint(engine, tools, JSON)
    for byte in b'{"name": "find", "arguments": {"ship": "Vesper"}}':
        constraint.accept(byte)
    assert constraint.is_complete


def test_a_name_may_hold_any_character(engine: TransformersEngine) -> None:
    tools = [{"type": "function", "function": {"name": 'é"\\{n}'}}]
    constraint = tool_call_constraint(engine, tools, HERMES)
    for byte in HERMES.write([('é"\\{n}', {})]).encode():
        constraint.accept(byte)
    assert constraint.is_complete


@pytest.mark.parametrize("template_marker", [MISTRAL, MISTRAL_ARGS], ids=["mistral", "mistral_args"])
def test_a_marker_that_is_a_special_token_is_that_token(new_engine: NewEngine, template_marker: ToolFormat) -> None:
    engine = new_engine(NEW_MISTRAL, "[TOOL_CALLS]")
    session = Memory(engine, POLICY).session()
    session.append("Hail the Fairlea. ")
    constraint = tool_call_constraint(engine, TOOLS, template_marker, name="hail")
    first, *_ = session.generate(600, GREEDY, constraint)
    assert first.token_ids == (259,)


@pytest.mark.parametrize("format", [MISTRAL, MISTRAL_ARGS], ids=["mistral", "mistral_args"])
def test_a_call_after_a_special_token_is_read(new_engine: NewEngine, format: ToolFormat) -> None:
    """`Piece.text` leaves special tokens out, so the call looked like content."""
    text = forced(new_engine(NEW_MISTRAL, "[TOOL_CALLS]"), format, name="hail")
    assert [made.name for made in parse(text, format).tool_calls] == ["hail"]


def test_the_text_of_an_answer_has_no_other_special_token(new_engine: NewEngine) -> None:
    engine = new_engine(NEW_MISTRAL, "[TOOL_CALLS]")
    stream = answer_text(engine, MISTRAL.markers)
    assert "".join(map(stream.push, [256, *b"A ", 259, *b"now", 258, *b"{}", 257])) == "A [TOOL_CALLS]now{}"


def test_the_text_of_an_answer_ends_at_a_stop_text(engine: TransformersEngine) -> None:
    stream = answer_text(engine, HERMES.markers, ["END"])
    assert "".join(map(stream.push, b"An owlEND or two")) == "An owl"


@pytest.mark.parametrize(
    ("tools", "how", "message"),
    [
        (TOOLS, {"name": "sail"}, r"no tool 'sail' to call among \['hail', 'now'\]: give one of them"),
        ([], {}, r"no tool None to call among \[\]"),
        (
            [NOW, {"type": "function", "function": {"name": "sail", "parameters": {"$ref": "#/$defs/sail"}}}],
            {},
            "the parameters of sail cannot be enforced: .*does not exist",
        ),
        (
            [{"type": "function", "function": {"name": "sail", "parameters": {"type": "string"}}}],
            {},
            "the parameters of sail are .*: give the JSON schema of an object",
        ),
    ],
)
def test_a_call_that_cannot_be_forced_is_refused(
    engine: TransformersEngine, tools: list, how: dict, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        tool_call_constraint(engine, tools, HERMES, **how)


# Free answers whose calls have one form


def followed(constraint: Constraint, text: str, seed: int | None = None) -> str:
    """A text that the grammar accepts: the given one, extended at random if there is a seed."""
    said = bytearray(text.encode())
    for byte in said:
        constraint.accept(byte)
    choose = random.Random(seed)
    while seed is not None and not constraint.is_complete:
        token_id = choose.choice(constraint.mask(torch.zeros(260)).isfinite().nonzero()[:, 0].tolist())
        constraint.accept(token_id)
        said += bytes([token_id] if token_id < 256 else [])
    return said.decode()


@EACH
@pytest.mark.parametrize("before", ["", "Well. ", "Well {a}, <b> [c]\n"], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_a_strict_call_follows_its_schema_where_the_model_is_free_to_make_it(
    engine: TransformersEngine, format: ToolFormat, before: str, seed: int
) -> None:
    constraint = calls_or_text_constraint(engine, TOOLS, format, strict={"hail", "now"}, parallel=False)
    written = format.write([("hail", {"ship": "Vesper", "times": 7})])
    text = followed(constraint, before + written[: written.index('"ship"')], seed)
    answer = parse(text, format)
    assert (answer.content, answer.invalid) == (before.rstrip(), [])
    (made,) = answer.tool_calls
    assert made.arguments["ship"] in ("Fairlea", "Vesper")
    assert made.arguments["times"] in range(1, 10)
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        followed(constraint, "\n")


@EACH
@pytest.mark.parametrize("arguments", [{"ship": "Titanic"}, {"ship": "Vesper", "times": 10}, {"times": 3}], ids=str)
def test_a_strict_call_that_does_not_follow_its_schema_cannot_be_written(
    engine: TransformersEngine, format: ToolFormat, arguments: dict
) -> None:
    for name in ("hail", "sink"):
        constraint = calls_or_text_constraint(engine, TOOLS, format, strict={"hail"})
        with pytest.raises(InvalidInput, match="does not follow the grammar"):
            followed(constraint, f"Well. {format.write([(name, arguments)])}")
    constraint = calls_or_text_constraint(engine, TOOLS, format, strict={"now"})
    followed(constraint, f"Well. {format.write([('hail', arguments)])}")


@EACH
def test_one_call_is_not_followed_by_another_where_one_is_asked_for(
    engine: TransformersEngine, format: ToolFormat
) -> None:
    two = format.write([("now", {}), ("hail", {"ship": "Vesper", "times": 3})])
    followed(calls_or_text_constraint(engine, TOOLS, format), two)
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        followed(calls_or_text_constraint(engine, TOOLS, format, parallel=False), two)


@EACH
@pytest.mark.parametrize("text", ["", "An owl.", 'Hail the "Fairlea" <twice> [in all], {"x": 1}.\n'])
def test_free_text_may_end_anywhere_and_say_anything_but_a_call(
    engine: TransformersEngine, format: ToolFormat, text: str
) -> None:
    constraint = calls_or_text_constraint(engine, TOOLS, format, parallel=False)
    followed(constraint, text)
    constraint.accept(257)
    assert constraint.is_complete


def test_near_its_limit_free_text_is_not_closed_like_json(engine: TransformersEngine) -> None:
    constraint = calls_or_text_constraint(engine, TOOLS, HERMES, strict={"hail"})
    assert constraint.mask(torch.zeros(260), is_closing=True).isfinite().sum() > 100


@pytest.mark.parametrize("format", [MISTRAL, MISTRAL_ARGS], ids=["mistral", "mistral_args"])
def test_a_special_token_opens_a_strict_call(new_engine: NewEngine, format: ToolFormat) -> None:
    engine = new_engine(NEW_MISTRAL, "[TOOL_CALLS]")
    constraint = calls_or_text_constraint(engine, TOOLS, format, strict={"hail"}, parallel=False)
    text = format.write([("hail", {"ship": "Vesper", "times": 3})]).removeprefix("[TOOL_CALLS]")
    for token_id in [*b"Well. ", 259, *text.encode()]:
        constraint.accept(token_id)
    assert constraint.is_complete
    spelt = calls_or_text_constraint(engine, TOOLS, format, strict={"hail"}, parallel=False)
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        followed(spelt, "[TOOL_CALLS]")


@EACH
def test_an_answer_in_a_form_may_be_calls_instead(engine: TransformersEngine, format: ToolFormat) -> None:
    """With a response_format no tool could be called, so an agent with one never called any."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "at": {"enum": ["sea"]}}, "required": ["at"]}
    called = [
        format.write([(name, arguments)]) for name, arguments in (("now", {}), ("hail", {"ship": "Vesper", "times": 3}))
    ]
    for text in ('{"at": "sea"}', '{"name": "hail", "at": "sea"}', '{"name": "x", "at": "sea"}', *called):
        constraint = calls_or_json_constraint(engine, TOOLS, format, schema, parallel=False)
        assert followed(constraint, text)
        constraint.accept(257)
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        followed(calls_or_json_constraint(engine, TOOLS, format, schema), "Well. ")


def test_a_name_that_its_format_cannot_hold_is_refused(engine: TransformersEngine) -> None:
    tools = [{"type": "function", "function": {"name": "sail [ARGS]"}}]
    with pytest.raises(InvalidInput, match="the tool name 'sail \\[ARGS\\]' runs into the text after it"):
        tool_call_constraint(engine, tools, MISTRAL_ARGS)


# The demo model


@pytest.fixture
def demo_memory(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Memory:
    return Memory(TransformersEngine(*demo), POLICY)


@pytest.mark.model
def test_the_demo_model_calls_a_tool_of_which_it_is_told(demo_memory: Memory) -> None:
    engine, session = demo_memory.engine, demo_memory.session()
    messages, tools = prepare(engine, [{"role": "user", "content": "Hail the ship Vesper 3 times."}], TOOLS)
    session.append(engine.encode(engine.render(messages, tools=tools, add_generation_prompt=True)))
    constraint = tool_call_constraint(engine, TOOLS, tool_format(engine), name="hail")
    text = "".join(piece.text for piece in session.generate(80, GREEDY, constraint))
    (made,) = parse(text, tool_format(engine)).tool_calls
    assert made.arguments["ship"] in ("Fairlea", "Vesper")
    assert made.arguments["times"] in range(1, 10)


@pytest.mark.model
def test_the_demo_model_calls_a_tool_however_it_samples(demo_memory: Memory) -> None:
    engine, session = demo_memory.engine, demo_memory.session()
    session.append([{"role": "user", "content": "Hello."}])
    constraint = tool_call_constraint(engine, TOOLS, HERMES, name="hail")
    text = "".join(piece.text for piece in session.generate(150, Sampling(temperature=3.0, seed=1), constraint))
    assert [made.name for made in parse(text, HERMES).tool_calls] == ["hail"]
