"""Diagnose an engine on a case: the tensors first; where they do not explain enough, the checks of the contract."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ktverify.checks.target import Target
from ktverify.diagnose import from_checks
from ktverify.diagnose.evidence import Evidence, Tensors
from ktverify.diagnose.search import Diagnosis, explain, ranked, reduced
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS

SURE = 0.95  # share of the error above which an explanation needs no further calls
_TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")


def diagnose(
    case: Case,
    target: Target,
    *,
    tensors: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    actual: Tensors | None = None,
    run_checks: bool = True,
    seconds: float = 20.0,
) -> Diagnosis:
    """Find the cause of what is wrong with `target` on `case`; with `run_checks`, also of what the case does not show.

    tensors: examine only these. actual: ALL_TENSORS of the case, if the caller has them. run_checks=False makes no call
    beyond the case's own. seconds: after this time no further hypothesis or check is begun. Exceptions of the engine
    on the case itself are not caught.
    """
    until = time.monotonic() + seconds
    inputs, note = reduced(make_inputs(case) if inputs is None else inputs)
    if actual is None or note:
        # an engine may write to its inputs; the oracle needs them unchanged
        actual = target.run(case, replace(inputs, **{name: getattr(inputs, name).clone() for name in _TOKENS}))
    wanted = {name: tensor for name, tensor in actual.items() if name in (tensors or ALL_TENSORS)}
    diagnosis = explain(Evidence.of(inputs, wanted, target, seconds=seconds))
    notes = [note] if note else []
    first = diagnosis.first
    if run_checks and not (first is not None and first.share > SURE):
        # the checks of the registry have cases and tensor parallel degrees of their own
        asked = from_checks.on_case(case, target.tp) if diagnosis.failing or target.tp != 1 else []
        asked += [] if diagnosis.failing else from_checks.quick()
        found, tried = from_checks.first_failure(target, asked, until)
        diagnosis.tried += tried
        if found is None and tried < len(asked):
            notes.append(f"the time was up after {tried} of {len(asked)} checks")
        diagnosis.explanations = ranked([*diagnosis.explanations, *([found] if found else [])])
    diagnosis.note = "; ".join(notes)
    return diagnosis
