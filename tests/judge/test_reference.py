"""The oracle against torch's autograd and finite differences in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ktverify.engines.registry import find
from ktverify.engines.run import check_grad_names
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward, plain_expert, routed, zeros
from ktverify.judge.rounding import rounded_draws
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

CASES = [
    "E=5,k=2,H=12,I=9,T=7,r=3,alpha=7.5",
    "E=5,k=3,H=12,I=9,T=7,r=3,alpha=6,routing=duplicate",
    "E=5,k=3,H=12,I=9,T=7,r=3,alpha=6,routing=masked",
    "E=3,k=2,H=12,I=9,T=4,r=3,alpha=6,routing=all_masked",
    "E=5,k=1,H=12,I=9,T=1,r=1,alpha=6",
    "E=5,k=2,H=12,I=9,T=0,r=2,alpha=6",
    "E=4,k=4,H=8,I=16,T=5,r=20,alpha=1",
    "E=4,k=2,H=8,I=16,T=20,r=2,alpha=4,routing=zipf",
    "E=4,k=2,H=8,I=16,T=6,r=2,alpha=4,lora=float32",
    "E=4,k=2,H=8,I=16,T=6,r=2,alpha=4,data=large",
    "E=4,k=2,H=8,I=16,T=6,r=2,alpha=4,data=tiny",
    "E=4,k=2,H=8,I=16,T=6,r=2,alpha=4,data=strong_lora",
    "E=4,k=2,H=8,I=16,T=6,r=2,alpha=4,data=zero_b",
]


def loss_by_token(
    inputs: Inputs, leaves: dict[str, Tensor], masks: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(output [T, H], <output, grad_output>): the forward of docs/contract.md, token by token, slot by slot."""
    s = inputs.case.scaling
    masks = masks or masks_of(inputs, 0.0)
    rows = []
    for t in range(inputs.case.qlen):
        total = torch.zeros(inputs.case.hidden, dtype=torch.float64)
        for j in range(inputs.case.top_k):
            e = int(inputs.expert_ids[t, j])
            if e < 0:
                continue
            x = leaves[GRAD_INPUT][t]
            a = {name: leaves[f"grad_{name}"][e] for name in LORA_NAMES}
            m = {name: mask[t, j] for name, mask in masks.items()}
            g = inputs.gate_proj[e].double() @ x + s * (a["gate_lora_b"] @ (a["gate_lora_a"] @ (m["gate"] * x)))
            u = inputs.up_proj[e].double() @ x + s * (a["up_lora_b"] @ (a["up_lora_a"] @ (m["up"] * x)))
            h = g / (1 + torch.exp(-g)) * u
            y = inputs.down_proj[e].double() @ h + s * (a["down_lora_b"] @ (a["down_lora_a"] @ (m["down"] * h)))
            total = total + leaves[GRAD_WEIGHTS][t, j] * y
        rows.append(total)
    output = torch.stack(rows) if rows else torch.zeros(0, inputs.case.hidden, dtype=torch.float64)
    return output, (output * inputs.grad_output.double()).sum()


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """In fp64, what gradients are computed for, by the name of its gradient."""
    lora = {f"grad_{name}": inputs.lora[name].double() for name in LORA_NAMES}
    return {GRAD_INPUT: inputs.hidden_states.double(), **lora, GRAD_WEIGHTS: inputs.weights.double()}


def masks_of(inputs: Inputs, p: float) -> dict[str, Tensor]:
    """Dropout masks in fp64; ones for p = 0."""
    widths = {"gate": inputs.case.hidden, "up": inputs.case.hidden, "down": inputs.case.intermediate}
    shape, draw = inputs.expert_ids.shape, torch.Generator().manual_seed(3)
    return {n: (torch.rand(*shape, w, generator=draw) >= p).double() / (1 - p) for n, w in widths.items()}


