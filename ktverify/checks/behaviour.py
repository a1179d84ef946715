"""What docs/contract.md demands beyond right numbers: determinism, isolation, no leftovers, edge inputs.

Each check takes a Target and raises AssertionError with what it saw.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ktverify.checks.expected import expected_of
from ktverify.checks.target import SMALL, Target, expect, same_bits
from ktverify.engines import registry
from ktverify.engines.run import run_layer
from ktverify.errors import GateFailed
from ktverify.judge import gates, metrics, reference
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT, tensor_shapes

Tensors = dict[str, Tensor]
TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")
# wide enough for several blocks and threads; multiples of 32, for odd sizes have checks of their own
MIDDLE = Case.parse("E=6,k=2,H=224,I=160,T=70,r=8,alpha=16")
# MIDDLE as a multiple of nothing
ODD_MIDDLE = Case.parse("E=6,k=2,H=203,I=137,T=70,r=7,alpha=16")
# another width than SMALL and MIDDLE, more experts a token
WIDE = Case.parse("E=5,k=3,H=96,I=64,T=7,r=3,alpha=5")


def judged(target: Target, what: str, case: Case, found: Tensors, inputs: Inputs) -> None:
    """AssertionError unless every tensor of `found` is within the budgets of plain bf16 torch on these inputs."""
    oracle, peer = expected_of(inputs)
    off = target.gates_off
    raise_for(
        what, [gates.judge(case, n, metrics.compare(t, oracle[n]), peer[n], gates_off=off) for n, t in found.items()]
    )


def raise_for(what: str, judgements: list[gates.Judgement]) -> None:
    """GateFailed with the line of every judgement that is no PASS."""
    bad = [judgement for judgement in judgements if judgement.verdict is not gates.Verdict.PASS]
    if bad:
        exceeded = tuple(
            (gate.gate, gate.used)
            for judgement in bad
            for gate in judgement.gates
            if gate.verdict is not gates.Verdict.PASS
        )
        lines = [judgement.line.partition("\n")[0] for judgement in bad]
        raise GateFailed("\n".join([what, *lines]), exceeded)


def changed(inputs: Inputs, **tensors: Tensor) -> Inputs:
    """`inputs` with some tensors exchanged, LoRA tensors by their names; everything else is shared."""
    result = copy.copy(inputs)
    result.lora = {name: tensors.pop(name, tensor) for name, tensor in inputs.lora.items()}
    for name, tensor in tensors.items():
        setattr(result, name, tensor)
    return result


def reached(ids: Tensor) -> list[int]:
    """The experts that expert_ids name, ascending."""
    return sorted({int(expert) for expert in ids.reshape(-1) if expert >= 0})


# ---- shapes, dtypes and edge inputs


def check_edge(target: Target, case: Case) -> None:
    """Shapes and dtypes as docs/contract.md, "The layer", has them, values within the budgets."""
    inputs = make_inputs(case)
    found = target.run(case, inputs)
    shapes = tensor_shapes(case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank)
    lora_dtype = getattr(torch, case.lora_dtype)
    dtypes = {OUTPUT: torch.bfloat16, GRAD_INPUT: torch.bfloat16, GRAD_WEIGHTS: torch.float32}
    for name, tensor in found.items():
        dtype = dtypes.get(name, lora_dtype)
        target.expect(
            tuple(tensor.shape) == shapes[name], f"{name} is {list(tensor.shape)}, must be {list(shapes[name])}", "form"
        )
        target.expect(tensor.dtype == dtype, f"{name} is {tensor.dtype}, must be {dtype}", "form")
    judged(target, case.id, case, found, inputs)


def check_masked_weights_do_not_count(target: Target) -> None:
    """A slot of id -1 contributes nothing, whatever its routing weight is."""
    case = dataclasses.replace(SMALL, routing="masked")
    inputs = make_inputs(case)
    expected = target.run(case, inputs)
    masked = inputs.expert_ids < 0
    expect(bool(masked.any()), "the case masks nothing")
    for value in (0.0, 1e30, float("inf"), float("nan")):
        weights = torch.where(masked, torch.tensor(value), inputs.weights)
        found = target.run(case, changed(inputs, weights=weights))
        target.expect_same_bits(f"weight {value} in masked slots", expected, found)
        target.expect(not bool(found[GRAD_WEIGHTS][masked].any()), "grad_weights of masked slots must be zero", "stray")


def check_odd_addresses(target: Target, case: Case = MIDDLE) -> None:
    """Tensors one byte and one element off any alignment give the bits of aligned ones."""
    inputs = make_inputs(case)
    expected = target.run(case, inputs)
    for step in (1, 2, 4, 63):
        moved = _everywhere(inputs, lambda tensor: _at_offset(tensor, step))  # noqa: B023 - called at once
        expect(moved.hidden_states.data_ptr() % 64 == step, "the test did not get its address")
        target.expect_same_bits(f"{case.id} at addresses 64 n + {step}", expected, target.run(case, moved))


def _at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy whose first byte lies `offset` bytes after a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.empty(size + 128, dtype=torch.uint8).numpy()
    start = -buffer.ctypes.data % 64 + offset
    copied = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copied.copy_(tensor)


def _everywhere(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """`inputs` with every tensor that a layer takes put through `change`."""
    tensors = {name: change(getattr(inputs, name)) for name in (*TOKENS, *BASE_NAMES, "physical_map")}
    lora = {name: change(tensor) for name, tensor in inputs.lora.items()}
    return changed(inputs, **tensors, **lora)


def check_strides(target: Target) -> None:
    """Non-contiguous tensors are accepted and give the bits of contiguous ones; so do tensors that require grad."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else spaced(tensor)

    def spaced(tensor: Tensor) -> Tensor:
        wide = torch.zeros(*tensor.shape[:-1], 3 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., 1::3] = tensor
        return wide[..., 1::3]

    for change in (transposed, spaced):
        moved = _everywhere(inputs, change)
        expect(not moved.hidden_states.is_contiguous(), "the test made a contiguous tensor")
        # running.build_layer clones the LoRA tensors, which would make them contiguous
        layer = target.bare(MIDDLE)
        layer.load_weights_from_tensors(moved.gate_proj, moved.up_proj, moved.down_proj, moved.physical_map)
        layer.init_lora_weights(*moved.lora.values())
        target.expect_same_bits(change.__name__, expected, run_layer(layer, moved))

    def tracked(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor

    found = target.run(MIDDLE, _everywhere(inputs, tracked))
    target.expect_same_bits(
        "tensors that require grad", expected, {name: tensor.detach() for name, tensor in found.items()}
    )


# ---- the same bits


def check_repeats(target: Target, case: Case = MIDDLE) -> None:
    """The same call again, on the same layer and on a new one, gives the same bits."""
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)
    first = {name: tensor.clone() for name, tensor in run_layer(layer, inputs).items()}
    for _ in range(4):
        target.expect_same_bits("the same layer again", first, run_layer(layer, inputs))
    target.expect_same_bits("a new layer", first, target.run(case, inputs))


