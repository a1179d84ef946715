"""docs/contract.md, sentence by sentence: each has a check, or a reason why it can have none; so has each argument."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from ktverify.checks import registry
from ktverify.engines.argument_checks import LayerSpec
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.system.files import ROOT

# ---- sentences that are asked, but not by a check whose own sentence they are: sentence -> checks
EVERY_CASE = ("forward/small", "backward/small")
MADE_INT8, MADE_INT4, MADE_FP8 = ((f"quantised/made_of_bf16/{label}",) for label in ("int8", "int4_32", "fp8"))
ORDER = ("property/permuted_tokens", "property/permuted_slots", "property/permuted_experts")
ASKED_BY: dict[str, tuple[str, ...]] = {
    "hidden_states, output; grad_output, grad_input | [T, H] | bf16": (
        "edge/one_token",
        "refusals/hidden_states dtype",
    ),
    "expert_ids | [T, k] | int64, 0 to E − 1, or −1": ("refusals/expert_ids dtype", "refusals/expert id 6"),
    "weights (of the routing), grad_weights | [T, k] | fp32": ("edge/one_token", "refusals/weights dtype"),
    "gate_proj, up_proj; down_proj | [E, I, H]; [E, H, I] | bf16, frozen": (
        "refusals/gate_proj transposed",
        "behaviour/nothing_is_written",
    ),
    "gate_lora_a, up_lora_a; gate_lora_b, up_lora_b | [E, r, H]; [E, I, r] | bf16 or fp32, all six the same": (
        "refusals/gate_lora_a transposed",
        "refusals/LoRA of two dtypes",
        "edge/multiples_of_nothing_many_rows",
    ),
    "down_lora_a; down_lora_b | [E, r, I]; [E, H, r] | as above": ("refusals/down_lora_a transposed",),
    "the six LoRA gradients, grad_gate_lora_a … | their parameter's | their parameter's": (
        "edge/multiples_of_nothing_many_rows",
    ),
    "A result is a plain tensor of torch on the CPU.": EVERY_CASE,
    "It shares no memory with an argument, another result or an earlier one.": (
        *EVERY_CASE,
        "behaviour/nothing_is_written",
    ),
    "g = x Gᵀ + s (x A_gᵀ) B_gᵀ u = x Uᵀ + s (x A_uᵀ) B_uᵀ": EVERY_CASE,
    "h = g · σ(g) · u y = h Dᵀ + s (h A_dᵀ) B_dᵀ": EVERY_CASE,
    "A token's output is the sum of its slots' y, each times its routing weight w.": EVERY_CASE,
    "dh = dy D + s (dy B_d) A_d": EVERY_CASE,
    "dg = dh · u · σ(g) (1 + g (1 − σ(g))) du = dh · g · σ(g)": EVERY_CASE,
    "dx = dg G + s (dg B_g) A_g + du U + s (du B_u) A_u": EVERY_CASE,
    "grad_down_lora_b = s dyᵀ (h A_dᵀ) grad_down_lora_a = s (dy B_d)ᵀ h": EVERY_CASE,
    "grad_gate_lora_b = s dgᵀ (x A_gᵀ) grad_gate_lora_a = s (dg B_g)ᵀ x": EVERY_CASE,
    "grad_up_lora_b = s duᵀ (x A_uᵀ) grad_up_lora_a = s (du B_u)ᵀ x": EVERY_CASE,
    "grad_input of a token = Σ dx over its slots grad_weights[t, j] = ⟨dO[t], y of slot j⟩": EVERY_CASE,
    "Two slots of a token may name the same expert.": ("edge/expert_named_twice",),
    "An engine under strict limits gives its bits, at every tensor-parallel degree; any other keeps its budget.": (
        "exact/exact_small",
        "tp/integer",
    ),
    "threadpool_count is the tensor-parallel degree: I is split evenly.": ("tp/gaussian", "tp_constraint/2049/2"),
    "base weights by slot; physical_map [E] int64: slot p contains logical expert physical_map[p].": (
        "behaviour/physical_map",
    ),
    "the six tensors, in the order gate a, b, up a, b, down a, b; they become layer.gate_lora_a … layer.down_lora_b, "
    "the parameters that an optimizer steps.": ("training/update", "training/fp32_parameters"),
    "output.": EVERY_CASE,
    "of the newest waiting forward: grad_input and a dict of exactly the six LoRA gradients; layer.grad_weights is "
    "then the routing gradient": ("behaviour/outstanding_forwards", "backward/small"),
    "It is the memory of the buffers that all layers of a process share; no saved forward is in it": (
        "behaviour/clear_cache",
        "processes/cleared_memory_comes_back",
    ),
    "The error is one line that names the argument, what it got and what it takes; it has exactly the class below, not "
    "one derived from it; afterwards the layer gives the bits it gave before, and a forward that was waiting still has "
    "its backward.": ("refusals/k above E", "refusals/grad_output columns"),
    "unknown mode or method | ValueError that lists the known ones": (
        "refusals/mode unknown",
        "refusals/method unknown",
    ),
    "a size, rank, cache depth or thread count of 0 or less; k above E; alpha not finite or not above 0; dropout "
    "outside [0, 1) | ValueError": (
        "refusals/hidden_size 0",
        "refusals/lora_rank -3",
        "refusals/max_cache_depth 0",
        "refusals/cpuinfer_threads -3",
        "refusals/k above E",
        "refusals/lora_alpha inf",
        "refusals/lora_dropout 1.0",
    ),
    "… of another dtype or device, or no tensor; LoRA tensors of two dtypes | ValueError or TypeError": (
        "refusals/gate_proj dtype",
        "refusals/up_lora_a device",
        "refusals/gate_proj no tensor",
        "refusals/LoRA of two dtypes",
    ),
    "physical_map that is no permutation of 0 … E − 1 | ValueError": (
        "refusals/physical_map twice",
        "refusals/physical_map negative",
    ),
    "… of another dtype or device, or no tensor | ValueError or TypeError": (
        "refusals/weights float64",
        "refusals/hidden_states device",
        "refusals/expert_ids None",
        "quantised_refusals/fp8 codes of bytes",
        "refusals/grad_output dtype",
        "refusals/grad_output None",
    ),
    "an id of E or more, or below −1 | ValueError with its position": ("refusals/expert id 6", "refusals/expert id -2"),
    "one saved forward more than max_cache_depth | RuntimeError": ("refusals/two forwards outstanding",),
    "backward without a saved forward, or a second one of it | RuntimeError that names the call": (
        "refusals/backward without forward",
        "refusals/backward twice",
    ),
    "grad_output of another number of rows | ValueError or RuntimeError": ("refusals/grad_output too few rows",),
    "… of another width, number of dimensions | ValueError": (
        "refusals/grad_output columns",
        "refusals/grad_output dimensions",
    ),
    "update_lora_weights with a parameter of another shape, dtype, or none": ("behaviour/failed_update",),
    "AMXFP8_SFT | float8_e4m3fn [E, N, K] | fp32 [E, ⌈N / 128⌉, ⌈K / 128⌉], of 128 × 128 weights": (
        "quantised/weights/fp8",
        "quantised_refusals/fp8 codes of bytes",
    ),
    "AMXINT8_SFT | int8 [E, N, K] | fp32 [E, N], of a row": ("quantised/weights/int8",),
    "AMXINT4_SFT | int32 [E, N, K / 8], eight codes each, the first in the lowest four bits; q is the code less 8 | "
    "bf16, fp16 or fp32 [E, N, K / group], group 32 or 128; zero points, where given, int8 of this shape, −8 to 7": (
        "quantised/weights/int4_32",
        "quantised/weights/int4_128",
        "quantised/weights/int4_zeros",
        "quantised/weights/int4_fp16",
        "quantised/weights/int4_fp32",
    ),
    "MXFP4_SFT | uint8 [E, N, K / 2], two codes of e2m1 each, the first in the lower half | e8m0 as uint8 "
    "[E, N, K / 32]": ("quantised/weights/mxfp4",),
    "def int8(w):": MADE_INT8,
    "s = w.float().abs().amax(1, keepdim=True) / 127": MADE_INT8,
    "return (w.float() / s).round().clamp(-127, 127), s": MADE_INT8,
    "def int4(w, group):": MADE_INT4,
    "g = w.float().unflatten(1, (-1, group))": MADE_INT4,
    "s = (g.abs().amax(2, keepdim=True) / 7).bfloat16().float()": MADE_INT4,
    "return (g / s).round().clamp(-8, 7), s": MADE_INT4,
    "def fp8(w):": MADE_FP8,
    "b = pad(w.float(), (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))"
    ".unflatten(1, (-1, 128)).unflatten(0, (-1, 128))": MADE_FP8,
    "s = b.abs().amax((1, 3), keepdim=True) / 448": MADE_FP8,
    "return (b / s).clamp(-448, 448).to(torch.float8_e4m3fn), s": MADE_FP8,
    "s = s.where(s != 0, 1)": (*MADE_INT8, *MADE_INT4, *MADE_FP8),
    "round and to take the nearest number, of two the even one.": (*MADE_INT8, *MADE_INT4, *MADE_FP8),
    "A row, group or block of zeros has the scale 1.": (*MADE_INT8, *MADE_INT4, *MADE_FP8),
    "pad is torch.nn.functional's: a block at an edge has fewer weights.": MADE_FP8,
    "The methods of this table, each also with _SkipLoRA, take the base weights as codes: a matrix [N, K] of each of E "
    "experts as here, by slot, in load_weights_from_tensors(gate_proj, up_proj, down_proj, physical_map, "
    "scales=(gate, up, down), zero_points=None).": ("quantised/same_bits/fp8", "quantised/same_bits/int4_zeros"),
    "gpu_experts_mask of another shape, or of another number than num_gpu_experts (native alone) | ValueError": (
        "refusals/gpu_experts_mask too short",
        "refusals/gpu_experts_mask of another number",
    ),
    "gpu_experts_mask that is no tensor or list of bool, gpu_device that is no text (native alone) | ValueError or "
    "TypeError": ("refusals/gpu_experts_mask dtype", "refusals/gpu_device no text"),
    "gpu_device that torch does not know (native alone) | ValueError": ("refusals/gpu_device unknown",),
    "gpu_device that is not there (native alone) | RuntimeError": ("refusals/gpu_device not there",),
    "With gpu_experts_mask, bool [E], torch computes the experts of the mask on gpu_device, cuda:N or cpu, and the "
    "engine the others; num_gpu_experts=n names the first n.": ("hybrid/masks/one", "hybrid/count"),
    "Both directions read the same W.": ("quantised/weights/fp8", "quantised/weights/int4_32"),
    "Another engine whose backward takes accumulate is asked for the same, within its own budget.": (
        "property/accumulated_gradients",
    ),
    "Tokens, slots or experts in another order: the same bits wherever no sum changes its order.": ORDER,
}

# ---- sentences that no check can ask: sentence -> why
A_HEADING, A_NAME, SAID_LATER = "says what follows", "defines a word or a symbol", "later sentences say it exactly"
OF_THE_SUITES = "is about the suites; tests of this project ask it"
PERMITTED = "permits roundings, which every budget of numbers is made of; tests/judge/test_rounding.py draws them"
EXPLAINS: dict[str, str] = {
    "Version 1.0.": OF_THE_SUITES,
    "What a layer has to compute, how it is called, and what it refuses.": A_HEADING,
    "The oracle (ktverify/judge/reference.py), the checks in suites/ and the engine follow this page; an engine of "
    "your own is judged by it.": OF_THE_SUITES,
    "What an engine cannot do it declares by NotImplementedError: that counts as UNSUPPORTED, not as a failure.": (
        OF_THE_SUITES
    ),
    "One that torch raises declares nothing.": OF_THE_SUITES,
    "T tokens (*qlen*), E experts, k experts a token, H hidden, I intermediate, r LoRA rank; s = lora_alpha / "
    "r.": A_NAME,
    "One expert, with the rows x [n, H] of the tokens that name it; G, U, D are its base matrices, A and B its LoRA:": (
        A_NAME
    ),
    "Backward, with dO the rows of grad_output and dy = w · dO:": A_NAME,
    "How far a result may be from fp64, and why, is in [ktverify/judge/tolerances.toml](../ktverify/judge/"
    "tolerances.toml); rel_l2 and mean_rel are defined in ktverify/judge/metrics.py.": A_NAME,
    "Strict limits are for the native engine and any whose factory says fp32_sums = True: keeping them takes bf16 "
    "operands, fp32 wherever a sum is formed, also over experts and over gate and up, and one rounding where a result "
    "is stored.": "explains the strict limits; the gate rel_l2_own is one of every case",
    "That leaves a relative L2 error of about 2.4e-3 forward and at most 3e-3 to 3.5e-3 backward, where torch, written "
    "op by op in bf16, has 4.5e-3 to 7e-3.": "explains the strict limits by measurements",
    "Beyond the size of the error, every engine owes this:": A_HEADING,
    "lora_dropout is peft's: each LoRA drops elements of its own input, x for gate and for up, h for down, in forwards "
    "with save_for_backward=True.": SAID_LATER,
    "With the probability p:": A_HEADING,
    "An engine that has no such method declares it, or refuses it as unknown: both are UNSUPPORTED.": OF_THE_SUITES,
    "An engine that takes no mask declares it, refuses the argument as unknown, or has no set_gpu_experts_mask: each "
    "is UNSUPPORTED.": OF_THE_SUITES,
    "The suites pass gpu_experts_mask and gpu_device only in these checks, with cpu, which stands in for a GPU through "
    "the same code.": OF_THE_SUITES,
    "Of n processes (ranks), rank i has experts ⌊i E / n⌋ to ⌊(i + 1) E / n⌋ − 1 in a layer of its own; each row of "
    "its calls has one slot with the weight 1. ktverify/engines/expert_parallel.py sends rows to the ranks of their "
    "experts and back as bf16.": SAID_LATER,
    "An engine that declares that it cannot compute such a layer is UNSUPPORTED.": OF_THE_SUITES,
    "The suites make two, three and four ranks; the engine's layers of all ranks are in one process.": OF_THE_SUITES,
    "The README shows them in order.": A_HEADING,
    "An engine is any callable that takes the constructor's keyword arguments and returns an object with the "
    "methods.": ("every check does it"),
    "The suites pass max_cache_depth and lora_dropout only where a check is about them, and isa only where the factory "
    "names its isas.": OF_THE_SUITES,
    "These are checked of native alone:": A_HEADING,
    "A right engine may round to bf16 at all of these points, or at some of them:": PERMITTED,
    "an operand | w; A and B where they are fp32; LoRA's input after dropout; every value below, each "
    "time that it is used": PERMITTED,
    "a product with a matrix | x Gᵀ, x A_gᵀ, (x A_gᵀ) B_gᵀ, dy D, dyᵀ (h A_dᵀ) …, and up to four parts of"
    " its sum, as those of a tensor-parallel degree": PERMITTED,
    "a sum or product of two values | s times a LoRA term, base plus LoRA term, σ(g), 1 − σ(g), g σ(g), "
    "h, each step of dg and du, w y, w dO, each sum of dx, an element of dO times one of y": PERMITTED,
    "the sum over slots | after each slot, in any order": PERMITTED,
    "a result | all of them": PERMITTED,
    "A factor s or w may be multiplied in earlier or later, and a value may be computed again in the "
    "backward.": PERMITTED,
    "Beyond these parts, sums over H, I, r and tokens are at least as exact as in fp32, and fp16 is "
    "nowhere.": PERMITTED,
    "The budget is what all these roundings at once leave: their root mean square over several draws, "
    "times what one more draw exceeds once in a million comparisons (ktverify/judge/rounding.py).": PERMITTED,
    "Where values cancel or few numbers decide, that may be large.": PERMITTED,
    "It does not depend on any engine; plain torch in bf16 uses 51 to 75 % of it.": PERMITTED,
    **dict.fromkeys(
        (
            "An engine may say what it can do: in ktverify.toml beside the file or module that --engine names, or by "
            "attributes of its factory, contract and a dict capabilities with the names of this table.",
            "What it claims is checked.",
            "What it disclaims is UNSUPPORTED, and is tried once, so that the report says what works though it is "
            "disclaimed.",
            "A name that is left out is neither.",
            "isas | the instruction sets that its isa= takes",
            "fp32_sums | true: strict limits",
            "tp | the tensor-parallel degrees",
            "methods | the methods, without _SkipLoRA",
            "skip_lora | true: the methods with _SkipLoRA",
            "odd_sizes | true: H, I and I / TP that are no multiples of 32",
            "max_cache_depth | the largest",
            "lora_dropout | true: dropout",
            "gpu_experts | true: experts on another device",
            'contract = "1.0" names the version that an engine is written for.',
            "The first number grows where an engine that kept the contract may no longer keep it; the second where the "
            "contract only says more.",
            "An engine of a newer version than this page is refused.",
            "1.0 | the first version with a number",
        ),
        OF_THE_SUITES,
    ),
}

# ---- arguments: of the constructor, and "method.argument" of the calls -> checks that give other values than one
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "layer_idx": ("behaviour/layer_index",),
    "num_experts": ("edge/sizes_of_one", "refusals/num_experts 0"),
    "num_experts_per_tok": ("edge/every_expert_of_every_token", "refusals/k above E"),
    "hidden_size": ("edge/multiples_of_nothing", "refusals/hidden_size 0"),
    "moe_intermediate_size": ("edge/multiples_of_nothing", "refusals/moe_intermediate_size 0"),
    "num_gpu_experts": ("hybrid/count", "refusals/num_gpu_experts -1"),
    "gpu_experts_mask": ("hybrid/masks/scattered", "refusals/gpu_experts_mask too short"),
    "gpu_device": ("hybrid/masks/scattered", "refusals/gpu_device unknown"),
    "cpuinfer_threads": ("behaviour/threads", "processes/threads_have_a_ceiling"),
    "threadpool_count": ("tp/gaussian", "behaviour/threads_fewer_than_parts"),
    "weight_path": ("native/weight_path",),
    "chunked_prefill_size": ("behaviour/largest_call", "refusals/more rows than chunked_prefill_size"),
    "method": ("behaviour/skip_lora", "refusals/method unknown"),
    "mode": ("refusals/mode unknown",),
    "lora_rank": ("edge/rank_above_sizes", "refusals/lora_rank 0"),
    "lora_alpha": ("property/scaled_alpha", "refusals/lora_alpha 0.0"),
    "lora_dropout": ("dropout/elements", "dropout/zero", "refusals/lora_dropout 1.0"),
    "max_cache_depth": ("behaviour/outstanding_forwards", "refusals/two forwards outstanding"),
    "isa": ("native/isa_is_kept", "isa_choice/sse9-argument"),
    "numa_nodes": ("native/numa_nodes",),
    "load_weights_from_tensors.gate_proj": ("refusals/gate_proj shape",),
    "load_weights_from_tensors.up_proj": ("refusals/up_proj shape",),
    "load_weights_from_tensors.down_proj": ("refusals/down_proj shape",),
    "load_weights_from_tensors.scales": ("quantised/weights/fp8", "quantised_refusals/fp8 scales of rows"),
    "load_weights_from_tensors.zero_points": ("quantised/weights/int4_zeros", "quantised_refusals/int4 zero point 8"),
    "load_weights_from_tensors.physical_map": ("behaviour/physical_map", "refusals/physical_map twice"),
    "load_weights.physical_map": ("native/weight_path",),
    "load_weights.first": ("native/part_of_weight_path",),
    "load_weights.total": ("native/part_of_weight_path",),
    **{
        f"init_lora_weights.{name}_lora_{matrix}": (f"refusals/{name}_lora_{matrix} shape", "behaviour/lora_again")
        for name in ("gate", "up", "down")
        for matrix in "ab"
    },
    "forward_sft.hidden_states": ("behaviour/strides", "refusals/hidden_states columns"),
    "forward_sft.expert_ids": ("edge/masked_slots", "refusals/expert id 6"),
    "forward_sft.weights": ("behaviour/masked_weights_do_not_count", "refusals/weights rows"),
    "forward_sft.save_for_backward": ("behaviour/saved_by_default", "behaviour/outstanding_forwards"),
    "backward.grad_output": ("behaviour/strides", "refusals/grad_output columns"),
    "backward.accumulate": ("native/accumulation",),
    "set_gpu_experts_mask.gpu_experts_mask": ("hybrid/moved", "hybrid/moved_while_waiting"),
}
CALLS = (
    "load_weights_from_tensors",
    "load_weights",
    "init_lora_weights",
    "forward_sft",
    "backward",
    "set_gpu_experts_mask",
)


def plain(text: str) -> str:
    """A text without Markdown's backticks and asterisks, and without line breaks."""
    return " ".join(text.replace("`", "").replace("**", "").split())


