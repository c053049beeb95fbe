"""The toy engine in place of the tiny transformers model, for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import Tensor
from toy_engine import ToyEngine


class StockModel:
    """The toy model over a cache that is never compacted, called as the tests call a transformers model."""

    def __init__(self, engine: ToyEngine) -> None:
        self._engine = engine

    def __call__(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = self._engine.forward(self._engine.new_cache(), ids[0].tolist(), num_logits=ids.shape[1])
        return SimpleNamespace(logits=logits[None])


@pytest.fixture(scope="session")
def engine() -> ToyEngine:
    return ToyEngine()


@pytest.fixture(scope="session")
def stock_model(engine: ToyEngine) -> StockModel:
    return StockModel(engine)
