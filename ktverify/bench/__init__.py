"""The bench: the native engine and its peers side by side in one run, held against the machine's own ceilings.

Comes in: shapes (shapes.toml), engines (one file each in peers/). Goes out: a table, JSON lines, a plot, in
`reports/runs/<stamp>-bench/`. Each engine lives in a process of its own (host.py); the controller (measure.py) tells
them in turn to compute. An engine may be added by adding a file to peers/: see peers/native.py for what it holds.
"""
