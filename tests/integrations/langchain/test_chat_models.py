"""`ChatAMMemory` on the tiny model: threads in every way of calling it, tokens that are read again, and errors."""

from __future__ import annotations

import asyncio
import itertools
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.chat_models import base
from langchain_am_memory import ChatAMMemory, register_provider
from langchain_am_memory.call_options import openai_tools
from langchain_am_memory.limits import with_limits
from langchain_am_memory.messages import to_openai
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.exceptions import ContextOverflowError, OutputParserException
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, Field

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, InvalidPolicy, UnsupportedOperation

ROOMY = MemoryPolicy(trigger_tokens=3000, pinned=4, keep_recent=8, chunk_tokens=256)
TIGHT = MemoryPolicy(trigger_tokens=160, pinned=4, keep_recent=8, keep_ratio=0.25, chunk_tokens=256)
CONFIG: Any = {"configurable": {"thread_id": "mine"}}

NewModel = Callable[..., ChatAMMemory]


@pytest.fixture
def new_model(engine: TransformersEngine) -> NewModel:
    def make(policy: MemoryPolicy = ROOMY, store: Path | None = None, **fields: Any) -> ChatAMMemory:
        return ChatAMMemory(model=Memory(engine, policy, store=store), **{"max_tokens": 6, "temperature": 0, **fields})

    return make


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def read_again(answer: BaseMessage) -> int:
    """Tokens of the prompt that were not in the cache."""
    assert isinstance(answer, AIMessage)
    usage = answer.usage_metadata
    assert usage is not None
    return usage["input_tokens"] - usage["input_token_details"]["cache_read"]


# Tokens that are read


def test_the_second_call_reads_only_its_new_tokens(new_model: NewModel) -> None:
    model = new_model()
    messages: list[BaseMessage] = [HumanMessage("hello there, this is a rather long first message")]
    first = model.invoke(messages)
    second = model.invoke([*messages, first, HumanMessage("and?")])
    assert read_again(first) > 60
    # the end of the answer, and "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n" in bytes
    assert read_again(second) == pytest.approx(27, abs=4)


def test_a_restart_reads_only_what_is_new(new_model: NewModel, tmp_path: Path) -> None:
    messages: list[BaseMessage] = [HumanMessage("hello there, this is a rather long first message")]
    messages.append(new_model(store=tmp_path).invoke(messages, CONFIG))
    again = new_model(store=tmp_path).invoke([*messages, HumanMessage("and?")], CONFIG)
    assert read_again(again) < 35


def test_usage_counts_what_the_tokenizer_counts(new_model: NewModel) -> None:
    model = new_model()
    messages = [SystemMessage("be brief"), HumanMessage("hello")]
    answer = model.invoke(messages)
    assert answer.usage_metadata["input_tokens"] == model.get_num_tokens_from_messages(messages)


def test_tools_are_counted(new_model: NewModel) -> None:
    model, messages = new_model(), [HumanMessage("hello")]
    without = model.get_num_tokens_from_messages(messages)
    assert model.get_num_tokens_from_messages(messages, tools=[add]) > without + len("Add two numbers.")


def test_a_conversation_longer_than_the_cache_goes_on(new_model: NewModel) -> None:
    model = new_model(TIGHT)
    messages: list[BaseMessage] = []
    for number in range(8):
        messages.append(HumanMessage(f"this is message number {number}"))
        messages.append(model.invoke(messages))
    figures = messages[-1].response_metadata["am_memory"]
    assert figures["compactions"] >= 3
    assert figures["kv_tokens"] <= 160 < figures["logical_tokens"]


# Threads


def thread_names(model: ChatAMMemory) -> list[str]:
    return model.threads().names()


def test_a_call_without_a_thread_is_of_the_default_one(new_model: NewModel) -> None:
    model = new_model()
    model.invoke("hello")
    assert thread_names(model) == ["default"]


def _stream_events_v3(model: ChatAMMemory) -> object:
    return model.stream_events("hello", CONFIG, version="v3").output


SYNC: dict[str, Callable[[ChatAMMemory], object]] = {
    "invoke": lambda model: model.invoke("hello", CONFIG),
    "stream": lambda model: list(model.stream("hello", CONFIG)),
    "batch": lambda model: model.batch(["hello"], CONFIG),
    "bind_tools": lambda model: model.bind_tools([add]).invoke("hello", CONFIG),
    "with_config": lambda model: model.with_config(CONFIG).invoke("hello"),
    "bind": lambda model: model.bind(thread_id="mine").invoke("hello"),
    "agent": lambda model: create_agent(model, []).invoke({"messages": [HumanMessage("hello")]}, CONFIG),
    "agent stream": lambda model: list(
        create_agent(model, []).stream({"messages": [HumanMessage("hello")]}, CONFIG, stream_mode="messages")
    ),
    "stream_events v3": _stream_events_v3,
    "session_id": lambda model: RunnableWithMessageHistory(
        model, lambda session_id: InMemoryChatMessageHistory()
    ).invoke([HumanMessage("hello")], {"configurable": {"session_id": "mine"}}),
}


