"""What docs/contract.md demands beyond right numbers: the same bits, isolation, no leftovers, waiting forwards."""

from __future__ import annotations

import dataclasses
import gc

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import TOKENS, changed, everywhere, rows_of
from ktverify.checks.causes import Cause
from ktverify.checks.check import check
from ktverify.checks.judging import ALONE, NUMBERS, SAME_BITS, expect_forms, judged, raise_for, share_memory
from ktverify.checks.problem import live_oracle
from ktverify.checks.target import MIDDLE, ODD_MIDDLE, SMALL, WIDE, Target, expect, same_bits
from ktverify.engines.run import backward_of, forward, run_layer
from ktverify.isolation.hosted import seen
from ktverify.judge import gates, metrics, reference
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

Tensors = dict[str, Tensor]


@check("behaviour", SAME_BITS, cause=Cause.STALE_VALUES, variants={"": {}, "_at_odd_sizes": {"case": ODD_MIDDLE}})
def check_repeats(target: Target, case: Case = MIDDLE) -> None:
    """The same call again, on the same layer and on a new one, gives the same bits."""
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)
    first = {name: tensor.clone() for name, tensor in run_layer(layer, inputs).items()}
    for _ in range(4):
        again = run_layer(layer, inputs)
        how, cause = _difference(first, again)
        target.expect_same_bits(f"the same layer again{how}", first, again, cause=cause)
    target.expect_same_bits("a new layer", first, target.run(case, inputs), cause=Cause.THREADS)


def _difference(first: Tensors, again: Tensors) -> tuple[str, Cause]:
    """How a repeated call differs, and what that suggests: another order of sums, or values of the call before."""
    if all(metrics.compare(again[name], tensor.double()).rel_l2 < 1e-2 for name, tensor in first.items()):
        return ", which differs by no more than an order of sums", Cause.THREADS
    odd = [(again[name] - tensor, tensor) for name, tensor in first.items() if not same_bits(again[name], tensor)]
    added = all(torch.allclose(change.float(), tensor.float(), rtol=0.05) for change, tensor in odd)
    return ", which adds the results of the first call" if added else "", Cause.STALE_VALUES


@check(
    "behaviour",
    SAME_BITS,
    cause=Cause.THREADS,
    variants={"": {}, "_at_odd_sizes": {"case": ODD_MIDDLE}, "_fewer_than_parts": {"tp": 4}},
)
def check_threads(target: Target, case: Case = MIDDLE, tp: int = 1) -> None:
    """The same bits with 1, 2, 3 and 16 threads, also for a single token, and with more tensor-parallel parts than
    threads."""
    for sized in (case, dataclasses.replace(case, qlen=1)):
        inputs = make_inputs(sized)
        expected = target.run(sized, inputs, threads=16, tp=tp)
        for threads in (1, 2, 3):
            found = target.run(sized, inputs, threads=threads, tp=tp)
            target.expect_same_bits(f"{sized.id} with 16 and {threads} threads", expected, found)


@check("behaviour", ALONE, gates=(*NUMBERS, "tp"), cause=Cause.TOKEN_TAIL)
def check_company(target: Target) -> None:
    """What a token gets does not depend on which other tokens are in the call.

    Other tokens may change the order of a sum: engines that claim fp32 sums owe no more than that leaves, others
    what the oracle asks of the few alone.
    """
    inputs = make_inputs(MIDDLE)
    whole = target.run(MIDDLE, inputs)
    part = slice(3, 20)
    few = rows_of(inputs, part)
    found = target.run(MIDDLE, few)
    if not target.strict:
        judged(target, "17 tokens out of 70, by themselves", MIDDLE, found, few)
        return
    for name in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS):
        apart = metrics.compare(found[name], whole[name][part].double())
        budget = float(gates.tolerances()["tp"]["rel_l2"])
        what = f"{name} of 17 tokens is {apart.rel_l2:.1e} from the same tokens among 70"
        target.expect(apart.rel_l2 <= budget, what, "tp", apart.rel_l2 / budget)


@check(
    "behaviour",
    "Inputs, parameters and earlier results are never written to.",
    gates=("written",),
    cause=Cause.MEMORY_LAYOUT,
    variants={"": {}, "_at_odd_sizes": {"case": ODD_MIDDLE}},
)
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

    watched = everywhere(inputs, guarded)
    layer = target.layer(case, watched)
    first = run_layer(layer, watched)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = run_layer(layer, changed(other, **watched.lora))
    third = run_layer(layer, watched)
    seen(layer)
    stale = Cause.STALE_VALUES
    target.expect_same_bits("the first results after later calls", kept, first, gate="written", cause=stale)
    places: dict[str, Tensor] = {}
    for call, results in enumerate((first, second, third)):
        for name, tensor in results.items():
            where = f"{name} of call {call}"
            shared = next((what for what, place in places.items() if share_memory(tensor, place)), "")
            target.expect(not shared, f"{where} lies where {shared} lies", "written", cause=stale)
            places[where] = tensor
    for what, buffer, before in guards:
        target.expect(bool(torch.equal(buffer, before)), f"an input was written to, or beside: {what}", "written")
    for name in LORA_NAMES:
        what = f"{name}, the optimizer's, was changed by a call"
        target.expect(same_bits(getattr(layer, name).detach(), watched.lora[name]), what, "written")


