"""`ChatAMMemory`: a local model as a LangChain chat model, which reads only what is new and never forgets the rest."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.chat import ChatAnswer, ChatRequest, Part
from am_memory.engines.base import EngineName
from am_memory.errors import CompactionFailed, InvalidInput, InvalidPolicy, PromptTooLong
from am_memory.threads import Threads
from am_memory.tool_calls import InvalidCall
from langchain_am_memory import threads_of
from langchain_am_memory.compactions import Run, ToldLater, listener
from langchain_am_memory.messages import to_openai

PROVIDER = "am_memory"
Limit = tuple[str, int | float]
"""("tokens", a number) or ("fraction", a share), as LangChain's middleware has them."""

_workers: WeakKeyDictionary[Memory, ThreadPoolExecutor] = WeakKeyDictionary()
"""One for each memory: the engine works on one thing at a time, and the event loop never waits for it."""
_starting = Lock()
_loading = Lock()


def _worker(memory: Memory) -> ThreadPoolExecutor:
    with _starting:  # not the other lock: the event loop must not wait for a model that is loaded elsewhere
        if memory not in _workers:
            _workers[memory] = ThreadPoolExecutor(1, thread_name_prefix="am_memory")
        return _workers[memory]


class ChatAMMemory(BaseChatModel):
    """A local model with a memory of unbounded length in bounded space.

    Every call of LangChain brings the whole conversation. What this model has read of it, compacted or not, is found
    by the messages it begins with, and only the rest is read; when the cache reaches `trigger`, its oldest part is
    compacted in place. Forks, edits, retries and restarts need nothing of the caller.

    Args:
        model: a hub id, a folder, a .gguf file, "demo" for the bundled model, or a `Memory`. Loaded at the first call.
        engine: what runs it: "transformers", or "llama_cpp" for a .gguf file as it is, quantised.
        trigger: the cache's size that fires a compaction: ("tokens", 8192), or ("fraction", 0.8) of the window.
        keep: how much of the cache, the newest part, a compaction leaves exact: ("fraction", 0.5), or in tokens.
        policy: all of the memory's settings; `trigger` and `keep` are set in it where they are given.
        store: a folder or fsspec URL; with it, threads outlive the process.
        max_bytes: of all kept caches; None: 4 GiB.
        max_tokens: generated at most.
        stop: texts that end an answer.
        timeout: seconds for an answer; None: none.
        max_retries: how often reading the prompt is tried again where a compaction fails for want of memory.
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=())

    model: str | Memory = Field(alias="model_name")
    engine: EngineName = "transformers"
    trigger: Limit | None = None
    keep: Limit | None = None
    policy: MemoryPolicy | None = None
    device: str | None = None
    dtype: Any = None
    store: str | None = None
    max_bytes: int | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, gt=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = None
    max_tokens: int = Field(default=512, gt=0)
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    timeout: float | None = Field(default=None, gt=0)
    max_retries: int = Field(default=2, ge=0)

    _threads: dict[str, Threads] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_settings(self) -> ChatAMMemory:
        self._memory_policy()
        given = [name for name in ("device", "dtype", "store") if getattr(self, name) is not None]
        if isinstance(self.model, Memory) and given:
            raise InvalidInput(f"{', '.join(given)} cannot be set on a Memory that is made: give it to the Memory")
        return self

    def _memory_policy(self) -> MemoryPolicy:
        """The policy, the memory's own where there is one, with `trigger` and `keep` in it."""
        policy = self.policy or (self.model.policy if isinstance(self.model, Memory) else MemoryPolicy())
        changes: dict[str, Any] = {}
        for name, limit in (("trigger", self.trigger), ("keep", self.keep)):
            if limit is not None and limit[0] not in ("tokens", "fraction"):
                raise InvalidPolicy(f'{name}={limit}: give ("tokens", a number) or ("fraction", a share)')
        if self.trigger is not None:
            kind, size = self.trigger
            changes["trigger_tokens"] = int(size) if kind == "tokens" else float(size)
        if self.keep is not None:
            kind, size = self.keep
            if kind == "tokens":
                trigger = changes.get("trigger_tokens", policy.trigger_tokens)
                if isinstance(trigger, float):
                    raise InvalidPolicy(
                        f"keep={self.keep} in tokens needs a trigger in tokens, not {trigger:.0%} of the window: give "
                        'trigger=("tokens", ...), or keep=("fraction", ...)'
                    )
                size = size / trigger
            changes["compact_fraction"] = 1 - size
        return MemoryPolicy(**{**dict(policy), **changes})

    # What it runs on

    def threads(self, model: str | None = None) -> Threads:
        """The conversations that this model knows; the first call loads the model.

        Args:
            model: another model than the one this was made with.
        """
        source = self.model if model is None else model
        name = source if isinstance(source, str) else ""
        with _loading:
            if name not in self._threads:
                memory = source if isinstance(source, Memory) else self._load(source)
                limits = {} if self.max_bytes is None else {"max_bytes": self.max_bytes}
                self._threads[name] = Threads(memory, **limits)
                if model is None and self.profile is not None:
                    self.profile.setdefault("max_input_tokens", memory.engine.info.window_tokens)
            return self._threads[name]

    def _load(self, source: str) -> Memory:
        return Memory.from_pretrained(
            source,
            engine=self.engine,
            policy=self._memory_policy(),
            device=self.device,
            dtype=self.dtype,
            store=self.store,
        )

    @property
    def memory(self) -> Memory:
        """The memory below; the first call loads the model."""
        return self.threads().memory

    def delete_thread(self, thread_id: str) -> None:
        """Forget a thread, in memory and in the store."""
        self.threads().delete(thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        await asyncio.to_thread(self.delete_thread, thread_id)

    def copy_thread(self, thread_id: str, new_thread_id: str) -> None:
        """Give a thread a second name, under which it goes its own way."""
        self.threads().copy(thread_id, new_thread_id)

    async def acopy_thread(self, thread_id: str, new_thread_id: str) -> None:
        await asyncio.to_thread(self.copy_thread, thread_id, new_thread_id)

    def prune_thread(self, thread_id: str, *, keep: int = 1) -> None:
        """Forget a thread's branches but the `keep` used last."""
        self.threads().prune(thread_id, keep=keep)

    async def aprune_thread(self, thread_id: str, *, keep: int = 1) -> None:
        await asyncio.to_thread(self.prune_thread, thread_id, keep=keep)

    # What LangChain asks of a model

    @property
    def _llm_type(self) -> str:
        return PROVIDER

    @property
    def _model_name(self) -> str:
        return self.model if isinstance(self.model, str) else self.model.engine.info.name

    @property
    def _identifying_params(self) -> dict[str, Any]:
        sampling = {name: getattr(self, name) for name in (*Sampling.model_fields, "max_tokens")}
        policy = self._memory_policy().model_dump(mode="json")
        return {"model_name": self._model_name, "engine": self.engine, "policy": policy, **sampling}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_name=str(kwargs.get("model") or self._model_name),
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
            ls_stop=stop or self.stop,
        )

    def _resolve_model_profile(self) -> ModelProfile | None:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            max_output_tokens=self.max_tokens,
        )
        if isinstance(self.model, Memory):
            profile["max_input_tokens"] = self.model.engine.info.window_tokens
        return profile

    def get_token_ids(self, text: str) -> list[int]:
        """By the model's own tokenizer."""
        return self.memory.tokenize(text)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Exactly what reading these messages and tools takes, the opening of the answer included."""
        return self.threads().num_tokens(to_openai(messages), _tools(tools))

    # The thread of a config, which a bare model's own methods do not pass on

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return super().invoke(input, config, **threads_of.lifted(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **threads_of.lifted(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        yield from super().stream(input, config, **threads_of.lifted(config, kwargs))

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        async for chunk in super().astream(input, config, **threads_of.lifted(config, kwargs)):
            yield chunk

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **threads_of.lifted(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().astream_events(input, config, **threads_of.lifted(config, kwargs))

    # Answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        thread = threads_of.of_call(kwargs, run_manager)
        return _whole(list(self._chunks(messages, stop, thread, Run.of_call(run_manager).tell, **kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        thread = threads_of.of_call(kwargs, run_manager)
        for chunk in self._chunks(messages, stop, thread, Run.of_call(run_manager).tell, **kwargs):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        thread = threads_of.of_call(kwargs, run_manager)
        return _whole(
            [chunk async for chunk in self._achunks(messages, stop, thread, Run.of_call(run_manager), **kwargs)]
        )

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        thread = threads_of.of_call(kwargs, run_manager)
        async for chunk in self._achunks(messages, stop, thread, Run.of_call(run_manager), **kwargs):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _achunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        thread: str,
        run: Run,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        """`_chunks`, each step of it on the memory's worker."""
        loop = asyncio.get_running_loop()
        memory = (await asyncio.to_thread(self.threads, kwargs.get("model"))).memory
        worker, tell = _worker(memory), ToldLater(run, loop)
        chunks = self._chunks(messages, stop, thread, tell, **kwargs)
        try:
            while (chunk := await loop.run_in_executor(worker, next, chunks, None)) is not None:
                await tell.settle()
                yield chunk
        finally:
            worker.submit(chunks.close)  # behind a step that may still be under way

    def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        thread: str,
        tell: Callable[[dict[str, Any]], object],
        **kwargs: Any,
    ) -> Generator[ChatGenerationChunk, None, None]:
        """The answer, piece by piece; the conversation is kept when it is complete, and not otherwise."""
        call = _Call(self, kwargs, stop)
        with call.threads.memory.listening(listener(thread, tell)):
            yield from self._answer(call, to_openai(messages), thread)

    def _answer(
        self, call: _Call, messages: list[dict[str, Any]], thread: str
    ) -> Generator[ChatGenerationChunk, None, None]:
        started = time.monotonic()
        answer = ChatAnswer(call.threads, call.request(messages, thread))
        self._read(answer)
        said = _Chunks()
        for delta in answer.generate():
            if self.timeout is not None and time.monotonic() - started > self.timeout:
                raise TimeoutError(
                    f"no complete answer after {self.timeout} s: raise timeout, or lower max_tokens ({call.max_tokens})"
                )
            for part in delta.parts:
                yield said.chunk(part)
        answer.keep()
        yield said.last(answer, call.model_name)

    def _read(self, answer: ChatAnswer) -> None:
        for attempt in range(self.max_retries + 1):
            try:
                for _ in answer.read():
                    pass
                return
            except PromptTooLong as error:
                raise ContextOverflowError(str(error)) from error
            except CompactionFailed:
                if attempt == self.max_retries:
                    raise

    # Tools and structure

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tell the model of tools.

        Args:
            tools: anything that LangChain can make a function's schema of.
            tool_choice: "auto" (None) leaves it to the model, "none" forbids calls, "any" (or "required", or True)
                forces one, and so does the name of a tool, or {"type": "function", "function": {"name": ...}}. What is
                forced is guaranteed, by constrained decoding.
        """
        schemas = _tools(tools)
        return self.bind(tools=schemas, tool_choice=_choice(tool_choice, schemas), **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Literal["function_calling", "json_schema", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers in the form of a schema, by constrained decoding.

        Args:
            schema: a pydantic class, a TypedDict, a JSON schema, or an OpenAI function.
            method: "json_schema" or "json_mode": the answer's text is JSON that follows the schema;
                "function_calling": it is a forced call of a tool with that schema.
            include_raw: give {"raw", "parsed", "parsing_error"} in place of what was parsed.
            strict: accepted for other providers' sake; a schema is always strict here.
        """
        if kwargs:
            raise ValueError(f"Received unsupported arguments {kwargs}")
        is_pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
        tool = convert_to_openai_tool(schema)
        format_of = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": tool}}
        model: Runnable[LanguageModelInput, Any]
        parser: Any
        if method == "function_calling":
            name = tool["function"]["name"]
            model = self.bind_tools([tool], tool_choice=name, **format_of)
            parser = (
                PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
                if is_pydantic
                else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
            )
        else:
            named = {"name": tool["function"]["name"], "schema": convert_to_json_schema(schema)}
            wanted = {"type": "json_schema", "json_schema": named}
            model = self.bind(response_format=wanted, **format_of)
            parser = PydanticOutputParser(pydantic_object=cast(type, schema)) if is_pydantic else JsonOutputParser()
        if not include_raw:
            return cast("Runnable[LanguageModelInput, Any]", model | parser)
        parsed = RunnablePassthrough.assign(
            parsed=RunnableLambda(lambda output: output["raw"]) | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return {"raw": model} | parsed.with_fallbacks([failed], exception_key="parsing_error")


class _Call:
    """What one call asks for, beside its messages."""

    def __init__(self, model: ChatAMMemory, kwargs: dict[str, Any], stop: list[str] | None) -> None:
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("ls_")}
        override = kwargs.pop("model", None)
        self.policy: MemoryPolicy = kwargs.pop("memory_policy", None) or model._memory_policy()
        self.model_name = str(override or model._model_name)
        self.threads = model.threads(override)
        self.tools: list[dict[str, Any]] = _tools(kwargs.pop("tools", None))
        choice = _choice(kwargs.pop("tool_choice", None), self.tools)
        self.tool_choice: str | None = "required" if choice == "any" else choice
        self.max_tokens = int(kwargs.pop("max_tokens", None) or model.max_tokens)
        self.response_format = kwargs.pop("response_format", None)
        self.sampling = self._sampling(model, kwargs, stop)
        if kwargs:
            raise InvalidInput(f"unknown arguments {', '.join(sorted(kwargs))}: see ChatAMMemory for what a call takes")

    def _sampling(self, model: ChatAMMemory, kwargs: dict[str, Any], stop: list[str] | None) -> Sampling:
        own = {name: getattr(model, name) for name in Sampling.model_fields if name != "stop"}
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        values = {name: value for name, value in {**own, **asked}.items() if value is not None}
        default = self.threads.memory.sampling
        return Sampling(**{**default.model_dump(), **values, "stop": tuple(stop or model.stop or default.stop)})

    def request(self, messages: list[dict[str, Any]], thread: str) -> ChatRequest:
        return ChatRequest(
            messages,
            tools=self.tools,
            tool_choice=self.tool_choice,
            response_format=self.response_format,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            thread=thread,
            policy=self.policy,
        )


