"""Run an engine, or anything that may end its process, in a process of its own."""
