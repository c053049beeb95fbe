"""Session files with absurd contents and a sound checksum: whoever can write to a store can make them.

python tests/security/forging.py 500 [SEED]      so many of each kind of session; prints what became of them
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Session
from am_memory.engines.base import Engine
from am_memory.errors import AMMemoryError, StorageError
from am_memory.storage.tensor_file import CHECKSUM_KEY, ZEROS

POLICY = MemoryPolicy(trigger_tokens=96, keep_ratio=0.25, pinned=3, keep_recent=8, chunk_tokens=32)
POLICIES = {
    "plain": POLICY,
    "int8": POLICY.with_changes(segment_dtype="int8"),
    "originals": POLICY.with_changes(originals="host"),
    "refit": POLICY.with_changes(experiments=Experiments(recompaction="refit")),
    "summaries": POLICY.with_changes(experiments=Experiments(summary_tokens=8)),
    "self-study": POLICY.with_changes(reference_queries=("self_study",), self_study_tokens=16),
}
QUICK_FIELDS = {*POLICY.model_fields_set, "segment_dtype", "originals"}
ABSURD = [
    *(-1, 0, 1, 2, 3, 7, 50, 255, 259, 260, 10**4, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, -(2**31), -(2**63) - 1),
    *(0.5, -0.5, 1e308, float("nan"), float("inf"), True, None, "", "3", "x" * 100, [], {}, [[]], [1, 2], {"role": 1}),
]


ForgeHeader = Callable[[dict[str, Any]], object]


def as_it_is(header: dict[str, Any]) -> None:
    """Forge nothing."""


@dataclass
class File:
    """A session file in parts, or the file of a compact text.

    Attributes:
        part: under which its JSON stands, "session" or "text".
    """

    header: dict[str, Any]
    content: Any
    tensors: dict[str, Tensor]
    part: str = "session"

    @classmethod
    def of(cls, data: bytes, part: str = "session") -> File:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return cls(header["__metadata__"], json.loads(bytes(tensors.pop(part).numpy())), tensors, part)

    def sealed(self, forge_header: ForgeHeader = as_it_is) -> bytes:
        """The whole file, with its checksum."""
        text = json.dumps(self.content).encode()
        tensors = {self.part: torch.frombuffer(bytearray(text), dtype=torch.uint8), **self.tensors}
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        size = 8 + int.from_bytes(data[:8], "little")
        header = {"__metadata__": {**self.header, "sha256": ZEROS.decode()}, **json.loads(data[8:size])}
        forge_header(header)
        written = json.dumps(header, separators=(",", ":")).encode()
        written += b" " * (-len(written) % 8)
        whole = len(written).to_bytes(8, "little") + written + data[size:]
        place = whole.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
        digest = sha256(whole[:place] + ZEROS + whole[place + len(ZEROS) :]).hexdigest().encode()
        return whole[:place] + digest + whole[place + len(ZEROS) :]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON, all there is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def forge_json(chance: random.Random, value: Any) -> None:
    """Change one thing, in place."""
    *path, key = chance.choice([*places(value)])
    for step in path:
        value = value[step]
    match chance.randrange(6):
        case 0:
            del value[key]
        case 1 if isinstance(value[key], list) and value[key]:
            chance.shuffle(value[key])
        case 2 if isinstance(value[key], list) and value[key]:
            value[key].append(deepcopy(chance.choice(value[key])))
        case 3 if isinstance(value[key], int):
            value[key] += chance.choice([-1, 1, -100, 100])
        case _:
            value[key] = deepcopy(chance.choice(ABSURD))


def forge_tensor(chance: random.Random, tensors: dict[str, Tensor]) -> None:
    """Change one tensor, or which there are."""
    name = chance.choice([*tensors])
    tensor = tensors[name].clone()
    axis = chance.randrange(max(tensor.ndim, 1))
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8]
    match chance.randrange(9):
        case 0:
            del tensors[name]
            return
        case 1:
            tensors[chance.choice([f"{name}.more", f"layers.9.{name}", "layers.x.key", "layers.-1.key", "owl"])] = (
                tensor
            )
            return
        case 2:
            other = chance.choice([*tensors])
            tensors[name], tensors[other] = tensors[other], tensors[name]
            return
        case 3:
            tensor = tensor.to(chance.choice([*dtypes, torch.uint8]))
        case 4 if tensor.numel():
            tensor = tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis]))
        case 5 if tensor.numel():
            tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
        case 6:
            tensor = chance.choice([tensor.flatten(), tensor[None], tensor.reshape(*tensor.shape[::-1])])
        case _ if tensor.numel():
            info = torch.finfo(tensor.dtype) if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
            absurd = [float("nan"), float("inf")] if tensor.is_floating_point() else [-1, 0, 1, 7, 100]
            number = chance.choice([*absurd, info.min, info.max])
            flat = tensor.view(-1)
            where = slice(None) if chance.random() < 0.3 else chance.randrange(len(flat))
            flat[where] = number
    tensors[name] = tensor


def forge_entry(chance: random.Random) -> ForgeHeader:
    """Change one thing in the file's own header."""

    def forge(header: dict[str, Any]) -> None:
        name = chance.choice([*header])
        entry = header[name]
        match chance.randrange(5):
            case 0 if name != "__metadata__":
                header[name] = chance.choice(ABSURD)
            case 1 if "dtype" in entry:
                entry["dtype"] = chance.choice(["F64", "F8_E4M3", "BOOL", "U64", "C64", "owl", 7, None])
            case 2 if "shape" in entry:
                entry["shape"] = chance.choice(
                    [[2**62, 0], [0, 2**62, 4], [-1], [2**63], "ab", [1.5], [1] * 70, [10**30], [0]]
                )
            case 3 if "data_offsets" in entry:
                entry["data_offsets"] = chance.choice([[0, 0], [0, 2**63], [8, 0], [-8, 0], "ab", [0], [0, 1, 2], None])
            case _ if name == "__metadata__":
                entry[chance.choice(["format", "needs"])] = chance.choice(
                    ["0", "-1", "owl", "1.5", "9" * 5000, "", "２"]
                )

    return forge