@pytest.mark.parametrize("call", SYNC)
def test_the_thread_is_found_on_every_way_of_calling(new_model: NewModel, call: str) -> None:
    model = new_model()
    SYNC[call](model)
    assert thread_names(model) == ["mine"]


async def _astream(model: ChatAMMemory) -> None:
    async for _ in model.astream("hello", CONFIG):
        pass


async def _astream_events(model: ChatAMMemory) -> None:
    agent = create_agent(model, [])
    async for _ in agent.astream_events({"messages": [HumanMessage("hello")]}, CONFIG, version="v2"):
        pass


async def _bare_astream_events(model: ChatAMMemory) -> None:
    async for _ in model.astream_events("hello", CONFIG, version="v2"):
        pass


async def _bare_astream_events_v3(model: ChatAMMemory) -> None:
    async for _ in await model.astream_events("hello", CONFIG, version="v3"):
        pass


ASYNC: dict[str, Callable[[ChatAMMemory], Any]] = {
    "ainvoke": lambda model: model.ainvoke("hello", CONFIG),
    "astream": _astream,
    "abatch": lambda model: model.abatch(["hello"], CONFIG),
    "agent": lambda model: create_agent(model, []).ainvoke({"messages": [HumanMessage("hello")]}, CONFIG),
    "agent astream_events": _astream_events,
    "astream_events": _bare_astream_events,
    "astream_events v3": _bare_astream_events_v3,
}


@pytest.mark.parametrize("call", ASYNC)
async def test_the_thread_is_found_on_every_asynchronous_way_of_calling(new_model: NewModel, call: str) -> None:
    model = new_model()
    await ASYNC[call](model)
    assert thread_names(model) == ["mine"]


def test_a_deleted_thread_is_gone(new_model: NewModel) -> None:
    model = new_model()
    model.invoke("hello", CONFIG)
    model.delete_thread("mine")
    assert thread_names(model) == []


def test_a_summariser_that_shares_the_thread_does_not_disturb_it(new_model: NewModel) -> None:
    model = new_model()
    messages: list[BaseMessage] = [HumanMessage("tell me a long story about an owl")]
    messages.append(model.invoke(messages, CONFIG))
    model.invoke([HumanMessage("Summarise: tell me a long story")], CONFIG)
    assert read_again(model.invoke([*messages, HumanMessage("on")], CONFIG)) < 35


# Agents


def test_an_agent_with_a_checkpointer_reads_each_turn_once(new_model: NewModel) -> None:
    agent = create_agent(new_model(), [], checkpointer=InMemorySaver(), system_prompt="You are an owl. " * 4)
    answers = [
        agent.invoke({"messages": [HumanMessage(f"question {number}")]}, CONFIG)["messages"][-1] for number in range(3)
    ]
    assert read_again(answers[0]) > 100
    assert all(read_again(answer) < 40 for answer in answers[1:])


def test_time_travel_finds_the_branch_again(new_model: NewModel) -> None:
    agent = create_agent(new_model(), [], checkpointer=InMemorySaver())
    for text in ("first question, rather long", "second question"):
        agent.invoke({"messages": [HumanMessage(text)]}, CONFIG)
    after_first = next(
        state for state in agent.get_state_history(CONFIG) if len(state.values["messages"]) == 2 and not state.next
    )
    forked = agent.invoke({"messages": [HumanMessage("another second question")]}, after_first.config)
    assert [message.content for message in forked["messages"]][2] == "another second question"
    assert read_again(forked["messages"][-1]) < 60


def test_tool_calls_and_their_results_go_back_and_forth(new_model: NewModel) -> None:
    model = new_model(max_tokens=200)
    question = HumanMessage("add")
    call = model.bind_tools([add], tool_choice="add").invoke([question])
    assert [found["name"] for found in call.tool_calls] == ["add"]
    assert set(call.tool_calls[0]["args"]) == {"a", "b"}
    result = ToolMessage("3", tool_call_id=call.tool_calls[0]["id"])
    after = model.bind_tools([add]).invoke([question, call, result])
    assert read_again(after) < 120  # the call itself is in the cache as it was generated