class _Chunks:
    """One answer in LangChain's form."""

    def __init__(self) -> None:
        self.id = f"run-{uuid.uuid4()}"
        self._num_invalid = 0

    def chunk(self, part: Part) -> ChatGenerationChunk:
        if isinstance(part, str):
            return self._chunk(content=part)
        if isinstance(part, InvalidCall):  # LangChain has a place for those
            # With the error first it is no JSON, which LangChain would complete to a call that nobody made.
            args, call_id = f"{part.error}: {part.text}", f"call_{uuid.uuid4().hex[:24]}"
            self._num_invalid += 1
            invalid = tool_call_chunk(name=None, args=args, id=call_id, index=1000 + self._num_invalid)
            return self._chunk(tool_call_chunks=[invalid])
        call = tool_call_chunk(name=part.name, args=part.arguments_json, id=part.id, index=part.index)
        return self._chunk(tool_call_chunks=[call])

    def _chunk(self, **fields: Any) -> ChatGenerationChunk:
        fields.setdefault("content", "")
        message = AIMessageChunk(id=self.id, **fields)
        return ChatGenerationChunk(message=message)

    def last(self, answer: ChatAnswer, model_name: str) -> ChatGenerationChunk:
        """What is said of the answer when it is complete."""
        stats, usage = answer.session.stats, answer.usage
        metadata = {
            "model_name": model_name,
            "model_provider": PROVIDER,
            "finish_reason": answer.finish_reason,
            "am_memory": {
                "logical_tokens": stats.logical_tokens,
                "kv_tokens": round(stats.kv_tokens, 1),
                "kv_bytes": stats.kv_bytes,
                "compactions": stats.num_compactions,
                "compactions_in_answer": answer.num_compactions,
                "rebuilt": answer.turn.rebuilt,
            },
        }
        said = UsageMetadata(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            input_token_details={"cache_read": usage.cached_tokens},
        )
        last = AIMessageChunk(
            content="", id=self.id, response_metadata=metadata, usage_metadata=said, chunk_position="last"
        )
        return ChatGenerationChunk(message=last, generation_info={"finish_reason": answer.finish_reason})


def _whole(chunks: list[ChatGenerationChunk]) -> ChatResult:
    """One message of all chunks."""
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    said = merged.message
    assert isinstance(said, AIMessageChunk)
    message = AIMessage(
        content=said.content,
        id=said.id,
        tool_calls=said.tool_calls,
        invalid_tool_calls=said.invalid_tool_calls,
        response_metadata=said.response_metadata,
        usage_metadata=said.usage_metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=merged.generation_info)])


def _tools(tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    return [convert_to_openai_tool(tool) for tool in tools or ()]


def _choice(choice: dict[str, Any] | str | bool | None, tools: list[dict[str, Any]]) -> Any:
    """The choice in one form: None, "auto", "none", "any", or a tool's name.

    Raises:
        InvalidInput: the name of no tool.
    """
    if choice in (None, False, "auto", "none"):
        return choice or None
    if choice in ("any", "required", True):
        return "any"
    name = _name(choice)
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise InvalidInput(f"tool_choice {name!r} is none of the tools: {', '.join(names) or 'there are none'}")
    return name


def _name(choice: Any) -> str:
    return str(choice["function"]["name"] if isinstance(choice, dict) else choice)
