"""What an engine claims, checked; and what it disclaims, tried: a disclaimer of what works is reported."""

from __future__ import annotations

from dataclasses import replace

from ktverify.checks.altered_inputs import TOKENS, changed
from ktverify.checks.behaviour import check_skip_lora
from ktverify.checks.dropout import P, check_elements
from ktverify.checks.hybrid import check_masks
from ktverify.checks.judging import judged
from ktverify.checks.quantised import check_weights
from ktverify.checks.target import ODD, SMALL, Target
from ktverify.engines.capabilities import MULTIPLE, WORKS, Capability
from ktverify.engines.run import METHOD, backward_of, forward
from ktverify.errors import GateFailed, Unsupported
from ktverify.judge.dequantise import CODINGS
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import GRAD_NAMES


def judge_claim(target: Target, claim: Capability) -> None:
    """Try what the engine claims or disclaims, with one check of it.

    GateFailed, or what the engine raised, where a claim does not hold. Unsupported where it is a disclaimer; its text
    says whether it works all the same.
    """
    try:
        _try(replace(target, ask_disclaimed=True), claim)
    except Exception as error:
        if not claim.claimed:
            raise Unsupported(f"{claim} is disclaimed") from None
        if isinstance(error, NotImplementedError):
            text = f"the engine claims {claim}, and declares that it cannot: {error}"
            raise GateFailed(text, (("refusal", float("inf")),)) from None
        raise
    if not claim.claimed:
        raise Unsupported(f"{WORKS}{claim}")


def _try(target: Target, claim: Capability) -> None:
    if claim.name == "tp":
        _right(replace(target, tp=claim.value), replace(SMALL, intermediate=MULTIPLE * claim.value))
    elif claim.name == "methods" and claim.value == METHOD:
        _right(target, SMALL)
    elif claim.name == "methods":
        check_weights(target, next(label for label, coding in CODINGS.items() if coding.method == claim.value))
    elif claim.name == "skip_lora":
        check_skip_lora(target)
    elif claim.name == "odd_sizes":
        _right(target, ODD)
    elif claim.name == "max_cache_depth":
        _depth(target, claim.value)
    elif claim.name == "gpu_experts":
        check_masks(target, "every_second")
    else:
        check_elements(target, P)


def _right(target: Target, case: Case) -> None:
    inputs = make_inputs(case)
    judged(target, case.id, case, target.run(case, inputs), inputs)


def _depth(target: Target, depth: int) -> None:
    """`depth` forwards of different tokens wait; the backwards, newest first, have the bits that they have alone."""
    drawn = [make_inputs(SMALL.with_seed(seed)) for seed in range(depth)]
    # one layer has one set of weights
    batches = [changed(drawn[0], **{name: getattr(each, name) for name in TOKENS}) for each in drawn]
    alone = [target.run(SMALL, each) for each in batches]
    layer = target.layer(SMALL, batches[0], max_cache_depth=depth)
    for each in batches:
        forward(layer, each, save=True)
    for each, expected in zip(reversed(batches), reversed(alone), strict=True):
        target.expect_same_bits(f"{depth} forwards wait", expected, backward_of(layer, each), GRAD_NAMES)
