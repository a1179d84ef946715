"""The layer as a table with one formula per stage, and a defect as a substitution in that table.

FORMULAS maps each stage of docs/contract.md, "The layer", to a formula: a function from the values of one expert to
one tensor. It is evaluated from top to bottom. A defect is a `Change`: a dict from stages (or leaves, which are the
inputs) to other formulas. `{"dsilu": lambda v: v["sigma"]}` is an engine whose derivative of silu lacks a term;
`LayerValues.changed` evaluates that stage and those that depend on it, and returns what such an engine computes. The
dependences are found by running the formulas. The judge is judge/reference.py; a test compares both.

Shapes per expert of n rows, all fp64: x, d_out [n, H]; w [n, 1]; gate, up [I, H]; down [H, I]; LoRA ga, ua [r, H],
gb, ub [I, r], da [r, I], db [H, r]; s a scalar; g, u, h, dh, dg, du [n, I]; y, dy, dx [n, H].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ktverify.judge.reference import routed, zeros
from ktverify.spec.cases import tensors_of
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import ALL_TENSORS, BASE_NAMES, GRAD_INPUT, GRAD_WEIGHTS, LORA_NAMES, OUTPUT, TOKEN_TENSORS

DTYPE = torch.float64
# leaf -> name of the input
MATRICES = dict(zip(("gate", "up", "down", "ga", "gb", "ua", "ub", "da", "db"), BASE_NAMES + LORA_NAMES, strict=True))
LEAVES = ("x", "w", "d_out", *MATRICES, "s")


@dataclass
class ExpertValues:
    """One expert's values by name: leaves and stages. rows, slots [n]: the (token, slot) pairs routed to it."""

    expert: int
    rows: Tensor
    slots: Tensor
    of: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.of[name]


Formula = Callable[[ExpertValues], Tensor]
Change = Mapping[str, Formula]

# docs/contract.md, "The layer", in order of evaluation
FORMULAS: dict[str, Formula] = {
    "x_ga": lambda v: v["x"] @ v["ga"].T,
    "x_ua": lambda v: v["x"] @ v["ua"].T,
    "g_base": lambda v: v["x"] @ v["gate"].T,
    "u_base": lambda v: v["x"] @ v["up"].T,
    "g_lora": lambda v: v["s"] * (v["x_ga"] @ v["gb"].T),
    "u_lora": lambda v: v["s"] * (v["x_ua"] @ v["ub"].T),
    "g": lambda v: v["g_base"] + v["g_lora"],
    "u": lambda v: v["u_base"] + v["u_lora"],
    "sigma": lambda v: torch.sigmoid(v["g"]),
    "silu": lambda v: v["g"] * v["sigma"],
    "h": lambda v: v["silu"] * v["u"],
    "h_da": lambda v: v["h"] @ v["da"].T,
    "y_base": lambda v: v["h"] @ v["down"].T,
    "y_lora": lambda v: v["s"] * (v["h_da"] @ v["db"].T),
    "y": lambda v: v["y_base"] + v["y_lora"],
    OUTPUT: lambda v: v["w"] * v["y"],
    GRAD_WEIGHTS: lambda v: (v["d_out"] * v["y"]).sum(1),
    "dy": lambda v: v["w"] * v["d_out"],
    "dy_db": lambda v: v["dy"] @ v["db"],
    "dh_base": lambda v: v["dy"] @ v["down"],
    "dh_lora": lambda v: v["s"] * (v["dy_db"] @ v["da"]),
    "dh": lambda v: v["dh_base"] + v["dh_lora"],
    "grad_down_lora_b": lambda v: v["s"] * (v["dy"].T @ v["h_da"]),
    "grad_down_lora_a": lambda v: v["s"] * (v["dy_db"].T @ v["h"]),
    "dsilu": lambda v: v["sigma"] * (1 + v["g"] * (1 - v["sigma"])),
    "dg": lambda v: v["dh"] * v["u"] * v["dsilu"],
    "du": lambda v: v["dh"] * v["silu"],
    "dg_gb": lambda v: v["dg"] @ v["gb"],
    "du_ub": lambda v: v["du"] @ v["ub"],
    "grad_gate_lora_b": lambda v: v["s"] * (v["dg"].T @ v["x_ga"]),
    "grad_gate_lora_a": lambda v: v["s"] * (v["dg_gb"].T @ v["x"]),
    "grad_up_lora_b": lambda v: v["s"] * (v["du"].T @ v["x_ua"]),
    "grad_up_lora_a": lambda v: v["s"] * (v["du_ub"].T @ v["x"]),
    "dx_gate": lambda v: v["dg"] @ v["gate"],
    "dx_up": lambda v: v["du"] @ v["up"],
    "dx_gate_lora": lambda v: v["s"] * (v["dg_gb"] @ v["ga"]),
    "dx_up_lora": lambda v: v["s"] * (v["du_ub"] @ v["ua"]),
    GRAD_INPUT: lambda v: v["dx_gate"] + v["dx_up"] + v["dx_gate_lora"] + v["dx_up_lora"],
}