def check_threads(target: Target, case: Case = MIDDLE) -> None:
    """1, 2, 3 and more threads than there are processors give the same bits, for one token too."""
    for sized in (case, dataclasses.replace(case, qlen=1)):
        inputs = make_inputs(sized)
        expected = target.run(sized, inputs, threads=1)
        for threads in (2, 3, 16):
            found = target.run(sized, inputs, threads=threads)
            target.expect_same_bits(f"{sized.id} with 1 and {threads} threads", expected, found)


def check_company(target: Target) -> None:
    """What a token gets does not depend on which other tokens are in the call.

    Other tokens may change the order of a sum: engines that are `engines.strict` owe no more than that leaves, others
    what the oracle asks of the few alone.
    """
    inputs = make_inputs(MIDDLE)
    whole = target.run(MIDDLE, inputs)
    part = slice(3, 20)
    few = changed(inputs, **{name: getattr(inputs, name)[part] for name in TOKENS})
    found = target.run(MIDDLE, few)
    if not registry.strict(target.engine):
        judged(target, "17 tokens out of 70, by themselves", MIDDLE, found, few)
        return
    for name in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS):
        apart = metrics.compare(found[name], whole[name][part].double())
        budget = float(gates.tolerances()["tp"]["rel_l2"])
        target.expect(
            apart.rel_l2 <= budget,
            f"{name} of 17 tokens is {apart.rel_l2:.1e} from the same tokens among 70",
            "tp",
            apart.rel_l2 / budget,
        )


def check_outlier_token(target: Target) -> None:
    """One token 48 times as large as the others, as first tokens are in real models: the others are still computed.

    It alone makes up the norm, so rel_l2 is blind to all the rest; the mean is not.
    """
    case = Case.parse("E=2,k=2,H=96,I=96,T=300,r=8,alpha=16")
    inputs = make_inputs(case)
    inputs.hidden_states[0] *= 48
    judged(target, "a token 48 times as large as the others", case, target.run(case, inputs), inputs)


