"""torch, a loop over experts, gradients by autograd: what a torch user writes.

LoRA parameters are unbound once per call instead of indexed per expert: the backward of an index makes a zero tensor
of all experts for each of them, which would make this peer several times slower than it need be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "torch loop"
HELD = 1.05
LAZY = False
BACKWARD = True
LORA = True
NEEDS = ""


class TorchLoop:
    def __init__(self, problem: BenchInputs) -> None:
        import torch

        p = problem
        self.torch = torch
        self.scaling = p.scaling
        self.names = p.lora_names
        self.gate, self.up, self.down = (p.base(name) for name in ("gate_proj", "up_proj", "down_proj"))
        t = p.tensors
        self.lora = [t[name].requires_grad_() for name in p.lora_names]
        self.x = t["hidden_states"].requires_grad_()
        self.w = t["weights"].to(torch.bfloat16).requires_grad_()
        self.ids = t["expert_ids"]
        self.grad_output = t["grad_output"]
        self.output: Any = None
        self.grads: dict[str, Any] = {}
        self.about = {"version": torch.__version__, "threads": str(torch.get_num_threads())}

    def _output(self) -> Any:
        torch = self.torch
        linear, silu, s = torch.nn.functional.linear, torch.nn.functional.silu, self.scaling
        out = torch.zeros(self.x.shape, dtype=torch.bfloat16)
        lora = [tensor.unbind(0) for tensor in self.lora]
        for expert in range(self.gate.shape[0]):
            rows, slots = (self.ids == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            ga, gb, ua, ub, da, db = (tensor[expert] for tensor in lora)
            x = self.x[rows]
            g = linear(x, self.gate[expert]) + s * linear(linear(x, ga), gb)
            u = linear(x, self.up[expert]) + s * linear(linear(x, ua), ub)
            h = silu(g) * u
            y = linear(h, self.down[expert]) + s * linear(linear(h, da), db)
            out.index_add_(0, rows, y * self.w[rows, slots].unsqueeze(1))
        return out

    def forward(self) -> None:
        with self.torch.no_grad():
            self.output = self._output()

    def forward_saving(self) -> None:
        self.output = self._output()

    def backward(self) -> None:
        wanted = [self.x, self.w, *self.lora]
        names = ["grad_input", "grad_weights", *(f"grad_{name}" for name in self.names)]
        self.grads = dict(zip(names, self.torch.autograd.grad(self.output, wanted, self.grad_output), strict=True))

    def results(self) -> dict[str, Any]:
        return {"output": self.output, **self.grads}


def load(problem: BenchInputs) -> TorchLoop:
    return TorchLoop(problem)
