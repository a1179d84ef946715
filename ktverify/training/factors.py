"""peft's LoRA of the experts, and the six tensors that the engine takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional

from ktverify.engines.argument_checks import LayerSpec


@dataclass(frozen=True)
class Factors:
    """peft's LoRA of one stacked parameter: a [E r, in], b [out, r E] (expert index fastest); delta = scaling B A.

    turned: as peft before 0.19 has them, a [E r, out], b [in, r E], delta = scaling (B A)ᵀ.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    turned: bool = False

    def of_experts(self, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a [E, r, in], b [E, out, r], differentiable, on the CPU."""
        a, b = self.a.cpu(), self.b.cpu()
        a, b = a.reshape(num_experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)
        return (b.transpose(1, 2), a.transpose(1, 2)) if self.turned else (a, b)

    def part(self, num_experts: int, experts: range) -> Factors:
        """The factors of some of `num_experts` experts, as new tensors."""
        own = slice(experts.start, experts.stop)
        a = self.a.detach().reshape(num_experts, -1, self.a.shape[-1])[own].flatten(0, 1)
        b = self.b.detach().reshape(self.b.shape[0], -1, num_experts)[..., own].flatten(1)
        return replace(self, a=a.clone(), b=b.clone())


class Adapter(Protocol):
    """LoRA of one parameter. factors: its Factors, None while it is disabled; held: its Factors in any case; attached:
    those of all its adapters, active or not."""

    @property
    def parameter_name(self) -> str: ...
    def factors(self) -> Factors | None: ...
    def held(self) -> Factors | None: ...
    def attached(self) -> list[Factors]: ...


def rank_of(factors: Iterable[Factors], num_experts: int) -> int:
    """The largest rank; 1 without any."""
    return max((f.a.shape[0] // num_experts for f in factors), default=1)


def dtype_of(factors: Iterable[Factors]) -> torch.dtype:
    """bf16 where all factors have it, else fp32."""
    bf16 = all(f.a.dtype == f.b.dtype == torch.bfloat16 for f in factors)
    return torch.bfloat16 if bf16 else torch.float32


def engine_lora(factors: dict[str, Factors], spec: LayerSpec, dtype: torch.dtype) -> list[torch.Tensor]:
    """The six tensors in the order of LORA_NAMES, differentiable with respect to the factors; [] without any.

    gate and up share the A of their stacked parameter. A smaller rank than the engine's is padded with zeros; of
    another scaling, B contains the ratio.
    """
    if not factors:
        return []
    experts, hidden, intermediate = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    sizes = {"gate_up_proj": (hidden, 2 * intermediate), "down_proj": (intermediate, hidden)}
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, (inputs, outputs) in sizes.items():
        if (given := factors.get(name)) is None:
            pairs[name] = (
                torch.zeros(experts, spec.lora_rank, inputs, dtype=dtype, device="cpu"),
                torch.zeros(experts, outputs, spec.lora_rank, dtype=dtype, device="cpu"),
            )
            continue
        a, b = given.of_experts(experts)
        ratio = given.scaling / spec.scaling
        a, b = a.to(dtype), (b if abs(ratio - 1) < 1e-6 else b.float() * ratio).to(dtype)
        missing = spec.lora_rank - a.shape[1]
        pairs[name] = (functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))) if missing else (a, b)
    (a, b), (down_a, down_b) = pairs["gate_up_proj"], pairs["down_proj"]
    return [a, b[:, :intermediate], a, b[:, intermediate:], down_a, down_b]
