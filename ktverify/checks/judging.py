"""Judge an engine's tensors inside a check: GateFailed names every gate that is exceeded.

Numbers are judged only of tensors that have the form of docs/contract.md; see `wrong_forms`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.problem import Problem, Result, live_oracle
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.isolation import wire
from ktverify.judge import gates
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import BASE_NAMES, GRAD_INPUT, GRAD_WEIGHTS, OUTPUT, tensor_shapes

# the gates of `gates.judge`
NUMBERS = ("non_finite", "hidden_non_finite", "stray", "mean_rel", "rel_l2", "rel_l2_own", "exact", "trust")
# sentences of docs/contract.md that several checks share
BUDGET = "Every engine has a budget, the error that roundings to bf16 leave, and a ceiling on the mean"
SAME_BITS = (
    "The same bits for the same call: again, on another layer, with another number of threads, at any address, with "
    "any strides, after calls of other lengths."
)
ALONE = "Among other tokens a token gets what it gets alone, up to the order of a sum."


def wrong_forms(
    case: Case, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """The tensors that are not what docs/contract.md, "The layer", says: name -> what is wrong, in words.

    A result is a plain strided tensor on the CPU, with the shape and dtype of the contract, and shares no memory with
    another result, with an element of its own, or with `beside`: arguments and earlier results, by what they are.
    """
    shapes = tensor_shapes(case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank)
    dtypes = {OUTPUT: torch.bfloat16, GRAD_INPUT: torch.bfloat16, GRAD_WEIGHTS: torch.float32}
    wrong = {}
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, getattr(torch, case.lora_dtype))
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            wrong[name] = f"{name} is a {type(tensor).__name__}, expected a plain tensor"
        elif tensor.layout is not torch.strided or tensor.device.type != "cpu":
            wrong[name] = f"{name} is {tensor.layout} on {tensor.device}, expected torch.strided on cpu"
        elif kind := wire.not_its_memory(tensor):
            wrong[name] = f"{name} is a {kind}Tensor, whose values are not those in its memory"
        elif tuple(tensor.shape) != shapes[name]:
            wrong[name] = f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}"
        elif tensor.dtype != dtype:
            words = [str(each).removeprefix("torch.") for each in (tensor.dtype, dtype)]
            wrong[name] = f"{name} is {words[0]}, expected {words[1]}"
    places = {what: tensor for what, tensor in (beside or {}).items() if isinstance(tensor, Tensor)}
    for name in (name for name in tensors if name not in wrong):
        if overlaps_itself(tensors[name]):
            wrong[name] = f"{name} has elements that share memory: its strides are {tensors[name].stride()}"
        elif shared := next((what for what, place in places.items() if share_memory(tensors[name], place)), ""):
            wrong[name] = f"{name} lies in the memory of {shared}"
        places[name] = tensors[name]
    return wrong


def form_cause(text: str) -> Cause:
    """What a text of `wrong_forms` suggests."""
    types = re.fullmatch(r"\w+ is \w+, expected \w+", text)
    return Cause.ACCUMULATION_TYPE if types else Cause.MEMORY_LAYOUT


def arguments_of(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that a layer gets for `inputs`, by name."""
    return {name: getattr(inputs, name) for name in ("hidden_states", "expert_ids", "weights", "grad_output")} | {
        **{name: getattr(inputs, name) for name in BASE_NAMES},
        **inputs.lora,
    }


def expect_forms(
    target: Target, what: str, found: Mapping[str, Tensor], inputs: Inputs, earlier: Mapping[str, Tensor] | None = None
) -> None:
    """GateFailed unless `found`, the results of a call with `inputs`, has the form that `wrong_forms` asks for."""
    if not target.asks("form"):
        return
    case = replace(inputs.case, qlen=len(inputs.hidden_states))
    before = {f"an earlier {name}": tensor for name, tensor in (earlier or {}).items()}
    wrong = list(wrong_forms(case, found, {**arguments_of(inputs), **before}).values())
    if wrong:
        lines = [f"FAIL {text}" for text in wrong]
        raise GateFailed("\n".join([what, *lines]), (("form", math.inf),), cause=form_cause(wrong[0]))


