"""The memory: sessions over one engine, each in bounded space.

Start reading here. The cache of a session is `[pinned exact][segment 1]...[segment n][exact tail]`. When it reaches the
policy's trigger, in a prompt or in the middle of an answer, the oldest part of the tail becomes a new segment, and the
conversation goes on.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from am_memory.compaction.plan import originals_place
from am_memory.engines.base import Engine, Message
from am_memory.engines.names import DtypeName, EngineName, as_dtype, require_engine_name
from am_memory.errors import InvalidInput, SessionNotFound, require_kind
from am_memory.event_log import log
from am_memory.events import CompactionFinished, Event, Listener, ignore
from am_memory.formatting import counted
from am_memory.kv_cache.cache import KVCache
from am_memory.policy import MemoryPolicy
from am_memory.recall.original_store import OriginalStore
from am_memory.session.batch import pieces_of
from am_memory.session.chat_history import ChatHistory, checked_tools
from am_memory.session.compact_texts import CompactTexts
from am_memory.session.context import Context
from am_memory.session.generate_hook import watched
from am_memory.session.generation import Generation, Piece
from am_memory.session.limits import require_possible
from am_memory.session.preparing import prepare
from am_memory.session.reopening import reopened
from am_memory.session.resuming import check_origin, policy_of
from am_memory.session.saving import SavedCopy, rename
from am_memory.session.session import Session
from am_memory.session.shared import Shared
from am_memory.session.stats import sessions_table
from am_memory.session.text_making import TextMaking
from am_memory.storage.compact_text import CompactText, TextCache
from am_memory.storage.session_file import SavedSession
from am_memory.storage.store import ANY, Store
from am_memory.text.sampling import Sampling

if TYPE_CHECKING:
    import torch


class Memory:
    """Sessions with unbounded history in bounded memory, on one model and one device.

    Args:
        engine: runs the model.
        policy: when and how to compact. None: `MemoryPolicy()`, and a saved session goes on under its own policy.
        sampling: how sessions choose tokens where a call does not say.
        store: a folder or any fsspec URL, where sessions are saved and resumed from; None: nothing is stored.
        on_event: called with every event of `am_memory.events`, with refine="idle" also from another thread. The main
            ones are also logged, to `am_memory`.
        trust_messages: read control tokens that messages spell (`<|im_end|>`) as control tokens. By default they are
            plain text, and only the chat template writes control tokens, so that nobody can speak in another's turn.
        originals_bytes: host memory that the originals of all sessions may take: the exact entries of compacted
            tokens, and the keys by which they are searched. The least recently used entries move to disk. None: an
            eighth of the memory of the machine or container.
        originals_disk_bytes: what originals may take in the folder for temporary files. The least recently used are
            dropped. None: a quarter of what is free there.

    Attributes:
        engine, policy, sampling, store, on_event, trust_messages: as given, or their defaults.
        prefers_saved_policy: a saved session goes on under its own policy and not under the memory's; True where the
            memory was given none.

    Raises:
        InvalidInput: `engine`, `policy` or `sampling` is an object of another kind, or a bound is below 0.
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
        originals_bytes: int | None = None,
        originals_disk_bytes: int | None = None,
    ) -> None:
        if isinstance(engine, str | os.PathLike):
            raise InvalidInput(f"engine is {engine!r}: load a model by Memory.from_pretrained({os.fspath(engine)!r})")
        require_kind(MemoryPolicy, policy=policy)
        require_kind(Sampling, sampling=sampling)
        self.engine = engine
        self.policy = policy or MemoryPolicy()
        self.prefers_saved_policy = policy is None
        self.sampling = sampling or Sampling()
        self.store = store if isinstance(store, Store) or store is None else Store(os.fspath(store))
        self.on_event = on_event
        self.trust_messages = trust_messages
        self._listeners: list[Listener] = []
        originals = OriginalStore(originals_bytes, originals_disk_bytes)
        texts = CompactTexts(self.store, originals)
        self._shared = Shared(engine, self.sampling, self.store, self._notify, originals, texts)
        self._numbers = itertools.count(1)
        require_possible(self.policy, engine)

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
        originals_bytes: int | None = None,
        originals_disk_bytes: int | None = None,
        window_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> Memory:
        """Load a model and give it a memory.

        Args:
            model: a hub id, a local folder, a .gguf file, or "demo" for the bundled model.
            engine: "llama_cpp" runs .gguf files and "demo" quantised, as they are, on the stock llama-cpp-python.
            policy, store, on_event, trust_messages, originals_bytes, originals_disk_bytes: see `Memory`.
            device: None: the best there is.
            dtype: of weights and cache, as a torch.dtype or its name; for llama.cpp, of keys and values only. None:
                bfloat16 on CUDA, float32 on a CPU, float16 for llama.cpp. A CPU that multiplies bfloat16 reads and
                decodes faster in it (docs/performance.md).
            compile: compile the model's layers for decoding, by `torch.compile` (engine "transformers" only). Loading
                then takes up to a minute longer; docs/performance.md says when it pays.
            window_tokens: use fewer positions than the model was trained on. A model with "longrope" scaling needs it
                (engine "transformers" only).
            trust_remote_code: run the code that comes with a model which transformers does not know (engine
                "transformers" only). That code can do whatever you can: read it first.

        Raises:
            ModelNotFound: there is no such model.
            UnsupportedModel: its cache cannot be compacted, or its layers cannot be compiled.
            EngineFailed: torch.compile fails on this machine.
            InvalidInput: an unknown engine or dtype, a dtype that llama.cpp cannot keep, or an option that the engine
                does not have.
        """
        require_engine_name(engine)
        require_kind(MemoryPolicy, policy=policy)
        dtype = as_dtype(dtype)
        memory = partial(
            cls,
            policy=policy,
            store=store,
            on_event=on_event,
            trust_messages=trust_messages,
            originals_bytes=originals_bytes,
            originals_disk_bytes=originals_disk_bytes,
        )
        if engine == "llama_cpp":
            if compile:
                raise InvalidInput("compile=True works with engine='transformers' only: llama.cpp is compiled already")
            if window_tokens is not None or trust_remote_code:
                raise InvalidInput(
                    "window_tokens and trust_remote_code work with engine='transformers' only: a GGUF file states its "
                    "own window, and contains no code"
                )
            from am_memory.engines.llama_cpp import LlamaCppEngine

            runs = LlamaCppEngine.from_pretrained(model, device=device, dtype=dtype)
            return memory(runs)
        from am_memory.engines.transformers import TransformersEngine
        from am_memory.engines.transformers.loading import load_model

        loaded, tokenizer = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return memory(
            TransformersEngine(loaded, tokenizer, compile=compile, window_tokens=window_tokens),
            sampling=Sampling.from_generation_config(loaded.generation_config),
        )

    def __repr__(self) -> str:
        return f"Memory({self.engine.info.name!r}, {counted(len(self._shared.sessions), 'session')})"

    def _repr_html_(self) -> str:
        return sessions_table(self.engine.info.name, self._shared.sessions)

    def session(
        self, name: str | None = None, *, policy: MemoryPolicy | None = None, saved: SavedSession | None = None
    ) -> Session:
        """The session of that name: the one in memory, else the saved one, else a new one.

        Args:
            name: None: a name that is free.
            policy: the session's own policy from now on; ignored for a session that is in memory. None: a new session
                has the memory's. A saved session keeps a policy of its own; otherwise it takes the memory's, if the
                memory was given one, and the event `PolicyChanged` names the differences.
            saved: the saved session, if `load` has read it already.

        Raises:
            InvalidInput: the name is not a str, or the policy is not a `MemoryPolicy`.
            InvalidPolicy: the session cannot go on under `policy`.
            StorageError: the saved session cannot be read, belongs to another model, or cannot go on under its own
                policy.
        """
        require_kind(str, name=name)
        require_kind(MemoryPolicy, policy=policy)
        sessions = self._shared.sessions
        if name is None:
            taken = self.names()
            name = next(free for number in self._numbers if (free := f"session-{number}") not in taken)
        if saved is None and name not in sessions and self.store is not None and self.store.exists(name):
            saved = self.load(name, policy=policy)
        with self._shared.engine_lock:
            if name not in sessions:
                new = self._new(name, policy) if saved is None else self._resumed(name, saved, policy)
                self._shared.keep(new, name)
            return sessions[name]

    def _new(self, name: str, policy: MemoryPolicy | None, tools: Sequence[Message] = ()) -> Session:
        history = ChatHistory(tools=checked_tools(tools), trusts_messages=self.trust_messages)
        context = self._new_context(name, policy or self.policy, history)
        return Session(self._shared, context, has_own_policy=policy is not None)

    def _new_context(self, name: str, policy: MemoryPolicy, history: ChatHistory) -> Context:
        cache = self.engine.new_cache()
        originals = self._shared.original_store
        return Context(
            name, self.engine, policy, self._notify, cache, originals, num_pinned=policy.num_sinks, history=history
        )

    def load(self, name: str, *, policy: MemoryPolicy | None = None) -> SavedSession:
        """Read a saved session from the store, for `session(name, saved=...)`.

        It needs no engine, so another thread may do it while sessions go on. `session` alone does both.

        Raises:
            ModelMismatch: it was saved with another model, tokenizer or, if it has messages, chat template.
            StorageError: there is none of that name, or it cannot be read.
        """
        store = self._shared.require_store()
        saved = store.load(name, device=self.engine.info.device)
        check_origin(name, saved, self.engine.info)
        place = originals_place(policy or self._policy_of(name, saved), self.engine.capabilities)
        return store.with_originals(saved, self._shared.original_store, place)

    def _resumed(self, name: str, saved: SavedSession, policy: MemoryPolicy | None) -> Session:
        own, is_given, trusts = policy or self._policy_of(name, saved), policy is not None, self.trust_messages
        return reopened(self._shared, name, saved, own, is_given=is_given, trusts_messages=trusts)

    def _policy_of(self, name: str, saved: SavedSession) -> MemoryPolicy:
        return policy_of(name, saved, self.policy, is_default=self.prefers_saved_policy)

    def scratch(self, *, policy: MemoryPolicy | None = None, tools: Sequence[Message] = ()) -> Session:
        """A new session that the memory does not keep, unless `keep` is called.

        Args:
            policy: None: the memory's.
            tools: functions that the chat template tells the model of, in the form of OpenAI's API.
        """
        require_kind(MemoryPolicy, policy=policy)
        return self._new("scratch", policy, tools)

    def keep(self, session: Session, name: str, *, overwrite: bool = False) -> None:
        """Keep a session under a name, in place of the one that has it; once it is saved, also in the store.

        Args:
            overwrite: the next save replaces whatever is saved under that name. By default it refuses to replace a
                session that another program saved and that neither of the two went on from.
        """
        rename(session, name)
        held = self._shared.sessions.get(name)
        if overwrite:
            session._saved_copy = SavedCopy(ANY)
        elif held is not None and held is not session:
            session._saved_copy = SavedCopy(held._saved_copy.version, held._saved_copy.in_doubt)
        self._shared.keep(session, name)

    def release(self, name: str) -> None:
        """Drop a session from memory; its saved copy stays in the store."""
        self._shared.sessions.pop(name, None)

    def names(self) -> list[str]:
        """The names of all sessions, in memory and in the store."""
        return self._shared.names()

    def delete(self, name: str) -> None:
        """Delete a session from memory and from the store, whether or not the saved one can be read.

        A caller that still holds the session may use it, but saving it does not bring it back.

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
                session._saved_copy.is_deleted = True
        if session is not None:
            with self._shared.engine_lock:
                session._context.cancel_background_compaction()

    def compact_text(
        self,
        content: str | Sequence[int] | Sequence[Message] | Session,
        name: str,
        *,
        policy: MemoryPolicy | None = None,
        tools: Sequence[Message] = (),
    ) -> CompactText:
        """Read a text once, compact it whole, and keep it under a name; `Session.mount` mounts it in any session.

        With a store it is saved there. Sessions that have mounted another text of that name keep that one.

        Args:
            content: text, token ids or chat messages. Text is a user's message where the model has a chat template. A
                session: what it holds, with its exact tokens compacted; nothing is read again.
            policy: how it is compacted; `keep_ratio` and `max_compact_tokens` set its size. None: the memory's.
            tools: functions that the chat template tells the model of, in front of messages.

        Raises:
            InvalidInput: an empty text or name, or content of another kind.
            UnsupportedOperation: the engine cannot mount texts.
            CompactionFailed: out of memory, or a fit that is not finite.
        """
        return TextMaking.of(self.scratch(policy=policy), name, content, tools).run()

    def text(self, name: str) -> TextCache:
        """The compact text of that name, for `Session.mount`, in any thread. Raises TextNotFound or StorageError."""
        return self._shared.texts.get(name)

    def compact_texts(self) -> list[CompactText]:
        """All compact texts, in the order of their names."""
        return self._shared.texts.all()

    def delete_compact_text(self, name: str) -> None:
        """Delete a compact text; sessions that have mounted it keep it. Raises TextNotFound if there is none."""
        self._shared.texts.delete(name)

    def generate_many(self, answers: Iterable[Generation]) -> Iterator[tuple[Generation, Piece]]:
        """Let several sessions generate at the same time: each forward pass reads a token of every session.

        Each session gets the tokens that it would get alone, to rounding. What is unread of a prompt is read in parts
        between the steps, and compactions run in the background where the engine can do that (docs/many.md).

        Stopping the iteration ends all answers; each session keeps the tokens that were given out. An answer that fails
        ends with its `error`, and the others go on. `Generation.close` ends one answer.

        Args:
            answers: calls of `Session.generate` of different sessions, which may differ in their arguments.

        Yields:
            The answer and its next piece, in the order in which the answers were given.

        Raises:
            InvalidInput: two answers of one session or with one constraint, or an answer of another memory's session.
            Exception: once all answers have ended, the first error that ended one.
        """
        return pieces_of(self._shared, list(answers))

    def cache(self) -> KVCache:
        """A cache for `model.generate(**inputs, cache=memory.cache())`, which compacts by itself.

        It takes one sequence at a time, without padding; `model` is `engine.model`, or what peft has wrapped around it.
        A prompt longer than the trigger is read in pieces; the logits of every token that were asked for are still
        returned. Results that need one single pass (a loss, hidden states, the logits of several candidates) are
        refused if that pass does not fit. Nothing is recalled there: only a session knows what was said.
        """
        policy = self.policy.with_changes(originals="drop", recall_tokens=0, refine="off")
        return watched(self._new_context("generate()", policy, ChatHistory()))

    def prepare(self) -> None:
        """Measure the model now and not at its first compaction, unless it was measured before on this machine."""
        prepare(self._shared, self.policy)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return self.engine.encode(text)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Inside this `with` block, also call `listener` with every event of all sessions."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _notify(self, event: Event) -> None:
        if isinstance(event, CompactionFinished):
            self._shared.idle_worker.ask(event.session)
        for listener in (log, self.on_event, *self._listeners):
            listener(event)
