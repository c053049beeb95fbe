"""Under which policy a saved session goes on, and that it is told where that is another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from inside import originals_of
from policies import plain_policy
from torch import Tensor
from typer.testing import CliRunner

from am_memory import Memory, MemoryPolicy
from am_memory.cli.main import app
from am_memory.conversations.threads import Threads
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import StorageError
from am_memory.events import Event, PolicyChange, PolicyChanged
from am_memory.session.saving import snapshot
from am_memory.solver import OMP, Block, HighestAttention

SMALL = plain_policy(trigger_tokens=96, keep_ratio=0.25, keep_recent=4, pinned=3)
LARGE = SMALL.with_changes(trigger_tokens=200)

NewMemory = Callable[..., Memory]


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path, events: list[Event]) -> NewMemory:
    """As after a restart; without a policy it has one all the same, as the tiny model is too small for the default."""

    def make(policy: MemoryPolicy | None = None) -> Memory:
        memory = Memory(engine, policy or LARGE, store=tmp_path, on_event=events.append)
        memory.prefers_saved_policy = policy is None
        return memory

    return make


def save(memory: Memory, policy: MemoryPolicy | None = None) -> None:
    session = memory.session("alice", policy=policy)
    session.append("An owl.")
    session.save()


def told(events: list[Event]) -> list[PolicyChanged]:
    return [event for event in events if isinstance(event, PolicyChanged)]


def test_under_the_same_policy_nothing_is_said(new_memory: NewMemory, events: list[Event]) -> None:
    save(new_memory(SMALL))
    assert new_memory(SMALL).session("alice").policy == SMALL
    assert told(events) == []


def test_a_memory_that_was_given_another_policy_goes_on_under_it_and_says_what_changed(
    new_memory: NewMemory, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    save(new_memory(SMALL))
    assert new_memory(LARGE).session("alice").policy == LARGE
    assert told(events) == [PolicyChanged("alice", (PolicyChange("trigger_tokens", 96, 200),))]
    assert "under another policy than it was saved with: trigger_tokens 200 instead of 96" in caplog.text


def test_a_memory_that_was_given_none_goes_on_under_the_saved_one(new_memory: NewMemory, events: list[Event]) -> None:
    save(new_memory(SMALL))
    resumed = new_memory().session("alice")
    assert resumed.policy == SMALL
    assert resumed.trigger_tokens == 96
    resumed.save()
    assert new_memory(LARGE).session("alice").policy == LARGE, "it has none of its own by that"
    assert len(told(events)) == 1


def test_a_policy_of_its_own_stays_with_a_session(new_memory: NewMemory, events: list[Event]) -> None:
    save(new_memory(LARGE), policy=SMALL)
    for _ in range(2):
        resumed = new_memory(LARGE).session("alice")
        assert resumed.policy == SMALL
        resumed.save()
    resumed.fork("bob").save()
    assert new_memory(LARGE).session("bob").policy == SMALL
    assert told(events) == []


def test_a_policy_that_is_named_goes_before_all_others(new_memory: NewMemory, events: list[Event]) -> None:
    save(new_memory(LARGE), policy=SMALL)
    middle = SMALL.with_changes(trigger_tokens=150)
    resumed = new_memory(LARGE).session("alice", policy=middle)
    assert resumed.policy == middle
    resumed.save()
    assert new_memory(LARGE).session("alice").policy == middle
    assert told(events) == []


def test_a_fork_under_a_policy_has_it_for_its_own(new_memory: NewMemory) -> None:
    memory = new_memory(LARGE)
    save(memory)
    memory.session("alice").fork("bob", policy=SMALL).save()
    assert new_memory(LARGE).session("bob").policy == SMALL


def test_originals_are_kept_if_the_policy_says_so_under_which_it_goes_on(new_memory: NewMemory) -> None:
    memory = new_memory(SMALL.with_changes(originals="host"))
    session = memory.session("alice")
    session.append("An owl sat on an oak. " * 8)
    session.save()
    spans, resumed, dropping = (
        [(original.start, original.end) for original in originals_of(each)]
        for each in (session, new_memory().session("alice"), new_memory(SMALL).session("alice"))
    )
    assert resumed == spans != []
    assert dropping == []


@pytest.mark.parametrize("selection", [OMP(picks_per_step=3), OMP.fast(), HighestAttention()])
def test_parameters_of_a_selection_come_back(new_memory: NewMemory, selection: object) -> None:
    save(new_memory(LARGE), policy=SMALL.with_changes(key_selection=selection))
    assert new_memory(LARGE).session("alice").policy.key_selection == selection


@dataclass(frozen=True)
class Newest:
    name: str = "newest"

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_selection_of_ones_own_is_found_where_the_memory_has_it(new_memory: NewMemory, events: list[Event]) -> None:
    """A file cannot hold it."""
    own = SMALL.with_changes(key_selection=Newest())
    save(new_memory(own), policy=own)
    assert new_memory(own).session("alice").policy == own
    assert told(events) == []
    with pytest.raises(
        StorageError, match=r"'alice' cannot go on under the policy .*; name one: memory\.session\('ali"
    ):
        new_memory(LARGE).session("alice")
    assert new_memory(LARGE).session("alice", policy=LARGE).policy == LARGE


@pytest.mark.parametrize(("policy", "problem"), [
    ({"trigger_tokens": -1}, "trigger_tokens.* -1"),
    ({"trigger_tokens": "many"}, "trigger_tokens.* 'many'"),
    ({"of_the_future": 1}, "of_the_future"),
    ({"self": 1}, "self"),
    ({"key_selection": {"name": "owl"}}, "key_selection"),
])  # fmt: skip
@pytest.mark.parametrize("is_own", [True, False])
def test_a_saved_policy_that_is_none_is_refused_where_it_is_needed_and_told_where_it_is_not(
    new_memory: NewMemory, events: list[Event], policy: dict[str, object], problem: str, is_own: bool
) -> None:
    memory = new_memory(SMALL)
    save(memory)
    saved = replace(snapshot(memory.session("alice")), policy=policy, has_own_policy=is_own)
    memory.store.save("alice", saved)
    for needs_it in (new_memory(), *([new_memory(LARGE)] if is_own else [])):
        with pytest.raises(StorageError, match=problem):
            needs_it.session("alice")
    if not is_own:
        assert new_memory(LARGE).session("alice").policy == LARGE
        assert next(iter(policy)) in str(told(events)[-1])
    assert new_memory().session("alice", policy=SMALL).policy == SMALL


def test_a_conversation_goes_on_under_the_policy_that_it_was_called_with(new_memory: NewMemory) -> None:
    def turned(memory: Memory, policy: MemoryPolicy | None = None) -> int:
        turn = Threads(memory).turn([{"role": "user", "content": "Hello."}], policy=policy)
        assert turn.session.policy == (policy or memory.policy)
        turn.keep({"role": "assistant", "content": "".join(piece.text for piece in turn.session.generate(2))})
        return turn.num_cached_tokens

    assert turned(new_memory(LARGE), SMALL) == 0
    assert turned(new_memory(LARGE), SMALL) > 0
    assert turned(new_memory(SMALL)) > 0, "what counts is the policy, not who has named it"
    assert turned(new_memory(LARGE)) == 0


# The command line


@pytest.mark.parametrize(("options", "trigger"), [
    ((), 256),
    (("--trigger-tokens", "300"), 300),
    (("--keep-ratio", "0.2"), 2048),
])  # fmt: skip
def test_a_chat_goes_on_as_it_was_saved_unless_it_is_told_otherwise(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], trigger: int
) -> None:
    def from_pretrained(
        model: str, *, policy: MemoryPolicy, on_event: Callable[[Event], None], **others: object
    ) -> Memory:
        return Memory(engine, policy, store=tmp_path, on_event=on_event)

    monkeypatch.setattr(Memory, "from_pretrained", from_pretrained)
    monkeypatch.setenv("COLUMNS", "200")

    def chat(*options: str) -> str:
        result = CliRunner().invoke(app, ["chat", "--max-new-tokens", "2", *options], input="hello\n/quit\n")
        assert result.exit_code == 0
        return result.output

    assert "/256 tokens in the cache" in chat("--trigger-tokens", "256")
    output = chat(*options)
    assert f"/{trigger} tokens in the cache" in output
    assert ("goes on under another policy" in output) == bool(options)