# ---- isolation


def check_non_finite_isolation(target: Target) -> None:
    """A NaN or Inf in one token's row reaches that token and the gradients of its experts, and nothing else."""
    # nine experts for two tokens' worth of slots: some experts never meet the broken token
    case = dataclasses.replace(MIDDLE, num_experts=9, qlen=21)
    inputs = make_inputs(case)
    clean = target.run(case, inputs)
    token = 7
    hit = reached(inputs.expert_ids[token])
    spared = [expert for expert in reached(inputs.expert_ids) if expert not in hit]
    expect(bool(spared), "the case has no expert that the token spares")
    others = [row for row in range(case.qlen) if row != token]
    for value in (float("nan"), float("inf"), float("-inf")):
        for name in ("hidden_states", "grad_output"):
            broken = getattr(inputs, name).clone()
            broken[token, 13] = value
            layer = target.layer(case, inputs)
            found = run_layer(layer, changed(inputs, **{name: broken}))
            what = f"{value} in {name}[{token}, 13]"
            for tensor in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS):
                target.expect(
                    same_bits(clean[tensor][others], found[tensor][others]),
                    f"{what} reached other rows of {tensor}",
                    "bits",
                )
            for tensor in GRAD_NAMES:
                same = same_bits(clean[tensor][spared], found[tensor][spared])
                target.expect(same, f"{what} reached {tensor} of experts that the token was not routed to", "bits")
            shown = found[OUTPUT] if name == "hidden_states" else found[GRAD_INPUT]
            target.expect(not bool(torch.isfinite(shown[token]).all()), f"{what} was hidden", "hidden_non_finite")
            # nothing of it may be left in a buffer
            target.expect_same_bits(f"the call after {what}", clean, run_layer(layer, inputs))


def check_idle_experts(target: Target) -> None:
    """Experts without a token have gradients of exactly zero, also after a call that reached them, and whatever the
    caller wrote into the gradients of that call before it dropped them."""
    inputs = make_inputs(MIDDLE)
    layer = target.layer(MIDDLE, inputs)
    for idle in ([5], [0], [1, 2, 3], [4], list(range(1, 6))):
        for gradient in run_layer(layer, inputs).values():
            gradient.fill_(math.nan)
        busy = [expert for expert in range(MIDDLE.num_experts) if expert not in idle]
        ids = torch.tensor(busy)[inputs.expert_ids % len(busy)]
        found = run_layer(layer, changed(inputs, expert_ids=ids))
        for name in GRAD_NAMES:
            left = int(torch.count_nonzero(found[name][idle]))
            target.expect(left == 0, f"{name} of the idle experts {idle} has {left} elements other than 0", "stray")
            target.expect(bool(found[name][busy].any()), f"{name} of the busy experts {busy} is all zero", "bits")


def check_nothing_is_written(target: Target, case: Case = MIDDLE) -> None:
    """The inputs are the same bytes after the calls, and earlier results are not overwritten by later calls."""
    inputs, other = make_inputs(case), make_inputs(case.with_seed(9))
    # each tensor lies between guards, so that a write beside it shows
    guards: list[tuple[str, Tensor, Tensor]] = []

    def guarded(tensor: Tensor) -> Tensor:
        size, margin = tensor.numel() * tensor.element_size(), 4096
        buffer = torch.full((size + 2 * margin,), 0xA5, dtype=torch.uint8)
        inner = buffer[margin : margin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        guards.append((f"tensor of shape {list(tensor.shape)}", buffer, buffer.clone()))
        return inner

    watched = _everywhere(inputs, guarded)
    layer = target.layer(case, watched)
    first = run_layer(layer, watched)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = run_layer(layer, changed(other, **watched.lora))
    third = run_layer(layer, watched)
    target.expect_same_bits("the first results after later calls", kept, first, gate="written")
    places: dict[int, str] = {}
    for call, results in enumerate((first, second, third)):
        for name, tensor in results.items():
            where = f"{name} of call {call}"
            target.expect(
                tensor.data_ptr() not in places, f"{where} lies where {places.get(tensor.data_ptr())} lies", "written"
            )
            places[tensor.data_ptr()] = where
    for what, buffer, before in guards:
        target.expect(bool(torch.equal(buffer, before)), f"an input was written to, or beside: {what}", "written")
    for name, tensor in layer_parameters(layer).items():
        target.expect(
            same_bits(tensor, watched.lora[name]), f"{name}, the optimizer's, was changed by a call", "written"
        )


def layer_parameters(layer: object) -> Tensors:
    """The tensors that an optimizer steps, by LORA_NAMES."""
    return {name: getattr(layer, name).detach() for name in LORA_NAMES}


# ---- several calls, several layers


def check_two_layers(target: Target) -> None:
    """Layers of different sizes, their calls interleaved, give the bits that each gives alone."""
    every = [make_inputs(case) for case in (SMALL, MIDDLE, WIDE)]
    alone = [target.run(inputs.case, inputs) for inputs in every]
    layers = [target.layer(inputs.case, inputs) for inputs in every]
    for _ in range(2):
        outputs = [
            layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=True)
            for layer, inputs in zip(layers, every, strict=True)
        ]
        for index in (1, 0, 2):
            found = _backward(layers[index], every[index], outputs[index])
            target.expect_same_bits(f"layer {index} of three, interleaved", alone[index], found)
    # the buffers of a layer that is gone must not be what another one still uses
    del layers[1]
    gc.collect()
    target.expect_same_bits("after another layer was deleted", alone[0], run_layer(layers[0], every[0]))


