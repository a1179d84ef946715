"""Mutants: engines that are wrong in one way each. The checks must find each one, and the diagnosis name its cause.

MUTANTS lists them; `--engine ktverify.mutants.lora:lora_scale_one` judges one. A new mutant is a class whose docstring
states what is wrong, under a decorator with its cause, the check that finds it and the gate that it exceeds there.
"""

from __future__ import annotations

from ktverify.mutants import calls, divided, dropout, hybrid, lora, numbers, quantised, routes, state, weights
from ktverify.mutants.base import MUTANTS, Mutant, Plain

__all__ = [
    "MUTANTS", "Mutant", "Plain", "calls", "divided", "dropout", "hybrid", "lora", "numbers", "quantised", "routes",
    "state", "weights",
]  # fmt: skip
