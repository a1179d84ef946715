"""A run on disk: its records as JSON lines, its directory, and files that appear whole or not at all."""