# Structured output


class Weather(BaseModel):
    """The weather."""

    city: str
    is_raining: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_follows_the_schema_whatever_the_model(new_model: NewModel, method: Any) -> None:
    answer = new_model(max_tokens=300).with_structured_output(Weather, method=method).invoke("weather?")
    assert isinstance(answer, Weather)


def test_the_name_of_no_tool_is_refused(new_model: NewModel) -> None:
    with pytest.raises(InvalidInput, match="'subtract' is none of the tools: add"):
        new_model().bind_tools([add], tool_choice="subtract")


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        *(("auto", "auto"), ({"type": "auto"}, "auto"), ({"type": "none"}, "none"), (False, None)),
        *(("any", "any"), (True, "any"), ("required", "any"), ({"type": "any"}, "any"), ({"type": "required"}, "any")),
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "function", "name": "add"}, "add"),
        ({"type": "tool", "name": "add"}, "add"),
    ],
)
def test_a_choice_is_taken_as_the_well_known_apis_have_it(new_model: NewModel, choice: Any, meant: str | None) -> None:
    assert new_model().bind_tools([add], tool_choice=choice).kwargs["tool_choice"] == meant


@pytest.mark.parametrize(
    "choice",
    [
        *({"type": "function"}, {"type": "tool"}, {"function": "add"}, {"function": {}}, {}, 3, ["add"]),
        *({"type": "function", "function": {"name": 3}}, {"type": "any", "disable_parallel_tool_use": True}),
    ],
    ids=str,
)
def test_a_choice_in_no_known_form_is_refused(new_model: NewModel, choice: Any) -> None:
    with pytest.raises(InvalidInput, match=r'tool_choice is .*: give "auto", "none", "any", the name of a tool'):
        new_model().bind_tools([add], tool_choice=choice)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strict": "yes"}, "strict is 'yes': give True or False"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls is 'no': give True or False"),
        ({"parallel_tool_calls": 0}, "parallel_tool_calls is 0: give True or False"),
        ({"max_tokens": "abc"}, "max_tokens is 'abc': give a whole number"),
        ({"max_tokens": 2.7}, "max_tokens is 2.7: give a whole number"),
        ({"memory_policy": {"trigger_tokens": 600}}, "memory_policy is .*: give a MemoryPolicy"),
        ({"memory_policy": 3}, "memory_policy is 3: give a MemoryPolicy"),
    ],
    ids=str,
)
def test_a_value_that_is_none_of_its_arguments_is_refused(new_model: NewModel, given: dict, message: str) -> None:
    model = new_model()
    for take in (
        lambda: model.bind_tools([add], **given),
        lambda: model.bind(**given),
        lambda: model.invoke("hello", **given),
        lambda: new_model(model_kwargs=given),
    ):
        with pytest.raises(InvalidInput, match=message):
            take()


def test_what_is_said_of_calls_beside_tools_is_bound(new_model: NewModel) -> None:
    """It was accepted and ignored."""
    bound = new_model().bind_tools([add], strict=True, parallel_tool_calls=False)
    assert (bound.kwargs["strict"], bound.kwargs["parallel_tool_calls"]) == (True, False)


@pytest.mark.parametrize("choice", [None, "any"])
@pytest.mark.parametrize(
    "options",
    [{"parallel_tool_calls": False}, {"parallel_tool_calls": True}, {"strict": True}, {"strict": None}],
    ids=str,
)
def test_what_every_chat_model_takes_beside_tools_is_taken(new_model: NewModel, choice: Any, options: dict) -> None:
    model = new_model(max_tokens=120)
    for bound in (
        model.bind_tools([add], tool_choice=choice, **options),
        model.bind(tools=[add], tool_choice=choice, **options),
    ):
        answer = bound.invoke("add")
        assert choice is None or answer.tool_calls
        assert len(answer.tool_calls) <= 1 or options.get("parallel_tool_calls") is not False


def test_strict_is_said_of_each_tool(new_model: NewModel) -> None:
    asked = [
        new_model()._options({"tools": [add], "strict": strict}, None).tools[0]["function"] for strict in (True, None)
    ]
    assert [tool.get("strict") for tool in asked] == [True, None]
    assert asked[0]["parameters"] == asked[1]["parameters"]
    model = new_model()
    tokens = [
        model.get_num_tokens_from_messages([HumanMessage("hello")], tools=openai_tools([add], strict=strict))
        for strict in (True, None)
    ]
    assert tokens[0] == tokens[1]


