"""Hypothesis of stale LoRA: some of the six tensors still have the values of before an update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import LayerValues
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES

# all six, one projection, A or B; then single tensors
_GROUPS = (LORA_NAMES, LORA_NAMES[4:], LORA_NAMES[2:4], LORA_NAMES[:2], LORA_NAMES[::2], LORA_NAMES[1::2])


def stale(evidence: Evidence) -> Iterator[Explanation]:
    """The values of the case as drawn, where the caller has changed LoRA since."""
    drawn = make_inputs(evidence.case).lora
    if any(not torch.equal(drawn[name], tensor) for name, tensor in evidence.inputs.lora.items()):
        yield from stale_since(evidence, drawn)


def stale_since(evidence: Evidence, before: Mapping[str, Tensor]) -> Iterator[Explanation]:
    """Which of the six have the values `before`: group by group, each is put back if that lowers the error."""
    lora, error = dict(evidence.inputs.lora), evidence.error
    found: list[str] = []
    predicted = evidence.right
    for names in (*_GROUPS, *((name,) for name in LORA_NAMES)):
        tried = {**lora, **{name: before[name] for name in names}}
        tensors = LayerValues.of(replace(evidence.inputs, lora=tried)).tensors
        left = sum(evidence.left(tensors).values())
        if left < 0.9 * error:
            lora, error, predicted = tried, left, tensors
            found += [n for n in names if n not in found and not torch.equal(before[n], evidence.inputs.lora[n])]
    if found:
        which = "all six LoRA tensors" if len(found) == len(LORA_NAMES) else ", ".join(found)
        said = f"{which} are those of before the last update_lora_weights"
        yield evidence.explanation(Cause.STALE_LORA, said, predicted)