def sentences() -> list[str]:
    """Every sentence of the page: of paragraphs and list items, a table's rows, and each line of formulas.

    Of the table of calls, those of its second column: the signatures are in ARGUMENTS.
    """
    found = []
    for block in re.split(r"\n\s*\n", (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")):
        if block.startswith("#"):
            continue
        if block.startswith("    "):
            found += [plain(line) for line in block.splitlines()]
        elif block.startswith("| call |"):
            for row in block.splitlines()[2:]:
                found += _split(plain(row).strip("| ").partition(" | ")[2])
        elif block.startswith("|"):
            found += [plain(row).strip("| ") for row in block.splitlines()[2:]]
        else:
            found += [part for item in re.split(r"\n(?=- )", block) for part in _split(plain(item.removeprefix("- ")))]
    return found


def _split(text: str) -> list[str]:
    return re.split(r"(?<=[.])\s+(?=[A-Z]|\w+ (?:is|names) )", text)


SENTENCES = sentences()
OWN = {plain(one.contract) for one in registry.checks()}


def test_every_sentence_has_a_check_or_a_reason() -> None:
    asked = [*OWN, *ASKED_BY]
    unasked = []
    for sentence in SENTENCES:
        # every clause on its own; the second cell of a refusal is its error
        for clause in (part.partition(" | Val")[0].rstrip(".") for part in sentence.split("; ")):
            if sentence not in EXPLAINS and not any(clause in one or one in clause for one in asked):
                unasked.append(clause)
    assert not unasked, "\n".join(unasked)


@pytest.mark.parametrize("sentence", [*ASKED_BY, *EXPLAINS])
def test_what_is_listed_is_a_sentence_of_the_page(sentence: str) -> None:
    assert any(sentence in one for one in SENTENCES), sentence
    assert not any(plain(one) == sentence for one in OWN), f"a check has this sentence as its own: {sentence}"


def test_every_check_that_is_named_here_is_there() -> None:
    for names in (*ASKED_BY.values(), *ARGUMENTS.values()):
        for name in names:
            registry.find(name)


def test_every_argument_has_a_check() -> None:
    taken = {field.name for field in dataclasses.fields(LayerSpec)}
    assert taken == set(inspect.signature(KTMoEWrapper.__init__).parameters) - {"self"}
    for call in CALLS:
        given = inspect.signature(getattr(KTMoEWrapper, call)).parameters
        taken |= {f"{call}.{argument}" for argument in given if argument != "self"}
    assert taken == set(ARGUMENTS)