class Marks(BaseModel):
    """Marks."""

    at: set[Literal[1, 2]] = Field(min_length=2)
    by: pathlib.Path = pathlib.Path()


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_what_no_grammar_holds_is_checked_in_structured_output(
    new_model: NewModel, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """Schemas of pydantic classes with sets or paths were refused."""
    said = {
        "json_schema": '{"at": [1, %s]}',
        "function_calling": '<tool_call>\n{"name": "Marks", "arguments": {"at": [1, %s]}}\n</tool_call>',
    }

    def say(number: int) -> None:
        tokens = itertools.chain((said[method] % number).encode(), itertools.repeat(257))
        monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))

    schema = Marks.model_json_schema()
    model = new_model(max_tokens=200)
    for kind, right in ((Marks, Marks(at={1, 2})), (schema, {"at": [1, 2]})):
        say(2)
        assert model.with_structured_output(kind, method=method).invoke("x") == right
    checked = model.with_structured_output(schema, method=method)
    say(1)
    with pytest.raises(OutputParserException, match=r"does not follow its schema: \['at'\]: \[1,1\] has non-unique"):
        checked.invoke("x")
    say(1)
    with pytest.raises(OutputParserException, match="does not follow its schema"):
        list(checked.stream("x"))
    say(1)
    found = model.with_structured_output(schema, method=method, include_raw=True).invoke("x")
    assert (found["parsed"], type(found["parsing_error"])) == (None, OutputParserException)
    assert "non-unique" in found["raw"].response_metadata["am_memory"]["schema_error"]


@pytest.mark.parametrize("kind", [Weather, Weather.model_json_schema()], ids=["class", "schema"])
def test_structured_output_that_was_cut_off_is_not_completed(
    new_model: NewModel, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """LangChain completes the JSON of a stream, and of an answer that ends too early too."""
    tokens = iter(b'{"city": "London", "is_raining": tru')
    monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))
    with pytest.raises(OutputParserException, match="the answer was cut off"):
        new_model(max_tokens=30).with_structured_output(kind).invoke("weather?")


def test_an_agent_with_a_response_format_still_calls_its_tools(
    new_model: NewModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    tokens = iter([*call.encode(), 257, *b'{"city": "London", "is_raining": true}', 257])
    monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))
    state = create_agent(new_model(max_tokens=200), [add], response_format=Weather).invoke(
        {"messages": [HumanMessage("?")]}
    )
    assert [message.content for message in state["messages"] if isinstance(message, ToolMessage)] == ["3"]
    assert state["structured_response"] == Weather(city="London", is_raining=True)


# Calls from other providers


def test_a_call_that_could_not_be_made_is_told_as_it_was_written() -> None:
    """Providers' `invalid_tool_calls` were left out, so their results had no call."""
    broken = {"name": "add", "args": '{"a": 1, "b', "id": "c2", "error": "cut off", "type": "invalid_tool_call"}
    nameless = {"name": None, "args": "not JSON: x", "id": "c3", "error": None, "type": "invalid_tool_call"}
    made = {"name": "add", "args": {"a": 1}, "id": "c1"}
    (told,) = to_openai([AIMessage("", tool_calls=[made], invalid_tool_calls=[broken, nameless])])
    assert [(each["id"], each["function"]["name"], each["function"]["arguments"]) for each in told["tool_calls"]] == [
        ("c1", "add", '{"a": 1}'),
        ("c2", "add", '{"a": 1, "b'),
    ]


def test_a_conversation_with_a_broken_call_goes_on(new_model: NewModel) -> None:
    model = new_model()
    broken = {"name": "add", "args": '{"a": 1, "b', "id": "c2", "error": "cut off", "type": "invalid_tool_call"}
    messages: list[BaseMessage] = [
        HumanMessage("add"),
        AIMessage("", invalid_tool_calls=[broken]),
        ToolMessage("Not run.", tool_call_id="c2"),
        HumanMessage("again"),
    ]
    messages.append(model.bind_tools([add]).invoke(messages))
    assert read_again(model.bind_tools([add]).invoke([*messages, HumanMessage("and?")])) < 40


# Streams


def test_a_stream_says_what_invoke_says(new_model: NewModel) -> None:
    model = new_model()
    chunks = list(model.stream("hello"))
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke("hello").content


def test_an_abandoned_stream_leaves_the_thread_as_it_was(new_model: NewModel) -> None:
    model = new_model()
    for _ in model.stream("hello", CONFIG):
        break
    assert thread_names(model) == []