def by_autograd(inputs: Inputs, masks: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(inputs).items()}
    output, loss = loss_by_token(inputs, leaves, masks)
    order = list(leaves.values())
    gradients = (
        torch.autograd.grad(loss, order, allow_unused=True, materialize_grads=True)
        if loss.requires_grad
        else [torch.zeros_like(leaf) for leaf in order]
    )
    return {OUTPUT: output.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("text", CASES)
def test_the_oracle_agrees_with_autograd_in_fp64(text: str) -> None:
    inputs = make_inputs(Case.parse(text))
    found, wanted = forward_backward(inputs), by_autograd(inputs)
    assert tuple(found) == ALL_TENSORS
    for name in ALL_TENSORS:
        assert found[name].dtype == torch.float64
        difference = compare(found[name], wanted[name])
        assert difference.rel_l2 < 1e-12, (name, difference)
        assert difference.stray == 0, name


@pytest.mark.parametrize("text", CASES)
def test_the_oracle_with_dropout_agrees_with_autograd_in_fp64(text: str) -> None:
    inputs = make_inputs(Case.parse(text))
    masks = masks_of(inputs, 0.25)
    found, wanted = forward_backward(inputs, masks=masks), by_autograd(inputs, masks)
    drawn = rounded_draws(inputs, 1, masks=masks)
    for name in ALL_TENSORS:
        assert compare(found[name], wanted[name]).rel_l2 < 1e-12, name
        assert compare(drawn[name][0], wanted[name]).rel_l2 < 1e-5, name
        assert compare(drawn[name][1], wanted[name]).rel_l2 < 0.1, name


def test_the_oracle_agrees_with_finite_differences() -> None:
    """Of the loss <output, dO>, in fp64, without a formula for any derivative."""
    inputs = make_inputs(Case.parse("E=3,k=2,H=6,I=5,T=4,r=2,alpha=4,routing=duplicate"))
    found = forward_backward(inputs)
    values = leaves_of(inputs)
    step = 1e-6
    for name in values:
        places = [0, 3, 6] if name == GRAD_WEIGHTS else found[name].abs().flatten().topk(3).indices.tolist()
        for place in places:
            losses = []
            for sign in (1, -1):
                moved = {**values, name: values[name].clone()}
                moved[name].view(-1)[place] += sign * step
                losses.append(float(loss_by_token(inputs, moved)[1]))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert float(found[name].reshape(-1)[place]) == pytest.approx(slope, rel=1e-6, abs=1e-7), name


def test_the_fp32_oracle_is_close_to_fp64() -> None:
    inputs = make_inputs(Case.parse("E=6,k=2,H=96,I=80,T=40,r=8"))
    exact, single = forward_backward(inputs), forward_backward(inputs, dtype=torch.float32)
    for name in ALL_TENSORS:
        assert single[name].dtype == torch.float32
        assert compare(single[name], exact[name]).rel_l2 < 2e-6, name


def test_the_forward_is_the_same_without_a_backward() -> None:
    inputs = make_inputs(Case.parse("E=5,k=2,H=12,I=9,T=7,r=3"))
    found = forward_backward(inputs, backward=False)
    assert tuple(found) == (OUTPUT,)
    assert torch.equal(found[OUTPUT], forward_backward(inputs)[OUTPUT])


def test_skip_lora_passes_gradients_through_the_base_only() -> None:
    """grad_input is that of a layer whose forward has LoRA, but whose gradients pass through the base only."""
    inputs = make_inputs(Case.parse("E=5,k=2,H=12,I=9,T=7,r=3,alpha=6"))
    skipped, whole = forward_backward(inputs, skip_lora=True), forward_backward(inputs)
    assert torch.equal(skipped[OUTPUT], whole[OUTPUT])
    assert torch.equal(skipped[GRAD_WEIGHTS], whole[GRAD_WEIGHTS])
    for name in GRAD_NAMES:
        assert not bool(skipped[name].any())
    assert compare(skipped[GRAD_INPUT], whole[GRAD_INPUT]).rel_l2 > 0.05
    expected = torch.zeros_like(whole[GRAD_INPUT])
    for expert, rows, slots in routed(inputs.expert_ids):
        x = inputs.hidden_states[rows].double().requires_grad_()
        lora = [inputs.lora[name][expert].double() for name in LORA_NAMES]
        base = [getattr(inputs, name)[expert].double() for name in ("gate_proj", "up_proj", "down_proj")]
        y = plain_expert(x, *base, *lora, scaling=inputs.case.scaling, skip_lora=True)
        upstream = inputs.weights[rows, slots].double().unsqueeze(1) * inputs.grad_output[rows].double()
        expected.index_add_(0, rows, torch.autograd.grad(y, x, upstream)[0])
    assert compare(skipped[GRAD_INPUT], expected).rel_l2 < 1e-12


def test_duplicate_slots_add_their_weights() -> None:
    """A token that names an expert twice gets the result of one slot with the summed weight."""
    case = Case.parse("E=4,k=2,H=12,I=9,T=6,r=3,alpha=6,routing=duplicate")
    twice = make_inputs(case)
    once = replace(twice, expert_ids=twice.expert_ids[:, :1], weights=twice.weights.double().sum(1, keepdim=True))
    found, wanted = forward_backward(twice), forward_backward(once)
    for name in (OUTPUT, GRAD_INPUT, *GRAD_NAMES):
        assert compare(found[name], wanted[name]).rel_l2 < 1e-12, name
    assert torch.allclose(found[GRAD_WEIGHTS], wanted[GRAD_WEIGHTS].expand(-1, 2), rtol=1e-12)


def test_masked_slots_contribute_nothing() -> None:
    inputs = make_inputs(Case.parse("E=4,k=3,H=12,I=9,T=8,r=3,routing=masked"))
    masked = inputs.expert_ids < 0
    wild = replace(inputs, weights=torch.where(masked, torch.tensor(float("nan")), inputs.weights))
    found, wanted = forward_backward(wild), forward_backward(inputs)
    for name in ALL_TENSORS:
        assert torch.equal(found[name], wanted[name]), name
    assert not bool(found[GRAD_WEIGHTS][masked].any())


def test_a_nan_reaches_its_token_and_its_experts_only() -> None:
    inputs = make_inputs(Case.parse("E=12,k=2,H=16,I=12,T=9,r=3,data=nan_row"))
    clean = make_inputs(Case.parse("E=12,k=2,H=16,I=12,T=9,r=3"))
    found, wanted = forward_backward(inputs), forward_backward(clean)
    touched = inputs.expert_ids[4].tolist()
    for name in ALL_TENSORS:
        rows = touched if name in GRAD_NAMES else [4]
        rest = [n for n in range(len(found[name])) if n not in rows]
        assert bool(torch.isnan(found[name][rows]).all()), name
        assert torch.equal(found[name][rest], wanted[name][rest]), name


def test_routed_skips_masked_slots_and_sorts_experts() -> None:
    ids = torch.tensor([[3, -1], [0, 3], [3, 3]])
    found = [(e, rows.tolist(), slots.tolist()) for e, rows, slots in routed(ids)]
    assert found == [(0, [1], [0]), (3, [0, 1, 2, 2], [0, 1, 0, 1])]


def test_zeros_have_the_dtype_and_shape_asked_for() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        made = zeros((3, 0, 2), dtype)
        assert (made.dtype, made.shape) == (dtype, (3, 0, 2))
        assert not bool(zeros((2, 3), dtype).any())


# ---- engines


def test_gradient_names_are_checked() -> None:
    right = {name: torch.zeros(1) for name in GRAD_NAMES}
    check_grad_names(right)
    with pytest.raises(KeyError, match="gave no grad_up_lora_b"):
        check_grad_names({name: value for name, value in right.items() if name != "grad_up_lora_b"})
    with pytest.raises(ValueError, match="gave gate_lora_a"):
        check_grad_names({**right, "gate_lora_a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("natve", ValueError, "did you mean native"),
        ("ktverify.engines.registry:nothing", ValueError, "has no nothing"),
        ("ktverify.engines.registry:NATIVE", ValueError, "takes a callable"),
        (":x", ValueError, "takes native, "),
        ("no_such_package.module:factory", ImportError, "no_such_package"),
    ],
)
def test_an_unknown_engine_is_refused(name: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        find(name)
    assert find("ktverify.engines.torch_bf16:TorchBf16") is find("torch_bf16")
