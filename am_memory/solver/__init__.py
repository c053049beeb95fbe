"""Batched Attention Matching algebra (arXiv:2602.16284): tensors only; knows no model, cache or policy."""

from am_memory.solver.block import Block
from am_memory.solver.exact import ExactAttention, exact_attention, log_mass
from am_memory.solver.fit import Fit, fit, output_error
from am_memory.solver.keys import HighestAttention, KeySelection, attention_scores
from am_memory.solver.named import as_selection, parameters
from am_memory.solver.omp import OMP
from am_memory.solver.options import FitOptions

__all__ = [
    "OMP",
    "Block",
    "ExactAttention",
    "Fit",
    "FitOptions",
    "HighestAttention",
    "KeySelection",
    "as_selection",
    "attention_scores",
    "exact_attention",
    "fit",
    "log_mass",
    "output_error",
    "parameters",
]
