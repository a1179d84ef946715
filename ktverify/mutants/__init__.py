"""Engines that are wrong in one way each, on top of a right one: what the suite has to find, and the diagnosis to name.

MUTANTS lists them; `--engine ktverify.mutants.lora:lora_scale_one` judges one. A new one is a class with a docstring
that says what is wrong, under a line that says which cause it has, which check finds it and by which gate.
"""

from __future__ import annotations

from ktverify.mutants import lora, numbers, routes, state, weights
from ktverify.mutants.base import Plain
from ktverify.mutants.registry import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "Plain", "lora", "numbers", "routes", "state", "weights"]
