"""Plain, the right engine that all mutants derive from, and the list of mutants.

Plain has the calls of torch_bf16 and keeps the strict limits of the native engine: bf16 operands, fp32 sums, one
rounding of each result. Each step of the layer is a method; a mutant overrides only the step that it gets wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.engines.quantised import CodedMatrix, check_codes
from ktverify.engines.torch_bf16 import TorchBf16
from ktverify.judge.reference import routed, zeros
from ktverify.spec.names import BASE_NAMES, GRAD_NAMES, LORA_NAMES

Matrices = tuple[Tensor, Tensor, Tensor]
Gradients = dict[str, Tensor]


@dataclass
class Group:
    """One expert's n rows in one call, and what its forward saves for its backward; all fp32 except rows and slots.

    rows, slots [n]; x [n, H]; w [n, 1]; base: gate, up [I, H], down [H, I]; lora: six by LORA_NAMES, of this expert;
    masks: of dropout, for LoRA's input of "gate" and "up" [n, H] and "down" [n, I]; empty where nothing is dropped;
    x_ga, x_ua, h_da [n, r]; g, u, h [n, I]; y [n, H].
    """

    expert: int
    rows: Tensor
    slots: Tensor
    x: Tensor
    w: Tensor
    base: Matrices
    lora: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    x_ga: Tensor = field(init=False)
    x_ua: Tensor = field(init=False)
    h_da: Tensor = field(init=False)
    g: Tensor = field(init=False)
    u: Tensor = field(init=False)
    h: Tensor = field(init=False)
    y: Tensor = field(init=False)


@dataclass
class Outstanding:
    """A saved forward. rows: T; slots: the shape [T, k] of its weights."""

    rows: int
    slots: torch.Size
    lora_dtype: torch.dtype
    groups: list[Group]


class Plain(TorchBf16):
    """A right engine. Sums over I are split by threadpool_count; cpuinfer_threads has no effect."""

    fp32_sums = True
    formats = ("bf16", "fp8", "int8", "int4", "mxfp4")
    takes_mask = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.s = self.scale()

    def scale(self) -> float:
        """s = lora_alpha / lora_rank."""
        return self.spec.scaling

    # ---- roundings and sums

    def operand(self, value: Tensor) -> Tensor:
        """An operand of a matrix product: rounded to bf16."""
        return value.to(torch.bfloat16).float()

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A complete fp32 sum, rounded to the dtype of its result."""
        return value.to(dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [n, K] times b [K, m]; all sums over H, I or r."""
        return a @ b

    def over_rows(self, a: Tensor, b: Tensor) -> Tensor:
        """aᵀ b of a [n, p], b [n, q]; all sums over the rows of an expert."""
        return a.T @ b

    def over_parts(self, term: Callable[[slice], Tensor]) -> Tensor:
        """The sum of `term` over the tensor-parallel parts of I."""
        size = self.spec.moe_intermediate_size // self.spec.threadpool_count
        parts = [slice(begin, begin + size) for begin in range(0, self.spec.moe_intermediate_size, size)]
        return self.sum_of_parts([term(part) for part in parts])

    def sum_of_parts(self, parts: list[Tensor]) -> Tensor:
        return functools.reduce(torch.add, parts)

    # ---- quantised base weights

    def load_weights_from_tensors(self, *given: Any, **named: Any) -> None:
        if self.spec.weight_format != "bf16":
            given, named = self._as_bf16(*given, **named), {}
        super().load_weights_from_tensors(*given, **named)

    def _as_bf16(
        self,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        physical_map: Tensor,
        scales: Sequence[Tensor] | None = None,
        zero_points: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        found = check_codes(self.spec, (gate_proj, up_proj, down_proj), scales, zero_points)
        made = [torch.stack([self.weight(name, of) for of in found.of_slots(name)]) for name in BASE_NAMES]
        return *made, physical_map

    def q(self, of: CodedMatrix) -> Tensor:
        """q, less the zero point, of one expert's matrix: fp32 [N, K]."""
        return of.q()

    def code_scale(self, name: str, of: CodedMatrix) -> Tensor:
        """The scales of the weights of one expert's matrix `name`, fp32: [N, K], or [N, 1] for one of each row."""
        return of.scale()

    def weight(self, name: str, of: CodedMatrix) -> Tensor:
        """bf16 [N, K] of one expert's matrix `name`."""
        return (self.q(of) * self.code_scale(name, of)).to(torch.bfloat16)

    # ---- experts on another device

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        """The ids [T, k] of the slots of each side, this one's first; -1 for a slot of the other."""
        if not self.spec.num_gpu_experts:
            return [expert_ids]
        there = torch.isin(expert_ids, torch.tensor(self.spec.gpu_experts))
        return [torch.where(there, -1, expert_ids), torch.where(there, expert_ids, -1)]

    def there(self, expert: int) -> bool:
        """Whether the other device computes this expert."""
        return expert in self.spec.gpu_experts

    def set_gpu_experts_mask(self, gpu_experts_mask: Any) -> None:
        self.spec = replace(self.spec, num_gpu_experts=0, gpu_experts_mask=gpu_experts_mask)
        self.update_lora_weights()

    # ---- routing and weights

    def routes(self, expert_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, rows, slots) of every expert with a token."""
        return routed(expert_ids)

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = (tensor[self._slot_of[expert]].float() for tensor in self._base)
        return gate, up, down

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        return {name: self._lora[name][expert].float() for name in LORA_NAMES}

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        groups = []
        for expert, rows, slots in self.routes(expert_ids):
            x, w = hidden_states[rows].float(), weights[rows, slots].unsqueeze(1)
            groups.append(Group(expert, rows, slots, x, w, self.base_of(expert), self.lora_of(expert)))
        return groups

    # ---- dropout

    def drawn(self, at: Group) -> dict[str, Tensor]:
        """The masks of one expert's rows in a training forward."""
        found = zip(("gate", "up", "down"), self._masks(len(at.rows)), strict=True)
        return {name: mask for name, mask in found if mask is not None}

    def lora_input(self, at: Group, name: str, value: Tensor) -> Tensor:
        """What the LoRA of "gate", "up" or "down" gets instead of `value`."""
        return self.operand(value * at.masks[name]) if at.masks else value

    def through_dropout(self, at: Group, name: str, gradient: Tensor) -> Tensor:
        """The gradient of `value` in lora_input."""
        return gradient * at.masks[name] if at.masks else gradient

    # ---- forward

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        return torch.nn.functional.silu(g) * u

    def gate_and_up(self, at: Group) -> None:
        gate, up, _ = at.base
        at.x_ga = self.product(self.lora_input(at, "gate", at.x), at.lora["gate_lora_a"].T)
        at.x_ua = self.product(self.lora_input(at, "up", at.x), at.lora["up_lora_a"].T)
        at.g = self.product(at.x, gate.T) + self.s * self.product(at.x_ga, at.lora["gate_lora_b"].T)
        at.u = self.product(at.x, up.T) + self.s * self.product(at.x_ua, at.lora["up_lora_b"].T)

    def down(self, at: Group) -> None:
        down, a, b = at.base[2], at.lora["down_lora_a"], at.lora["down_lora_b"]
        h = self.lora_input(at, "down", at.h)
        at.h_da = self.over_parts(lambda i: self.product(h[:, i], a[:, i].T))
        at.y = self.over_parts(lambda i: self.product(at.h[:, i], down[:, i].T)) + self.down_lora(at, b)

    def down_lora(self, at: Group, b: Tensor) -> Tensor:
        return self.s * self.product(at.h_da, b.T)

    def expert(self, at: Group) -> None:
        """y of x."""
        self.gate_and_up(at)
        at.h = self.operand(self.activation(at.g, at.u))
        self.down(at)

    def combine(self, output: Tensor, at: Group) -> None:
        """output [T, H] fp32 += w y."""
        output.index_add_(0, at.rows, at.w * at.y)

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        groups = [at for ids in self.sides(expert_ids) for at in self.groups(hidden_states, ids, weights)]
        output = torch.zeros(hidden_states.shape)
        for at in groups:
            at.masks = self.drawn(at) if save else {}
            self.expert(at)
            self.combine(output, at)
        if save:
            self.save(Outstanding(len(hidden_states), expert_ids.shape, self._lora[LORA_NAMES[0]].dtype, groups))
        return self.stored(output, torch.bfloat16)

    def save(self, saved: Outstanding) -> None:
        self._saved.append(saved)  # type: ignore[arg-type]  # the backward of the parent reads only rows

    # ---- backward

    def routing_gradient(self, at: Group, d_out: Tensor) -> Tensor:
        """dw [n] of the upstream gradient's rows d_out [n, H]."""
        return (d_out * at.y).sum(1)

    def weighted(self, at: Group, d_out: Tensor) -> Tensor:
        """dy [n, H] = w dO."""
        return self.operand(at.w * d_out)

    def slope(self, g: Tensor) -> Tensor:
        """silu'(g)."""
        sigma = torch.sigmoid(g)
        return sigma * (1 + g * (1 - sigma))

    def through_activation(self, at: Group, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dg, du [n, I]."""
        return self.operand(dh * at.u * self.slope(at.g)), self.operand(dh * torch.nn.functional.silu(at.g))

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        """dh [n, I] of dy [n, H], and the gradients of down's LoRA."""
        dh = self.product(dy, at.base[2])
        if not self.spec.lora_backward:
            return dh, {}
        dy_db = self.product(dy, at.lora["down_lora_b"])
        found = {
            "grad_down_lora_b": self.s * self.over_rows(dy, at.h_da),
            "grad_down_lora_a": self.s * self.over_rows(dy_db, self.lora_input(at, "down", at.h)),
        }
        low = self.through_dropout(at, "down", self.product(dy_db, at.lora["down_lora_a"]))
        return dh + self.s * low, found

    def gate_up_gradients(self, at: Group, dg: Tensor, du: Tensor) -> tuple[Tensor, Gradients]:
        """dx [n, H] of dg and du [n, I], and the gradients of gate's and up's LoRA."""
        gate, up, _ = at.base
        dx = self.over_parts(lambda i: self.product(dg[:, i], gate[i]) + self.product(du[:, i], up[i]))
        if not self.spec.lora_backward:
            return dx, {}
        dg_gb = self.over_parts(lambda i: self.product(dg[:, i], at.lora["gate_lora_b"][i]))
        du_ub = self.over_parts(lambda i: self.product(du[:, i], at.lora["up_lora_b"][i]))
        found = {
            "grad_gate_lora_b": self.s * self.over_rows(dg, at.x_ga),
            "grad_gate_lora_a": self.s * self.over_rows(dg_gb, self.lora_input(at, "gate", at.x)),
            "grad_up_lora_b": self.s * self.over_rows(du, at.x_ua),
            "grad_up_lora_a": self.s * self.over_rows(du_ub, self.lora_input(at, "up", at.x)),
        }
        gate_low = self.through_dropout(at, "gate", self.product(dg_gb, at.lora["gate_lora_a"]))
        up_low = self.through_dropout(at, "up", self.product(du_ub, at.lora["up_lora_a"]))
        return dx + self.s * (gate_low + up_low), found

    def backward_of(self, at: Group, d_out: Tensor) -> tuple[Tensor, Gradients]:
        """dx [n, H] and the six gradients of one expert."""
        dh, found = self.down_gradients(at, self.weighted(at, d_out))
        dx, more = self.gate_up_gradients(at, *self.through_activation(at, dh))
        return dx, self.lora_gradients({**found, **more}) if found else {}

    def lora_gradients(self, found: Gradients) -> Gradients:
        """The six gradients of one expert, fp32, before they are stored."""
        return found

    def collect(self, grad_input: Tensor, at: Group, dx: Tensor) -> None:
        """grad_input [T, H] fp32 += dx."""
        grad_input.index_add_(0, at.rows, dx)

    def empty_gradients(self, saved: Outstanding) -> Gradients:
        return {f"grad_{name}": zeros(shape, saved.lora_dtype) for name, shape in self.spec.lora_shapes.items()}

    def keep(self, gradients: Gradients, at: Group, found: Gradients) -> None:
        """Store the gradients of one expert."""
        for name, gradient in found.items():
            gradients[name][at.expert] = self.stored(gradient, gradients[name].dtype)

    def finish(self, gradients: Gradients, grad_weights: Tensor) -> None:
        """Called once at the end of a backward; sets grad_weights [T, k]."""
        self.grad_weights = grad_weights

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        grad_input, grad_weights = torch.zeros(grad_output.shape), torch.zeros(saved.slots)
        gradients = self.empty_gradients(saved)
        for at in saved.groups:
            d_out = grad_output[at.rows].float()
            grad_weights[at.rows, at.slots] = self.routing_gradient(at, d_out)
            dx, found = self.backward_of(at, d_out)
            self.collect(grad_input, at, dx)
            self.keep(gradients, at, found)
        self.finish(gradients, grad_weights)
        return self.stored(grad_input, torch.bfloat16), {name: gradients[name] for name in GRAD_NAMES}


# ---- the list of mutants


@dataclass(frozen=True)
class Mutant:
    """An engine that is wrong in one way.

    what: one sentence on it. check: the id of the check that must find it, like forward/small, and gate: the gate that
    it exceeds there.
    """

    name: str
    what: str
    cause: Cause
    check: str
    gate: str
    factory: type[Plain]

    @property
    def engine(self) -> str:
        """The name that `--engine` takes."""
        return f"{self.factory.__module__}:{self.name}"


MUTANTS: dict[str, Mutant] = {}


def mutant(cause: Cause, check: str, gate: str = "rel_l2") -> Callable[[type[Plain]], type[Plain]]:
    """Enter a class into MUTANTS. ValueError for a name that is taken, or a class without a docstring."""

    def enter(factory: type[Plain]) -> type[Plain]:
        name, what = factory.__name__, " ".join((factory.__doc__ or "").split())
        if name in MUTANTS or not what:
            raise ValueError(f"mutant {name}: it takes a name of its own and a docstring that says what is wrong")
        MUTANTS[name] = Mutant(name, what, cause, check, gate, factory)
        return factory

    return enter
