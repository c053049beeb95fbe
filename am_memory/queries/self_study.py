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

Answers = tuple[tuple[int, ...], ...]
"""Token ids of the answer to each of the prompts."""


def study_prompts(engine: Engine, token_ids: Sequence[int]) -> list[list[int]]:
    """The prompts about the block of these tokens, each as a turn of its own where the model has a chat template."""
    quoted = engine.decode(token_ids[:QUOTED_TOKENS], skip_special=True).strip()
    return [as_turn(engine, f'{prompt}\n\n"{quoted}"') for prompt in PROMPTS]


def written_answers(
    engine: Engine,
    cache: SessionCache,
    token_ids: Sequence[int],
    *,
    max_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Answers:
    """Let the model answer the prompts on scratch, greedily, one after the other, as a cache holds one sequence.

    Args:
        cache: holds the block; it is afterwards as it was, whatever happens.
        token_ids: the block's tokens.
        max_tokens: of all answers together. Each ends with its turn, or with its share of what those before it left.
        on_progress: called with (tokens of the budget that are used or not needed, budget).
    """
    prompts, answers, left = study_prompts(engine, token_ids), [], max_tokens
    for index, prompt in enumerate(prompts):
        used = max_tokens - left
        share = left // (len(prompts) - index)
        answer = _written(engine, cache, prompt, share, lambda count: on_progress(used + count, max_tokens))  # noqa: B023
        answers.append(answer)
        left -= len(answer)
    on_progress(max_tokens, max_tokens)
    return tuple(answers)


def _written(
    engine: Engine, cache: SessionCache, prompt: Sequence[int], max_tokens: int, on_written: Callable[[int], None]
) -> tuple[int, ...]:
    state, chunk = cache.state(), prompt
    answer: list[int] = []
    try:
        while len(answer) < max_tokens:
            token_id = int(engine.forward(cache, chunk, num_logits=1)[0].argmax())
            if token_id in engine.info.eos_token_ids:
                break
            answer.append(token_id)
            chunk = [token_id]
            on_written(len(answer))
    finally:
        cache.restore(state)
    return tuple(answer)


def self_study_queries(
    engine: Engine, cache: SessionCache, token_ids: Sequence[int], answers: Answers, *, chunk_tokens: int
) -> list[ReferenceQueries]:
    """Read each prompt and its answer on scratch, and take the queries of both.

    Args:
        cache: holds the block; it is afterwards as it was, whatever happens.
        token_ids: the block's tokens.
        answers: of `written_answers`.
        chunk_tokens: read at once.

    Returns:
        For each compactable layer num_key_value_groups queries for each token of the prompts and the answers.
    """
    studies = []
    for prompt, answer in zip(study_prompts(engine, token_ids), answers, strict=True):
        turns = [*prompt, *answer]
        chunks = (turns[start : start + chunk_tokens] for start in range(0, len(turns), chunk_tokens))
        passes = queries_on_scratch(engine, cache, chunks)
        studies.append([ReferenceQueries.pooled(layer) for layer in passes])
    return [ReferenceQueries.union(layer) for layer in zip(*studies, strict=True)]
