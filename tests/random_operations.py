"""Random operations on a session, and the comparison of what it holds with its rebuild.

    python tests/random_operations.py 3000            so many operations, spread over all policies
    python tests/random_operations.py 3000 --seed 7   others
    python tests/random_operations.py 3000 --chunks   read in chunks, where rounding differs

Read token by token, a session and its rebuild compute the same in the same order, and must be equal to the bit. In
chunks the same keys must be kept, in the same ranking but for ties, and numbers be close.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter

import torch
from inside import context_of, pending_of, records_of
from policies import plain_policy
from torch import Tensor

from am_memory import AMMemoryError, Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.base import Engine
from am_memory.events import Span
from am_memory.kv_cache.int8 import Quantised, decoded
from am_memory.kv_cache.layers import LayerState, RecurrentState, SlidingState
from am_memory.session.appending import add, encode, read
from am_memory.session.context import Context
from am_memory.session.rebuild import rebuild

POLICY = plain_policy(trigger_tokens=128, keep_ratio=0.25, keep_recent=6, pinned=3, chunk_tokens=1, self_study_tokens=8)
TEXT_POLICY = plain_policy(trigger_tokens=128, keep_ratio=0.2, keep_recent=6, originals="host")
ROOM_BYTES = 40_000
"""Host memory, and room on disk, for originals: a few are dropped now and then."""
POLICIES: dict[str, dict[str, object]] = {
    "plain": {},
    "ahead": {"ahead_tokens": 15},
    "originals in host memory": {"originals": "host"},
    "ahead with originals": {"ahead_tokens": 12, "originals": "host"},
    "no recall by itself": {"originals": "host", "recall_tokens": 0},
    "much recall": {"originals": "host", "recall_tokens": 40},
    "int8 with originals on disk": {"originals": "disk", "segment_dtype": "int8"},
    "live queries": {"reference_queries": ("repeat", "live")},
    "live queries alone": {"reference_queries": ("live",)},
    "ahead, live, int8": {"ahead_tokens": 15, "reference_queries": ("repeat", "live"), "segment_dtype": "int8"},
    "tool results": {"tool_result_weight": 0.25},
    "summary": {"experiments": Experiments(summary_tokens=6)},
    "self-study": {"reference_queries": ("repeat", "self_study")},
    "gate": {"max_error": 0.05},
    "refit": {"experiments": Experiments(recompaction="refit"), "keep_ratio": 0.4},
    "omp": {"key_selection": "omp"},
    "omp_fast": {"key_selection": "omp_fast"},
    "uniform": {"head_budget": "uniform"},
    "on policy": {"experiments": Experiments(on_policy=True)},
}
KINDS = {
    "append": 5,
    "message": 3,
    "tell": 2,
    "generate": 4,
    "rewind a little": 4,
    "rewind": 1,
    "fork": 2,
    "fork with a policy": 1,
    "compact": 2,
    "recall": 3,
    "refine": 1,
    "mount": 2,
    "unmount": 1,
    "recall in a text": 2,
    "save": 2,
    "logits": 1,
}


def differences(one: Context, other: Context, atol: float = 0) -> list[str]:
    """In what two contexts differ, whatever they are called."""
    found = [
        what
        for what, of in {
            "tokens": lambda context: context.tokens,
            "records": lambda context: context.records,
            "segments": lambda context: context.cache.segments,
            "tokens read": lambda context: context.cache.num_tokens,
            "recalled": lambda context: sorted(each.page for each in context.recalled),
            "mounted": lambda context: [each.record for each in context.mounts.mounted],
            "under way": lambda context: context.background_compaction and context.background_compaction.at_tokens,
        }.items()
        if of(one) != of(other)
    ]
    if found:
        return found
    for index, (mine, theirs) in enumerate(zip(one.cache.state().layers, other.cache.state().layers, strict=True)):
        pairs = zip(_tensors(mine), _tensors(theirs), strict=True)
        found += [f"{name} of layer {index}" for (name, a), (_, b) in pairs if not _is_close(a, b, atol)]
    return found


def _tensors(layer: LayerState) -> list[tuple[str, Tensor | Quantised]]:
    if isinstance(layer, RecurrentState):
        return [("state", of) for of in layer.tensors]
    if isinstance(layer, SlidingState):
        return [("window", of) for of in (layer.keys, layer.values) if of is not None and layer.num_tokens]
    tail = [] if layer.buffer is None or not layer.length else [layer.buffer.key, layer.buffer.value]
    tensors: list[tuple[str, Tensor | Quantised]] = [("tail", of[:, :, : layer.length]) for of in tail]
    if layer.slots is not None:
        tensors += zip(("slot keys", "slot values", "biases", "positions", "ranks"), layer.slots.fields, strict=True)
    return tensors


def _is_close(mine: Tensor | Quantised, theirs: Tensor | Quantised, atol: float) -> bool:
    if isinstance(mine, Quantised) and isinstance(theirs, Quantised) and atol:
        atol += float(mine.scale.max()) if mine.scale.numel() else 0  # a code more, or less
    a, b = (decoded(of) if isinstance(of, Quantised) else of for of in (mine, theirs))
    if not atol or not a.is_floating_point():
        return torch.equal(a, b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


class Driver:
    """One session on which random operations are done.

    Args:
        seed: of everything that is random.
        kinds: of operations that are done.
        atol: how far a rebuild may be off; 0 is equal to the bit.
    """

    def __init__(
        self, engine: Engine, policy: MemoryPolicy, seed: str, folder: str, *, kinds: tuple[str, ...], atol: float = 0
    ) -> None:
        self.engine, self.policy, self.folder, self.atol = engine, policy, folder, atol
        self.random = random.Random(seed)
        self.kinds = kinds
        self.done: list[str] = []
        self.refused: Counter[str] = Counter()
        self.num_compared = 0
        self.session = self.resumed("session")
        self.session.append(self.tokens(180))

    def resumed(self, name: str) -> Session:
        """By a process of its own, as it were."""
        bounds = {"originals_bytes": ROOM_BYTES, "originals_disk_bytes": ROOM_BYTES}
        sampling = Sampling(temperature=0)
        return Memory(self.engine, self.policy, store=self.folder, sampling=sampling, **bounds).session(name)

    def tokens(self, most: int) -> list[int]:
        return [self.random.randrange(256) for _ in range(self.random.randint(1, most))]

    def step(self) -> None:
        """Do one operation; what is refused changes nothing, and is counted."""
        kind = self.random.choices(self.kinds, [KINDS[kind] for kind in self.kinds])[0]
        self.done.append(kind)
        try:
            getattr(self, kind.replace(" ", "_"))()
        except AMMemoryError as error:
            self.refused[f"{kind}: {type(error).__name__}"] += 1

    def append(self) -> None:
        self.session.append(self.tokens(60))

    def tell(self) -> None:
        add(self.session, encode(self.session, self.tokens(60)))
        read(self.session, self.random.randrange(40))

    def message(self) -> None:
        text = bytes(97 + token % 26 for token in self.tokens(30)).decode()
        self.session.append([{"role": self.random.choice(["user", "tool"]), "content": text}])

    def generate(self) -> None:
        list(self.session.generate(self.random.randint(1, 30)))

    def rewind_a_little(self) -> None:
        self.session.rewind(max(len(self.session.tokens) - self.random.randrange(40), 0))

    def rewind(self) -> None:
        self.session.rewind(self.random.randint(0, len(self.session.tokens)))

    def fork(self) -> None:
        self.session = self.session.fork(f"fork {len(self.done)}")

    def fork_with_a_policy(self) -> None:
        changes = self.random.choice(list(POLICIES.values()))
        self.session = self.session.fork(f"fork {len(self.done)}", policy=POLICY.with_changes(**changes))

    def compact(self) -> None:
        self.session.compact(self.random.choice([None, None, 0.3, 0.6, 1.0]))

    def recall(self) -> None:
        if self.session.segments:
            segment = self.random.choice(self.session.segments)
            start = self.random.randrange(segment.start, segment.end)
            self.session.recall((start, self.random.randint(start + 1, segment.end)))

    def refine(self) -> None:
        self.session.refine()

    def mount(self) -> None:
        """A text that there is, or a new one."""
        name, num_tokens = self.random.choice(["one", "two", "three"]), self.random.randint(10, 60)
        memory = Memory(self.engine, TEXT_POLICY, store=self.folder)
        if name not in [text.name for text in memory.compact_texts()]:
            memory.compact_text([self.random.randrange(256) for _ in range(num_tokens)], name)
        self.session.mount(name)

    def unmount(self) -> None:
        if self.session.mounts:
            self.session.unmount(self.random.choice(self.session.mounts).text.name)

    def recall_in_a_text(self) -> None:
        for mount in self.session.mounts[:1]:
            start = self.random.randrange(mount.text.num_tokens)
            end = self.random.randint(start + 1, mount.text.num_tokens)
            self.session.recall(Span(start, end, 0.0, "", mount.text.name))

    def save(self) -> None:
        self.session.save()
        saved, self.session = self.session, self.resumed(self.session.name)
        if pending_of(saved) is None:
            assert records_of(self.session) == records_of(saved) or self.policy != context_of(saved).policy

    def logits(self) -> None:
        self.session.logits(self.tokens(4))

    def differences(self) -> list[str]:
        """Between the session and its rebuild."""
        context = context_of(self.session)
        rebuilt = context.fork("rebuilt")
        with rebuilt.transaction():
            rebuild(rebuilt, len(rebuilt.tokens), "compared")
        self.num_compared += 1
        return differences(context, rebuilt, self.atol)


def main(num_operations: int, seed: int, *, in_chunks: bool) -> None:
    from conftest import random_gemma, random_llama, tokenizer_of_bytes

    from am_memory.engines.transformers import TransformersEngine

    engines = {make.__name__: TransformersEngine(make(), tokenizer_of_bytes()) for make in (random_llama, random_gemma)}
    per_policy, per_session = -(-num_operations // len(POLICIES)), 24
    num_done = num_compared = num_failed = 0
    for name, changes in POLICIES.items():
        policy = POLICY.with_changes(**changes, chunk_tokens=16 if in_chunks else 1)
        refused, seeds, failed, done, compared, started = Counter[str](), list[str](), [], 0, 0, time.monotonic()
        while done < per_policy:
            engine = engines["random_gemma" if len(seeds) % 4 == 3 else "random_llama"]
            seeds.append(f"{name} {seed} {len(seeds)}")
            with tempfile.TemporaryDirectory() as folder:
                driver = Driver(engine, policy, seeds[-1], folder, kinds=tuple(KINDS), atol=2e-3 if in_chunks else 0)
                for _ in range(per_session):
                    driver.step()
                    if len(driver.done) % 3 == 0 and (found := driver.differences()):
                        failed.append((seeds[-1], len(driver.done), driver.done[-5:], found))
                        break
            done, compared, refused = done + len(driver.done), compared + driver.num_compared, refused + driver.refused
        print(f"{name:28} {done:4} operations, {compared:4} compared, {len(failed)} differ, ", end="")
        print(f"{sum(refused.values())} refused, {time.monotonic() - started:.0f} s", flush=True)
        for failure in failed[:3]:
            print("   ", *failure)
        num_done, num_compared, num_failed = num_done + done, num_compared + compared, num_failed + len(failed)
    print(f"{num_done} operations, {num_compared} rebuilds compared, {num_failed} differ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_operations", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", action="store_true")
    args = parser.parse_args()
    main(args.num_operations, args.seed, in_chunks=args.chunks)
