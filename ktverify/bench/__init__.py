"""The benchmarks: engines side by side on the shapes of shapes.toml, and the parts layer/, transformer/ and c2c/.

Each engine of `bench shapes` runs in a process of its own (host.py). The controller (measure.py) asks them in turn, and
writes a table, JSON lines and a plot to `reports/runs/<stamp>-bench/`. A new engine is one file in peers/: see
peers/native.py for its contents.
"""