def _backward(layer: object, inputs: Inputs, output: Tensor) -> Tensors:
    grad_input, gradients = layer.backward(inputs.grad_output)  # type: ignore[attr-defined]
    grad_weights: Tensor = layer.grad_weights  # type: ignore[attr-defined]
    return {OUTPUT: output, GRAD_INPUT: grad_input, **gradients, GRAD_WEIGHTS: grad_weights}


def check_outstanding_forwards(target: Target) -> None:
    """max_cache_depth forwards may be outstanding, backward takes the newest first, unsaved forwards do not count."""
    depth = 3
    inputs = make_inputs(MIDDLE)
    batches = []
    for seed, rows in ((1, 70), (2, 5), (3, 33), (4, 1), (5, 33)):
        drawn = make_inputs(MIDDLE.with_seed(seed))
        batches.append(changed(inputs, **{name: getattr(drawn, name)[:rows] for name in TOKENS}))
    alone = [target.run(MIDDLE, batch) for batch in batches]
    layer = target.layer(MIDDLE, inputs, max_cache_depth=depth)

    def forward(index: int, save: bool = True) -> Tensor:
        batch = batches[index]
        output: Tensor = layer.forward_sft(batch.hidden_states, batch.expert_ids, batch.weights, save_for_backward=save)
        target.expect(
            same_bits(output, alone[index][OUTPUT]),
            f"output of batch {index} is another with others outstanding",
            "bits",
        )
        return output

    def backward(index: int) -> None:
        found = _backward(layer, batches[index], alone[index][OUTPUT])
        target.expect_same_bits(f"backward of batch {index}, newest first", alone[index], found)

    # 2 and 4 have as many rows: only their order tells them apart
    for order in ((0, 1, 2), (2, 3, 0), (1, 1, 3), (2, 4, 3)):
        for index in order:
            forward(index)
            forward(3, save=False)
        for index in reversed(order):
            forward(0, save=False)
            backward(index)
    # up and down, not only all the way up
    forward(0)
    forward(1)
    backward(1)
    forward(2)
    forward(3)
    backward(3)
    backward(2)
    backward(0)


