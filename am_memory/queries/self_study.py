"""Self-study: the model answers prompts about the block, and the queries of prompts and answers are taken.

What it looks up while it sums up, asks, lists and structures is what later turns look up (arXiv:2602.16284, section
3.1). Writing an answer costs a forward pass for each token; a written one is read in one. The two are apart, so that
whoever keeps the answers has the same queries again. Knows nothing of how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from am_memory.engines.base import Engine, SessionCache
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import as_turn
from am_memory.queries.scratch import queries_on_scratch

SUBJECT = "the part of our conversation that begins with the words quoted below"
PROMPTS = (
    f"Sum up, in a few sentences, {SUBJECT}.",
    f"Which details might somebody ask about in {SUBJECT}? Write short questions, each with its answer.",
    f"List the facts in {SUBJECT}: names, numbers, dates, places, decisions, each in a few words, exactly as told.",
    f"Write down as JSON {SUBJECT}: its persons and things, their properties, and the values of these.",
)
"""About what is to be compacted; each is a conversation of its own, in which the block's first words are quoted."""
QUOTED_TOKENS = 24

Conversations = tuple[tuple[int, ...], ...]
"""Token ids of each prompt with its answer, in the order of the prompts."""


def study_prompts(engine: Engine, token_ids: Sequence[int]) -> list[list[int]]:
    """The prompts about the block of these tokens, each as a turn of its own where the model has a chat template."""
    quoted = engine.decode(token_ids[:QUOTED_TOKENS], skip_special=True).strip()
    return [as_turn(engine, f'{prompt}\n\n"{quoted}"') for prompt in PROMPTS]


def self_study(
    engine: Engine,
    cache: SessionCache,
    token_ids: Sequence[int],
    *,
    max_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Conversations:
    """Let the model answer the prompts on scratch, greedily, one after the other, as a cache holds one sequence.

    Args:
        cache: holds the block; it is afterwards as it was, whatever happens.
        token_ids: the block's tokens.
        max_tokens: of all answers together. Each ends with its turn, or with its share of what those before it left.
        on_progress: called with (tokens of the budget that are used, or not needed; budget).
    """
    prompts, conversations, num_used = study_prompts(engine, token_ids), [], 0

    def on_written(num_written: int) -> None:
        on_progress(num_used + num_written, max_tokens)

    for index, prompt in enumerate(prompts):
        share = (max_tokens - num_used) // (len(prompts) - index)
        answer = _answer(engine, cache, prompt, share, on_written)
        conversations.append((*prompt, *answer))
        num_used += len(answer)
    on_progress(max_tokens, max_tokens)
    return tuple(conversations)


def _answer(
    engine: Engine, cache: SessionCache, prompt: Sequence[int], max_tokens: int, on_written: Callable[[int], None]
) -> list[int]:
    state, chunk = cache.state(), prompt
    answer: list[int] = []
    try:
        while len(answer) < max_tokens:
            token_id = int(engine.forward(cache, chunk, num_logits=1)[0].argmax())
            if token_id in engine.info.eos_token_ids:
                break
            chunk = [token_id]
            answer += chunk
            on_written(len(answer))
    finally:
        cache.restore(state)
    return answer


def self_study_queries(
    engine: Engine, cache: SessionCache, conversations: Conversations, *, chunk_tokens: int
) -> list[ReferenceQueries]:
    """Read each conversation on scratch, and take the queries of all its tokens.

    Args:
        cache: holds the block; it is afterwards as it was, whatever happens.
        chunk_tokens: read at once.

    Returns:
        For each compactable layer num_key_value_groups queries for each token.
    """
    samples = []
    for conversation in conversations:
        chunks = (conversation[start : start + chunk_tokens] for start in range(0, len(conversation), chunk_tokens))
        passes = queries_on_scratch(engine, cache, chunks)
        samples.append([ReferenceQueries.pooled(layer) for layer in passes])
    return [ReferenceQueries.union(layer) for layer in zip(*samples, strict=True)]
