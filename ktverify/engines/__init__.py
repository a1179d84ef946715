"""Engines under test: the registry that finds them by name, and one module or package per engine."""
