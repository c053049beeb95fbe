"""Self-study: the model answers prompts about the conversation, and the queries of prompts and answers are taken.

To sum up, ask, list and structure, the model attends to what later turns need (arXiv:2602.16284, section 3.1).
Generating takes a forward pass for each token of the longest answer; reading an answer takes one pass. The two are
separate functions: a compaction that is made again reads the kept answers, and gets the same queries. Does not know
how the queries are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from am_memory.engines.abilities import Branches, Branching
from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import as_turn
from am_memory.queries.scratch import queries_on_scratch, scratch

PROMPTS = (
    "Sum up what has been said so far in a few sentences.",
    "Which questions might somebody ask about the details of what has been said so far? Write short questions, each "
    "with its answer.",
    "List the facts that have been told so far: names, numbers, dates, places, decisions, each in a few words, exactly "
    "as they were told.",
    "Write down as JSON what has been told so far: persons and things, their properties, and the values of these.",
)
"""Each starts a conversation of its own."""

StudyConversations = tuple[tuple[int, ...], ...]
"""Token ids of each prompt followed by its answer, in the order of `PROMPTS`."""


def study_prompts(engine: Engine) -> list[list[int]]:
    """Token ids of the prompts, each a turn of its own if the model has a chat template."""
    return [as_turn(engine, prompt) for prompt in PROMPTS]


def self_study(
    engine: Engine, cache: SessionCache, *, max_tokens: int, on_progress: Callable[[int, int], None]
) -> StudyConversations:
    """Let the model answer the prompts on scratch, greedily; as one batch if the engine can.

    Args:
        cache: holds the block; restored afterwards, whatever happens.
        max_tokens: budget of all answers together. An answer ends with the model's turn, or when the budget is used up.
        on_progress: called with (tokens generated, `max_tokens`), and with `max_tokens` twice at the end.
    """
    prompts = study_prompts(engine)
    branches = engine.branches(cache, prompts) if isinstance(engine, Branching) else None
    if branches is None:
        answers = answer_one_by_one(engine, cache, prompts, max_tokens, on_progress)
    else:
        answers = answer_as_batch(branches, engine.info.eos_token_ids, max_tokens, on_progress)
    on_progress(max_tokens, max_tokens)
    return tuple((*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True))


def answer_as_batch(
    branches: Branches, eos_token_ids: frozenset[int], max_tokens: int, on_progress: Callable[[int, int], None]
) -> list[list[int]]:
    """Generate all answers as one batch. Tokens that a short answer leaves go to the others.

    Returns:
        Token ids of the answers, without the tokens that end their turns.
    """
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
        branches.advance(going, token_ids)


def answer_one_by_one(
    engine: Engine,
    cache: SessionCache,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[list[int]]:
    """Generate the answers one by one. Tokens that a short answer leaves go to those after it.

    Returns:
        Token ids of the answers, without the tokens that end their turns.
    """
    answers: list[list[int]] = []
    num_used = 0

    def on_token(num_generated: int) -> None:
        on_progress(num_used + num_generated, max_tokens)

    for index, prompt in enumerate(prompts):
        share = (max_tokens - num_used) // (len(prompts) - index)
        answers.append(greedy_answer(engine, cache, prompt, share, on_token))
        num_used += len(answers[-1])
    return answers


def greedy_answer(
    engine: Engine, cache: SessionCache, prompt: Sequence[int], max_tokens: int, on_token: Callable[[int], None]
) -> list[int]:
    """Let the model answer on scratch, greedily.

    Args:
        on_token: called with the number of tokens generated so far.

    Returns:
        Token ids of the answer, without the one that ends the turn.
    """
    chunk, answer = prompt, list[int]()
    with scratch(cache):
        while len(answer) < max_tokens:
            token_id = int(engine.forward(cache, chunk, num_logits=1)[0].argmax())
            if token_id in engine.info.eos_token_ids:
                break
            chunk = [token_id]
            answer += chunk
            on_token(len(answer))
    return answer


def self_study_queries(
    engine: Engine,
    cache: SessionCache,
    conversations: StudyConversations,
    *,
    chunk_tokens: int,
    on_read: Callable[[int], None] = lambda num_tokens: None,
) -> list[ReferenceQueries]:
    """Read each conversation on scratch, and take the queries of all its tokens.

    Args:
        cache: holds the block; restored afterwards, whatever happens.
        chunk_tokens: tokens in one forward pass.
        on_read: called after each pass with the number of tokens of the conversation read so far.

    Returns:
        For each compactable layer num_key_value_groups queries for each token.
    """
    samples = []
    for conversation in conversations:
        passes = queries_on_scratch(engine, cache, in_chunks(conversation, chunk_tokens), on_read)
        samples.append([ReferenceQueries.pooled(layer) for layer in passes])
    return [ReferenceQueries.union(layer) for layer in zip(*samples, strict=True)]
