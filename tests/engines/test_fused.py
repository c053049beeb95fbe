"""The GPU's attention, compared with the path of CPUs; in Triton's interpreter where there is no GPU.

Whatever is not a key is NaN: what follows the tail in its buffer, what lies around the slots, and every tensor that
the kernels are to fill.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines import partwise
from am_memory.engines.transformers import TransformersEngine, fused
from am_memory.kv_cache.int8 import Quantised
from am_memory.kv_cache.slots import Slots

pytest.importorskip("triton", reason="Triton has no build for this machine")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 0.2
TENSORS = ("key", "value", "bias")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # then torch fills what it allocates with NaN
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def poisoned(tensor: Tensor, spare: int) -> Tensor:
    """The same, as a view into memory that is NaN before and after it along the next to last axis (the last of one)."""
    dim = max(tensor.ndim - 2, 0)
    size = list(tensor.shape)
    size[dim] += 2 * spare
    around = tensor.new_full(size, torch.nan)
    view = around.narrow(dim, spare, tensor.shape[dim])
    view.copy_(tensor)
    return view


def random_slots(counts: list[int], head_dim: int, dtype: torch.dtype) -> Slots:
    total = sum(counts)
    key, value = torch.randn(2, total, head_dim)
    none = torch.zeros(total, dtype=torch.int32)
    fields = (poisoned(of.to(DEVICE, dtype), 3) for of in (key, value, 3 * torch.rand(total)))
    return Slots(*fields, none, none, (0, *itertools.accumulate(counts)))


def random_case(
    counts: list[int] | None, num_tokens: int, num_past: int, groups: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Slots | None]:
    """Queries as a model makes them, (tokens, heads) transposed, and a tail with spare room behind it."""
    num_heads = 3 if counts is None else len(counts)
    query = 2 * torch.randn(1, num_tokens, num_heads * groups, head_dim).transpose(1, 2)
    query *= (64 / head_dim) ** 0.5  # scores of one size, whatever the head_dim: the rounding grows with them
    tail = torch.randn(2, 1, num_heads, num_past + num_tokens, head_dim)
    key, value = (poisoned(of.to(DEVICE, dtype), 5) for of in tail)
    slots = None if counts is None else random_slots(counts, head_dim, dtype)
    return query.to(DEVICE, dtype), key, value, slots


def assert_equals_the_other_path(query: Tensor, key: Tensor, value: Tensor, slots: Slots | None) -> None:
    output, log_mass = fused.attend(query, key, value, slots, SCALING)
    if slots is not None:
        slots = slots.decoded()
    in_float32 = None if slots is None else replace(slots, **{name: getattr(slots, name).float() for name in TENSORS})
    expected, expected_mass = partwise.attend(query.float(), key.float(), value.float(), in_float32, SCALING)
    tolerance = TOLERANCE[query.dtype]
    assert output.dtype == query.dtype
    assert log_mass.dtype == torch.float32
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_mass, expected_mass, rtol=0, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("counts", [None, [0, 0, 0], [1, 0, 63], [500, 1, 0], [256, 257, 512], [600, 63, 64]], ids=str)
def test_a_token_sees_ragged_slots_and_the_tail(counts: list[int] | None, groups: int, dtype: torch.dtype) -> None:
    assert_equals_the_other_path(*random_case(counts, 1, 300, groups, 64, dtype))


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_any_head_dim(num_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    assert_equals_the_other_path(*random_case([70, 0], num_tokens, 9, 2, head_dim, dtype))


def in_int8(slots: Slots, num_pinned: int) -> Slots:
    """The first slots of each head as they are, the others in two segments in int8."""
    heads = []
    for slots_of_head in (slots.head(index) for index in range(slots.num_heads)):
        cuts = num_pinned, (num_pinned + slots_of_head.num_slots) // 2
        places = torch.arange(slots_of_head.num_slots)
        pinned = slots_of_head.where(places < cuts[0])
        older = slots_of_head.where((places >= cuts[0]) & (places < cuts[1])).quantised()
        heads += [pinned, older, slots_of_head.where(places >= max(cuts)).quantised()]
    stacked = Slots.stack(heads)
    return replace(stacked, cu_slots=stacked.cu_slots[::3])


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("counts", [[0, 500, 63], [3, 70, 260]], ids=str)
def test_slots_in_int8_are_decoded_as_they_are_loaded(counts: list[int], num_tokens: int, dtype: torch.dtype) -> None:
    query, key, value, slots = random_case(counts, num_tokens, 30, 2, 80, dtype)
    assert slots is not None
    coded = in_int8(slots, num_pinned=4)
    assert isinstance(coded.key, Quantised)
    assert len(coded.key.codes) > 0
    assert len(coded.key.exact) > 0
    assert_equals_the_other_path(query, key, value, coded)
    # Without rounding, there would be nothing to decode.
    assert not torch.equal(
        fused.attend(query, key, value, coded, SCALING)[0], fused.attend(query, key, value, slots, SCALING)[0]
    )


@DTYPES
@pytest.mark.parametrize("num_past", [0, 1, 300])
@pytest.mark.parametrize("num_tokens", [2, 33, 130])
def test_new_tokens_see_slots_the_past_and_themselves_causally(
    num_tokens: int, num_past: int, dtype: torch.dtype
) -> None:
    """Both ways: 2 tokens of 2 heads have their keys split, 130 have not, and 33 are just too many."""
    assert_equals_the_other_path(*random_case([500, 0, 63], num_tokens, num_past, 2, 64, dtype))


@pytest.mark.parametrize("num_past", [0, 255, 256])
def test_a_part_that_a_query_does_not_see_has_no_mass_for_it(num_past: int) -> None:
    """The parts of a tail may begin behind some of the new tokens."""
    assert_equals_the_other_path(*random_case(None, 20, num_past, 1, 16, torch.float32))
    assert_equals_the_other_path(*random_case([0, 300, 0], 20, num_past, 3, 16, torch.float32))


def test_scores_of_hundreds_do_not_overflow() -> None:
    query, key, value, slots = random_case([300, 0, 5], 3, 300, 2, 64, torch.float32)
    output, log_mass = fused.attend(100 * query, key, value, slots, SCALING)
    expected, expected_mass = partwise.attend(100 * query, key, value, slots, SCALING)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_mass, expected_mass, rtol=1e-6, atol=0)


def test_slots_with_a_bias_of_minus_infinity_weigh_nothing() -> None:
    query, key, value, slots = random_case([300, 300, 300], 1, 4, 2, 16, torch.float32)
    assert slots is not None
    slots.bias.fill_(-torch.inf)
    without = fused.attend(query, key, value, None, SCALING)
    torch.testing.assert_close(fused.attend(query, key, value, slots, SCALING), without, rtol=0, atol=1e-6)


def test_queries_may_be_laid_out_in_any_way() -> None:
    query, key, value, slots = random_case([30, 2, 0], 5, 4, 2, 16, torch.float32)
    expected = fused.attend(query, key, value, slots, SCALING)
    for strange in (query.contiguous(), query.mT.contiguous().mT):
        torch.testing.assert_close(fused.attend(strange, key, value, slots, SCALING), expected, rtol=0, atol=0)


def test_a_compacted_session_reads_and_writes_the_same(
    stock_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From end to end, the queries and masses that a compaction is made from among it."""
    engine = TransformersEngine(copy.deepcopy(stock_model).to(DEVICE), byte_tokenizer)
    policy = MemoryPolicy(trigger_tokens=1000, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=64)

    def logits() -> tuple[Tensor, list[int]]:
        session = Memory(engine, policy).session()
        session.append("The owl sat on the old oak and looked at the moon. " * 3)
        session.compact()
        generated = [token for piece in session.generate(3, Sampling()) for token in piece.token_ids]
        return session.logits(" The owl"), generated

    monkeypatch.setattr(fused, "can_attend", lambda query, value: False)
    expected = logits()
    monkeypatch.setattr(fused, "can_attend", lambda query, value: True)
    monkeypatch.setattr(partwise, "attend", None)
    actual = logits()
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-3)
    assert actual[1] == expected[1]


