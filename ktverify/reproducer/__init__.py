"""A case as a folder that needs nothing of ktverify, and whether it shows there what a run said of it.

folder.py writes it, confirm.py runs those of a whole run. For whoever maintains the engine: they run one file and see
the number.
"""
