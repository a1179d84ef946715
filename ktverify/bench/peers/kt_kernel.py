"""kt-kernel 0.7.2: its bf16 fine-tuning class, called as its Python wrapper calls it, without the wrapper's copies.

The class is named for AMX; on a CPU without it, kt-kernel loads a build of the same class for that CPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "kt-kernel"
HELD = 2.15
LAZY = False
BACKWARD = True
LORA = True
NEEDS = "kt_python"
SHORTEST = 32  # tokens that its buffers must have room for


class KtKernelPeer:
    def __init__(self, problem: BenchInputs) -> None:
        import torch

        p = problem
        package: Any = importlib.import_module("kt_kernel")
        extension = package.kt_kernel_ext
        pool = extension.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [p.threads]
        self.workers = extension.CPUInfer(pool)
        config = extension.moe.MOESFTConfig(p.num_experts, p.top_k, p.hidden, p.intermediate)
        config.max_len = max(p.qlen, SHORTEST)
        config.max_cache_depth = 1
        config.layer_idx = 0
        config.lora_rank = p.rank
        config.lora_alpha = p.alpha
        config.full_weight_grad = False
        config.authoritative_optimizer_grads = True
        config.share_backward_bb = False
        config.share_cache_pool = False
        self.map = torch.arange(p.num_experts, dtype=torch.int64)
        config.physical_to_logical_map = self.map.data_ptr()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(config, name, p.tensors[name].data_ptr())
        self.lora = {name: p.tensors[name] for name in p.lora_names}
        for name, tensor in self.lora.items():
            setattr(config, name, tensor.data_ptr())
        config.pool = self.workers.backend_
        self.moe = extension.moe.AMXBF16_SFT_MOE(config)
        self.moe.load_weights()

        self.top_k = p.top_k
        self.qlen = torch.tensor([p.qlen], dtype=torch.int32)
        self.x, self.ids, self.w = (p.tensors[name] for name in ("hidden_states", "expert_ids", "weights"))
        self.grad_output = p.tensors["grad_output"]
        self.made = {
            "output": torch.zeros_like(self.x),
            "grad_input": torch.zeros_like(self.x),
            **{f"grad_{name}": torch.zeros_like(tensor) for name, tensor in self.lora.items()},
            "grad_weights": torch.zeros_like(self.w),
        }
        self.about = {
            "version": importlib.metadata.version("kt-kernel"),
            "isa": str(getattr(package, "__cpu_variant__", "")),
            "threads": str(p.threads),
        }

    def _forward(self, save: bool) -> None:
        call = (self.qlen, self.ids, self.w, self.x, self.made["output"])
        length, ids, w, x, output = (tensor.data_ptr() for tensor in call)
        self.moe.forward_sft(length, self.top_k, ids, w, x, output, save)

    def forward(self) -> None:
        self._forward(False)

    def forward_saving(self) -> None:
        self._forward(True)

    def backward(self) -> None:
        made = self.made
        lora = [made[f"grad_{name}"].data_ptr() for name in self.lora]
        # then: no gradients of the base weights, nothing accumulated, scale 1
        self.moe.backward(
            self.grad_output.data_ptr(),
            made["grad_input"].data_ptr(),
            *lora,
            made["grad_weights"].data_ptr(),
            0,
            0,
            0,
            False,
            1.0,
        )

    def results(self) -> dict[str, Any]:
        return self.made


def load(problem: BenchInputs) -> KtKernelPeer:
    return KtKernelPeer(problem)
