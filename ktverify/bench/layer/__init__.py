"""Times of one layer: `bench layer` and `bench sweep` (measure.py, one new process for each spot) and `profile`."""
