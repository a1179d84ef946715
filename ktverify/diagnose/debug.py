"""What `debug nan` and `debug gradients` do: the first NaN or Inf of a case, and every difference in a table."""

from __future__ import annotations

from pathlib import Path

import torch

from ktverify.diagnose.formulas import label, walk
from ktverify.diagnose.hypotheses.non_finite import first_in, first_of
from ktverify.diagnose.hypotheses.tails import axis_words
from ktverify.diagnose.search import reduced
from ktverify.engines import registry
from ktverify.engines.run import run_case
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.files import write_whole

FINITE = "every stage and every tensor is finite"


def walk_non_finite(case: str, engine: str, *, isa: str | None, tp: int, save: Path) -> list[str]:
    """Lines that say where the first NaN or Inf is, in the oracle's stages and in the engine's tensors; FINITE alone
    where there is none. `save` then holds `inputs.*`, `stages.*` of the first expert concerned and `actual.*`."""
    parsed = Case.parse(case)
    inputs, note = reduced(make_inputs(parsed))
    place = first_in(inputs)
    actual = run_case(registry.find(engine), parsed, inputs=inputs, isa=isa, tp=tp)
    expected = forward_backward(inputs)
    own = first_of(actual, expected)
    hidden = [n for n in ALL_TENSORS if bool((torch.isfinite(actual[n]) & ~torch.isfinite(expected[n])).any())]
    if place is None and own is None:
        return [FINITE]
    lines = [note] if note else []
    lines.append(f"oracle: {place.text}" if place is not None else "oracle: every stage is finite on these inputs")
    if own is not None:
        name, index, value = own
        lines.append(f"engine: {value} in {name}{list(index)} ({axis_words(name, index)}), where the oracle is finite")
    else:
        lines.append("engine: NaN and Inf only where the oracle has them")
    if hidden:
        lines.append(f"engine: finite where the oracle is not, in {', '.join(hidden)}")
    tensors = {f"inputs.{n}": getattr(inputs, n) for n in ("hidden_states", "expert_ids", "weights", "grad_output")}
    tensors.update({f"actual.{name}": tensor for name, tensor in actual.items()})
    expert = place.expert if place is not None else inputs.active[0]
    for v in walk(inputs):
        if v.expert == expert:
            tensors.update({f"stages.{name}": value for name, value in v.of.items()})
    _save(tensors, parsed, save)
    lines.append(f"{len(tensors)} tensors in {save}: the inputs, the stages of expert {expert}, what the engine gave")
    more = registry.option(engine) + (f" --isa {isa}" if isa else "")
    lines.append(f"python -m ktverify debug nan '{parsed.id}'{more}" + (f" --tp {tp}" if tp != 1 else ""))
    return lines


def _save(tensors: dict[str, torch.Tensor], case: Case, path: Path) -> None:
    from safetensors.torch import save

    kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(kept, metadata={"case": case.id}))


def gradient_rows(case: str, engine: str, *, isa: str | None, tp: int) -> tuple[str, list[dict[str, str]]]:
    """A note ("" for none), and a row for each of ALL_TENSORS: max and mean of |a - b|, max / max and mean / mean
    relative to b, both norms, cosine, the worst index with both values."""
    parsed = Case.parse(case)
    inputs, note = reduced(make_inputs(parsed))
    actual = run_case(registry.find(engine), parsed, inputs=inputs, isa=isa, tp=tp)
    expected = forward_backward(inputs)
    headings = ("tensor", "max abs", "mean abs", "max rel", "mean rel", "rel_l2", "norm", "expected", "cosine", "worst")
    rows = []
    for name in ALL_TENSORS:
        a, b = actual[name].double(), expected[name]
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
    return note or "", rows
