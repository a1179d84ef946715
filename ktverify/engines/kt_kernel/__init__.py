"""kt-kernel, run by its own interpreter in a process of its own."""

ENGINE = "locate:KtKernel"
