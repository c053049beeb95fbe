"""Sources of reference queries, one source a file. Each returns one `ReferenceQueries` for each compactable layer."""

from am_memory.queries.live import LiveQueries
from am_memory.queries.message_tokens import message_token_positions
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import OnLayer, as_turn, repeat_queries
from am_memory.queries.scratch import logits_on_scratch, queries_on_scratch, require_scaling, scratch
from am_memory.queries.self_study import StudyConversations, greedy_answer, self_study, self_study_queries
from am_memory.queries.sources import Passage, Progress, QuerySources

__all__ = [
    "LiveQueries",
    "OnLayer",
    "Passage",
    "Progress",
    "QuerySources",
    "ReferenceQueries",
    "StudyConversations",
    "as_turn",
    "greedy_answer",
    "logits_on_scratch",
    "message_token_positions",
    "queries_on_scratch",
    "repeat_queries",
    "require_scaling",
    "scratch",
    "self_study",
    "self_study_queries",
]
