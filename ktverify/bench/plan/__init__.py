"""What a model needs before anyone loads it: memory of each process, step time of its MoE layers, and which split fits.

Input: MoeModel (training/moe_model.py), Hardware, and measured efficiencies. docs/plan.md has every formula.
"""
