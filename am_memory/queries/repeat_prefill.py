"""Repeat-prefill: the model is asked to repeat the block, reads it again, and its queries are taken.

One forward pass over the block's own tokens. To repeat, the model attends to what recall needs later
(arXiv:2602.16284, section 3.1). Does not know how the queries are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.scratch import queries_on_scratch, scratch
from am_memory.text.chat_template import RenderedChat

REQUEST = "Repeat the previous context."

OnLayer = Callable[[int, ReferenceQueries], None]
"""Called with (index among the compactable layers, the queries that came to that layer)."""


def repeat_request(engine: Engine) -> list[int]:
    """Token ids of the request to repeat; a turn of its own if the model has a chat template."""
    return as_turn(engine, REQUEST)


def as_turn(engine: Engine, text: str) -> list[int]:
    """Token ids of a user's turn within a chat; of the plain text if the model has no chat template."""
    if not engine.has_chat_template:
        return engine.encode(f"\n\n{text}\n\n")
    chat = RenderedChat(engine, [{"role": role, "content": text} for role in ("user", "assistant", "user")])
    return chat.encode(chat.write_behind(chat.messages, 1, add_generation_prompt=True))


def repeat_queries(
    engine: Engine,
    cache: SessionCache,
    token_ids: Sequence[int],
    *,
    chunk_tokens: int,
    on_progress: Callable[[int, int], None],
    weights: Sequence[float] | None = None,
) -> list[ReferenceQueries]:
    """Read the request and the block again on scratch, and take the queries of the block's tokens.

    Args:
        cache: holds the block; restored afterwards.
        token_ids: the tokens of the block that are repeated.
        chunk_tokens: tokens in one forward pass.
        on_progress: called with (tokens read, tokens to read).
        weights: how much each token's queries count; None: all alike.

    Returns:
        For each compactable layer num_key_value_groups * len(token_ids) queries.
    """
    request = repeat_request(engine)
    first, *others = in_chunks(token_ids, chunk_tokens)
    # The request is read together with the first chunk: a pass of its own would cost as much as a longer one.
    layers = queries_on_scratch(
        engine,
        cache,
        [[*request, *first], *others],
        lambda num_read: on_progress(num_read - len(request), len(token_ids)),
    )
    for passes in layers:
        query, log_mass = passes[0]
        passes[0] = query[:, :, len(request) :], log_mass[:, :, len(request) :]
    return [ReferenceQueries.pooled(passes, weights) for passes in layers]


def repeat_through(
    engine: Engine,
    cache: SessionCache,
    token_ids: Sequence[int],
    on_layer: OnLayer,
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Read the request and the block again on scratch, in one pass, and hand out each layer's queries on the way.

    Args:
        cache: holds the block; restored afterwards, whatever happens.
        token_ids, weights: as for `repeat_queries`.
        on_layer: called before the layer attends. If it compacts the layer, the layers above see the result.
    """
    request = repeat_request(engine)

    def on_query(index: int, query: Tensor, log_mass: Tensor) -> None:
        repeated = query[:, :, len(request) :], log_mass[:, :, len(request) :]
        on_layer(index, ReferenceQueries.pooled([repeated], weights))

    with scratch(cache):
        engine.forward(cache, [*request, *token_ids], on_query=on_query)
