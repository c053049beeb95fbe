"""Key selection by orthogonal matching pursuit on the attention mass (arXiv:2602.16284, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.errors import InvalidInput
from am_memory.solver.block import LOG2_E, Block
from am_memory.solver.exact import unnormalised_weights
from am_memory.solver.gram import GRAM_PANEL
from am_memory.solver.keys import repeat_first_in_padding

DEPENDENT_ENERGY = 1e-6
"""A column with a smaller share of its energy outside the span of the picks counts as dependent on them: the rest
cannot be told from the rounding of float32 Gram entries."""
MAX_GRAM_ELEMENTS = 2**28
"""Elements of the (heads, seq_len, seq_len) Gram matrices held at once: 1 GiB of float32."""


@dataclass(frozen=True)
class OMP:
    """Greedily picks the key whose column correlates most with the unexplained mass, refits the weights, and repeats.

    The column of key j is exp(logit_ij - shift_i) over the queries i; the target is the sum of all columns. A pivoted
    Cholesky factor of the Gram matrix grows by one row per pick. It replaces the least-squares refit after each pick:
    the picks are the same, at the cost of one matrix-vector product. As in the official code, negative weights count as
    0 in the unexplained mass. Unlike there, fewer refits save little.

    Attributes:
        picks_per_step: keys picked from one set of correlations; 1 is exact.
        refit_interval: steps between refits; 1 is exact. Correlations change only with a refit.
        first_steps: tuples (num_keys, picks_per_step, refit_interval) that apply until num_keys are picked.
        relative_mass: shift each query's logits by its log mass (see `FitOptions`). False: by its largest logit, as in
            the paper, which leaves a smaller mass error (docs/benchmarks/speed.md).
    """

    picks_per_step: int = 1
    refit_interval: int = 1
    first_steps: tuple[tuple[int, int, int], ...] = ()
    relative_mass: bool = False
    name: str = "omp"

    def __post_init__(self) -> None:
        numbers = (self.picks_per_step, self.refit_interval, *(number for step in self.first_steps for number in step))
        if min(numbers) < 1:
            raise InvalidInput(f"{self}: picks, steps and numbers of keys must be at least 1")

    @classmethod
    def fast(cls) -> OMP:
        """The paper's schedule: one pick per refit to 300 keys, 2 x 2 to 1500, then 2 x 4."""
        return cls(picks_per_step=4, refit_interval=2, first_steps=((300, 1, 1), (1500, 2, 2)), name="omp_fast")

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        max_slots = int(num_slots.max())
        group = max(1, MAX_GRAM_ELEMENTS // block.seq_len**2)
        rankings = []
        for start in range(0, block.num_heads, group):
            heads = [block.head(index) for index in range(start, min(start + group, block.num_heads))]
            pursuit = _Pursuit(*mass_system(heads, self.relative_mass), max_slots)
            while pursuit.num_picks < max_slots:
                pursuit.pick(min(self.picks_before_refit(pursuit.num_picks), max_slots - pursuit.num_picks))
            rankings.append(pursuit.ranking(scores[start : start + group]))
        return repeat_first_in_padding(torch.cat(rankings)[:, :max_slots], num_slots)

    def picks_before_refit(self, num_chosen: int) -> int:
        """Keys picked from one set of correlations, when num_chosen are picked already."""
        for num_keys, picks_per_step, refit_interval in self.first_steps:
            if num_chosen < num_keys:
                return picks_per_step * refit_interval
        return self.picks_per_step * self.refit_interval


def mass_system(heads: list[Block], is_relative: bool) -> tuple[Tensor, Tensor]:
    """Gram matrix (B, seq_len, seq_len) float32 of the mass columns, and their products (B, seq_len) with the mass."""
    seq_len, device = heads[0].seq_len, heads[0].key.device
    gram = torch.zeros(len(heads), seq_len, seq_len, device=device)
    target = torch.zeros(len(heads), seq_len, device=device)
    for index, head in enumerate(heads):
        for rows, weight, total, top in unnormalised_weights(head):
            column, mass = weight[0], total[0]  # (chunk, seq_len), (chunk,)
            if is_relative:
                column /= mass[:, None]
                mass = torch.ones_like(mass)
            if head.log_mass is not None:
                share = (top[0] + total[0].log2() - head.log_mass[0, rows] * LOG2_E).exp2_()
                column *= share[:, None]
                mass = mass * share
            target[index].addmv_(column.T, mass)
            for start in range(0, seq_len, GRAM_PANEL):
                panel = slice(start, start + GRAM_PANEL)
                gram[index, panel, start:].addmm_(column[:, panel].T, column[:, start:])
    return gram.triu_() + gram.triu(1).mT, target


class _Pursuit:
    """The state of a pursuit in a batch of heads. Row or entry p of its tensors belongs to pick p of each head.

    Attributes:
        gram: (B, seq_len, seq_len) float32.
        picks: (B, max_picks) int64, indices of the picked keys.
        is_pick: (B, max_picks) bool, False if no independent key was left to pick.
        factor: (B, max_picks, seq_len) float64, rows of a pivoted Cholesky factor of gram: products of all columns with
            the pick's column, after its part in the span of the earlier picks is removed and the rest normalised.
        inverse: (B, max_picks, max_picks) float64, upper triangular: the inverse of the factor's columns at the picks.
        weight: (B, max_picks) float64, least-squares weights of the picks.
        correlation: (B, seq_len) float64, product of each column with the unexplained mass.
        free_energy: (B, seq_len) float64, squared norm of each column outside the span of the picks.
    """

    def __init__(self, gram: Tensor, target: Tensor, max_picks: int) -> None:
        num_heads, seq_len = target.shape
        self.gram = gram
        self.correlation = target.double()
        self.free_energy = gram.diagonal(dim1=1, dim2=2).double()
        self.threshold = DEPENDENT_ENERGY * self.free_energy
        self.picks = torch.zeros(num_heads, max_picks, dtype=torch.int64, device=gram.device)
        self.is_pick = torch.zeros(num_heads, max_picks, dtype=torch.bool, device=gram.device)
        self.factor = self.correlation.new_empty(num_heads, max_picks, seq_len)
        self.inverse = self.correlation.new_zeros(num_heads, max_picks, max_picks)
        self.weight = self.correlation.new_zeros(num_heads, max_picks)
        self.num_picks = 0

    def pick(self, count: int) -> None:
        """Pick the `count` keys of the largest correlation, then update the state for each of them."""
        is_candidate = self.free_energy > self.threshold  # False for picks: they lie in the span
        ranked = self._clamped_correlation().masked_fill(~is_candidate, -torch.inf)
        picks = ranked.topk(count, dim=1).indices  # (B, count)
        is_pick = is_candidate.gather(1, picks)
        rows = self._rows_outside_span(picks)
        for position in range(count):
            row = self._append(rows[:, position], picks[:, position, None], is_pick[:, position, None])
            later = row.gather(1, picks[:, position + 1 :])
            rows[:, position + 1 :] -= later[:, :, None] * row[:, None]

    def _clamped_correlation(self) -> Tensor:
        """(B, seq_len): correlations with the unexplained mass, when negative weights count as 0."""
        surplus = self.weight[:, : self.num_picks].clamp_max(0.0)
        num_negative = int((surplus < 0).sum(1).max()) if self.num_picks else 0
        if num_negative == 0:
            return self.correlation
        lowest = surplus.topk(num_negative, dim=1, largest=False)
        rows = self._gram_rows(self.picks.gather(1, lowest.indices))
        return self.correlation + torch.bmm(lowest.values[:, None], rows)[:, 0]

    def _gram_rows(self, indices: Tensor) -> Tensor:
        """(B, count, seq_len) float64."""
        return self.gram.gather(1, indices[:, :, None].expand(-1, -1, self.gram.shape[1])).double()

    def _rows_outside_span(self, picks: Tensor) -> Tensor:
        """(B, count, seq_len): rows of the Gram matrix, without the part that the earlier picks explain."""
        factor = self.factor[:, : self.num_picks]
        known = factor.gather(2, picks[:, None].expand(-1, self.num_picks, -1))  # (B, num_picks, count)
        return self._gram_rows(picks).baddbmm_(known.mT, factor, alpha=-1)

    def _append(self, row: Tensor, pick: Tensor, is_pick: Tensor) -> Tensor:
        """Add one pick to the state.

        A pick that depends on the earlier ones gets a weight of 0 and changes nothing else.

        Args:
            row: (B, seq_len), its row outside the span of the earlier picks.
            pick, is_pick: (B, 1).

        Returns:
            (B, seq_len), the normalised row.
        """
        num_picks = self.num_picks
        pivot = row.gather(1, pick)
        is_independent = is_pick & (pivot > self.threshold.gather(1, pick))
        scale = torch.where(is_independent, pivot, torch.inf).rsqrt()  # (B, 1)
        explained = self.correlation.gather(1, pick) * scale

        known = self.factor[:, :num_picks].gather(2, pick[:, None].expand(-1, num_picks, -1))  # (B, num_picks, 1)
        column = torch.bmm(self.inverse[:, :num_picks, :num_picks], known)[:, :, 0]
        self.inverse[:, :num_picks, num_picks] = -scale * column
        self.inverse[:, num_picks, num_picks] = scale[:, 0]
        self.weight[:, : num_picks + 1] += explained * self.inverse[:, : num_picks + 1, num_picks]

        row = torch.mul(row, scale, out=self.factor[:, num_picks])
        self.correlation.addcmul_(row, explained, value=-1)
        self.free_energy.addcmul_(row, row, value=-1)
        self.picks[:, num_picks] = pick[:, 0]
        self.is_pick[:, num_picks] = is_pick[:, 0]
        self.num_picks += 1
        return row

    def ranking(self, scores: Tensor) -> Tensor:
        """(B, seq_len) int64: the picks in their order, then the other keys by score."""
        by_score = torch.sort(scores, dim=1, descending=True, stable=True).indices
        order = torch.full_like(by_score, self.num_picks)
        position = torch.arange(self.num_picks, device=order.device).expand_as(self.picks)
        order.scatter_reduce_(1, self.picks, torch.where(self.is_pick, position, self.num_picks), "amin")
        return by_score.gather(1, torch.sort(order.gather(1, by_score), dim=1, stable=True).indices)
