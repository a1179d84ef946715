"""kt-kernel 0.7.2: the layer of the engine kt_kernel, without the copies that Python makes around its kernel.

The kernel is called as kt-kernel's own Python class calls it. Left out are that class's copies of inputs and results,
and the adapter's copy of the LoRA gradients. The kernel's class is named after AMX; on a CPU without AMX, kt-kernel
loads a build of the same class for that CPU. FP8 takes sizes that are multiples of 128.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

ADAPTER = Path(__file__).parents[2] / "engines" / "kt_kernel" / "adapter.py"
CODED = Path(__file__).parents[1] / "coded.py"

TITLE = "kt-kernel"
PACKAGE = "kt_kernel"
HELD = 2.15
LAZY = False
BACKWARD = True
LORA = True
NEEDS = "kt_python"
# measured: INT8 1.09, INT4 0.59 (E=16, H=2048, I=768), FP8 1.17 (E=4, H=7168, I=2048; its codes are given beside)
FORMATS = {"fp8": (8, 1.25), "int8": (8, 1.15), "int4": (4, 0.65)}


class KtKernelPeer:
    def __init__(self, inputs: BenchInputs) -> None:
        import torch

        # this interpreter has no ktverify; these modules import nothing of it
        factory = inputs.load_module(ADAPTER).KtKernel
        how: dict[str, Any] = {"chunked_prefill_size": len(inputs.tensors["hidden_states"])}
        format = inputs.options.get("format", "bf16")
        if format == "fp8":
            self.layer = inputs.load_module(CODED).layer_of(inputs, factory, format, **how)
        else:
            # its kernel makes the codes of INT8 and INT4 of the bf16 weights
            self.layer = inputs.layer(factory, method=f"AMX{format.upper()}_SFT", **how)
        self.kernel = self.layer.wrapped.moe
        ids, self.grad_output = inputs.tensors["expert_ids"], inputs.tensors["grad_output"]
        self.top_k = ids.shape[1]
        x, w = inputs.tensors["hidden_states"], inputs.tensors["weights"]
        self.made = {
            "output": torch.zeros_like(x),
            "grad_input": torch.zeros_like(x),
            **{f"grad_{name}": torch.zeros_like(inputs.tensors[name]) for name in inputs.lora_names},
            "grad_weights": torch.zeros_like(w),
        }
        self.call = (torch.tensor([len(x)], dtype=torch.int32), ids, w, x, self.made["output"])
        self.about = {"isa": str(getattr(importlib.import_module(PACKAGE), "__cpu_variant__", ""))}

    def _forward(self, save: bool) -> None:
        length, *rest = (tensor.data_ptr() for tensor in self.call)
        self.kernel.forward_sft(length, self.top_k, *rest, save)

    def forward(self) -> None:
        self._forward(False)

    def forward_saving(self) -> None:
        self._forward(True)

    def backward(self) -> None:
        made = [tensor.data_ptr() for name, tensor in self.made.items() if name != "output"]
        # then: no gradients of the base weights, nothing accumulated, scale 1
        self.kernel.backward(self.grad_output.data_ptr(), *made, 0, 0, 0, False, 1.0)

    def results(self) -> dict[str, Any]:
        return self.made


def load(inputs: BenchInputs) -> KtKernelPeer:
    return KtKernelPeer(inputs)
