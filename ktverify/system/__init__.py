"""The machine: processors, memory, clock, and where the checkout and optional peers are."""