@check("behaviour", SAME_BITS, cause=Cause.STALE_VALUES)
def check_two_layers(target: Target) -> None:
    """Layers of different sizes, their calls interleaved, give the bits that each gives alone."""
    every = [make_inputs(case) for case in (SMALL, MIDDLE, WIDE)]
    alone = [target.run(inputs.case, inputs) for inputs in every]
    layers = [target.layer(inputs.case, inputs) for inputs in every]
    for _ in range(2):
        outputs = [forward(layer, inputs, save=True) for layer, inputs in zip(layers, every, strict=True)]
        for index in (1, 0, 2):
            found = {OUTPUT: outputs[index], **backward_of(layers[index], every[index])}
            target.expect_same_bits(f"layer {index} of three, interleaved", alone[index], found)
    # the buffers of a layer that is gone must not be what another one still uses
    del layers[1]
    gc.collect()
    target.expect_same_bits("after another layer was deleted", alone[0], run_layer(layers[0], every[0]))


@check(
    "behaviour",
    "Up to max_cache_depth (default 1) saved forwards may wait for their backward; others do not count",
    cause=Cause.ORDER,
)
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

    def call(index: int, save: bool = True) -> None:
        output = forward(layer, batches[index], save=save)
        what, cause = f"output of batch {index} is another with others outstanding", Cause.ORDER
        if not save:
            what, cause = f"{what}, without save_for_backward (is a dropout on?)", Cause.OTHER
        target.expect(same_bits(output, alone[index][OUTPUT]), what, "bits", cause=cause)

    def backward(index: int) -> None:
        found = {OUTPUT: alone[index][OUTPUT], **backward_of(layer, batches[index])}
        gives = [i for i, other in enumerate(alone) if all(same_bits(other[name], found[name]) for name in GRAD_NAMES)]
        other = f" (it gives the gradients of batch {gives[0]})" if gives and index not in gives else ""
        target.expect_same_bits(f"backward of batch {index}, newest first{other}", alone[index], found)

    # 2 and 4 have as many rows: only their order distinguishes them
    for order in ((0, 1, 2), (2, 3, 0), (1, 1, 3), (2, 4, 3)):
        for index in order:
            call(index)
            call(3, save=False)
        for index in reversed(order):
            call(0, save=False)
            backward(index)
    # up and down, not only all the way up
    for step, index in (
        (call, 0),
        (call, 1),
        (backward, 1),
        (call, 2),
        (call, 3),
        (backward, 3),
        (backward, 2),
        (backward, 0),
    ):
        step(index)


@check("behaviour", "gives memory back; changes no bit at any moment", cause=Cause.ORDER)
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
    output = forward(layer, inputs, save=True)
    layer.clear_sft_buffer_cache()
    found = {OUTPUT: output, **backward_of(layer, inputs)}
    target.expect_same_bits("cleared between forward and backward", expected, found)


@check("behaviour", SAME_BITS, cause=Cause.STALE_VALUES, variants={"": {}, "_at_odd_sizes": {"case": ODD_MIDDLE}})
def check_varying_tokens(target: Target, case: Case = MIDDLE) -> None:
    """One layer, calls of many lengths up and down: no value is left over from a longer call."""
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)
    for rows in (70, 1, 0, 33, 2, 70, 16, 31):
        batch = rows_of(inputs, slice(rows))
        target.expect_same_bits(f"{rows} rows", target.run(case, batch), run_layer(layer, batch))


@check(
    "behaviour",
    "Gradients of several backwards, summed by the caller in fp32, err no more than one backward of all their tokens "
    "may.",
    gates=NUMBERS,
    cause=Cause.STALE_VALUES,
)
def check_gradient_accumulation(target: Target) -> None:
    """Gradients of four micro-batches, summed in fp32, err no more than one call on all of them may."""
    case = dataclasses.replace(MIDDLE, lora_dtype="float32", qlen=64)
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)
    total = {name: torch.zeros(inputs.lora[name].shape) for name in LORA_NAMES}
    for begin in range(0, case.qlen, 16):
        found = run_layer(layer, rows_of(inputs, slice(begin, begin + 16)))
        for name in LORA_NAMES:
            total[name] += found[f"grad_{name}"].float()
    judged(target, "four micro-batches", case, {f"grad_{name}": tensor for name, tensor in total.items()}, inputs)


@check("behaviour", "none of the six is taken over", gates=("refusal", "bits"), cause=Cause.STALE_LORA)
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


@check(
    "behaviour",
    "Method AMXBF16_SFT_SkipLoRA has the same output and the same routing gradient; its backward leaves every LoRA "
    "term out, and the LoRA gradients are 0.",
    gates=(*NUMBERS, "bits"),
)
def check_skip_lora(target: Target) -> None:
    """…_SkipLoRA: the same output; grad_input without the LoRA terms; LoRA gradients zero."""
    inputs = make_inputs(MIDDLE)
    method = "AMXBF16_SFT_SkipLoRA"
    found = target.run(MIDDLE, inputs, method=method)
    full = target.run(MIDDLE, inputs)
    expect_forms(target, method, found, inputs)
    what = f"{method}: the output is another than without SkipLoRA"
    target.expect(same_bits(found[OUTPUT], full[OUTPUT]), what, "bits")
    for name in GRAD_NAMES:
        target.expect(not bool(found[name].any()), f"{method}: {name} must be zero", "stray")
    oracle = reference.forward_backward(inputs, skip_lora=True)
    for name in (GRAD_INPUT, GRAD_WEIGHTS):
        rounding = live_oracle(inputs).rounding[name]
        difference = metrics.compare(found[name], oracle[name])
        raise_for(method, [gates.judge(MIDDLE, name, difference, rounding, gates_off=target.gates_off)])
    whole = reference.forward_backward(inputs)
    apart = metrics.compare(oracle[GRAD_INPUT], whole[GRAD_INPUT]).rel_l2
    expect(
        apart > gates.tolerances()["check"]["least_difference"], "the case cannot show whether the LoRA terms are there"
    )
