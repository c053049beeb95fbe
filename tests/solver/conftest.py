"""Blocks to solve, and memory that is NaN until it is written."""

from collections.abc import Callable, Iterator

import pytest
import torch

from am_memory.solver import Block

MakeBlock = Callable[..., Block]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN in deterministic mode, so that a result that reads what nobody wrote is NaN too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def make_block() -> MakeBlock:
    def make(
        num_heads: int = 2,
        seq_len: int = 63,
        num_queries: int = 100,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Block:
        """Queries that each look for one key, on top of an interest they share: a softmax both peaked and broad."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        key = normal(num_heads, seq_len, head_dim) + 2.0 * normal(num_heads, 1, head_dim)
        wanted = torch.randint(seq_len, (num_queries,), generator=generator)
        strength = 2.0 * torch.rand(num_queries, 1, generator=generator)
        query = strength * key[:, wanted] + normal(num_heads, num_queries, head_dim) + normal(num_heads, 1, head_dim)
        value = normal(num_heads, seq_len, head_dim)
        return Block(query.to(dtype), key.to(dtype), value.to(dtype), head_dim**-0.5)

    return make
