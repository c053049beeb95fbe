"""`ChatAMMemory`: a local model as a LangChain chat model, which reads only what is new and never forgets the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from threading import Lock
from typing import Any, get_args

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.conversations.chat import HostWork, answer_chat
from am_memory.conversations.chat_answer import ChatAnswer, Delta
from am_memory.conversations.threads import Threads
from am_memory.engines.names import EngineName
from am_memory.errors import InvalidInput, InvalidPolicy, PromptTooLong, unknown
from langchain_am_memory import threads_of
from langchain_am_memory.answers import PROVIDER, Chunks, whole
from langchain_am_memory.calls import Call, check_arguments, one_choice, openai_tools
from langchain_am_memory.compactions import Run, ToldLater, listener
from langchain_am_memory.messages import to_openai
from langchain_am_memory.structured import Method, structured
from langchain_am_memory.workers import worker_of

Limit = tuple[str, int | float]
"""("tokens", a number) or ("fraction", a share), as LangChain's middleware has them."""

OF_LOADING = (
    *("engine", "device", "dtype", "compile", "store"),
    *("trust_messages", "window_tokens", "trust_remote_code"),
)
"""Settings by which a model is loaded, so that they say nothing of a `Memory` that is made."""

_loading = Lock()


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
        device, dtype, compile, trust_messages, window_tokens, trust_remote_code: as `Memory.from_pretrained` takes
            them.
        store: a folder or fsspec URL; with it, threads outlive the process.
        max_bytes: of all kept caches; None: 4 GiB.
        max_tokens, stop: generated at most; texts that end an answer.
        timeout: seconds for an answer; None: none.
        max_retries: how often reading the prompt is tried again where a compaction fails for want of memory.
        streaming: whether `invoke` streams to callback handlers; None leaves it to LangChain.
        model_kwargs: what every call gets, unless it says otherwise: what `invoke` takes beside messages.
        api_key: taken because programs give one to every chat model; there is nothing here that it would open.

    Raises:
        InvalidInput: a name that there is not, or what cannot be set on a `Memory` that is made.
        InvalidPolicy: a policy that can never work.
        ValidationError: pydantic's, for a value out of its range.
    """

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: str | Memory = Field(alias="model_name")
    engine: EngineName = "transformers"
    trigger: Limit | None = None
    keep: Limit | None = None
    policy: MemoryPolicy | None = None
    device: str | None = None
    dtype: Any = None
    compile: bool = False
    store: str | None = None
    trust_messages: bool = False
    window_tokens: int | None = None
    trust_remote_code: bool = False
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
    streaming: bool | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    api_key: SecretStr | None = None

    _threads: dict[str, Threads] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _check_arguments(cls, given: Any) -> Any:
        aliases = {field.alias for field in cls.model_fields.values() if field.alias is not None}
        if wrong := unknown(given, cls.model_fields.keys() | aliases):
            raise InvalidInput(f"ChatAMMemory takes no {wrong}")
        return given

    @model_validator(mode="after")
    def _check_settings(self) -> ChatAMMemory:
        self._memory_policy()
        check_arguments(self.model_kwargs)
        given = [
            name for name in OF_LOADING if name in self.model_fields_set and getattr(self, name) not in (None, False)
        ]
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
            trigger = changes.get("trigger_tokens", policy.trigger_tokens)
            if kind == "tokens" and isinstance(trigger, float):
                raise InvalidPolicy(
                    f"keep={self.keep} in tokens needs a trigger in tokens, not {trigger:.0%} of the window: give "
                    'trigger=("tokens", ...), or keep=("fraction", ...)'
                )
            whole = trigger if kind == "tokens" else 1
            if not 0 <= size < whole:
                raise InvalidPolicy(
                    f"keep={self.keep} with a trigger of {trigger}: what a compaction leaves exact is at least 0 and "
                    f"below {whole}; lower keep, or raise trigger"
                )
            changes["compact_fraction"] = 1 - size / whole
        return policy.with_changes(**changes)

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
            compile=self.compile,
            store=self.store,
            trust_messages=self.trust_messages,
            window_tokens=self.window_tokens,
            trust_remote_code=self.trust_remote_code,
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
        return self.threads().num_tokens(to_openai(messages), openai_tools(tools))

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
        return whole(list(self._chunks(messages, stop, thread, Run.of_call(run_manager).tell, **kwargs)))

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
        return whole(
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
        worker, tell = worker_of(memory), ToldLater(run, loop)
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
        call = Call(self, kwargs, stop)
        with call.threads.memory.listening(listener(thread, tell)):
            yield from self._answer(call, to_openai(messages), thread)

    def _answer(
        self, call: Call, messages: list[dict[str, Any]], thread: str
    ) -> Generator[ChatGenerationChunk, None, None]:
        started = time.monotonic()
        answer = ChatAnswer(call.threads, call.request(messages, thread))
        chunks = Chunks()
        try:
            for step in answer_chat(answer, max_retries=self.max_retries):
                if isinstance(step, HostWork):
                    step.run()
                    continue
                if self.timeout is not None and time.monotonic() - started > self.timeout:
                    raise TimeoutError(
                        f"no complete answer after {self.timeout} s: raise timeout, or lower max_tokens "
                        f"({call.max_tokens})"
                    )
                if isinstance(step, Delta):
                    for part in step.parts:
                        yield chunks.chunk(part)
        except PromptTooLong as error:
            raise ContextOverflowError(str(error)) from error
        yield chunks.last(answer, call.model_name)

    # Tools and structure

    def bind(self, **kwargs: Any) -> Any:  # LangChain's type of it has a private name
        """The model with arguments for every call.

        Raises:
            InvalidInput: the name of an argument that no call takes, or a value that is none of its.
        """
        check_arguments(kwargs)
        return super().bind(**kwargs)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tell the model of tools.

        Args:
            tools: anything that LangChain can make a function's schema of.
            tool_choice: "auto" (None) leaves it to the model, "none" forbids calls, "any" (or "required", or True)
                forces one, and so does the name of a tool. Mappings as the APIs of OpenAI and Anthropic have them say
                the same: {"type": "function", "function": {"name": ...}}, {"type": "tool", "name": ...},
                {"type": "any"}. What is forced is guaranteed, by constrained decoding.
            parallel_tool_calls: False: an answer has one call at most; True: a forced one may have several, as a free
                one may in any case.
            strict: arguments follow their schema where the model chooses to call, too; None: as each tool says itself.

        Raises:
            InvalidInput: a choice of no known form or none of the tools, or an argument that no call takes.
        """
        schemas, options = openai_tools(tools), {"parallel_tool_calls": parallel_tool_calls, "strict": strict}
        given = {name: value for name, value in options.items() if value is not None}
        bound: Runnable[LanguageModelInput, AIMessage] = self.bind(
            tools=schemas, tool_choice=one_choice(tool_choice, schemas), **given, **kwargs
        )
        return bound

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Method = "json_schema",
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

        Raises:
            InvalidInput: another method, or an argument that it does not take.
        """
        if wrong := unknown(kwargs, ("method", "include_raw", "strict")):
            raise InvalidInput(f"with_structured_output takes no {wrong}")
        if method not in get_args(Method):
            raise InvalidInput(f"method is {method!r}: give one of {', '.join(get_args(Method))}")
        return structured(self, schema, method, include_raw=include_raw)
