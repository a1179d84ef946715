"""What the tests of tests/bench/plan share: a small model, and descriptions of machines."""

from __future__ import annotations

from dataclasses import replace

from ktverify.bench.plan.hardware import Hardware
from ktverify.bench.plan.splits import Split
from ktverify.training.moe_model import MoeModel

ONE = Split("one process")
SMALL = MoeModel("small", 2, 8, 2, 512, 256, 1_000_000, ((512, 512),) * 4)
# two machines of two nodes whose limits are easy to divide by
TWO = Hardware(2, 2, memory=2.0**40, bandwidth=4e9, peak=4e12, network=1e9, local=2e9)
GPU = replace(TWO, machines=1, gpu_memory=2.0**36, gpu_bandwidth=1e12, gpu_peak=1e14, gpu_link=1e12)