def check_clear_cache(target: Target) -> None:
    """clear_sft_buffer_cache at any moment changes no bit."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)
    layer = target.layer(MIDDLE, inputs)
    layer.clear_sft_buffer_cache()
    target.expect_same_bits("cleared before the first call", expected, run_layer(layer, inputs))
    layer.clear_sft_buffer_cache()
    layer.clear_sft_buffer_cache()
    target.expect_same_bits("cleared twice between calls", expected, run_layer(layer, inputs))
    output = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=True)
    layer.clear_sft_buffer_cache()
    target.expect_same_bits("cleared between forward and backward", expected, _backward(layer, inputs, output))


def check_varying_tokens(target: Target, case: Case = MIDDLE) -> None:
    """One layer, calls of many lengths up and down: no value is left over from a longer call."""
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)
    for rows in (70, 1, 0, 33, 2, 70, 16, 31):
        batch = changed(inputs, **{name: getattr(inputs, name)[:rows] for name in TOKENS})
        target.expect_same_bits(f"{rows} rows", target.run(case, batch), run_layer(layer, batch))


def check_gradient_accumulation(target: Target) -> None:
    """Gradients of four micro-batches, summed in fp32, err no more than one call on all of them may."""
    case = dataclasses.replace(MIDDLE, lora_dtype="float32", qlen=64)
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)
    total = {name: torch.zeros(inputs.lora[name].shape) for name in LORA_NAMES}
    for begin in range(0, case.qlen, 16):
        part = slice(begin, begin + 16)
        found = run_layer(layer, changed(inputs, **{name: getattr(inputs, name)[part] for name in TOKENS}))
        for name in LORA_NAMES:
            total[name] += found[f"grad_{name}"].float()
    judged(target, "four micro-batches", case, {f"grad_{name}": tensor for name, tensor in total.items()}, inputs)


def check_reload(target: Target) -> None:
    """Loading other weights into a used layer leaves nothing of the old ones."""
    inputs, other = make_inputs(MIDDLE), make_inputs(MIDDLE.with_seed(4))
    layer = target.layer(MIDDLE, inputs)
    run_layer(layer, inputs)
    layer.load_weights_from_tensors(other.gate_proj, other.up_proj, other.down_proj, other.physical_map)
    layer.init_lora_weights(*(other.lora[name].clone() for name in LORA_NAMES))
    target.expect_same_bits("a used layer with new weights", target.run(MIDDLE, other), run_layer(layer, other))


def check_physical_map(target: Target) -> None:
    """Slots in another order, with the map that says so, change no bit; the map is not ignored."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)
    order = torch.tensor([3, 5, 0, 1, 4, 2])

    def load(physical_map: Tensor) -> Tensors:
        layer = target.bare(MIDDLE)
        layer.load_weights_from_tensors(*(getattr(inputs, name)[order] for name in BASE_NAMES), physical_map)
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
        return run_layer(layer, inputs)

    target.expect_same_bits("physical_map [3, 5, 0, 1, 4, 2]", expected, load(order))
    target.expect(not same_bits(load(torch.arange(6))[OUTPUT], expected[OUTPUT]), "physical_map is ignored", "bits")


def check_failed_update(target: Target) -> None:
    """update_lora_weights that meets one bad parameter takes none: never a mixture."""
    inputs, other = make_inputs(MIDDLE), make_inputs(MIDDLE.with_seed(6))
    layer = target.layer(MIDDLE, inputs)
    before = run_layer(layer, inputs)
    for name in LORA_NAMES:
        good = {each: other.lora[each].clone() for each in LORA_NAMES}
        for bad in (good[name][:, :-1], good[name].half(), None):
            for each in LORA_NAMES:
                setattr(layer, each, good[each])
            setattr(layer, name, bad)
            try:
                layer.update_lora_weights()
            except (ValueError, TypeError) as error:
                target.expect(name in str(error), f"the error must name {name}, it says {error}", "refusal")
            else:
                target.accepted(f"update_lora_weights with a bad {name}")
            target.expect_same_bits(f"after a refused update, {name} bad", before, run_layer(layer, inputs))
    for each in LORA_NAMES:
        setattr(layer, each, other.lora[each].clone())
    layer.update_lora_weights()
    found = run_layer(layer, inputs)
    target.expect_same_bits("after the update that worked", target.run(MIDDLE, changed(inputs, **other.lora)), found)


def check_skip_lora(target: Target) -> None:
    """…_SkipLoRA: the same output; grad_input without the LoRA terms; LoRA gradients zero."""
    inputs = make_inputs(MIDDLE)
    method = "AMXBF16_SFT_SkipLoRA"
    found = target.run(MIDDLE, inputs, method=method)
    full = target.run(MIDDLE, inputs)
    target.expect(
        same_bits(found[OUTPUT], full[OUTPUT]), f"{method}: the output is another than without SkipLoRA", "bits"
    )
    for name in GRAD_NAMES:
        target.expect(not bool(found[name].any()), f"{method}: {name} must be zero", "stray")
    oracle = reference.forward_backward(inputs, skip_lora=True)
    plain = Target("torch_bf16").run(MIDDLE, inputs, method=method)
    for name in (GRAD_INPUT, GRAD_WEIGHTS):
        peer = metrics.compare(plain[name], oracle[name]).rel_l2
        judgement = gates.judge(
            MIDDLE, name, metrics.compare(found[name], oracle[name]), peer, gates_off=target.gates_off
        )
        raise_for(method, [judgement])
    whole = reference.forward_backward(inputs)
    apart = metrics.compare(oracle[GRAD_INPUT], whole[GRAD_INPUT]).rel_l2
    expect(apart > gates.tolerances()["check"]["tells"], "the case cannot tell whether the LoRA terms are there")
