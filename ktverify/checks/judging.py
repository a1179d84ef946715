"""Judge an engine's tensors inside a check: GateFailed names every gate that is exceeded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ktverify.checks.problem import Problem, Result, live_oracle
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.judge import gates
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import GRAD_INPUT, GRAD_WEIGHTS, OUTPUT, tensor_shapes

# the gates of `gates.judge`
NUMBERS = ("non_finite", "hidden_non_finite", "stray", "mean_rel", "rel_l2", "rel_l2_own", "exact", "trust")
# sentences of docs/contract.md that several checks share
BUDGET = "Every engine has a budget made of the error of plain bf16 torch, and a ceiling on the mean"
SAME_BITS = (
    "The same bits for the same call: again, on another layer, with another number of threads, at any address, with "
    "any strides, after calls of other lengths."
)
ALONE = "Among other tokens a token gets what it gets alone, up to the order of a sum."


def wrong_forms(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The tensors whose shape or dtype is not that of docs/contract.md, "The layer": name -> what is wrong."""
    shapes = tensor_shapes(case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank)
    dtypes = {OUTPUT: torch.bfloat16, GRAD_INPUT: torch.bfloat16, GRAD_WEIGHTS: torch.float32}
    wrong = {}
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, getattr(torch, case.lora_dtype))
        if tuple(tensor.shape) != shapes[name]:
            wrong[name] = f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}"
        elif tensor.dtype != dtype:
            words = [str(each).removeprefix("torch.") for each in (tensor.dtype, dtype)]
            wrong[name] = f"{name} is {words[0]}, expected {words[1]}"
    return wrong


def judged(target: Target, what: str, case: Case, found: dict[str, Tensor], inputs: Inputs) -> None:
    """GateFailed unless every tensor of `found` is within the budgets of plain bf16 torch on these inputs."""
    oracle = live_oracle(inputs)
    judgements = [
        gates.judge(case, n, oracle.compare(n, t), oracle.peer[n], gates_off=target.gates_off) for n, t in found.items()
    ]
    raise_for(what, judgements, Result(Problem(case, inputs, oracle, "fresh"), found))


def raise_for(what: str, judgements: list[gates.Judgement], result: Result | None = None) -> None:
    """GateFailed with the line of every judgement that is not PASS."""
    bad = [judgement for judgement in judgements if judgement.verdict is not gates.Verdict.PASS]
    if bad:
        exceeded = tuple((gate.gate, gate.used) for judgement in bad for gate in judgement.exceeded)
        lines = [judgement.line.partition("\n")[0] for judgement in bad]
        raise GateFailed("\n".join([what, *lines]), exceeded, result=result)
