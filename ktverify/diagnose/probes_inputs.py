"""Probes of inputs: NaN rows, ids, outliers, tensor parallelism, other sizes, and what must be refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from ktverify.checks.causes import Cause
from ktverify.diagnose import calls
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.stand import Stand, certain
from ktverify.judge import gates
from ktverify.judge.metrics import compare
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, OUTPUT, TOKEN_TENSORS

# what each adds to a plain case: sizes that are multiples of nothing, one row, many, many slots, kinds of routing,
# of numbers and of parameters
PANEL: tuple[str, ...] = (
    "E=5,k=3,H=97,I=47,T=33,r=3,alpha=5",
    "E=8,k=3,H=64,I=48,T=16,r=4,alpha=16,map=permuted",
    "E=6,k=3,H=64,I=48,T=24,r=8,alpha=16,routing=duplicate",
    "E=6,k=3,H=64,I=48,T=24,r=8,alpha=16,routing=masked",
    "E=4,k=2,H=64,I=48,T=24,r=8,alpha=16,lora=float32",
    "E=4,k=2,H=64,I=48,T=1,r=8,alpha=16",
    "E=40,k=2,H=64,I=48,T=3,r=8,alpha=16",
    "E=16,k=2,H=64,I=48,T=96,r=8,alpha=16,routing=one_expert",
    "E=2,k=2,H=64,I=48,T=300,r=8,alpha=16",
    "E=16,k=8,H=64,I=48,T=32,r=8,alpha=16",
    "E=2,k=2,H=520,I=48,T=16,r=8,alpha=16",
    "E=4,k=2,H=64,I=48,T=32,r=33,alpha=32",
    "E=4,k=2,H=64,I=48,T=32,r=8,alpha=512",
    "E=4,k=2,H=64,I=256,T=32,r=8,alpha=16,data=large",
    "E=4,k=2,H=64,I=48,T=32,r=8,alpha=16,data=tiny",
)
_SECONDS = 30.0


def non_finite(stand: Stand) -> Iterator[Finding]:
    """A NaN or Inf in one token's row reaches that token and its experts' gradients, and nothing else."""
    inputs = stand.inputs
    clean = stand.run()
    token = len(inputs.hidden_states) // 2
    hit = set(inputs.expert_ids[token].tolist())
    spared = [expert for expert in range(stand.case.num_experts) if expert not in hit]
    others = [row for row in range(len(inputs.hidden_states)) if row != token]
    for value, name in ((v, n) for v in (float("nan"), float("inf")) for n in ("hidden_states", "grad_output")):
        broken = getattr(inputs, name).clone()
        broken[token, 1] = value
        layer = stand.layer()
        found = stand.run(layer, replace(inputs, **{name: broken}))
        what = f"{value} in {name}[{token}, 1]"
        for tensor in ALL_TENSORS:
            keep = others if tensor in TOKEN_TENSORS else spared
            if not calls.same_bits(clean[tensor][keep], found[tensor][keep]):
                side = "other rows of" if tensor in TOKEN_TENSORS else "other experts'"
                yield certain(Cause.NON_FINITE, f"{what} reaches {side} {tensor}")
                return
        shown = OUTPUT if name == "hidden_states" else GRAD_INPUT
        if bool(torch.isfinite(found[shown][token]).all()):
            yield certain(Cause.NON_FINITE, f"{what} is hidden: {shown}[{token}] is finite")
            return
        after = stand.run(layer)
        if calls.unequal(clean, after):
            yield certain(Cause.STALE_VALUES, f"{what} is left over in the next call: {calls.where(clean, after)}")
            return


def ids(stand: Stand) -> Iterator[Finding]:
    """-1 contributes nothing whatever its weight is; an id that is none is refused."""
    inputs = stand.inputs
    holes = inputs.expert_ids.clone()
    holes[::2, -1] = -1
    masked = replace(inputs, expert_ids=holes)
    plain = stand.run(None, masked)
    found = stand.situation(masked, plain)
    if found.failing:
        yield best(found, Cause.IDS, "with ids of -1 in the last slot of every other token")
        return
    for value, cause in ((1e30, Cause.IDS), (float("inf"), Cause.NON_FINITE), (float("nan"), Cause.NON_FINITE)):
        weights = torch.where(holes < 0, torch.tensor(value), inputs.weights)
        other = stand.run(None, replace(masked, weights=weights))
        if calls.unequal(plain, other):
            yield certain(
                cause, f"the weight of a slot with id -1 matters: {value} changes {calls.where(plain, other)}"
            )
            return
    for bad in (stand.case.num_experts, -2):
        wrong = inputs.expert_ids.clone()
        wrong[0, 0] = bad
        given = replace(inputs, expert_ids=wrong)
        if calls.refusal(lambda given=given: stand.run(None, given)) is None:  # type: ignore[misc]
            yield certain(Cause.IDS, f"expert id {bad} is accepted where there are {stand.case.num_experts} experts")
            return


def outlier(stand: Stand) -> Iterator[Finding]:
    """One token a thousand times as large as the others changes nothing for them."""
    inputs = stand.inputs
    clean = stand.run()
    large = inputs.hidden_states.clone()
    large[0] *= 1024
    found = stand.run(None, replace(inputs, hidden_states=large))
    for name in (OUTPUT, GRAD_INPUT):
        apart = compare(found[name][1:], clean[name][1:].double())
        if not apart.rel_l2 <= float(gates.tolerances()["tp"]["rel_l2"]):
            said = f"a token 1024 times as large changes the other tokens' {name}: rel_l2 {apart.rel_l2:.1e}"
            rows = (found[name][1:].float().abs().sum(1) == 0) & (clean[name][1:].float().abs().sum(1) > 0)
            more = f"; {int(rows.sum())} of their rows are zero" if bool(rows.any()) else ""
            yield certain(Cause.OTHER, said + more)
            return


def tensor_parallel(stand: Stand) -> Iterator[Finding]:
    """Every degree that divides I: against the oracle, and against TP 1 where the engine claims fp32 sums."""
    one = stand.run(tp=1)
    budget = float(gates.tolerances()["tp"]["rel_l2"])
    for degree in (2, 4, 5):
        probe = replace(stand.probe, tp=degree)
        tensors = stand.run(tp=degree)
        found = Situation.of(stand.case, stand.inputs, tensors, probe=probe, seconds=_SECONDS)
        if found.failing:
            yield replace(best(found, Cause.TP_PART, f"TP {degree} is wrong where TP 1 is right"), cause=Cause.TP_PART)
            return
        apart = {name: compare(tensors[name], one[name].double()).rel_l2 for name in ALL_TENSORS}
        worst = max(apart, key=apart.__getitem__)
        if stand.probe.strict and not apart[worst] <= budget:
            said = f"TP {degree} is {apart[worst]:.1e} from TP 1 in {worst}, more than another order of a sum makes"
            yield certain(Cause.TP_PART, f"{said} ({budget:.0e})")
            return


def best(situation: Situation, cause: Cause, what: str) -> Finding:
    """The first cause of a case beside the one that was asked about; `cause` alone where none fits."""
    from ktverify.diagnose.search import explain

    found = explain(situation)
    if found.first is not None:
        return replace(found.first, text=f"{what}: {found.first.text}", complete=True)
    said = f"{what}: {', '.join(situation.failing)}, and none of {found.tried} hypotheses tells how"
    return certain(cause, said, rank=4)


def others(stand: Stand) -> Iterator[Finding]:
    """The first case of PANEL that the engine fails, explained."""
    probe = replace(stand.probe, tp=1)
    until = time.monotonic() + _SECONDS
    for text in PANEL:
        if time.monotonic() > until:
            return
        case = Case.parse(text)
        inputs = make_inputs(case)
        found = Situation.of(case, inputs, probe.run(case, inputs), probe=probe)
        if found.failing:
            yield best(found, Cause.OTHER, f"with {text}")
            return


def refusals(stand: Stand) -> Iterator[Finding]:
    """What docs/contract.md has refused, a few of each kind; and a refused call leaves the layer as it was."""
    bad = calls.bad_calls(stand.case, stand.inputs, stand.layer, stand.probe.factory)
    accepted = [text for text, act in bad if calls.refusal(act) is None]
    if accepted:
        yield certain(Cause.REFUSAL, f"not refused: {'; '.join(accepted)}")
        return
    inputs = stand.inputs
    expected, layer = stand.run(), stand.layer()
    output = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=True)
    calls.refusal(lambda: layer.backward(inputs.grad_output[:-1]))
    calls.refusal(lambda: layer.backward(inputs.grad_output.float()))
    refused = calls.refusal(lambda: layer.backward(inputs.grad_output))
    if refused is not None:
        yield certain(Cause.REFUSAL, f"a backward that is refused uses its forward up: the next one says {refused}")
        return
    layer = stand.layer()
    again = stand.run(layer)
    if calls.unequal(expected, again) or not calls.same_bits(output, expected[OUTPUT]):
        yield certain(Cause.REFUSAL, f"a refused call changes what comes after it: {calls.where(expected, again)}")
