"""`debug nan`: the first NaN or Inf of a case. `debug gradients`: a table of the differences of every tensor."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from ktverify.checks.target import Target
from ktverify.diagnose.asking import Given
from ktverify.diagnose.formulas import label, walk
from ktverify.diagnose.hook import options
from ktverify.diagnose.hypotheses.results import first_in, first_of
from ktverify.diagnose.hypotheses.tails import axis_words
from ktverify.diagnose.search import reduced
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.files import write_whole

FINITE = "every stage and every tensor is finite"


def fault_lines(given: Given) -> list[str]:
    """What the engine did instead of giving some of ALL_TENSORS, and which; the last lines of its output."""
    if given.fault is None:
        return []
    missing = [name for name in ALL_TENSORS if name not in given.actual]
    declared = "UNSUPPORTED " if given.fault.verdict == "UNSUPPORTED" else ""
    after = f"; it gave no {', '.join(missing)}" if missing else ""
    return [f"{declared}{given.fault.text}{after}", *(f"    {line}" for line in given.fault.words)]


def walk_non_finite(case: Case, given: Given, target: Target, save: Path) -> list[str]:
    """Find the first NaN or Inf in the oracle's stages and in the tensors that an engine gave; return lines of text.

    [FINITE] where there is none and all tensors are there. Otherwise `save` gets `inputs.*`, `actual.*` and the
    `stages.*` of the expert with the first one (of the first active expert, if the oracle is finite), as safetensors.
    """
    inputs, note = reduced(make_inputs(case))
    place = first_in(inputs)
    actual, expected = given.actual, forward_backward(inputs)
    fitting = {name: tensor for name, tensor in actual.items() if tensor.shape == expected[name].shape}
    own = first_of(fitting, expected)
    hidden = [n for n in fitting if bool((torch.isfinite(actual[n]) & ~torch.isfinite(expected[n])).any())]
    faults = fault_lines(given)
    if place is None and own is None and not faults:
        return [FINITE]
    lines = [*([note] if note else []), *faults]
    lines.append(f"oracle: {place[1]}" if place is not None else "oracle: every stage is finite on these inputs")
    if own is not None:
        name, index, value = own
        lines.append(f"engine: {value} in {name}{list(index)} ({axis_words(name, index)}), where the oracle is finite")
    elif place is not None or actual:
        there = "NaN and Inf only where the oracle has them" if place is not None else "what it gave is finite"
        lines.append(f"engine: {there}" if actual else "engine: it gave no tensor")
    if hidden:
        lines.append(f"engine: finite where the oracle is not, in {', '.join(hidden)}")
    tensors = {f"inputs.{n}": getattr(inputs, n) for n in ("hidden_states", "expert_ids", "weights", "grad_output")}
    tensors.update({f"actual.{name}": tensor for name, tensor in actual.items()})
    expert = place[0] if place is not None else next(iter(inputs.active), -1)
    stages = next((v.of for v in walk(inputs) if v.expert == expert), {})
    tensors.update({f"stages.{name}": value for name, value in stages.items()})
    kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_whole(save, safetensors.torch.save(kept, metadata={"case": case.id}))
    lines.append(f"{len(tensors)} tensors in {save}: the inputs, the stages of expert {expert}, what the engine gave")
    lines.append(f"python -m ktverify debug nan '{case.id}'{options(target)}")
    return lines


def gradient_rows(case: Case, given: Given) -> tuple[str, list[dict[str, str]]]:
    """(note, a row per tensor that an engine gave): max and mean of |a - b|, the same relative to max |b| and mean |b|,
    rel_l2, both norms, the cosine, and the worst index with both values. note: the experts examined, "" for all."""
    inputs, note = reduced(make_inputs(case))
    actual, expected = given.actual, forward_backward(inputs)
    headings = ("tensor", "max abs", "mean abs", "max rel", "mean rel", "rel_l2", "norm", "expected", "cosine", "worst")
    rows = []
    for name in (name for name in ALL_TENSORS if name in actual):
        a, b = actual[name].double(), expected[name]
        if a.shape != b.shape:
            rows.append({"tensor": label(name), "worst": f"it is {list(a.shape)}, expected {list(b.shape)}"})
            continue
        both = torch.isfinite(a) & torch.isfinite(b)
        apart = torch.where(both, (a - b).abs(), 0.0)
        largest = float(torch.where(both, b, 0.0).abs().max()) if b.numel() else 0.0
        found = compare(actual[name], b)
        mean = float(apart.mean()) if apart.numel() else 0.0
        relative = found.max_abs / largest if largest else 0.0
        worst = f"{list(found.worst_index)}: {found.worst_actual:.4g}, expected {found.worst_expected:.4g}"
        numbers = (found.max_abs, mean, relative, found.mean_rel, found.rel_l2)
        norms = (f"{found.norm_actual:.4g}", f"{found.norm_expected:.4g}", f"{found.cosine:.6f}")
        cells = (label(name), *(f"{value:.1e}" for value in numbers), *norms, worst if b.numel() else "")
        rows.append(dict(zip(headings, cells, strict=True)))
    return note, rows
