"""Files of compact texts with a sound checksum and absurd contents: refused by one of our errors, or mounted as any."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import POLICIES, File, forged

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import AMMemoryError, CorruptSession
from am_memory.events import Span

TEXT = "An owl sat on the old oak and looked at the moon. " * 4
POLICY = POLICIES["originals"].with_changes(trigger_tokens=200, recall_tokens=48)


@pytest.fixture
def memory(engine: TransformersEngine, tmp_path: Path) -> Memory:
    memory = Memory(engine, POLICY, store=tmp_path)
    memory.compact_text(TEXT, "owls")
    return memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "texts" / "owls.safetensors"


def use(memory: Memory) -> None:
    """All that can be done with a text."""
    memory.release("alice")
    memory.compact_texts()
    session = memory.session("alice")
    session.append([{"role": "user", "content": "Where is the owl?"}])
    session.mount("owls")
    list(session.generate(2))
    session.search("owl")
    with suppress(AMMemoryError):
        session.recall(Span(5, 30, 0.0, "", "owls"))
    session.append([{"role": "user", "content": "And then? " * 8}])
    session.rewind(len(session.tokens) // 2)
    session.save(overwrite=True)
    memory.release("alice")
    memory.session("alice").rewind(20)
    session.unmount("owls")


@pytest.mark.parametrize("policy", [POLICY, POLICY.with_changes(segment_dtype="int8")], ids=["model", "int8"])
def test_no_forged_text_ends_in_an_error_that_is_not_ours(
    engine: TransformersEngine, tmp_path: Path, path: Path, policy: MemoryPolicy
) -> None:
    memory = Memory(engine, policy, store=tmp_path / "first")
    memory.compact_text(TEXT, "owls")
    use(memory)
    data, chance = (tmp_path / "first" / "texts" / "owls.safetensors").read_bytes(), random.Random(0)
    memory, counted, wrong = Memory(engine, policy, store=tmp_path), Counter[str](), []
    path.parent.mkdir()
    for _ in range(60):
        path.write_bytes(forged(chance, data, "text"))
        (tmp_path / "alice.safetensors").unlink(missing_ok=True)
        try:
            use(memory)
        except AMMemoryError as error:
            counted[type(error).__name__] += 1
        except Exception as error:
            wrong.append("".join(traceback.format_exception(error)[-3:]))
    assert wrong == []
    assert counted["CorruptSession"] > 30


@pytest.mark.parametrize(("name", "forge"), [
    ("layers.0.slots.bias", lambda tensor: tensor.double()),
    ("layers.0.slots.bias", lambda tensor: tensor.fill_(float("nan"))),
    ("layers.0.slots.positions", lambda tensor: tensor.fill_(0)),
    ("layers.0.slots.key", lambda tensor: tensor[:, :-1]),
    ("layers.9.slots.key", lambda tensor: torch.zeros(1)),
    ("layers.-1.slots.key", lambda tensor: torch.zeros(1)),
    ("tokens", lambda tensor: tensor.fill_(260)),
    ("tokens", lambda tensor: tensor[:1]),
])  # fmt: skip
def test_absurd_tensors_are_refused(
    memory: Memory, path: Path, name: str, forge: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    file = File.of(path.read_bytes(), "text")
    file.tensors[name] = forge(file.tensors.get(name, torch.zeros(1)).clone())
    path.write_bytes(file.sealed())
    with pytest.raises(CorruptSession, match="compact the text again, or delete it"):
        use(memory)


@pytest.mark.parametrize(("field", "value"), [
    ("start", 10**6),
    ("segments", [{"start": 0, "end": 50, "num_slots": 40, "shift": 0}]),
    ("segments", [{"start": 30, "end": 10**6, "num_slots": 40, "shift": 0}]),
    ("num_heads", []),
    ("about", {"name": "owls", "num_tokens": 9, "num_slots": 1.0, "num_bytes": 9, "preview": ""}),
])  # fmt: skip
def test_absurd_numbers_are_refused(memory: Memory, path: Path, field: str, value: Any) -> None:
    file = File.of(path.read_bytes(), "text")
    file.content[field] = value
    path.write_bytes(file.sealed())
    with pytest.raises(CorruptSession, match="compact the text again, or delete it"):
        use(memory)


def test_a_session_with_a_text_that_is_never_seen_is_refused(memory: Memory, tmp_path: Path) -> None:
    session = memory.session("alice")
    session.append(TEXT)
    session.mount("owls")
    session.save()
    saved = tmp_path / "alice.safetensors"
    file = File.of(saved.read_bytes())
    file.content["mount_records"][0][-1] = 10**30
    saved.write_bytes(file.sealed())
    with pytest.raises(CorruptSession, match="seen from token"):
        Memory(memory.engine, POLICY, store=tmp_path).session("alice")
