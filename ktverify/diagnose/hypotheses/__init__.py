"""Hypotheses about a defect, one family per module; `search` tries them all."""
