"""torch.nn.functional.grouped_mm over the sorted rows, gradients by autograd; gate and up in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "torch grouped_mm"
HELD = 1.05
LAZY = False
BACKWARD = True
LORA = True
NEEDS = ""


class TorchGroupedMmPeer:
    def __init__(self, problem: BenchInputs) -> None:
        import torch

        p = problem
        self.torch = torch
        self.scaling, self.top_k, self.experts = p.scaling, p.top_k, p.num_experts
        self.names = p.lora_names
        t = p.tensors
        self.gate_up = torch.cat([t["gate_proj"], t["up_proj"]], dim=1)
        self.down = p.base("down_proj")
        self.lora = [t[name].requires_grad_() for name in p.lora_names]
        self.x = t["hidden_states"].requires_grad_()
        self.w = t["weights"].to(torch.bfloat16).requires_grad_()
        self.ids = t["expert_ids"]
        self.grad_output = t["grad_output"]
        self.output: Any = None
        self.grads: dict[str, Any] = {}
        self.about = {"version": torch.__version__, "threads": str(torch.get_num_threads())}

    def _output(self) -> Any:
        torch, s = self.torch, self.scaling
        ids, order = torch.sort(self.ids.reshape(-1))
        token = order // self.top_k
        ends = torch.cumsum(torch.bincount(ids, minlength=self.experts), 0).int()

        def product(x: Any, weight: Any) -> Any:
            return torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)

        ga, gb, ua, ub, da, db = self.lora
        x = self.x[token]
        g, u = product(x, self.gate_up).chunk(2, -1)
        g = g + s * product(product(x, ga), gb)
        u = u + s * product(product(x, ua), ub)
        h = torch.nn.functional.silu(g) * u
        y = product(h, self.down) + s * product(product(h, da), db)
        out = torch.zeros(self.x.shape, dtype=torch.bfloat16)
        return out.index_add_(0, token, y * self.w.reshape(-1)[order].unsqueeze(1))

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


def load(problem: BenchInputs) -> TorchGroupedMmPeer:
    return TorchGroupedMmPeer(problem)
