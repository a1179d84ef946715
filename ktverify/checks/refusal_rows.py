"""The rows of the table "Refusals" of docs/contract.md: what is done, which error it gets, what the error contains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.target import SMALL, Target
from ktverify.engines.run import run_layer
from ktverify.errors import Unsupported
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

WRONG = (ValueError, TypeError)


@dataclass
class Setup:
    """What a refusal is tried on: the engine, a loaded layer of it (TP 1, SMALL) and the inputs that it works with."""

    target: Target
    inputs: Inputs
    layer: Any

    def another(self, **more: Any) -> Setup:
        """The same with a layer of other, permitted arguments. Unsupported where the engine has none such."""
        try:
            return Setup(self.target, self.inputs, self.target.layer(SMALL, self.inputs, **more))
        except NotImplementedError as error:
            raise Unsupported(str(error)) from error

    def bare(self) -> Setup:
        """The same with a layer that has neither weights nor LoRA."""
        return Setup(self.target, self.inputs, self.target.bare(SMALL))

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
    act: Callable[[Setup], object]
    after: Callable[[Setup], None] | None = field(default=None)


def _constructor() -> Iterable[tuple[str, Refusal]]:
    def build(**more: Any) -> Callable[[Setup], object]:
        return lambda setup: setup.target.bare(SMALL, **more)

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
    def load(name: str, change: Callable[[Tensor], Any]) -> Callable[[Setup], object]:
        return lambda setup: setup.load_into_bare(**{name: change(getattr(setup.inputs, name))})

    def reload(name: str) -> Callable[[Setup], object]:
        return lambda setup: setup.load(**{name: getattr(setup.inputs, name)[:, :-1]})

    def lora(name: str, change: Callable[[Tensor], Any]) -> Callable[[Setup], object]:
        return lambda setup: setup.init_lora(**{name: change(setup.inputs.lora[name])})

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
        act: Callable[[Setup], object], *, weights: bool = False, lora: bool = False
    ) -> Callable[[Setup], object]:
        def tried(setup: Setup) -> None:
            bare = setup.bare()
            if weights:
                bare.load()
            if lora:
                bare.init_lora()
            act(bare)

        return tried

    wrong_time = (RuntimeError,)
    yield (
        "forward before everything",
        Refusal(wrong_time, ("load_weights_from_tensors",), on_bare(lambda setup: setup.forward())),
    )
    yield (
        "forward before weights",
        Refusal(wrong_time, ("load_weights_from_tensors",), on_bare(lambda setup: setup.forward(), lora=True)),
    )
    yield (
        "forward before LoRA",
        Refusal(wrong_time, ("init_lora_weights",), on_bare(lambda setup: setup.forward(), weights=True)),
    )
    yield (
        "update before LoRA",
        Refusal(
            wrong_time, ("init_lora_weights",), on_bare(lambda setup: setup.layer.update_lora_weights(), weights=True)
        ),
    )
    yield (
        "backward before everything",
        Refusal(wrong_time, ("forward_sft",), on_bare(lambda setup: setup.layer.backward(setup.inputs.grad_output))),
    )
    yield (
        "backward without forward",
        Refusal(wrong_time, ("forward_sft",), lambda setup: setup.layer.backward(setup.inputs.grad_output)),
    )

    def unsaved(setup: Setup) -> None:
        setup.forward(save_for_backward=False)
        setup.layer.backward(setup.inputs.grad_output)

    yield "backward after an unsaved forward", Refusal(wrong_time, ("save_for_backward",), unsaved)

    def twice(setup: Setup) -> None:
        setup.forward()
        setup.layer.backward(setup.inputs.grad_output)
        setup.layer.backward(setup.inputs.grad_output)

    yield "backward twice", Refusal(wrong_time, ("forward_sft",), twice)

    def two_forwards(setup: Setup) -> None:
        setup.forward()
        setup.forward()

    yield (
        "two forwards outstanding",
        Refusal(wrong_time, ("max_cache_depth", "1"), two_forwards, _outstanding_still_answers),
    )

    def four_forwards(setup: Setup) -> None:
        deep = setup.another(max_cache_depth=3)
        for _ in range(4):
            deep.forward()

    yield "four forwards outstanding of three", Refusal(wrong_time, ("max_cache_depth", "3"), four_forwards)


def _outstanding_still_answers(setup: Setup) -> None:
    """The forward that was outstanding when something was refused has its gradients, and the same bits."""
    grad_input, gradients = setup.layer.backward(setup.inputs.grad_output)
    found = {"grad_input": grad_input, **gradients, "grad_weights": setup.layer.grad_weights}
    expected = setup.target.run(SMALL, setup.inputs)
    setup.target.expect_same_bits("backward after the refusal", expected, found, tuple(found))


def _inputs() -> Iterable[tuple[str, Refusal]]:
    def forward(name: str, change: Callable[[Tensor], Any]) -> Callable[[Setup], object]:
        return lambda setup: setup.forward(**{name: change(getattr(setup.inputs, name))})

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
    # which of the three has the wrong number of rows is unknown, so any may be named
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

    def too_long(setup: Setup) -> None:
        setup.another(chunked_prefill_size=SMALL.qlen - 1).forward()

    rows = str(SMALL.qlen)
    yield (
        "more rows than chunked_prefill_size",
        Refusal((ValueError,), ("chunked_prefill_size", rows, str(SMALL.qlen - 1)), too_long),
    )

    def backward(change: Callable[[Tensor], Any]) -> Callable[[Setup], object]:
        def act(setup: Setup) -> None:
            setup.forward()
            setup.layer.backward(change(setup.inputs.grad_output))

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


# contract: the row or sentence of docs/contract.md that the refusals of a function belong to
PARTS: tuple[tuple[str, Callable[[], Iterable[tuple[str, Refusal]]]], ...] = (
    ("Bad input is refused before anything is computed or changed.", _constructor),
    ("base weights, LoRA or physical_map of another shape", _weights),
    ("forward before the base weights or LoRA, update before LoRA", _order),
    ("hidden_states, expert_ids or weights of another shape; more rows than chunked_prefill_size", _inputs),
)
