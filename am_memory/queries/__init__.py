"""Reference queries: the sample of queries on which a compaction is fitted, one source a file.

Every source gives, for each compactable layer, (num_key_value_heads, num_queries, head_dim) after RoPE, with the query
heads of a group pooled along `num_queries` (arXiv:2602.16284, section 3).
"""

from am_memory.queries.live import LiveQueries
from am_memory.queries.repeat_prefill import repeat_queries

__all__ = ["LiveQueries", "repeat_queries"]
