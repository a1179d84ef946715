"""Ten right engines that round at different points: none of them may be accused.

docs/contract.md, "Numbers", lists the points at which an engine may round to bf16. `Rounds` is Plain with a rounding at
any of them; each class below selects some, or sums in another order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ktverify.mutants.base import Gradients, Group, Matrices, Outstanding, Plain
from ktverify.spec.names import LORA_NAMES

# what an engine may round: a routing weight, an fp32 LoRA parameter, x A and its like, the LoRA term, a product with a
# base matrix, the sum of both, silu or its slope, h, dy, dg and du, w y, the sum over slots so far
POINTS = frozenset(
    ("weight", "parameter", "low", "term", "base", "sum", "silu", "slope", "h", "dy", "dg", "dx", "wy", "slots", "dw")
)
ROUNDING: dict[str, type[Rounds]] = {}


def _enter(factory: type[Rounds]) -> type[Rounds]:
    ROUNDING[factory.__name__] = factory
    return factory


def engine_of(name: str) -> str:
    """The name that `--engine` takes."""
    return f"{__name__}:{name}"


class Rounds(Plain):
    """A right engine that rounds at `points`; `work` is the type in which it computes, `parts` splits each sum."""

    fp32_sums = False
    points: ClassVar[frozenset[str]] = frozenset(("h", "dy", "dg"))
    work: ClassVar[torch.dtype] = torch.float32
    parts: ClassVar[int] = 1

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.spec.lora_dropout:
            raise NotImplementedError("lora_dropout")

    def at(self, point: str, value: Tensor) -> Tensor:
        """`value`, rounded to bf16 if the engine rounds at `point`."""
        return value.to(torch.bfloat16).to(self.work) if point in self.points else value.to(self.work)

    def operand(self, value: Tensor) -> Tensor:
        return value

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self._in_parts(a, b)

    def over_rows(self, a: Tensor, b: Tensor) -> Tensor:
        return self._in_parts(a.T, b)

    def _in_parts(self, a: Tensor, b: Tensor) -> Tensor:
        size = -(-a.shape[1] // self.parts) or 1
        if size >= a.shape[1]:
            return a @ b
        cuts = range(0, a.shape[1], size)
        return self.sum_of_parts([a[:, i : i + size] @ b[i : i + size] for i in cuts])

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = (tensor.to(self.work) for tensor in super().base_of(expert))
        return gate, up, down

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        return {name: self.at("parameter", tensor) for name, tensor in super().lora_of(expert).items()}

    def routes(self, expert_ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:  # type: ignore[override]
        return list(super().routes(expert_ids))

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        found = super().groups(hidden_states, expert_ids, weights)
        for at in found:
            at.x, at.w = at.x.to(self.work), self.at("weight", at.w)
        return found

    def low_rank(self, value: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """value Aᵀ [n, r], and s (value Aᵀ) Bᵀ."""
        low = self.at("low", self.product(value, a.T))
        return low, self.at("term", self.s * self.product(low, b.T))

    def gate_and_up(self, at: Group) -> None:
        lora = at.lora
        at.x_ga, gate = self.low_rank(at.x, lora["gate_lora_a"], lora["gate_lora_b"])
        at.x_ua, up = self.low_rank(at.x, lora["up_lora_a"], lora["up_lora_b"])
        at.g = self.at("sum", self.at("base", self.product(at.x, at.base[0].T)) + gate)
        at.u = self.at("sum", self.at("base", self.product(at.x, at.base[1].T)) + up)

    def silu(self, g: Tensor) -> Tensor:
        return self.at("silu", torch.nn.functional.silu(g))

    def expert(self, at: Group) -> None:
        self.gate_and_up(at)
        at.h = self.at("h", self.silu(at.g) * at.u)
        self.down(at)

    def down(self, at: Group) -> None:
        down, a, b = at.base[2], at.lora["down_lora_a"], at.lora["down_lora_b"]
        at.h_da, term = self.low_rank(at.h, a, b)
        base = self.at("base", self.over_parts(lambda i: self.product(at.h[:, i], down[:, i].T)))
        at.y = self.at("sum", base + term)

    def combine(self, output: Tensor, at: Group) -> None:
        output.index_add_(0, at.rows, self.at("wy", at.w * at.y).to(output.dtype))
        output.copy_(self.at("slots", output))

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        groups = self.groups(hidden_states, expert_ids, weights)
        output = torch.zeros(hidden_states.shape, dtype=self.work)
        for at in groups:
            self.expert(at)
            self.combine(output, at)
        if save:
            self.save(Outstanding(len(hidden_states), expert_ids.shape, self._lora[LORA_NAMES[0]].dtype, groups))
        return self.stored(output, torch.bfloat16)

    def routing_gradient(self, at: Group, d_out: Tensor) -> Tensor:
        return self.at("dw", (d_out.to(self.work) * at.y).sum(1)).float()

    def weighted(self, at: Group, d_out: Tensor) -> Tensor:
        return self.at("dy", at.w * d_out)

    def through_activation(self, at: Group, dh: Tensor) -> tuple[Tensor, Tensor]:
        return self.at("dg", dh * at.u * self.at("slope", self.slope(at.g))), self.at("dg", dh * self.silu(at.g))

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        a, b = at.lora["down_lora_a"], at.lora["down_lora_b"]
        dh = self.at("base", self.product(dy, at.base[2]))
        if not self.spec.lora_backward:
            return dh, {}
        dy_db, term = self.low_rank(dy, b.T, a.T)
        found = {
            "grad_down_lora_b": self.s * self.over_rows(dy, at.h_da),
            "grad_down_lora_a": self.s * self.over_rows(dy_db, at.h),
        }
        return self.at("sum", dh + term), found

    def gate_up_gradients(self, at: Group, dg: Tensor, du: Tensor) -> tuple[Tensor, Gradients]:
        lora = at.lora
        dx = self.dx_of_base(at, dg, du)
        if not self.spec.lora_backward:
            return dx, {}
        dg_gb, gate = self.low_rank(dg, lora["gate_lora_b"].T, lora["gate_lora_a"].T)
        du_ub, up = self.low_rank(du, lora["up_lora_b"].T, lora["up_lora_a"].T)
        found = {
            "grad_gate_lora_b": self.s * self.over_rows(dg, at.x_ga),
            "grad_gate_lora_a": self.s * self.over_rows(dg_gb, at.x),
            "grad_up_lora_b": self.s * self.over_rows(du, at.x_ua),
            "grad_up_lora_a": self.s * self.over_rows(du_ub, at.x),
        }
        return self.at("dx", self.at("dx", dx + gate) + up), found

    def dx_of_base(self, at: Group, dg: Tensor, du: Tensor) -> Tensor:
        """dg G + du U, two products."""
        return self.at("base", self.product(dg, at.base[0])) + self.at("base", self.product(du, at.base[1]))

    def collect(self, grad_input: Tensor, at: Group, dx: Tensor) -> None:
        grad_input.index_add_(0, at.rows, dx.to(grad_input.dtype))
        grad_input.copy_(self.at("slots", grad_input))


# ---- the ten


@_enter
class operands_and_results(Rounds):
    """fp32 arithmetic; h, dy, dg, du and every result in bf16."""

    points = frozenset(("h", "dy", "dg", "dw"))


@_enter
class results_alone(Rounds):
    """fp64 arithmetic; only results are rounded."""

    points = frozenset()
    work = torch.float64


@_enter
class everything(Rounds):
    """Every value in bf16, fp32 LoRA parameters as well; sums over slots by ascending expert."""

    points = POINTS


@_enter
class everything_backwards(Rounds):
    """Every value in bf16; sums over slots by descending expert, s folded into B and rounded with it."""

    points = POINTS

    def routes(self, expert_ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:  # type: ignore[override]
        return super().routes(expert_ids)[::-1]

    def low_rank(self, value: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        low = self.at("low", self.product(value, a.T))
        return low, self.at("term", self.product(low, self.at("term", self.s * b).T))


@_enter
class weights_before_down(Rounds):
    """w h, rounded, goes into down; sums over slots in bf16; in the backward w comes after the product with down."""

    points = frozenset(("weight", "h", "wy", "slots", "dy", "dg"))

    def combine(self, output: Tensor, at: Group) -> None:
        weighted, plain = self.at("h", at.w * at.h), at.y
        given, at.h = at.h, weighted
        self.down(at)
        output.index_add_(0, at.rows, self.at("wy", at.y))
        output.copy_(self.at("slots", output))
        at.h, at.y = given, plain
        at.h_da = self.product(at.h, at.lora["down_lora_a"].T)

    def weighted(self, at: Group, d_out: Tensor) -> Tensor:
        return d_out

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        dh, _ = super().down_gradients(at, dy)
        found = super().down_gradients(at, self.at("dy", at.w * dy))[1]
        return self.at("dy", at.w * self.at("dy", dh)), found


@_enter
class activation_of_rounded(Rounds):
    """g and u in bf16 before the activation; silu, sigma and each step of the slope in bf16; backward from those."""

    points = frozenset(("sum", "silu", "slope", "h", "dy", "dg"))

    def silu(self, g: Tensor) -> Tensor:
        return self.at("silu", g * self.at("silu", torch.sigmoid(g)))

    def slope(self, g: Tensor) -> Tensor:
        sigma = self.at("slope", torch.sigmoid(g))
        inner = self.at("slope", g * self.at("slope", 1 - sigma))
        return sigma * self.at("slope", 1 + inner)


@_enter
class parts_in_bf16(Rounds):
    """Each sum in four parts, as of four tensor-parallel ranks, each part rounded to bf16."""

    points = frozenset(("h", "dy", "dg", "sum"))
    parts = 4

    def sum_of_parts(self, parts: list[Tensor]) -> Tensor:
        return super().sum_of_parts([part.to(torch.bfloat16).to(self.work) for part in parts])


@_enter
class lora_in_bf16(Rounds):
    """LoRA in bf16: parameters, s x A (s at once), the term; the base with fp32 sums."""

    points = frozenset(("parameter", "low", "term", "h", "dy", "dg"))

    def low_rank(self, value: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        scaled = self.at("low", self.s * self.product(value, a.T))
        return scaled / self.s, self.at("term", self.product(scaled, b.T))


@_enter
class gate_and_up_at_once(Rounds):
    """gate and up in one product each way; LoRA gets h before it is rounded, dy stays fp32; w in bf16."""

    points = frozenset(("weight", "dg", "dx", "slots", "dw"))

    def gate_and_up(self, at: Group) -> None:
        super().gate_and_up(at)
        both = self.product(at.x, torch.cat(at.base[:2]).T)
        gate, up = both[:, : len(at.base[0])], both[:, len(at.base[0]) :]
        lora = at.lora
        at.g = gate + self.low_rank(at.x, lora["gate_lora_a"], lora["gate_lora_b"])[1]
        at.u = up + self.low_rank(at.x, lora["up_lora_a"], lora["up_lora_b"])[1]

    def down(self, at: Group) -> None:
        at.h_da, term = self.low_rank(at.h, at.lora["down_lora_a"], at.lora["down_lora_b"])
        at.y = self.product(at.h.to(torch.bfloat16).to(self.work), at.base[2].T) + term

    def dx_of_base(self, at: Group, dg: Tensor, du: Tensor) -> Tensor:
        return self.product(torch.cat([dg, du], 1), torch.cat(at.base[:2]))


@_enter
class h_again_in_the_backward(Rounds):
    """The backward computes g, u and h again, from bf16 g and u; the forward kept them in fp32."""

    points = frozenset(("h", "dy", "dg", "base", "wy"))

    def backward_of(self, at: Group, d_out: Tensor) -> tuple[Tensor, Gradients]:
        at.g, at.u = (value.to(torch.bfloat16).to(self.work) for value in (at.g, at.u))
        at.h = self.at("h", self.silu(at.g) * at.u)
        at.h_da = self.product(at.h, at.lora["down_lora_a"].T)
        return super().backward_of(at, d_out)
