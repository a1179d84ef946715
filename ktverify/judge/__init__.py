"""The right answer and the verdict: the oracle, the bf16 baseline, the metrics, the gates and the goldens.

Imports no engine.
"""
