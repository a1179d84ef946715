"""From numbers to a cause."""
