"""Goldens: the oracle's answers to the catalogue, kept in golden/ so that a run need not compute them.

`load(case)` gives a `Golden` to compare an engine's tensors with; `python -m ktverify.golden regenerate` makes them.
"""

from __future__ import annotations

from ktverify.golden.store import Drift, Golden, NoGolden, golden_dir, has, load, load_full, regenerate

__all__ = ["Drift", "Golden", "NoGolden", "golden_dir", "has", "load", "load_full", "regenerate"]
