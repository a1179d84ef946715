"""The right answer and the verdict: the oracle, the errors of rounding, the metrics, the gates and the goldens.

Imports no engine.
"""
