"""What is asked of a tiny model of each family: that it works in every way, or that it is refused with a reason."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from inside import cache_of
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.support import cache_argument
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.slots import Segment, Slots

NUM_TOKENS = 60
BOUNDS = [0, 20, 37, *range(38, 45), NUM_TOKENS]
"""A prompt in chunks, then token by token, then a chunk again."""
TOLERANCE = 1e-4
EVERYTHING = MemoryPolicy(trigger_tokens=1.0, keep_ratio=1.0, max_compact_tokens=100, pinned=2)
A_QUARTER = MemoryPolicy(trigger_tokens=1.0, keep_ratio=0.25, pinned=2)


class Wrong(AssertionError):
    """A model that was accepted does not do what was asked of it."""


def verdict(family: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> str:
    """The reason for which a family is refused; "" if it works.

    Args:
        options: of its configuration; see `tiny_models.tiny_config`.

    Raises:
        Wrong: it was accepted and does something wrong.
        Exception: any other error, which is one of the model alone if it comes before the model is loaded.
    """
    model = tiny_model(family, dict(options or {}))
    ids = torch.randint(256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    try:
        engine = TransformersEngine(model, tokenizer)
    except UnsupportedModel as refusal:
        return str(refusal)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].float()
    rounding = _error(_read_by_stock(tiny_model(family, dict(options or {})), ids), expected)
    _require_same(_read(engine, ids), expected, max(TOLERANCE, 2 * rounding), "uncompacted")
    kept = _kept(engine, ids, EVERYTHING)
    _require_same(kept, expected[44:-1], max(2e-3, 2 * rounding), "two compactions that keep everything")
    _require_nearer(engine, ids, expected[44:-1])
    _require_sessions(engine, ids)
    _require_generate(engine, ids)
    return ""


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two sets of logits, relative to their spread."""
    return float((actual - expected).abs().max() / expected.std())


def _require_same(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    if not (error := _error(actual, expected)) <= tolerance:
        raise Wrong(f"{what}: off by {error:.2g} of the logits' spread")


def _read(engine: TransformersEngine, ids: list[int]) -> Tensor:
    cache = engine.new_cache()
    steps = zip(BOUNDS, BOUNDS[1:], strict=False)
    return torch.cat([engine.forward(cache, ids[start:end], num_logits=end - start) for start, end in steps])


@torch.no_grad()
def _read_by_stock(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The same steps with transformers' own cache: those of recurrent layers differ from one pass."""
    cache = DynamicCache(config=model.config)
    steps = zip(BOUNDS, BOUNDS[1:], strict=False)
    argument = cache_argument(model)
    return torch.cat([model(torch.tensor([ids[a:b]]), **{argument: cache}).logits[0].float() for a, b in steps])


def _kept(engine: TransformersEngine, ids: list[int], policy: MemoryPolicy) -> Tensor:
    """The logits of the last tokens, after two compactions of what comes before."""
    session = Memory(engine, policy).session()
    session.append(ids[:30])
    session.compact(0.6)
    session.append(ids[30:45])
    session.compact(1.0)
    return session.logits(ids[45:])


def _require_nearer(engine: TransformersEngine, ids: list[int], expected: Tensor) -> None:
    """A quarter of the slots must do better than none."""
    actual, cache = _kept(engine, ids, A_QUARTER), engine.new_cache()
    engine.forward(cache, ids[:44])
    nothing = [Slots.exact(*layer.exact_entries(44, 44), start=44) for layer in cache.compactable]
    cache.restore(cache.compacted([Segment(2, 44, 0)], nothing, num_pinned=2))
    evicted = engine.forward(cache, ids[44:-1], num_logits=NUM_TOKENS - 45)
    if not bool(actual.isfinite().all()):
        raise Wrong("a quarter kept: the logits are not finite")
    error, other = (float((one - expected).square().mean().sqrt()) for one in (actual, evicted))
    if error > other:
        raise Wrong(f"a quarter kept: off by {error:.3g}, and by {other:.3g} with nothing kept")


def _require_sessions(engine: TransformersEngine, ids: list[int]) -> None:
    """Saved and resumed, forked, and rewound, the session says what it said."""
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory(engine, A_QUARTER, store=folder)
        session = memory.session("family")
        session.append(ids[:40])
        session.compact(0.8)
        session.append(ids[40:50])
        expected = session.logits(ids[50:])
        session.save()
        _require_same(
            Memory(engine, A_QUARTER, store=folder).session("family").logits(ids[50:]), expected, 1e-4, "resumed"
        )
        branch = session.fork()
        session.append(ids[:8])
        _require_same(branch.logits(ids[50:]), expected, 1e-4, "forked")
        session.rewind(50)
        _require_same(session.logits(ids[50:]), expected, 1e-3, "rewound")
        if cache_of(session).num_tokens > 50:
            raise Wrong("rewound: it holds tokens that it should have forgotten")


def _require_generate(engine: TransformersEngine, ids: list[int]) -> None:
    """`generate()` of transformers, over our cache, gives the tokens that a session gives."""
    memory = Memory(
        engine,
        MemoryPolicy(trigger_tokens=40, keep_ratio=0.5, keep_recent=8, pinned=2),
        sampling=Sampling(temperature=0.0),
    )
    inputs = {"input_ids": torch.tensor([ids[:30]]), "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    cache = memory.cache()
    tokens = engine.model.generate(**inputs, cache=cache)
    if tokens.shape[1] != 50 or not cache.segments:
        raise Wrong(f"generate(): {tokens.shape[1]} tokens, {len(cache.segments)} compactions")


def outcome(family: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> str:
    """The verdict, or the error if there is none."""
    try:
        return verdict(family, tokenizer, options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
