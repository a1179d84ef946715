"""The command line: `main` and one module per command. Light: help imports no torch."""
