"""Self-study: the model answers prompts about what it was told, and the queries of prompts and answers are taken.

What it looks up while it sums up, asks, lists and structures is what later turns look up (arXiv:2602.16284, section
3.1). Writing costs a forward pass for each token of the longest answer; a written one is read in one. The two are
apart, so that whoever keeps the answers has the same queries again. Knows nothing of how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from am_memory.engines.base import Branches, Branching, Engine, SessionCache, in_chunks
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import as_turn
from am_memory.queries.scratch import queries_on_scratch

PROMPTS = (
    "Sum up what has been said so far in a few sentences.",
    "Which questions might somebody ask about the details of what has been said so far? Write short questions, each "
    "with its answer.",
    "List the facts that have been told so far: names, numbers, dates, places, decisions, each in a few words, exactly "
    "as they were told.",
    "Write down as JSON what has been told so far: persons and things, their properties, and the values of these.",
)
"""Each is a conversation of its own."""

Conversations = tuple[tuple[int, ...], ...]
"""Token ids of each prompt with its answer, in the order of the prompts."""


def study_prompts(engine: Engine) -> list[list[int]]:
    """The prompts, each as a turn of its own where the model has a chat template."""
    return [as_turn(engine, prompt) for prompt in PROMPTS]


def self_study(
    engine: Engine, cache: SessionCache, *, max_tokens: int, on_progress: Callable[[int, int], None]
) -> Conversations:
    """Let the model answer the prompts on scratch, greedily: a token of each answer in a pass where the engine can.

    Args:
        cache: holds the block; it is afterwards as it was, whatever happens.
        max_tokens: of all answers together. Each ends with its turn, or with its share of what others leave.
        on_progress: called with (tokens of the budget that are used, or not needed; budget).
    """
    prompts = study_prompts(engine)
    branches = engine.branches(cache, prompts) if isinstance(engine, Branching) else None
    if branches is None:
        answers = one_after_the_other(engine, cache, prompts, max_tokens, on_progress)
    else:
        answers = side_by_side(branches, engine.info.eos_token_ids, max_tokens, on_progress)
    on_progress(max_tokens, max_tokens)
    return tuple((*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True))


def side_by_side(
    branches: Branches, eos_token_ids: frozenset[int], max_tokens: int, on_progress: Callable[[int, int], None]
) -> list[list[int]]:
    """The answers of all branches, without the end of their turns; what one leaves of its share goes to the others."""
    answers: list[list[int]] = [[] for _ in branches.logits]
    writing, num_used = answers, 0
    while True:
        chosen = branches.logits.argmax(1).tolist()
        going = [index for index, token_id in enumerate(chosen) if token_id not in eos_token_ids]
        if not going:
            return answers
        del going[max_tokens - num_used :]
        writing, token_ids = [writing[index] for index in going], [chosen[index] for index in going]
        for answer, token_id in zip(writing, token_ids, strict=True):
            answer.append(token_id)
        num_used += len(going)
        on_progress(num_used, max_tokens)
        if num_used == max_tokens:
            return answers
        branches.read(going, token_ids)


def one_after_the_other(
    engine: Engine,
    cache: SessionCache,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[list[int]]:
    """The same for an engine whose caches hold one text each; what one leaves of its share goes to those after it."""
    answers: list[list[int]] = []
    num_used = 0

    def on_written(num_written: int) -> None:
        on_progress(num_used + num_written, max_tokens)

    for index, prompt in enumerate(prompts):
        share = (max_tokens - num_used) // (len(prompts) - index)
        answers.append(greedy_answer(engine, cache, prompt, share, on_written))
        num_used += len(answers[-1])
    return answers


def greedy_answer(
    engine: Engine, cache: SessionCache, prompt: Sequence[int], max_tokens: int, on_written: Callable[[int], None]
) -> list[int]:
    """What the model answers on scratch, without the end of its turn; `on_written` gets its length at each token."""
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
        passes = queries_on_scratch(engine, cache, in_chunks(conversation, chunk_tokens))
        samples.append([ReferenceQueries.pooled(layer) for layer in passes])
    return [ReferenceQueries.union(layer) for layer in zip(*samples, strict=True)]
