"""From a number to a cause: hypotheses about what an engine does wrong, tried on its tensors and ranked by evidence.

Comes in: a case, an engine's tensors and, where a hypothesis needs it, the engine itself. Goes out: a `Diagnosis`.
"""
