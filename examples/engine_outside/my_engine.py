"""An engine of one's own, written with nothing but ktverify's README: plain torch, one expert after the other.

In this folder, `ktverify repro small --engine my_engine:Engine` judges its numbers on one case.
"""

import torch
from torch.nn.functional import linear, silu

LORA = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class Engine:
    def __init__(self, num_experts, lora_rank, lora_alpha, threadpool_count=1, method="AMXBF16_SFT", **sizes):
        if threadpool_count != 1:
            raise NotImplementedError("tensor parallelism")
        if method != "AMXBF16_SFT":
            raise NotImplementedError(f"method {method}")
        self.num_experts, self.scaling = num_experts, lora_alpha / lora_rank
        self.grad_weights = None

    def load_weights_from_tensors(self, gate_proj, up_proj, down_proj, physical_map):
        slot_of = torch.argsort(physical_map)  # logical expert -> physical slot
        self.base = [tensor.detach()[slot_of] for tensor in (gate_proj, up_proj, down_proj)]

    def init_lora_weights(self, *tensors):
        for name, tensor in zip(LORA, tensors, strict=True):
            setattr(self, name, tensor)
        self.update_lora_weights()

    def update_lora_weights(self):
        self.lora = [getattr(self, name).detach().clone() for name in LORA]

    def _expert(self, x, expert, lora):
        def projection(value, weight, a, b):
            low = linear(linear(value.to(a.dtype), a), b) * self.scaling
            return (linear(value, weight) + low).to(value.dtype)

        (gate, up, down), (gate_a, gate_b, up_a, up_b, down_a, down_b) = (w[expert] for w in self.base), lora
        h = silu(projection(x, gate, gate_a, gate_b)) * projection(x, up, up_a, up_b)
        return projection(h, down, down_a, down_b)

    def forward_sft(self, hidden_states, expert_ids, weights, save_for_backward=True):
        self.saved, output = [], torch.zeros_like(hidden_states, requires_grad=False)
        for expert in range(self.num_experts):
            rows, slots = (expert_ids == expert).nonzero(as_tuple=True)
            if len(rows):
                leaves = [hidden_states[rows], weights[rows, slots].bfloat16(), *(t[expert] for t in self.lora)]
                x, w, *lora = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                with torch.set_grad_enabled(save_for_backward):
                    y = self._expert(x, expert, lora) * w.unsqueeze(1)
                output.index_add_(0, rows, y.detach())
                self.saved.append((expert, rows, slots, y, leaves))
        self.shape = expert_ids.shape
        return output

    def backward(self, grad_output):
        grad_input = torch.zeros_like(grad_output)
        self.grad_weights = torch.zeros(self.shape)
        grad_loras = {f"grad_{name}": torch.zeros_like(t) for name, t in zip(LORA, self.lora, strict=True)}
        for expert, rows, slots, y, leaves in self.saved:
            dx, dw, *found = torch.autograd.grad(y, leaves, grad_output[rows])
            grad_input.index_add_(0, rows, dx)
            self.grad_weights[rows, slots] = dw.float()
            for name, gradient in zip(LORA, found, strict=True):
                grad_loras[f"grad_{name}"][expert] = gradient
        return grad_input, grad_loras

    def clear_sft_buffer_cache(self):
        pass
