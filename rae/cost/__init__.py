"""What training and sampling cost: parameters, floating-point operations, memory, hours on a card."""

from rae.cost.budget import Card, Memory, Plan, optimizer_ratio, static_memory
from rae.cost.meter import Work, measure, on_paper, parameters, shares
from rae.cost.steps import Piece, Step, training_step

__all__ = [
    "Card",
    "Memory",
    "Piece",
    "Plan",
    "Step",
    "Work",
    "measure",
    "on_paper",
    "optimizer_ratio",
    "parameters",
    "shares",
    "static_memory",
    "training_step",
]
