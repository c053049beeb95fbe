"""The memory: sessions over one engine, each watched, compacted and kept in bounded space.

The place to start reading. A session's cache is `[pinned exact][segment 1]...[segment n][exact tail]`; when it reaches
the policy's trigger, in a prompt or in the middle of an answer, the oldest part of the tail becomes a new segment and
the conversation goes on.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from am_memory.compaction.plan import trigger_tokens
from am_memory.compaction.record import as_policy, with_policy
from am_memory.engines.base import Engine, Message
from am_memory.engines.names import DtypeName, EngineName, as_dtype
from am_memory.errors import InvalidInput, InvalidPolicy, SessionNotFound, StorageError
from am_memory.events import Event, Listener, OriginalsLost, OriginUnknown, PolicyChanged, ignore, log
from am_memory.kv_cache.cache import KVCache, Snapshot
from am_memory.policy import MemoryPolicy
from am_memory.session.chat_history import ChatHistory
from am_memory.session.context import Context
from am_memory.session.generate_hook import watched
from am_memory.session.resuming import changes_of, check_content, check_origin, load, policy_of
from am_memory.session.session import Session
from am_memory.session.shared import Shared
from am_memory.storage.session_file import SavedSession
from am_memory.storage.store import Store
from am_memory.text.chat_template import Chat
from am_memory.text.sampling import Sampling

if TYPE_CHECKING:
    import torch


class Memory:
    """Sessions with unbounded history in bounded memory, on one model and one device.

    Args:
        engine: runs the model.
        policy: when and how to compact; None: as `MemoryPolicy()`, and sessions that were saved under another go on
            under that.
        sampling: how sessions choose tokens where a call says nothing else.
        store: a folder or any fsspec URL, where sessions are saved and resumed from; None: nothing is stored.
        on_event: called with every event of `am_memory.events`; the main ones are logged in any case, to `am_memory`.
        trust_messages: control tokens that messages spell (`<|im_end|>`) are read as such. By default they are text,
            and only the chat template writes control tokens, so that nobody can speak in another's turn.

    Raises:
        InvalidPolicy: the policy cannot work with this model.
    """

    def __init__(
        self,
        engine: Engine,
        policy: MemoryPolicy | None = None,
        *,
        sampling: Sampling | None = None,
        store: str | os.PathLike[str] | Store | None = None,
        on_event: Listener = ignore,
        trust_messages: bool = False,
    ) -> None:
        self.engine = engine
        self.trust_messages = trust_messages
        self.policy = policy or MemoryPolicy()
        self.has_default_policy = policy is None
        """Nobody has asked for the policy: that of a saved session goes before it."""
        self.sampling = sampling or Sampling()
        self.store = store if isinstance(store, Store) or store is None else Store(os.fspath(store))
        self.on_event = on_event
        self._listeners: list[Listener] = []
        self._shared = Shared(engine, self.sampling, self.store, self._notify)
        self._numbers = itertools.count(1)
        self.trigger_tokens = trigger_tokens(self.policy, engine.info.window_tokens, self.policy.num_sinks)

    @classmethod
    def from_pretrained(  # noqa: PLR0913
        cls,
        model: str | os.PathLike[str],
        *,
        engine: EngineName = "transformers",
        policy: MemoryPolicy | None = None,
        device: str | None = None,
        dtype: torch.dtype | DtypeName | None = None,
        compile: bool = False,
        store: str | os.PathLike[str] | None = None,
        on_event: Listener = ignore,
        trust_messages: bool = False,
        window_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> Memory:
        """Load a model and give it a memory.

        Args:
            model: a hub id, a local folder, a .gguf file, or "demo" for the bundled model.
            engine: "llama_cpp" runs .gguf files and "demo" as they are, quantised, on the stock llama-cpp-python.
            device: None is the best there is.
            dtype: of weights and cache, or its name; for llama.cpp of keys and values alone. None is bfloat16 on CUDA
                and float32 on a CPU, which reads and decodes faster in bfloat16 if it multiplies it
                (docs/performance.md); for llama.cpp float16.
            compile: compile the model's layers by `torch.compile` for decoding (engine "transformers" only). Loading
                takes up to a minute longer; docs/performance.md says what it is good for.
            window_tokens: positions that are used, if not all that the model was trained on; a model of "longrope" has
                to be told (engine "transformers" only).
            trust_remote_code: run the code that comes with a model that transformers does not have (engine
                "transformers" only). It can do whatever you can: read it first.

        Raises:
            ModelNotFound: there is no such model.
            UnsupportedModel: its cache cannot be compacted, or its layers not compiled.
            EngineFailed: torch.compile fails on this machine.
            InvalidInput: llama.cpp is to be compiled; a dtype that has no such name, or that llama.cpp does not keep.
        """
        dtype = as_dtype(dtype)
        if engine == "llama_cpp":
            if compile:
                raise InvalidInput("compile=True is for engine='transformers'; llama.cpp is compiled as it is")
            if window_tokens is not None or trust_remote_code:
                raise InvalidInput(
                    "window_tokens and trust_remote_code are for engine='transformers'; a GGUF file says what its "
                    "window is, and has no code"
                )
            from am_memory.engines.llama_cpp import LlamaCppEngine

            runs = LlamaCppEngine.from_pretrained(model, device=device, dtype=dtype)
            return cls(runs, policy, store=store, on_event=on_event, trust_messages=trust_messages)
        from am_memory.engines.loading import load_model
        from am_memory.engines.transformers import TransformersEngine

        loaded, tokenizer = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(
            TransformersEngine(loaded, tokenizer, compile=compile, window_tokens=window_tokens),
            policy,
            sampling=Sampling.from_generation_config(loaded.generation_config),
            store=store,
            on_event=on_event,
            trust_messages=trust_messages,
        )

    def session(self, name: str | None = None, *, policy: MemoryPolicy | None = None) -> Session:
        """The session of that name: the one in memory, else the one in the store, else a new one.

        Args:
            name: None is a new name.
            policy: for a session that is not in memory yet, and of its own from then on. None: of a new session, the
                memory's. Of a saved one the policy of its own, where it was given one, else the memory's, and the event
                `PolicyChanged` says what is different; a memory that was given none takes up the saved one.

        Raises:
            StorageError: the saved session cannot be read, is another model's, or was saved under a policy of its own
                that cannot be taken up.
        """
        if name is None:
            names = (f"session-{number}" for number in self._numbers)
            name = next(name for name in names if name not in self.names())
        with self._shared.engine_lock:
            if name not in self._shared.sessions:
                if self.store is not None and self.store.exists(name):
                    return self.resume(name, self.saved(name, policy=policy), policy=policy)
                self._shared.sessions[name] = self._new(name, policy)
            return self._shared.sessions[name]

    def _new(self, name: str, policy: MemoryPolicy | None, tools: Sequence[Message] = ()) -> Session:
        history = ChatHistory(tools=tuple(tools), trusts_messages=self.trust_messages)
        session = Session(self._shared, self._new_context(name, policy or self.policy, history))
        session.has_own_policy = policy is not None
        return session

    def _new_context(self, name: str, policy: MemoryPolicy, history: ChatHistory) -> Context:
        cache = self.engine.new_cache()
        return Context(name, self.engine, policy, self._notify, cache, num_pinned=policy.num_sinks, history=history)

    def _notify(self, event: Event) -> None:
        for listener in (log, self.on_event, *self._listeners):
            listener(event)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Also tell `listener` of every event, of all sessions, inside of the `with`."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def saved(self, name: str, *, policy: MemoryPolicy | None = None) -> SavedSession:
        """A session as it lies in the store, for `resume`. Needs no device: another thread may do it meanwhile.

        Raises:
            ModelMismatch: it was saved with another model, another tokenizer or, if it has messages, chat template.
            StorageError: there is none of that name, or it cannot be read.
        """
        store = self._shared.require_store()
        saved = store.load(name, device=self.engine.info.device, originals="drop")
        check_origin(name, saved, self.engine.info)
        place = (policy or self._policy_of(name, saved)).originals
        return saved if place == "drop" else store.with_originals(saved, place)

    def _policy_of(self, name: str, saved: SavedSession) -> MemoryPolicy:
        return policy_of(name, saved, self.policy, is_default=self.has_default_policy)

    def resume(self, name: str, saved: SavedSession, *, policy: MemoryPolicy | None = None) -> Session:
        """Go on with a saved session under a name; the one in memory that has it goes before.

        Raises:
            InvalidPolicy: the session cannot go on under the policy that was named.
            StorageError: it cannot go on under the policy that it had, or is none that this model could have had.
        """
        with self._shared.engine_lock:
            if name not in self._shared.sessions:
                check_content(name, saved, self.engine.info, self._cache_of_one_token)
                try:
                    session = self._resumed(name, saved, policy or self._policy_of(name, saved))
                except InvalidPolicy as error:
                    if policy is not None:
                        raise
                    raise StorageError(
                        f"session {name!r} cannot go on under its policy: {error}; name one that it can go on under: "
                        f"memory.session({name!r}, policy=...)"
                    ) from error
                session.has_own_policy = policy is not None or saved.has_own_policy
                if policy is None and (changes := changes_of(saved, session.policy)):
                    self._notify(PolicyChanged(name, changes))
                self._shared.sessions[name] = session
            return self._shared.sessions[name]

    @cached_property
    def _cache_of_one_token(self) -> Snapshot:
        """What saved caches are compared with."""
        cache = self.engine.new_cache()
        self.engine.forward(cache, [0])
        return cache.state()

    def _resumed(self, name: str, saved: SavedSession, policy: MemoryPolicy) -> Session:
        cache = self.engine.new_cache()
        load(name, saved, cache)
        is_same = saved.policy == policy.model_dump(mode="json")
        records = list(saved.records) if is_same else with_policy(as_policy(saved.policy), saved.records)
        history = ChatHistory(
            saved.messages, saved.message_starts, saved.is_answering, saved.tools, trusts_messages=self.trust_messages
        )
        context = Context(
            name,
            self.engine,
            policy,
            self._notify,
            cache,
            list(saved.tokens),
            records,
            saved.num_pinned,
            history,
            originals=saved.originals,
        )
        if unknown := check_origin(name, saved, self.engine.info):
            self._notify(OriginUnknown(name, unknown))
        for which, reason in saved.lost:
            self._notify(OriginalsLost(name, which.start, which.end, reason))
        for start in saved.recalled:
            context.resume_recall(start)
        session = Session(self._shared, context)
        session.metadata, session.saved_version = saved.metadata, saved.version
        return session

    def scratch(self, *, policy: MemoryPolicy | None = None, tools: Sequence[Message] = ()) -> Session:
        """A new session that the memory does not keep, unless `keep` is called.

        Args:
            policy: None: the memory's.
            tools: functions that the model's chat template tells it of, as OpenAI's API has them.
        """
        return self._new("scratch", policy, tools)

    def keep(self, session: Session, name: str, *, overwrite: bool = False) -> None:
        """Keep a session under a name, in place of the one that has it; in the store, too, as soon as it is saved.

        What somebody else has saved under that name, which neither of the two went on from, is not overwritten.

        Args:
            overwrite: it is, by the next save.
        """
        session.rename(name)
        held = self._shared.sessions.get(name)
        if overwrite or (held is not None and held is not session):
            session.take_place_of(None if overwrite else held)
        self._shared.sessions[name] = session

    def release(self, name: str) -> None:
        """Drop a session from memory; a saved one stays in the store."""
        self._shared.sessions.pop(name, None)

    def names(self) -> list[str]:
        """All sessions, in memory and in the store."""
        return self._shared.names()

    def delete(self, name: str) -> None:
        """Forget a session, in memory and in the store, whether or not the saved one can be read.

        Whoever still has the session may go on with it, but does not bring it back by saving it.

        Raises:
            SessionNotFound: there is none of that name.
        """
        with self._shared.store_lock:
            is_saved = self.store is not None and self.store.exists(name)
            if name not in self._shared.sessions and not is_saved:
                raise SessionNotFound(f"no session {name!r}; there are: {', '.join(self.names()) or 'none'}")
            if self.store is not None:
                self.store.delete(name)
            if (session := self._shared.sessions.pop(name, None)) is not None:
                session.deleted()
        if session is not None:
            session.give_up()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without anything added."""
        return self.engine.encode(text)

    def chat(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Chat:
        """Messages as this memory has the model's chat template write them."""
        return Chat(self.engine, messages, tools, trusts_messages=self.trust_messages)

    def cache(self) -> KVCache:
        """A cache for `model.generate(**inputs, cache=memory.cache())`, which compacts by itself.

        For one sequence at a time, without padding, and of text alone; `model` is `engine.model`, or what peft has
        around it. A prompt longer than the trigger is read in pieces and compacted on the way; the pass that was asked
        for it gives the logits of every token that it was asked for. What only one pass can give (a loss, hidden
        states, the logits of a number of candidates) is refused before anything is read, where it does not fit.
        """
        return watched(self._new_context("generate()", self.policy, ChatHistory()))
