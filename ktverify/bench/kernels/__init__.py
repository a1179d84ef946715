"""`bench kernels`: the constants of the engine's kernels against others, each compiled and timed in this process."""
