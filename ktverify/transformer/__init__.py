"""A decoder-only transformer to time and to count: sizes and their presets, the memory of a training step, the model.

Comes in: sizes (presets.toml, or the command's options). Goes out: counts (`sizes`, `memory`: no torch), the model
(`model`), what autograd really keeps of it (`kept`). Knows nothing of the Mixture-of-Experts engine.
"""