async def test_a_cancelled_stream_leaves_the_thread_as_it_was(new_model: NewModel) -> None:
    model = new_model(max_tokens=500)
    first = asyncio.Event()

    async def consume() -> None:
        async for _ in model.astream("hello", CONFIG):
            first.set()

    task = asyncio.create_task(consume())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert thread_names(model) == []
    assert (await new_model().ainvoke("hello")).content


async def test_calls_at_once_get_their_tokens_in_one_pass(new_model: NewModel, pass_sizes: list[int]) -> None:
    await new_model(max_tokens=20).abatch([f"prompt {number}" for number in range(6)])
    assert max(pass_sizes) == 6
    assert sum(pass_sizes) > 4 * len(pass_sizes)


async def test_sixteen_threads_at_once_get_their_own_answers(new_model: NewModel) -> None:
    model = new_model(TIGHT)
    prompts = [f"prompt {number} " + "abc" * number for number in range(16)]
    alone = [new_model(TIGHT).invoke(prompt).content for prompt in prompts]
    configs: list[Any] = [{"configurable": {"thread_id": f"thread {number}"}} for number in range(16)]
    together = await model.abatch(list(prompts), configs)
    assert [answer.content for answer in together] == alone

    async def streamed(number: int) -> str:
        return "".join([str(chunk.content) async for chunk in model.astream(prompts[number], configs[number])])

    assert await asyncio.gather(*map(streamed, range(16))) == alone
    assert len(thread_names(model)) == 16


# Bad input


def test_a_turn_that_cannot_fit_overflows(new_model: NewModel) -> None:
    model = new_model(MemoryPolicy(trigger_tokens=100, pinned="system", keep_recent=8, keep_ratio=0.25))
    with pytest.raises(ContextOverflowError, match="raise trigger_tokens"):
        model.invoke([SystemMessage("x" * 300), HumanMessage("hello")])


def test_an_image_is_refused(new_model: NewModel) -> None:
    content: Any = [{"type": "image_url", "image_url": {"url": "http://localhost/owl.png"}}]
    with pytest.raises(InvalidInput, match="text only"):
        new_model().invoke([HumanMessage(content)])


def test_an_answer_that_takes_too_long_is_given_up(new_model: NewModel) -> None:
    model = new_model(timeout=1e-9)
    with pytest.raises(TimeoutError, match="raise timeout"):
        model.invoke("hello", CONFIG)
    assert thread_names(model) == []


MISSPELT: dict[str, Callable[[ChatAMMemory], object]] = {
    "invoke": lambda model: model.invoke("hello", temprature=0),
    "stream": lambda model: list(model.stream("hello", temprature=0)),
    "batch": lambda model: model.batch(["hello"], temprature=0),
    "stream_events": lambda model: model.stream_events("hello", version="v3", temprature=0).output,
    "bind": lambda model: model.bind(temprature=0),
    "bind_tools": lambda model: model.bind_tools([add], temprature=0),
    "model_kwargs": lambda model: ChatAMMemory(model="demo", model_kwargs={"temprature": 0}),
    "the model": lambda model: ChatAMMemory(model="demo", temprature=0),
    "agent": lambda model: create_agent(model, [], middleware=[_misspelling()]).invoke({"messages": ["hello"]}),
}


def _misspelling() -> Any:
    @wrap_model_call
    def misspelling(request: Any, handler: Any) -> Any:
        return handler(request.override(model_settings={"temprature": 0}))

    return misspelling


@pytest.mark.parametrize("call", MISSPELT)
def test_an_argument_that_there_is_not_is_refused_with_the_nearest_one(new_model: NewModel, call: str) -> None:
    with pytest.raises(InvalidInput, match=r"temprature \(did you mean temperature\?\)"):
        MISSPELT[call](new_model())


@pytest.mark.parametrize("call", ["ainvoke", "abatch", "astream"])
async def test_it_is_refused_of_asynchronous_calls(new_model: NewModel, call: str) -> None:
    model = new_model()
    with pytest.raises(InvalidInput, match=r"max_token \(did you mean max_tokens\?\)"):
        if call == "astream":
            async for _ in model.astream("hello", max_token=1):
                pass
        else:
            await (model.ainvoke("hello", max_token=1) if call == "ainvoke" else model.abatch(["hello"], max_token=1))


