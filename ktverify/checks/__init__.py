"""What is checked of an engine: one registry, used by pytest, `verify`, `repro`, `mutants`, `clean` and `diagnose`."""
