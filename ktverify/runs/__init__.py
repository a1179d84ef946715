"""Records of runs, and how they are written to disk and read back."""