def test_a_setting_that_there_is_not_is_refused_before_anything_is_loaded() -> None:
    """`ChatAMMemory(triger=...)` was accepted, and compacted at 8,192 tokens."""
    with pytest.raises(InvalidInput, match=r"ChatAMMemory takes no triger \(did you mean trigger\?\), max_token \("):
        ChatAMMemory(model="demo", triger=("tokens", 1000), max_token=3)
    with pytest.raises(InvalidInput, match="takes no colour$"):
        ChatAMMemory(model="demo", colour="blue")
    with pytest.raises(InvalidPolicy, match=r"there is no triger_tokens \(did you mean trigger_tokens\?\)"):
        ChatAMMemory(model="demo", policy={"triger_tokens": 1000})
    with pytest.raises(
        InvalidInput, match=r"with_structured_output takes no include_row \(did you mean include_raw\?\)"
    ):
        ChatAMMemory(model="demo").with_structured_output(Weather, include_row=True)


def test_what_langchain_gives_every_chat_model_is_taken(new_model: NewModel) -> None:
    given: dict[str, Any] = {
        "name": "mine", "cache": None, "verbose": False, "callbacks": None, "tags": ["a"], "metadata": {"b": 1},
        "custom_get_token_ids": None, "rate_limiter": None, "disable_streaming": False, "output_version": "v0",
        "stop_sequences": ["x"], "timeout": 60, "api_key": "sk-nothing", "streaming": True,
    }  # fmt: skip
    model = new_model(**given)
    assert "sk-nothing" not in repr(model)
    assert model.invoke("hello", {"tags": ["c"], "metadata": {"d": 2}}, stop=["y"], stream=False).content
    assert model.bind(ls_structured_output_format={"kwargs": {}, "schema": {}}).invoke("hello").content


def test_model_kwargs_are_of_every_call_that_says_nothing_else(new_model: NewModel) -> None:
    model = new_model(model_kwargs={"max_tokens": 2})
    assert model.invoke("hello").usage_metadata["output_tokens"] == 2
    assert model.invoke("hello", max_tokens=3).usage_metadata["output_tokens"] == 3


def test_a_policy_of_a_model_sets_only_the_fields_that_it_was_given() -> None:
    """It was made of all fields, so that none was left to the engine: a GPU read 512 tokens at once."""
    plain = ChatAMMemory(model="demo", trigger=("tokens", 4000), keep=("fraction", 0.5))._memory_policy()
    assert plain.model_fields_set == {"trigger_tokens", "compact_fraction"}
    assert plain.chunk_tokens is None
    told = ChatAMMemory(model="demo", trigger=("tokens", 4000), policy=MemoryPolicy(chunk_tokens=100))._memory_policy()
    assert told.chunk_tokens == 100


def test_compactions_in_reading_the_prompt_are_not_of_the_answer(new_model: NewModel) -> None:
    for num_more in range(40):  # one of them has its last token read just where a compaction is due
        read = new_model(TIGHT, max_tokens=1).invoke("a message that is longer than the cache " * 8 + "a" * num_more)
        figures = read.response_metadata["am_memory"]
        assert figures["compactions"] > 2
        assert figures["compactions_in_answer"] == 0
    written = new_model(TIGHT, max_tokens=300).invoke("hello", temperature=1, seed=3)
    figures = written.response_metadata["am_memory"]
    assert figures["compactions_in_answer"] == figures["compactions"] > 1


def test_trigger_and_keep_are_the_policys(engine: TransformersEngine) -> None:
    model = ChatAMMemory(model="demo", trigger=("tokens", 4000), keep=("tokens", 1000))
    assert model._memory_policy().trigger_tokens == 4000
    assert model._memory_policy().compact_fraction == 0.75


def test_keep_in_tokens_needs_a_trigger_in_tokens() -> None:
    with pytest.raises(InvalidPolicy, match="needs a trigger in tokens"):
        ChatAMMemory(model="demo", trigger=("fraction", 0.5), keep=("tokens", 1000))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (
            ("tokens", 5000),
            r"keep=5,000 tokens and trigger=4,000 tokens leave nothing .* below trigger; lower keep, or raise trigger",
        ),
        (4000, "keep=4,000 tokens and trigger=4,000 tokens"),
        (("tokens", -1), "at least 0"),
        (("fraction", 1.0), r"keep=\('fraction', 1.0\) is not a share: .* less than 1"),
        (("words", 5), r"keep=\('words', 5\): give a number of tokens"),
    ],
)
def test_a_keep_that_leaves_nothing_to_compact_is_refused_by_its_name(keep: tuple[str, float], words: str) -> None:
    """The error named `compact_fraction`, which nobody had set."""
    with pytest.raises(InvalidPolicy, match=words):
        ChatAMMemory(model="demo", trigger=("tokens", 4000), keep=keep)


def test_a_keep_of_a_trigger_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidPolicy, match="keep=0 tokens and trigger=0 tokens"):
        ChatAMMemory(model="demo", trigger=("tokens", 0), keep=("tokens", 0))