def test_the_kernels_compile_for_gpus_that_are_not_here() -> None:
    """By Triton's compiler instead of its interpreter; in a process of its own, as one of the two is chosen at import."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared_bytes = [int(line) for line in done.stdout.split()]
    assert len(shared_bytes) == 2 * (3 * 3 + 2 * 2)
    assert max(shared_bytes) <= 99 * 1024  # of an RTX 30 or 40, an A10 or an L40; others have more


def test_a_cpu_takes_the_other_path() -> None:
    assert not fused.can_attend(*[torch.ones(1, 2, 3, 16)] * 2)


@pytest.mark.gpu
def test_a_gpu_takes_this_path_unless_a_gradient_is_asked_for() -> None:
    query = torch.ones(1, 2, 3, 16, device="cuda", dtype=torch.bfloat16)
    assert fused.can_attend(query, query) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not fused.can_attend(query.requires_grad_(), query)
    assert not fused.can_attend(*[torch.ones(1, 2, 3, 512, device="cuda")] * 2)
    assert not fused.can_attend(*[torch.ones(1, 2, 3, 16, device="cuda", dtype=torch.float64)] * 2)
    assert not fused.can_attend(torch.ones(1, 2, 3, 16, device="cuda"), torch.ones(1, 2, 3, 8, device="cuda"))


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu() -> None:
    case = random_case([500, 0, 63], 1, 300, 2, 64, torch.bfloat16)
    expected = fused.attend(*case, SCALING)  # compiles, and puts the slots' bounds on the device
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = fused.attend(*case, SCALING)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
