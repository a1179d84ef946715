"""The table "Refusals" of docs/contract.md, as data: what is done, which error it has to get, what the error must say.

Each is tried on a layer that works, which has to work afterwards and to give the same bits as before.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.check import Check, Where, enter
from ktverify.checks.target import SMALL, Target
from ktverify.engines.run import run_layer
from ktverify.errors import EngineDied, Unsupported
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES, lora_shapes

WRONG = (ValueError, TypeError)


@dataclass
class Stage:
    """What a refusal is tried on: the engine, a loaded layer of it (TP 1, SMALL) and the inputs that it works with."""

    target: Target
    inputs: Inputs
    layer: Any

    def another(self, **more: Any) -> Stage:
        """The same with a layer of other, permitted arguments. Unsupported where the engine has none such."""
        try:
            return Stage(self.target, self.inputs, self.target.layer(SMALL, self.inputs, **more))
        except NotImplementedError as error:
            raise Unsupported(str(error)) from error

    def bare(self) -> Stage:
        """The same with a layer that has neither weights nor LoRA."""
        return Stage(self.target, self.inputs, self.target.bare(SMALL))

    def load_into_bare(self, **changed: Any) -> None:
        """load on a layer that has no weights yet, which has to work once it gets the right ones."""
        bare = self.bare()
        try:
            bare.load(**changed)
        except WRONG:
            bare.load()
            bare.init_lora()
            found = run_layer(bare.layer, self.inputs)
            self.target.expect_same_bits(
                "a layer whose first weights were refused", run_layer(self.layer, self.inputs), found
            )
            raise

    def forward(self, *, save_for_backward: bool = True, **changed: Any) -> Tensor:
        """forward_sft with some arguments exchanged."""
        given = {
            "hidden_states": self.inputs.hidden_states,
            "expert_ids": self.inputs.expert_ids,
            "weights": self.inputs.weights,
            **changed,
        }
        output: Tensor = self.layer.forward_sft(
            given["hidden_states"], given["expert_ids"], given["weights"], save_for_backward=save_for_backward
        )
        return output

    def load(self, **changed: Any) -> None:
        """load_weights_from_tensors with some arguments exchanged."""
        given = {name: getattr(self.inputs, name) for name in (*BASE_NAMES, "physical_map")}
        self.layer.load_weights_from_tensors(*{**given, **changed}.values())

    def init_lora(self, **changed: Any) -> None:
        """init_lora_weights with some arguments exchanged."""
        given = {name: self.inputs.lora[name].clone() for name in LORA_NAMES}
        self.layer.init_lora_weights(*{**given, **changed}.values())


@dataclass(frozen=True)
class Refusal:
    """`act` must raise one of `errors`, with every text of `mentions` in it; `after` then finds nothing changed."""

    errors: tuple[type[Exception], ...]
    mentions: tuple[str, ...]
    act: Callable[[Stage], object]
    after: Callable[[Stage], None] | None = field(default=None)


def check_refusal(target: Target, name: str) -> None:
    """AssertionError unless REFUSALS[name] is refused as it says and the layer works on, with the same bits."""
    refusal = REFUSALS[name]
    inputs = make_inputs(SMALL)
    stage = Stage(target, inputs, target.layer(SMALL, inputs))
    before = run_layer(stage.layer, inputs)
    try:
        refusal.act(stage)
    except (EngineDied, Unsupported):
        raise
    except Exception as error:
        kinds = " or ".join(kind.__name__ for kind in refusal.errors)
        # RuntimeError has children (NotImplementedError, RecursionError) that say something else
        target.expect(
            type(error) in refusal.errors,
            f"{name}: must raise {kinds}, raised {type(error).__name__}: {error}",
            "refusal",
        )
        text = str(error)
        missing = [mention for mention in refusal.mentions if mention not in text]
        target.expect(not missing, f"{name}: the error must tell {missing}, it says {text!r}", "refusal")
        target.expect(len(text.splitlines()) == 1, f"{name}: an error is one line, this has more: {text!r}", "refusal")
    else:
        target.accepted(f"{name}:")
        return
    if refusal.after is not None:
        refusal.after(stage)
    target.expect_same_bits(f"{name}: before the refusal and after it", before, run_layer(stage.layer, inputs))


# ---- the parts of the table


def _constructor() -> Iterable[tuple[str, Refusal]]:
    def build(**more: Any) -> Callable[[Stage], object]:
        return lambda stage: stage.target.bare(SMALL, **more)

    yield "mode unknown", Refusal((ValueError,), ("mode", "no_such_mode", "sft"), build(mode="no_such_mode"))
    yield (
        "method unknown",
        Refusal(
            (ValueError,),
            ("method", "NO_SUCH_METHOD", "AMXBF16_SFT", "AMXBF16_SFT_SkipLoRA"),
            build(method="NO_SUCH_METHOD"),
        ),
    )
    for name in (
        "num_experts",
        "num_experts_per_tok",
        "hidden_size",
        "moe_intermediate_size",
        "lora_rank",
        "chunked_prefill_size",
        "max_cache_depth",
        "cpuinfer_threads",
    ):
        for value in (0, -3):
            yield f"{name} {value}", Refusal((ValueError,), (name, str(value)), build(**{name: value}))
    yield (
        "k above E",
        Refusal((ValueError,), ("num_experts_per_tok", "7", "6"), build(num_experts_per_tok=7)),
    )
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        yield f"lora_alpha {alpha}", Refusal((ValueError,), ("lora_alpha",), build(lora_alpha=alpha))
    for dropout in (-0.1, 1.0, 1.5, float("nan")):
        yield f"lora_dropout {dropout}", Refusal((ValueError,), ("lora_dropout",), build(lora_dropout=dropout))


def _weights() -> Iterable[tuple[str, Refusal]]:
    # into a layer without weights: an engine that takes them once only has no second time to refuse
    def load(name: str, change: Callable[[Tensor], Any]) -> Callable[[Stage], object]:
        return lambda stage: stage.load_into_bare(**{name: change(getattr(stage.inputs, name))})

    def reload(name: str) -> Callable[[Stage], object]:
        return lambda stage: stage.load(**{name: getattr(stage.inputs, name)[:, :-1]})

    def lora(name: str, change: Callable[[Tensor], Any]) -> Callable[[Stage], object]:
        return lambda stage: stage.init_lora(**{name: change(stage.inputs.lora[name])})

    for names, put in ((BASE_NAMES, load), (LORA_NAMES, lora)):
        for name in names:
            yield f"{name} shape", Refusal((ValueError,), (name,), put(name, lambda t: t[:, :-1]))
            yield f"{name} too few experts", Refusal((ValueError,), (name,), put(name, lambda t: t[:-1]))
            yield f"{name} dimensions", Refusal((ValueError,), (name,), put(name, lambda t: t[0]))
            yield f"{name} transposed", Refusal((ValueError,), (name,), put(name, lambda t: t.transpose(1, 2)))
            yield f"{name} dtype", Refusal(WRONG, (name, "float16"), put(name, lambda t: t.to(torch.float16)))
            yield f"{name} integers", Refusal(WRONG, (name, "int16"), put(name, lambda t: t.view(torch.int16)))
            yield f"{name} device", Refusal(WRONG, (name, "meta"), put(name, lambda t: t.to("meta")))
            yield f"{name} no tensor", Refusal(WRONG, (name,), put(name, lambda t: t.float().numpy()))
            yield f"{name} None", Refusal(WRONG, (name,), put(name, lambda t: None))
    for name in BASE_NAMES:
        yield f"{name} shape, of a layer that has weights", Refusal((ValueError,), (name,), reload(name))
    yield "gate_proj float32", Refusal(WRONG, ("gate_proj", "float32"), load("gate_proj", lambda t: t.float()))
    yield "LoRA of two dtypes", Refusal(WRONG, ("bfloat16", "float32"), lora("up_lora_b", lambda t: t.float()))

    experts = SMALL.num_experts
    for what, values in (
        ("twice", [0, 1, 2, 3, 4, 4]),
        ("out of range", [1, 2, 3, 4, 5, 6]),
        ("negative", [-1, 0, 1, 2, 3, 4]),
        ("too short", list(range(experts - 1))),
        ("too long", list(range(experts + 1))),
    ):
        wrong = torch.tensor(values)
        act = load("physical_map", lambda _, wrong=wrong: wrong)  # type: ignore[misc]
        yield f"physical_map {what}", Refusal((ValueError,), ("physical_map",), act)
    yield "physical_map dtype", Refusal(WRONG, ("physical_map",), load("physical_map", lambda t: t.float()))
    yield "physical_map dimensions", Refusal((ValueError,), ("physical_map",), load("physical_map", lambda t: t[None]))


def _order() -> Iterable[tuple[str, Refusal]]:
    def on_bare(
        act: Callable[[Stage], object], *, weights: bool = False, lora: bool = False
    ) -> Callable[[Stage], object]:
        def tried(stage: Stage) -> None:
            bare = stage.bare()
            if weights:
                bare.load()
            if lora:
                bare.init_lora()
            act(bare)

        return tried

    wrong_time = (RuntimeError,)
    yield (
        "forward before everything",
        Refusal(wrong_time, ("load_weights_from_tensors",), on_bare(lambda stage: stage.forward())),
    )
    yield (
        "forward before weights",
        Refusal(wrong_time, ("load_weights_from_tensors",), on_bare(lambda stage: stage.forward(), lora=True)),
    )
    yield (
        "forward before LoRA",
        Refusal(wrong_time, ("init_lora_weights",), on_bare(lambda stage: stage.forward(), weights=True)),
    )
    yield (
        "update before LoRA",
        Refusal(
            wrong_time, ("init_lora_weights",), on_bare(lambda stage: stage.layer.update_lora_weights(), weights=True)
        ),
    )
    yield (
        "backward before everything",
        Refusal(wrong_time, ("forward_sft",), on_bare(lambda stage: stage.layer.backward(stage.inputs.grad_output))),
    )
    yield (
        "backward without forward",
        Refusal(wrong_time, ("forward_sft",), lambda stage: stage.layer.backward(stage.inputs.grad_output)),
    )

    def unsaved(stage: Stage) -> None:
        stage.forward(save_for_backward=False)
        stage.layer.backward(stage.inputs.grad_output)

    yield "backward after an unsaved forward", Refusal(wrong_time, ("save_for_backward",), unsaved)

    def twice(stage: Stage) -> None:
        stage.forward()
        stage.layer.backward(stage.inputs.grad_output)
        stage.layer.backward(stage.inputs.grad_output)

    yield "backward twice", Refusal(wrong_time, ("forward_sft",), twice)

    def two_forwards(stage: Stage) -> None:
        stage.forward()
        stage.forward()

    yield (
        "two forwards outstanding",
        Refusal(wrong_time, ("max_cache_depth", "1"), two_forwards, _outstanding_still_answers),
    )

    def four_forwards(stage: Stage) -> None:
        deep = stage.another(max_cache_depth=3)
        for _ in range(4):
            deep.forward()

    yield "four forwards outstanding of three", Refusal(wrong_time, ("max_cache_depth", "3"), four_forwards)


def _outstanding_still_answers(stage: Stage) -> None:
    """The forward that was outstanding when something was refused has its gradients, and the same bits."""
    grad_input, gradients = stage.layer.backward(stage.inputs.grad_output)
    found = {"grad_input": grad_input, **gradients, "grad_weights": stage.layer.grad_weights}
    expected = stage.target.run(SMALL, stage.inputs)
    stage.target.expect_same_bits("backward after the refusal", expected, found, tuple(found))


def _inputs() -> Iterable[tuple[str, Refusal]]:
    def forward(name: str, change: Callable[[Tensor], Any]) -> Callable[[Stage], object]:
        return lambda stage: stage.forward(**{name: change(getattr(stage.inputs, name))})

    other_dtype = {"hidden_states": torch.float32, "expert_ids": torch.int32, "weights": torch.bfloat16}
    for name, dtype in other_dtype.items():
        text = str(dtype).removeprefix("torch.")
        yield f"{name} dtype", Refusal(WRONG, (name, text), forward(name, lambda t, d=dtype: t.to(d)))  # type: ignore[misc]
        yield f"{name} columns", Refusal((ValueError,), (name,), forward(name, lambda t: t[:, :-1]))
        yield f"{name} one dimension", Refusal((ValueError,), (name,), forward(name, lambda t: t[0]))
        yield f"{name} three dimensions", Refusal((ValueError,), (name,), forward(name, lambda t: t[None]))
        yield f"{name} device", Refusal(WRONG, (name, "meta"), forward(name, lambda t: t.to("meta")))
        yield f"{name} no tensor", Refusal(WRONG, (name,), forward(name, lambda t: t.tolist()))
        yield f"{name} None", Refusal(WRONG, (name,), forward(name, lambda t: None))
    # which of the three has the wrong number of rows nobody can know, so any may be named
    yield "expert_ids rows", Refusal((ValueError,), ("expert_ids",), forward("expert_ids", lambda t: t[:-1]))
    yield "weights rows", Refusal((ValueError,), ("weights",), forward("weights", lambda t: t[:-1]))
    yield "weights float64", Refusal(WRONG, ("weights", "float64"), forward("weights", lambda t: t.double()))
    yield (
        "hidden_states float16",
        Refusal(WRONG, ("hidden_states", "float16"), forward("hidden_states", lambda t: t.half())),
    )

    for value in (SMALL.num_experts, SMALL.num_experts + 100, -2, 2**31, 2**62, -(2**63)):

        def spoil(ids: Tensor, value: int = value) -> Tensor:
            ids = ids.clone()
            ids[5, 1] = value
            return ids

        yield (
            f"expert id {value}",
            Refusal((ValueError,), ("expert_ids", str(value), "5", "1"), forward("expert_ids", spoil)),
        )

    def too_long(stage: Stage) -> None:
        stage.another(chunked_prefill_size=SMALL.qlen - 1).forward()

    rows = str(SMALL.qlen)
    yield (
        "more rows than chunked_prefill_size",
        Refusal((ValueError,), ("chunked_prefill_size", rows, str(SMALL.qlen - 1)), too_long),
    )

    def backward(change: Callable[[Tensor], Any]) -> Callable[[Stage], object]:
        def act(stage: Stage) -> None:
            stage.forward()
            stage.layer.backward(change(stage.inputs.grad_output))

        return act

    both = (ValueError, RuntimeError)
    for what, errors, change in (
        ("too few rows", both, lambda t: t[:-1]),
        ("too many rows", both, lambda t: torch.cat([t, t])),
        ("no rows", both, lambda t: t[:0]),
        ("columns", (ValueError,), lambda t: t[:, :-1]),
        ("dimensions", (ValueError,), lambda t: t[0]),
        ("dtype", WRONG, lambda t: t.float()),
        ("device", WRONG, lambda t: t.to("meta")),
        ("None", WRONG, lambda t: None),
    ):
        yield (
            f"grad_output {what}",
            Refusal(errors, ("grad_output",), backward(change), _outstanding_still_answers),
        )


# a table of refusals -> the sentences of docs/contract.md that it holds an engine to
_PARTS = {
    _constructor: "Bad input is refused before anything is computed or changed.",
    _weights: "base weights, LoRA or physical_map of another shape",
    _order: "forward before the base weights or LoRA, update before LoRA",
    _inputs: "hidden_states, expert_ids or weights of another shape; more rows than chunked_prefill_size",
}
REFUSALS: dict[str, Refusal] = {}


def _enter_parts() -> None:
    for part, contract in _PARTS.items():
        for name, refusal in part():
            REFUSALS[name] = refusal
            enter([_check(name, check_refusal, contract, name=name)])


def _check(id: str, function: Callable[..., object], contract: str, **arguments: object) -> Check:
    return Check(
        f"refusals/{id}",
        "contract",
        function,
        contract,
        ("refusal", "bits"),
        cause=Cause.REFUSAL,
        arguments=arguments,
        where=Where.OWN_CHOICE,
    )


_enter_parts()


# ---- rows that need a layer of their own


def check_out_of_memory(target: Target) -> None:
    """AssertionError unless four times this machine's memory of weights gets a MemoryError with both figures: how much
    was needed and how much there is.

    The tensors have stride 0, so that they take nothing here. Other layers work afterwards.
    """
    inputs = make_inputs(SMALL)
    before = target.run(SMALL, inputs)
    # wide both ways, so that only the base weights are large
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hidden = intermediate = math.isqrt(4 * memory // 6)
    wide = torch.empty(1, dtype=torch.bfloat16)
    token = torch.zeros(1, hidden, dtype=torch.bfloat16)
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "hidden_size": hidden, "lora_rank": 1}
    try:
        # an engine that packs an expert when its first token comes needs the memory only then
        layer = target.bare(SMALL, moe_intermediate_size=intermediate, **sizes)
        shapes = [(1, intermediate, hidden), (1, intermediate, hidden), (1, hidden, intermediate)]
        layer.load_weights_from_tensors(*(wide.expand(shape) for shape in shapes), torch.zeros(1, dtype=torch.int64))
        layer.init_lora_weights(
            *(torch.zeros(shape, dtype=torch.bfloat16) for shape in lora_shapes(1, hidden, intermediate, 1).values())
        )
        layer.forward_sft(token, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), save_for_backward=True)
    except MemoryError as error:
        amounts = re.findall(r"\d[\d.,]*\s*(?:[kMGT]i?B|bytes)", str(error))
        target.expect(
            len(amounts) >= 2,
            f"the error must say how much was needed and how much there is, it says {error}",
            "refusal",
        )
    else:
        target.accepted(f"{4 * memory / 2**30:.0f} GiB of weights")
    target.expect_same_bits("before the MemoryError and after it", before, target.run(SMALL, inputs))


enter([_check("out of memory", check_out_of_memory, "more memory than there is")])