@pytest.mark.parametrize("name", ["llama_cpp", "transformers"])
def test_an_engine_beside_a_memory_is_refused(new_model: NewModel, name: str) -> None:
    with pytest.raises(InvalidInput, match="originals_bytes cannot be set on a Memory that is made"):
        new_model(originals_bytes=0)
    with pytest.raises(InvalidInput, match="engine cannot be set on a Memory that is made"):
        new_model(engine=name)


def test_a_structured_output_by_another_method_is_refused(new_model: NewModel) -> None:
    with pytest.raises(InvalidInput, match="method is 'bogus': give one of function_calling, json_schema, json_mode"):
        new_model().with_structured_output(Weather, method="bogus")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: give a whole number, at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": "9"}, "max_tokens is '9'"),
        ({"stop": 5}, "stop 5: "),
        ({"stop": 0}, "stop 0: "),
        ({"stop": "abc"}, "stop 'abc': "),
        ({"stop": [5]}, "stop.0 5: "),
    ],
)
def test_bad_options_of_a_call_are_refused_by_their_values(
    new_model: NewModel, options: dict[str, Any], words: str
) -> None:
    """`max_tokens=0` became the default, and a single stop text was split into its characters."""
    with pytest.raises(InvalidInput, match=words):
        new_model().invoke("hello", **options)
    with pytest.raises(InvalidInput, match=words):
        new_model(model_kwargs=options).invoke("hello")


def test_stops_are_those_of_the_call_then_of_model_kwargs_then_of_the_model(new_model: NewModel) -> None:
    def stops(of_call: list[str] | None, **fields: Any) -> tuple[str, ...]:
        return new_model(**fields)._options({}, of_call).sampling.stop

    assert stops(["a"], stop=["b"], model_kwargs={"stop": ["c"]}) == ("a",)
    assert stops(None, stop=["b"], model_kwargs={"stop": ["c"]}) == ("c",)
    assert stops(None, stop=["b"]) == stops([], stop=["b"]) == ("b",)


def test_a_limit_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidPolicy, match=r'keep=\("messages", 20\): .* give keep=\("tokens", 2,000\)'):
        ChatAMMemory(model="demo", keep=("messages", 20))


@pytest.mark.parametrize(
    "limit",
    [
        ("tokens", "many"),
        ("tokens", 20.5),
        ("tokens", True),
        ("messages", "many"),
        ("fraction", "half"),
        ("tokens",),
        "8",
    ],
)
def test_a_limit_that_is_no_number_is_refused_in_our_words(limit: Any) -> None:
    """`int` and `float` raised errors of their own, and cut ("tokens", 20.5) to 20."""
    with pytest.raises(InvalidPolicy, match=r"give a number of tokens"):
        with_limits(MemoryPolicy(), trigger=limit, keep=None)
    with pytest.raises(InvalidPolicy, match=r"give a number of tokens"):
        with_limits(MemoryPolicy(), trigger=2048, keep=limit)


def test_every_setting_of_sampling_is_a_field_and_reaches_the_call(new_model: NewModel) -> None:
    """New settings of Sampling, which the model did not have, broke every call."""
    given = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {65: 100.0}}
    assert set(Sampling.model_fields) <= set(ChatAMMemory.model_fields)
    sampling = new_model(**given)._options({}, None).sampling
    assert sampling.model_dump(include=set(given)) == given
    assert new_model(logit_bias={65: 100.0}, max_tokens=3).invoke("hello").content == "AAA"


def test_plain_numbers_are_tokens_and_shares() -> None:
    plain = ChatAMMemory(model="demo", trigger=2048, keep=512)._memory_policy()
    assert (plain.trigger_tokens, plain.compact_fraction) == (2048, 0.75)
    assert ChatAMMemory(model="demo", trigger=0.8)._memory_policy().trigger_tokens == 0.8


def test_init_chat_model_makes_it_by_the_name_of_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BUILTIN_PROVIDERS", dict(base._BUILTIN_PROVIDERS))
    base._get_chat_model_creator.cache_clear()
    register_provider()
    model = base.init_chat_model("am_memory:demo", trigger=2048, temperature=0)
    assert isinstance(model, ChatAMMemory)
    assert (model.model, model.trigger, model.temperature) == ("demo", 2048, 0)
    with pytest.raises(InvalidInput, match="takes no trigerr"):
        base.init_chat_model("demo", model_provider="am_memory", trigerr=2048)


