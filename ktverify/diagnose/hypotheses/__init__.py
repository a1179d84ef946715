"""Hypotheses about a defect, one module per kind; `search.FAMILIES` lists them."""
