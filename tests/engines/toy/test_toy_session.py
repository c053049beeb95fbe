"""A conversation from the outside, over the toy engine."""

from __future__ import annotations

from borrowed import borrow

WITHOUT = {
    "test_greedy_generation_is_that_of_generate",  # compares with generate() of transformers
    "test_the_memory_says_how_to_sample_where_a_call_does_not",  # its numbers are those of the tiny model
    "test_messages_that_the_template_writes_as_one_turn_come_in_one_call",  # changes a transformers tokenizer
    "test_what_the_template_refuses_is_bad_input",  # changes a transformers tokenizer
    "test_a_model_without_a_chat_template_takes_no_messages",  # changes a transformers tokenizer
    "test_a_tool_result_that_counts_less_gets_fewer_slots",  # takes long
    "test_the_statistics_are_those_of_the_cache",  # counts the tensors of a KVCache
}
globals().update(borrow("session/test_session.py", without=WITHOUT))
