"""Reading on scratch leaves nothing in the cache."""

from __future__ import annotations

import pytest

from am_memory.engines.transformers import TransformersEngine
from am_memory.queries import scratch


def test_what_is_read_on_scratch_is_gone_afterwards(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, [1, 2, 3])
    before = cache.state()
    with scratch(cache):
        engine.forward(cache, [4, 5])
        assert cache.num_tokens == 5
    assert cache.state() == before


def test_an_error_on_scratch_is_raised_and_leaves_the_cache_as_it_was(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, [1, 2, 3])
    before = cache.state()

    def read_and_fail() -> None:
        with scratch(cache):
            engine.forward(cache, [4, 5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_and_fail()
    assert cache.state() == before