def share_memory(left: Tensor, right: Tensor) -> bool:
    """True where an element of one strided CPU tensor lies on a byte of an element of the other."""
    spans = [_span(tensor) for tensor in (left, right)]
    if not all(spans):
        return False
    begin, end = max(span[0] for span in spans), min(span[1] for span in spans)
    if begin >= end:
        return False
    if all(_dense(tensor) for tensor in (left, right)):
        return True
    # columns of one block may lie between each other
    taken = torch.zeros(end - begin, dtype=torch.bool)
    for tensor in (left, right):
        bytes_of = _addresses(tensor) - begin
        inside = bytes_of[(bytes_of >= 0) & (bytes_of < end - begin)]
        if tensor is left:
            taken[inside] = True
    return bool(taken[inside].any())


def overlaps_itself(tensor: Tensor) -> bool:
    """True where two elements of a strided CPU tensor share a byte, as those of an expanded one do."""
    if _dense(tensor) or not _span(tensor):
        return False
    addresses = _addresses(tensor)
    return bool((addresses.sort().values.diff() == 0).any())


def _span(tensor: Tensor) -> tuple[int, ...]:
    """(first byte, end) of the elements of a strided CPU tensor; () for one without a place."""
    if tensor.numel() == 0 or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return ()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _dense(tensor: Tensor) -> bool:
    """True where a tensor's elements fill its span, each once."""
    span = _span(tensor)
    if not span or span[1] - span[0] != tensor.numel() * tensor.element_size():
        return False
    wanted = 1
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if step != wanted:
            return False
        wanted *= size
    return True


def _addresses(tensor: Tensor) -> Tensor:
    """The addresses of all bytes of a tensor's elements, int64 [n]."""
    begin, end = _span(tensor)
    size = tensor.element_size()
    places = torch.arange((end - begin) // size, device="cpu").as_strided(tensor.shape, tensor.stride()).reshape(-1)
    return (begin + places[:, None] * size + torch.arange(size, device="cpu")).reshape(-1)


def judged(target: Target, what: str, case: Case, found: dict[str, Tensor], inputs: Inputs) -> None:
    """GateFailed unless every tensor of `found` is within its budget on these inputs."""
    expect_forms(target, what, found, inputs)
    oracle = live_oracle(inputs)
    judgements = [
        gates.judge(case, n, oracle.compare(n, t), oracle.rounding[n], gates_off=target.gates_off)
        for n, t in found.items()
    ]
    raise_for(what, judgements, Result(Problem(case, inputs, oracle, "fresh"), found))


def raise_for(what: str, judgements: list[gates.Judgement], result: Result | None = None) -> None:
    """GateFailed with the line of every judgement that is not PASS."""
    bad = [judgement for judgement in judgements if judgement.verdict is not gates.Verdict.PASS]
    if bad:
        exceeded = tuple((gate.gate, gate.used) for judgement in bad for gate in judgement.exceeded)
        lines = [judgement.line.partition("\n")[0] for judgement in bad]
        raise GateFailed("\n".join([what, *lines]), exceeded, result=result)


def judge_refusal(
    target: Target, what: str, error: Exception, errors: tuple[type[Exception], ...], mentions: tuple[str, ...]
) -> None:
    """GateFailed unless `error` is of one of these classes, has one line, and contains `mentions`."""
    kinds, text = " or ".join(kind.__name__ for kind in errors), str(error)
    # RuntimeError has children (NotImplementedError, RecursionError) with another meaning
    right = type(error) in errors
    target.expect(right, f"{what}: must raise {kinds}, raised {type(error).__name__}: {text}", "refusal")
    missing = [mention for mention in mentions if mention not in text]
    target.expect(not missing, f"{what}: the error must contain {missing}, it says {text!r}", "refusal")
    target.expect(len(text.splitlines()) == 1, f"{what}: an error is one line, this has more: {text!r}", "refusal")