FORWARD = tuple(FORMULAS)[: list(FORMULAS).index(OUTPUT)]  # up to y

# how messages name a stage; a stage that is not listed is called by its name
LABELS: dict[str, str] = {
    "ga": "Ag (gate_lora_a)",
    "gb": "Bg (gate_lora_b)",
    "ua": "Au (up_lora_a)",
    "ub": "Bu (up_lora_b)",
    "da": "Ad (down_lora_a)",
    "db": "Bd (down_lora_b)",
    "x_ga": "x Agᵀ (gate LoRA, low rank)",
    "x_ua": "x Auᵀ (up LoRA, low rank)",
    "g_base": "x Wgᵀ (gate product)",
    "u_base": "x Wuᵀ (up product)",
    "g_lora": "gate's LoRA part",
    "u_lora": "up's LoRA part",
    "g": "g, gate with LoRA",
    "u": "u, up with LoRA",
    "sigma": "sigmoid(g)",
    "silu": "silu(g)",
    "h": "h = silu(g) u",
    "h_da": "h Adᵀ (down LoRA, low rank)",
    "y_base": "h Wdᵀ (down product)",
    "y_lora": "down's LoRA part",
    "y": "y, one expert's result",
    "dy": "dy = w dO",
    "dy_db": "dy Bd (down LoRA, low rank)",
    "dh_base": "dy Wd",
    "dh_lora": "dh's LoRA part",
    "dsilu": "silu'(g)",
    "dg_gb": "dg Bg (gate LoRA, low rank)",
    "du_ub": "du Bu (up LoRA, low rank)",
    "dx_gate": "dg Wg",
    "dx_up": "du Wu",
    "dx_gate_lora": "gate LoRA's part of grad_input",
    "dx_up_lora": "up LoRA's part of grad_input",
}


def label(name: str) -> str:
    """The name of a stage or leaf in messages."""
    return LABELS.get(name, name)


class _Tracing(dict[str, Tensor]):
    """Has a value for every name, and so records the names that a formula asks for."""

    def __missing__(self, name: str) -> Tensor:
        return self.setdefault(name, torch.ones(1, 1, dtype=DTYPE))


@functools.cache
def operands(stage: str) -> tuple[str, ...]:
    """The names that the formula of `stage` uses, each once, in order of first use."""
    trace = _Tracing()
    FORMULAS[stage](ExpertValues(0, torch.zeros(1), torch.zeros(1), trace))
    return tuple(trace)


@functools.cache
def downstream(name: str) -> frozenset[str]:
    """`name` and every stage that depends on it, directly or through other stages."""
    found = {name}
    for stage in FORMULAS:
        if found.intersection(operands(stage)):
            found.add(stage)
    return frozenset(found)


def reached_tensors(names: Iterable[str]) -> frozenset[str]:
    """Which of ALL_TENSORS a change of these stages or leaves can affect."""
    return frozenset(name for start in names for name in downstream(start) if name in ALL_TENSORS)


def with_operands(stage: str, **other: Formula) -> Formula:
    """The formula of `stage` with other operands in this stage only: operand name -> the formula used in its place."""
    return lambda v: FORMULAS[stage](replace(v, of=v.of | {name: make(v) for name, make in other.items()}))


