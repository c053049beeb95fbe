"""Repeat-prefill: the model is asked to repeat the block, is shown it again, and its queries are taken.

One forward pass over the block's own tokens; what the model looks up while it repeats is what recall needs
(arXiv:2602.16284, section 3.1). Knows nothing of how the queries are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, cat

from am_memory.cache import KVCache
from am_memory.engines.base import Engine

REQUEST = "Repeat the previous context."


def repeat_request(engine: Engine) -> list[int]:
    """The request to repeat, as a turn of its own where the model has a chat template."""
    if not engine.has_chat_template:
        return engine.encode(f"\n\n{REQUEST}\n\n")
    mark = "\u241e"
    turns = [("user", REQUEST), ("assistant", mark), ("user", REQUEST)]
    text = engine.render([{"role": role, "content": content} for role, content in turns], add_generation_prompt=True)
    return engine.encode(text.split(mark, 1)[-1])


def repeat_queries(
    engine: Engine,
    cache: KVCache,
    token_ids: Sequence[int],
    *,
    chunk_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[Tensor]:
    """Read the request and the block again on scratch, and take the queries of the block's tokens.

    Args:
        cache: holds the block; it is afterwards as it was.
        token_ids: the block's tokens.
        chunk_tokens: read at once.
        on_progress: called with (tokens read, tokens to read).

    Returns:
        For each compactable layer (num_key_value_heads, num_key_value_groups * num_tokens, head_dim).
    """
    pieces: list[list[Tensor]] = [[] for _ in cache.compactable]
    state = cache.state()
    try:
        engine.forward(cache, repeat_request(engine))
        for start in range(0, len(token_ids), chunk_tokens):
            chunk = token_ids[start : start + chunk_tokens]
            engine.forward(cache, chunk, on_query=lambda index, query: pieces[index].append(query))
            on_progress(start + len(chunk), len(token_ids))
    finally:
        cache.restore(state)
    return [cat(layer, dim=2).flatten(1, 2) for layer in pieces]