def forged(chance: random.Random, data: bytes, part: str = "session") -> bytes:
    """Another file with one to three changes, and a checksum that is right."""
    file = File.of(data, part)
    entry = as_it_is
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        kind = chance.random()
        if kind < 0.6:
            forge_json(chance, file.content)
        elif kind < 0.9:
            forge_tensor(chance, file.tensors)
        else:
            entry = forge_entry(chance)
    return file.sealed(entry)


def saved_session(memory: Memory) -> Session:
    """One that was compacted several times, and is in the midst of an answer."""
    session = memory.session("alice")
    session.append([{"role": "user", "content": "An owl sat on the old oak and looked at the moon. " * 4}])
    next(iter(session.generate(4)))
    session.metadata["of"] = {"any": [1, 2]}
    session.save()
    return session


def use(session: Session) -> None:
    """All that can be done with a session."""
    session.stats, session.segments, session.messages  # noqa: B018
    branch = session.fork()
    for _ in session.generate(2):
        pass
    session.search("owl")
    session.append([{"role": "user", "content": "And then? " * 3}])
    session.compact(0.8)
    if session.segments:
        with suppress(AMMemoryError):
            session.recall(session.segments[0])
    session.rewind(len(session.tokens) // 2)
    session.save(overwrite=True)
    branch.compact(1.0)
    branch.rewind(5)


def outcome(memory: Memory, data: bytes) -> str:
    """What becomes of a file: how it is refused, or how the session goes on; raises what no error of ours is."""
    path = Path(memory.store.url) / "alice.safetensors"
    path.write_bytes(data)
    memory.release("alice")
    try:
        session = memory.session("alice")
    except StorageError as error:
        return type(error).__name__
    try:
        use(session)
    except AMMemoryError as error:
        return f"loaded, then {type(error).__name__}"
    return "loaded"


def outcomes(engine: Engine, policy: MemoryPolicy, count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """What became of so many forged files, and of those that ended in anything but an error of ours the traceback."""
    chance, counted, wrong = random.Random(seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory(engine, policy, store=folder)
        saved_session(memory)
        data = (Path(folder) / "alice.safetensors").read_bytes()
        assert outcome(memory, File.of(data).sealed()) == "loaded"
        for number in range(count):
            torch.manual_seed(0)
            # Under a saved policy that may say how long the model writes, it would.
            memory.prefers_saved_policy = number % 2 == 0 and policy.model_fields_set <= QUICK_FIELDS
            try:
                counted[outcome(memory, forged(chance, data))] += 1
            except Exception as error:
                counted[f"WRONG {type(error).__name__}"] += 1
                wrong.append("".join(traceback.format_exception(error)[-3:]))
    return counted, wrong


def main(count: int, seed: int = 0) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import conftest

    logging.getLogger("am_memory").setLevel(logging.CRITICAL)

    from am_memory.engines.transformers import TransformersEngine

    tokenizer = conftest.byte_tokenizer.__wrapped__()
    for model in (conftest.random_llama, conftest.random_gemma):
        engine = TransformersEngine(model(), tokenizer)
        for name, policy in POLICIES.items():
            counted, wrong = outcomes(engine, policy, count, seed)
            print(model.__name__, name, dict(counted), flush=True)
            for text, number in Counter(wrong).most_common(5):
                print(number, text, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