def test_a_langchain_without_its_table_of_providers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(base, "_BUILTIN_PROVIDERS")
    with pytest.raises(UnsupportedOperation, match="make ChatAMMemory"):
        register_provider()


def test_the_policy_of_a_model_on_a_memory_is_its_own(new_model: NewModel) -> None:
    model = new_model(trigger=("tokens", 160), keep=("fraction", 0.5))
    answer = model.invoke("a rather long message " * 20)
    assert answer.response_metadata["am_memory"]["kv_tokens"] <= 160
    assert model.memory.policy.trigger_tokens == 3000


def test_the_store_of_a_memory_that_is_made_cannot_be_set(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="store cannot be set"):
        ChatAMMemory(model=Memory(engine, ROOMY), store="elsewhere")


def test_a_call_that_is_cut_off_is_an_invalid_one(new_model: NewModel) -> None:
    answer = new_model(max_tokens=30).bind_tools([add], tool_choice="add").invoke("add")
    assert answer.tool_calls == []
    assert len(answer.invalid_tool_calls) == 1
    assert answer.response_metadata["finish_reason"] == "length"


def test_nothing_is_rebuilt_in_a_first_call(new_model: NewModel) -> None:
    assert new_model().invoke("hello").response_metadata["am_memory"]["rebuilt"] is None


def test_the_profile_knows_the_window_once_the_model_is_loaded(new_model: NewModel) -> None:
    model = new_model()
    assert model.profile["max_input_tokens"] == 4096


def test_making_a_model_loads_nothing() -> None:
    assert ChatAMMemory(model="/there/is/no/such/model").get_name() == "ChatAMMemory"


def test_a_model_says_in_a_line_what_it_holds(new_model: NewModel) -> None:
    assert repr(ChatAMMemory(model="demo", api_key="sk-nothing")) == "ChatAMMemory('demo', not loaded)"
    model = new_model()
    model.invoke("hello", CONFIG)
    name = model.memory.engine.info.name
    assert str(model).startswith(f"ChatAMMemory({name!r}, Threads(1 thread with 1 branch in memory, ")


def test_what_a_model_is_loaded_with_is_what_was_set(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, Any] = {}

    def from_pretrained(source: str, **given: Any) -> Memory:
        loaded.update(given, source=source)
        return Memory(engine, given["policy"])

    monkeypatch.setattr(Memory, "from_pretrained", from_pretrained)
    settings: dict[str, Any] = {"engine": "llama_cpp", "device": "cuda:1", "dtype": "bfloat16", "store": "there"}
    settings |= {"originals_bytes": 5, "originals_disk_bytes": 0}
    ChatAMMemory(model="mine", policy=ROOMY, compile=True, **settings).invoke("hello", max_tokens=1)
    left = {"trust_messages": False, "window_tokens": None, "trust_remote_code": False}
    assert loaded == {"source": "mine", "policy": ROOMY, "compile": True, **left, **settings}


# Compact texts


def test_a_conversation_begins_with_the_texts_that_are_mounted(new_model: NewModel) -> None:
    model = new_model()
    text = model.memory.compact_text("The ferry leaves at noon, and the key is under the third stone.", "handbook")
    plain, mounted = (model.invoke("hello there", mounts=mounts) for mounts in ([], ["handbook"]))
    sizes = [answer.response_metadata["am_memory"]["kv_tokens"] for answer in (plain, mounted)]
    assert sizes[1] - sizes[0] == pytest.approx(text.num_slots, abs=1)
    again = ChatAMMemory(model=model.memory, mounts=["handbook"], max_tokens=6, temperature=0).invoke("hello there")
    assert again.text == mounted.text
    with pytest.raises(InvalidInput, match="mounts is 'handbook': give a list"):
        model.bind(mounts="handbook")
    for wrong in (5, {"handbook": 1}, (name for name in ["handbook"]), [5], b"handbook"):
        with pytest.raises(InvalidInput, match="give a list of names of compact texts"):
            model.bind(mounts=wrong)


def test_a_thread_is_handed_to_another_agent(new_model: NewModel) -> None:
    reader = new_model(TIGHT)
    reader.invoke("a long letter about ships and towns, with a great many words in it. " * 6, CONFIG)
    text = reader.threads().compact_text("mine", "the letter")
    assert text.num_tokens > 160 > text.num_slots
    answer = ChatAMMemory(model=reader.memory, max_tokens=2).invoke("What was it about?", mounts=["the letter"])
    assert answer.response_metadata["am_memory"]["kv_tokens"] > text.num_slots
    with pytest.raises(InvalidInput, match="there is no thread 'nobody'"):
        reader.threads().compact_text("nobody", "x")
