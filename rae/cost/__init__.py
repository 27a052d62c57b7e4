"""Cost of training and sampling: parameters, floating-point operations, memory, GPU hours."""

from rae.cost.budget import Card, Memory, Plan, optimizer_ratio, static_memory
from rae.cost.meter import Work, measure, parameters, shares, to_meta
from rae.cost.steps import Piece, Step, training_step

__all__ = [
    "Card",
    "Memory",
    "Piece",
    "Plan",
    "Step",
    "Work",
    "measure",
    "optimizer_ratio",
    "parameters",
    "shares",
    "static_memory",
    "to_meta",
    "training_step",
]