def leaf(name: str) -> Formula:
    """The formula that returns the value `name` unchanged."""
    return lambda v: v[name]


def leaves_of(inputs: Inputs, expert: int, rows: Tensor, slots: Tensor) -> ExpertValues:
    """The leaves of one expert, fp64."""
    of = {
        "x": inputs.hidden_states[rows].to(DTYPE),
        "w": inputs.weights[rows, slots].to(DTYPE).unsqueeze(1),
        "d_out": inputs.grad_output[rows].to(DTYPE),
        "s": torch.tensor(inputs.case.scaling, dtype=DTYPE),
    }
    for name, source in MATRICES.items():
        tensor: Tensor = inputs.lora[source] if source in LORA_NAMES else getattr(inputs, source)
        of[name] = tensor[expert].to(DTYPE)
    return ExpertValues(expert, rows, slots, of)


@dataclass
class LayerValues:
    """Every value of every active expert, and the tensors that the experts' values add up to (fp64, by name)."""

    inputs: Inputs
    experts: list[ExpertValues]
    tensors: dict[str, Tensor]
    formulas: Change = field(default_factory=lambda: FORMULAS)

    @classmethod
    def of(cls, inputs: Inputs) -> LayerValues:
        """The values by FORMULAS, that is, as docs/contract.md defines them."""
        experts = list(walk(inputs))
        return cls(inputs, experts, {name: add_up(inputs, experts, name) for name in ALL_TENSORS})

    def changed(self, change: Change) -> Predicted:
        """The tensors that `change` affects, as a layer with these formulas computes them; no others."""
        wanted = reached_tensors(change)
        experts = [recomputed(v, change, self.formulas) for v in self.experts]
        found = {name: add_up(self.inputs, experts, name) for name in ALL_TENSORS if name in wanted}
        return Predicted(found, change)

    def under(self, predicted: Mapping[str, Tensor]) -> LayerValues:
        """The layer with the defect that predicts these tensors: with its formulas where they are known."""
        tensors, change = {**self.tensors, **predicted}, getattr(predicted, "change", {})
        experts = [recomputed(v, change, self.formulas) for v in self.experts] if change else self.experts
        return LayerValues(self.inputs, experts, tensors, {**self.formulas, **change})


class Predicted(dict[str, Tensor]):
    """Tensors by name, and the change of formulas that gives them."""

    def __init__(self, tensors: Mapping[str, Tensor], change: Change) -> None:
        super().__init__(tensors)
        self.change = change


def walk(inputs: Inputs) -> Iterator[ExpertValues]:
    """Each active expert's values, computed stage by stage."""
    for expert, rows, slots in routed(inputs.expert_ids):
        v = leaves_of(inputs, expert, rows, slots)
        for stage, formula in FORMULAS.items():
            v.of[stage] = formula(v)
        yield v


def recomputed(v: ExpertValues, change: Change, formulas: Change = FORMULAS) -> ExpertValues:
    """One expert's values with the formulas of `change`; only these stages and their dependents are evaluated again.

    formulas: those of the other stages.
    """
    here = replace(v, of=dict(v.of))
    touched = {name for name in change if name in LEAVES}
    for name in touched:
        here.of[name] = change[name](v)
    for stage in FORMULAS:
        formula = formulas[stage]
        if stage in change or touched.intersection(operands(stage)):
            here.of[stage] = change.get(stage, formula)(here)
            touched.add(stage)
    return here


def add_up(inputs: Inputs, experts: Iterable[ExpertValues], name: str) -> Tensor:
    """One of ALL_TENSORS, fp64: the sum over experts of a per-token tensor, or the experts' gradients stacked."""
    total = zeros(tensors_of(inputs.case)[name], DTYPE)
    for v in experts:
        if name == GRAD_WEIGHTS:
            total[v.rows, v.slots] = v[name]
        elif name in TOKEN_TENSORS:
            total.index_add_(0, v.rows, v[name])
        else:
            total[v.expert] = v[name]
    return total
