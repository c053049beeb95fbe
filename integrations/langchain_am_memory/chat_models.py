"""`ChatAMMemory`: a local model as a LangChain chat model. It reads only what is new in a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from threading import Lock
from typing import Any, get_args

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.conversations.chat_answer import ChatAnswer
from am_memory.conversations.threads import Threads
from am_memory.engines.names import EngineName
from am_memory.errors import InvalidInput, unknown
from langchain_am_memory.answers import PROVIDER, AnswerStep, generate_chunks, merged
from langchain_am_memory.call_options import CallOptions, check_arguments, one_choice, openai_tools
from langchain_am_memory.compactions import CallbackRun, Emit, LoopEmitter, listener
from langchain_am_memory.limits import Limit, with_limits
from langchain_am_memory.messages import to_openai
from langchain_am_memory.sampling_fields import SamplingFields
from langchain_am_memory.structured import Method, structured
from langchain_am_memory.thread_ids import ThreadedChatModel, take_thread
from langchain_am_memory.workers import worker_of

LOAD_SETTINGS = (
    *("engine", "device", "dtype", "compile", "store"),
    *("trust_messages", "window_tokens", "trust_remote_code", "originals_bytes", "originals_disk_bytes"),
)
"""Settings that loading a model takes. A given `Memory` has its own."""

_loading = Lock()


class ChatAMMemory(ThreadedChatModel, SamplingFields):
    """A local model that remembers a conversation of any length in bounded memory.

    LangChain sends the whole conversation at every call. This model finds what it has read of it by the messages, and
    reads only the rest. When the cache reaches `trigger`, its oldest part is compacted in place. Forks, edits, retries
    and restarts need no care.

    Args:
        model: a hub id, a folder, a .gguf file, "demo" for the bundled model, or a `Memory`. Loaded at the first call.
        engine: "transformers", or "llama_cpp", which runs a .gguf file quantised, as it is.
        trigger: the cache size that starts a compaction: 8192, ("tokens", 8192), or ("fraction", 0.8) of the window.
        keep: the newest part of the cache, which a compaction leaves exact: 2048, or ("fraction", 0.5) of the trigger.
        policy: all settings of the memory. `trigger` and `keep` replace its own.
        device, dtype, compile, trust_messages, window_tokens, trust_remote_code, originals_bytes, originals_disk_bytes:
            as in `Memory.from_pretrained`.
        store: a folder or fsspec URL where threads are saved, so that they survive the process.
        max_bytes: of all cached conversations together; None: 4 GiB.
        temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed:
            sampling; None: as the model's own settings say.
        max_tokens, stop: the longest answer, and texts that end one.
        mounts: names of compact texts (`Memory.compact_text`) that conversations begin with; a call may name others.
        timeout: seconds for an answer; None: no limit.
        max_retries: how often a failed compaction is tried again while the prompt is read.
        streaming: whether `invoke` streams to callback handlers; None: LangChain decides.
        model_kwargs: defaults for the keyword arguments of every call.
        api_key: ignored; programs pass one to every chat model.

    Raises:
        InvalidInput: an unknown setting, or a setting that a given `Memory` has already fixed.
        InvalidPolicy: a policy that cannot work.
        ValidationError: from pydantic, for a value out of its range.
    """

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: str | Memory = Field(validation_alias="model_name")  # with `alias`, type checkers refuse `model=`
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
    originals_bytes: int | None = Field(default=None, ge=0)
    originals_disk_bytes: int | None = Field(default=None, ge=0)
    max_bytes: int | None = None
    max_tokens: int = Field(default=512, gt=0)
    mounts: list[str] = Field(default_factory=list)
    timeout: float | None = Field(default=None, gt=0)
    max_retries: int = Field(default=2, ge=0)
    streaming: bool | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    api_key: SecretStr | None = None

    _threads: dict[str, Threads] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _check_arguments(cls, given: Any) -> Any:
        aliases = {str(field.validation_alias) for field in cls.model_fields.values() if field.validation_alias}
        if wrong := unknown(given, cls.model_fields.keys() | aliases):
            raise InvalidInput(f"ChatAMMemory takes no {wrong}")
        return given

    @model_validator(mode="after")
    def _check_settings(self) -> ChatAMMemory:
        self._memory_policy()
        check_arguments(self.model_kwargs)
        given = [
            name
            for name in LOAD_SETTINGS
            if name in self.model_fields_set and (value := getattr(self, name)) is not None and value is not False
        ]
        if isinstance(self.model, Memory) and given:
            raise InvalidInput(f"{', '.join(given)} cannot be set on a Memory that is made: give it to the Memory")
        return self

    def _memory_policy(self) -> MemoryPolicy:
        """The policy, or that of a `Memory`, with `trigger` and `keep`."""
        policy = self.policy or (self.model.policy if isinstance(self.model, Memory) else MemoryPolicy())
        return with_limits(policy, trigger=self.trigger, keep=self.keep)

    def __repr__(self) -> str:
        loaded = self._threads.get(self.model if isinstance(self.model, str) else "")
        return f"ChatAMMemory({self._model_name!r}, {loaded or 'not loaded'})"

    __str__ = __repr__

    # The memory

    def threads(self, model: str | None = None) -> Threads:
        """The conversations in memory and in the store. The first call loads the model.

        Args:
            model: another model; None: this one's.
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
            originals_bytes=self.originals_bytes,
            originals_disk_bytes=self.originals_disk_bytes,
        )

    @property
    def memory(self) -> Memory:
        """The memory of this model. The first call loads the model."""
        return self.threads().memory

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread, in memory and in the store."""
        self.threads().delete(thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        await asyncio.to_thread(self.delete_thread, thread_id)

    def copy_thread(self, thread_id: str, new_thread_id: str) -> None:
        """Copy a thread to a second name. The two share memory until they differ."""
        self.threads().copy(thread_id, new_thread_id)

    async def acopy_thread(self, thread_id: str, new_thread_id: str) -> None:
        await asyncio.to_thread(self.copy_thread, thread_id, new_thread_id)

    def prune_thread(self, thread_id: str, *, keep: int = 1) -> None:
        """Delete a thread's branches but the `keep` used last."""
        self.threads().prune(thread_id, keep=keep)

    async def aprune_thread(self, thread_id: str, *, keep: int = 1) -> None:
        await asyncio.to_thread(self.prune_thread, thread_id, keep=keep)

    # LangChain's description of the model

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
        """The token ids of a text, by the model's own tokenizer."""
        return self.memory.tokenize(text)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The exact number of tokens of a prompt, the opening of the answer included."""
        return self.threads().num_tokens(to_openai(messages), openai_tools(tools))

    # Answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        thread = take_thread(kwargs, run_manager)
        return merged(list(self._chunks(messages, stop, thread, CallbackRun.of(run_manager), **kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        thread = take_thread(kwargs, run_manager)
        for chunk in self._chunks(messages, stop, thread, CallbackRun.of(run_manager), **kwargs):
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
        thread, run = take_thread(kwargs, run_manager), CallbackRun.of(run_manager)
        return merged([chunk async for chunk in self._achunks(messages, stop, thread, run, **kwargs)])

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        thread, run = take_thread(kwargs, run_manager), CallbackRun.of(run_manager)
        async for chunk in self._achunks(messages, stop, thread, run, **kwargs):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _achunks(
        self, messages: list[BaseMessage], stop: list[str] | None, thread: str, run: CallbackRun, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        """`_chunks`, with each step on the memory's worker."""
        worker = worker_of((await asyncio.to_thread(self.threads, kwargs.get("model"))).memory)
        emitter = LoopEmitter(run, asyncio.get_running_loop())
        async with aclosing(worker.results(self._steps(messages, stop, thread, emitter.emit, **kwargs))) as chunks:
            async for chunk in chunks:
                await emitter.flush()
                yield chunk

    def _chunks(
        self, messages: list[BaseMessage], stop: list[str] | None, thread: str, run: CallbackRun, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        """The chunks of `_steps`, made in the caller's thread."""
        with closing(self._steps(messages, stop, thread, run.emit, **kwargs)) as steps:
            yield from (step for step in steps if isinstance(step, ChatGenerationChunk))

    def _steps(
        self, messages: list[BaseMessage], stop: list[str] | None, thread: str, emit: Emit, **kwargs: Any
    ) -> Generator[AnswerStep, None, None]:
        """The answer in chunks. The conversation is kept once the answer is complete."""
        options = self._options(kwargs, stop)
        threads, name = self.threads(options.model), str(options.model or self._model_name)
        with threads.memory.listening(listener(thread, emit)):
            answer = ChatAnswer(threads, options.request(to_openai(messages), thread))
            yield from generate_chunks(answer, name, timeout=self.timeout, max_retries=self.max_retries)

    def _options(self, kwargs: dict[str, Any], stop: list[str] | None) -> CallOptions:
        """The options of a call: its arguments, over `model_kwargs`, over the fields, over the model's sampling."""
        given = {"mounts": self.mounts, **self.model_kwargs, **kwargs}
        check_arguments(given)
        if stop not in (None, []):
            given["stop"] = stop
        sampling = self.over(self.threads(given.get("model")).memory.sampling)
        return CallOptions.of(given, policy=self._memory_policy(), sampling=sampling, max_tokens=self.max_tokens)

    # Tools and structured output

    def bind(self, **kwargs: Any) -> Any:  # LangChain's type of it has a private name
        """The model with default arguments for every call; raises InvalidInput for those that no call takes."""
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
        """The model with tools that it may call.

        Args:
            tools: anything that LangChain can convert to a function's schema.
            tool_choice: "auto" or None lets the model choose, "none" forbids calls, "any" (or "required", or True)
                forces a call, and a tool's name forces a call of that tool. Mappings of the OpenAI and Anthropic APIs
                work too: {"type": "function", "function": {"name": ...}}, {"type": "tool", "name": ...},
                {"type": "any"}. Constrained decoding guarantees a forced call.
            parallel_tool_calls: False: an answer holds at most one call. True: a forced answer may hold several. None:
                only an answer that is not forced may hold several.
            strict: the arguments of every call follow their schema; None: each tool says it itself.

        Raises:
            InvalidInput: an unknown form of `tool_choice`, a name that no tool has, or an unknown argument.
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
        """A model whose answers follow a schema, by constrained decoding.

        Args:
            schema: a pydantic class, a TypedDict, a JSON schema, or an OpenAI function.
            method: "json_schema" and "json_mode": the answer's text is JSON of the schema. "function_calling": the
                answer is a forced call of a tool with the schema.
            include_raw: return {"raw", "parsed", "parsing_error"} instead of the parsed value.
            strict: accepted, as other providers take it; a schema is always strict here.

        Raises:
            InvalidInput: an unknown method or argument.
        """
        if wrong := unknown(kwargs, ("method", "include_raw", "strict")):
            raise InvalidInput(f"with_structured_output takes no {wrong}")
        if method not in get_args(Method):
            raise InvalidInput(f"method is {method!r}: give one of {', '.join(get_args(Method))}")
        return structured(self, schema, method, include_raw=include_raw)
