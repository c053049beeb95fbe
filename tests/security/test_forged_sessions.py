"""Session files with a sound checksum and absurd contents are refused by one of our errors, or go on as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from forging import POLICIES, File, outcome, outcomes, saved_session
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory
from am_memory.conversations.branch import BRANCH_KEY
from am_memory.conversations.threads import Threads
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CorruptSession


@pytest.fixture(scope="module")
def sliding_engine(
    new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> TransformersEngine:
    return TransformersEngine(new_sliding_model(), byte_tokenizer)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", ["engine", "sliding_engine"])
def test_no_forged_file_ends_in_an_error_that_is_not_ours(
    request: pytest.FixtureRequest, model: str, policy: str
) -> None:
    counted, wrong = outcomes(request.getfixturevalue(model), POLICIES[policy], 40)
    assert wrong == []
    assert counted["CorruptSession"] > 20


def change(content: Any, path: str, value: Any) -> None:
    *steps, last = (int(step) if step.lstrip("-").isdigit() else step for step in path.split("."))
    for step in steps:
        content = content[step]
    content[last] = value


@pytest.mark.parametrize(("path", "value"), [
    ("num_pinned", -1),
    ("num_pinned", 10**30),
    ("state.num_pinned_slots", 2),
    ("state.segments.0.num_slots", -1),
    ("state.segments.0.num_slots", 10**400),
    ("state.segments.0.start", -3),
    ("state.segments.1.start", 5),
    ("state.segments.0.shift", 10**9),
    ("state.layers.0.num_tokens", 99),
    ("records.0.at_tokens", -5),
    ("records.0.at_tokens", 10**12),
    ("records.0.lag_tokens", 10**12),
    ("records.0.lag_tokens", -1),
    ("records.0.live_start", 10**12),
    ("records.0.plan.segments", []),
    ("records.0.plan.segments.0.num_slots", 2**40),
    ("records.0.plan.segments.0.end", 10**6),
    ("records.0.conversations", [[10**9]]),
    ("records.0.summary", [[-1], [5]]),
    ("records", []),
    ("messages.0.role", None),
    ("messages", []),
    ("message_starts.0", -1),
    ("message_starts.1", 10**9),
    ("originals", [{"start": 0, "end": 9, "digest": "../../../etc/passwd"}]),
])  # fmt: skip
def test_absurd_numbers_are_refused(engine: TransformersEngine, tmp_path: Any, path: str, value: Any) -> None:
    file = saved_file(engine, tmp_path)
    change(file.content, path, value)
    with pytest.raises(CorruptSession, match=r"(?s)'alice'.* from a copy, or delete it"):
        loaded(engine, tmp_path, file)


@pytest.mark.parametrize(("name", "forge"), [
    ("layers.0.slots.bias", lambda tensor: tensor.fill_(float("nan"))),
    ("layers.0.slots.bias", lambda tensor: tensor.fill_(float("inf"))),
    ("layers.0.slots.bias", lambda tensor: tensor.bfloat16()),
    ("layers.0.slots.positions", lambda tensor: tensor.fill_(10**9)),
    ("layers.0.slots.positions", lambda tensor: tensor.fill_(-1)),
    ("layers.0.slots.ranks", lambda tensor: tensor.fill_(-1)),
    ("layers.0.slots.ranks", lambda tensor: tensor.long()),
    ("layers.0.slots.cu_slots", lambda tensor: tensor + 1),
    ("layers.0.slots.key", lambda tensor: tensor[:, :-1]),
    ("layers.0.slots.key", lambda tensor: tensor.half()),
    ("layers.0.key", lambda tensor: tensor.long()),
    ("layers.0.key", lambda tensor: tensor.double()),
    ("layers.0.key", lambda tensor: torch.cat([tensor, tensor])),
    ("layers.0.key", lambda tensor: tensor[0]),
    ("layers.0.value", lambda tensor: tensor[..., :-1]),
    ("tokens", lambda tensor: tensor.float()),
    ("tokens", lambda tensor: tensor.fill_(260)),
    ("tokens", lambda tensor: tensor.fill_(-(2**63))),
    ("tokens", lambda tensor: tensor[:20]),
])  # fmt: skip
def test_absurd_tensors_are_refused(
    engine: TransformersEngine, tmp_path: Any, name: str, forge: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    file = saved_file(engine, tmp_path)
    file.tensors[name] = forge(file.tensors[name].clone())
    with pytest.raises(CorruptSession, match=r"(?s)'alice'.* from a copy, or delete it"):
        loaded(engine, tmp_path, file)


def test_a_group_of_coded_rows_takes_no_memory_by_its_number(engine: TransformersEngine, tmp_path: Any) -> None:
    """Groups are counted by their numbers: one of 2**40 asked for terabytes."""
    file = saved_file(engine, tmp_path, "int8")
    group = file.tensors["layers.0.slots.key.group"]
    group[group == group.max()] = 2**40
    with pytest.raises(CorruptSession, match="rows are int8"):
        loaded(engine, tmp_path, file, "int8")


@pytest.mark.parametrize("shape", [[2**62, 0], [0, 2**40], [0, 0, 0, 0, 0]])
def test_an_empty_tensor_of_a_huge_shape_is_refused(
    engine: TransformersEngine, tmp_path: Any, shape: list[int]
) -> None:
    file = saved_file(engine, tmp_path)
    file.tensors["layers.0.owl"] = torch.empty(0)
    data = file.sealed(lambda header: header["layers.0.owl"].update(shape=shape))
    assert outcome(Memory(engine, POLICIES["plain"], store=tmp_path), data) == "CorruptSession"


def test_contents_that_are_nested_too_deeply_are_refused(engine: TransformersEngine, tmp_path: Any) -> None:
    file = saved_file(engine, tmp_path)
    text = json.dumps(file.content).replace('"any"', '"any": ' + "[" * 10**5 + "]" * 10**5 + ', "other"')
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    file.tensors["session"] = data
    assert outcome(Memory(engine, POLICIES["plain"], store=tmp_path), file.sealed()) == "CorruptSession"


@pytest.mark.parametrize("recalls", [
    [[60, 2, 5, True]],
    [[60, 3, 1000, True]],
    [[60, 5, 5, True]],
    [[60, 5, 8, False]],
    [[60, 5, 8, True], [60, 5, 7, False]],
    [[60, 5, 8, True], [60, 5, 8, False], [60, 5, 8, False]],
])  # fmt: skip
def test_a_recall_of_what_no_segment_holds_is_refused(
    engine: TransformersEngine, tmp_path: Any, recalls: list[list[Any]]
) -> None:
    """It ended a rewind, much later, in an error that was not ours."""
    memory = Memory(engine, POLICIES["originals"], store=tmp_path)
    session = saved_session(memory)
    session.recall(session.segments[0])
    session.save()
    file = File.of((tmp_path / "alice.safetensors").read_bytes())
    assert file.content["records"][-1]["recalls"] == [[ANY, 3, ANY, True]]
    loaded(engine, tmp_path, file, "originals")
    file.content["records"][-1]["recalls"] = recalls
    with pytest.raises(CorruptSession, match=r"recalled or put away at tokens .*, where none is"):
        loaded(engine, tmp_path, file, "originals")


def test_a_window_that_lacks_tokens_is_refused(sliding_engine: TransformersEngine, tmp_path: Any) -> None:
    file = saved_file(sliding_engine, tmp_path)
    for part in ("key", "value"):
        file.tensors[f"layers.0.{part}"] = file.tensors[f"layers.0.{part}"][:, :, 1:].clone()
    with pytest.raises(CorruptSession, match="a sliding window holds 14 tokens, of which the next one sees 15"):
        loaded(sliding_engine, tmp_path, file)


@pytest.mark.parametrize("forge", [
    lambda kept: kept.clear(),
    lambda kept: kept.update(thread="another"),
    lambda kept: kept.update(keys=[]),
    lambda kept: kept.update(keys=[1, 2]),
    lambda kept: kept.update(ends=kept["ends"][:-1]),
    lambda kept: kept.update(ends=[10**9] * len(kept["ends"])),
    lambda kept: kept["ends"].reverse(),
    lambda kept: kept["keys"].__setitem__(-1, "x"),
])  # fmt: skip
def test_a_branch_that_says_it_is_another_is_passed_over(
    engine: TransformersEngine, tmp_path: Any, forge: Callable[[dict[str, Any]], object]
) -> None:
    messages = [{"role": "user", "content": "Hello."}]
    turn = Threads(Memory(engine, POLICIES["plain"], store=tmp_path)).turn(messages, thread="owls")
    turn.keep({"role": "assistant", "content": "".join(piece.text for piece in turn.session.generate(2))})
    assert Threads(Memory(engine, POLICIES["plain"], store=tmp_path)).turn(messages, thread="owls").num_cached_tokens
    (path,) = tmp_path.rglob("*.safetensors")
    file = File.of(path.read_bytes())
    forge(file.content["metadata"][BRANCH_KEY])
    path.write_bytes(file.sealed())
    again = Threads(Memory(engine, POLICIES["plain"], store=tmp_path)).turn(messages, thread="owls")
    assert again.num_cached_tokens == 0


def saved_file(engine: TransformersEngine, folder: Any, policy: str = "plain") -> File:
    saved_session(Memory(engine, POLICIES[policy], store=folder))
    return File.of((folder / "alice.safetensors").read_bytes())


def loaded(engine: TransformersEngine, folder: Any, file: File, policy: str = "plain") -> None:
    (folder / "alice.safetensors").write_bytes(file.sealed())
    Memory(engine, POLICIES[policy], store=folder).session("alice")
