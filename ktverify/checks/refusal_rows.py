"""The rows of the table "Refusals" of docs/contract.md: what is done, which error it gets, what the error contains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.target import SMALL, Target
from ktverify.engines.run import backward_of, run_layer
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
        given = {name: getattr(self.inputs, name) for name in ("hidden_states", "expert_ids", "weights")}
        output: Tensor = self.layer.forward_sft(*{**given, **changed}.values(), save_for_backward=save_for_backward)
        return output

    def backward(self) -> Any:
        """backward of the newest saved forward."""
        return self.layer.backward(self.inputs.grad_output)

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


Act = Callable[[Setup], object]
Rows = Iterable[tuple[str, Refusal]]
VALUE, WRONG_TIME = (ValueError,), (RuntimeError,)


def _constructor() -> Rows:
    sizes = (
        "num_experts num_experts_per_tok hidden_size moe_intermediate_size lora_rank chunked_prefill_size "
        "max_cache_depth cpuinfer_threads"
    )
    method = ("method", "NO_SUCH_METHOD", "AMXBF16_SFT", "AMXBF16_SFT_SkipLoRA")
    rows: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("mode unknown", {"mode": "no_such_mode"}, ("mode", "no_such_mode", "sft")),
        ("method unknown", {"method": "NO_SUCH_METHOD"}, method),
        *((f"{name} {value}", {name: value}, (name, str(value))) for name in sizes.split() for value in (0, -3)),
        ("k above E", {"num_experts_per_tok": 7}, ("num_experts_per_tok", "7", "6")),
        *((f"lora_alpha {x}", {"lora_alpha": x}, ("lora_alpha",)) for x in (0.0, -1.0, math.nan, math.inf)),
        *((f"lora_dropout {x}", {"lora_dropout": x}, ("lora_dropout",)) for x in (-0.1, 1.0, 1.5, math.nan)),
    ]
    for name, more, mentions in rows:
        yield name, Refusal(VALUE, mentions, lambda setup, more=more: setup.target.bare(SMALL, **more))  # type: ignore[misc]


def native_alone() -> Rows:
    """What the contract asks of the native engine alone."""
    most, mask = SMALL.num_experts, "gpu_experts_mask"
    half: list[Any] = [True, False] * (most // 2)
    rows: list[tuple[str, tuple[type[Exception], ...], tuple[str, ...], dict[str, Any]]] = [
        *((f"num_gpu_experts {n}", VALUE, ("num_gpu_experts", str(n)), {"num_gpu_experts": n}) for n in (-1, most + 1)),
        (f"{mask} too short", VALUE, (mask, "5", "6"), {mask: half[1:]}),
        (f"{mask} too long", VALUE, (mask, "7", "6"), {mask: torch.tensor([*half, True])}),
        (f"{mask} of two dimensions", VALUE, (mask, "6"), {mask: torch.tensor([half])}),
        (f"{mask} of numbers", WRONG, (mask, "bool"), {mask: [1, 0] * (most // 2)}),
        (f"{mask} dtype", WRONG, (mask, "int64", "bool"), {mask: torch.tensor(half).long()}),
        (f"{mask} no list", WRONG, (mask, "bool"), {mask: 3}),
        (f"{mask} of another number", VALUE, ("num_gpu_experts", mask, "2", "3"), {mask: half, "num_gpu_experts": 2}),
        ("gpu_device unknown", VALUE, ("gpu_device", "tpu"), {mask: half, "gpu_device": "tpu"}),
        ("gpu_device no text", WRONG, ("gpu_device", "7"), {mask: half, "gpu_device": 7}),
        ("gpu_device not there", (RuntimeError,), ("gpu_device", "cuda:99"), {mask: half, "gpu_device": "cuda:99"}),
    ]
    for name, errors, mentions, given in rows:
        yield name, Refusal(errors, mentions, lambda setup, given=given: setup.target.bare(SMALL, **given))  # type: ignore[misc]


def _weights() -> Rows:
    # into a layer without weights: an engine that takes them only once has no second time to refuse
    def load(name: str, change: Callable[[Tensor], Any]) -> Act:
        return lambda setup: setup.load_into_bare(**{name: change(getattr(setup.inputs, name))})

    def reload(name: str) -> Act:
        return lambda setup: setup.load(**{name: getattr(setup.inputs, name)[:, :-1]})

    def lora(name: str, change: Callable[[Tensor], Any]) -> Act:
        return lambda setup: setup.init_lora(**{name: change(setup.inputs.lora[name])})

    for names, put in ((BASE_NAMES, load), (LORA_NAMES, lora)):
        for name in names:
            yield f"{name} shape", Refusal(VALUE, (name,), put(name, lambda t: t[:, :-1]))
            yield f"{name} too few experts", Refusal(VALUE, (name,), put(name, lambda t: t[:-1]))
            yield f"{name} dimensions", Refusal(VALUE, (name,), put(name, lambda t: t[0]))
            yield f"{name} transposed", Refusal(VALUE, (name,), put(name, lambda t: t.transpose(1, 2)))
            yield f"{name} dtype", Refusal(WRONG, (name, "float16"), put(name, lambda t: t.to(torch.float16)))
            yield f"{name} integers", Refusal(WRONG, (name, "int16"), put(name, lambda t: t.view(torch.int16)))
            yield f"{name} device", Refusal(WRONG, (name, "meta"), put(name, lambda t: t.to("meta")))
            yield f"{name} no tensor", Refusal(WRONG, (name,), put(name, lambda t: t.float().numpy()))
            yield f"{name} None", Refusal(WRONG, (name,), put(name, lambda t: None))
    for name in BASE_NAMES:
        yield f"{name} shape, of a layer that has weights", Refusal(VALUE, (name,), reload(name))
    yield "gate_proj float32", Refusal(WRONG, ("gate_proj", "float32"), load("gate_proj", lambda t: t.float()))
    yield "LoRA of two dtypes", Refusal(WRONG, ("bfloat16", "float32"), lora("up_lora_b", lambda t: t.float()))

    for what, values in (
        ("twice", [0, 1, 2, 3, 4, 4]),
        ("out of range", [1, 2, 3, 4, 5, 6]),
        ("negative", [-1, 0, 1, 2, 3, 4]),
        ("too short", list(range(SMALL.num_experts - 1))),
        ("too long", list(range(SMALL.num_experts + 1))),
    ):
        act = load("physical_map", lambda _, values=values: torch.tensor(values))  # type: ignore[misc]
        yield f"physical_map {what}", Refusal(VALUE, ("physical_map",), act)
    yield "physical_map dtype", Refusal(WRONG, ("physical_map",), load("physical_map", lambda t: t.float()))
    yield "physical_map dimensions", Refusal(VALUE, ("physical_map",), load("physical_map", lambda t: t[None]))


def _order() -> Rows:
    def calls(*mentions: str, of: Callable[[Setup], Setup] = lambda setup: setup, after: Any = None) -> Any:
        """The row of some calls in turn, on `of` the setup, which are refused with all `mentions`."""

        def row(*steps: Act) -> Refusal:
            def act(setup: Setup) -> None:
                setup = of(setup)
                for step in steps:
                    step(setup)

            return Refusal(WRONG_TIME, mentions, act, after)

        return row

    def unsaved(setup: Setup) -> Tensor:
        return setup.forward(save_for_backward=False)

    forward, backward, bare = Setup.forward, Setup.backward, Setup.bare
    load, lora = "load_weights_from_tensors", "init_lora_weights"
    yield "forward before everything", calls(load, of=bare)(forward)
    yield "forward before weights", calls(load, of=bare)(Setup.init_lora, forward)
    yield "forward before LoRA", calls(lora, of=bare)(Setup.load, forward)
    yield "update before LoRA", calls(lora, of=bare)(Setup.load, lambda setup: setup.layer.update_lora_weights())
    yield "backward before everything", calls("forward_sft", of=bare)(backward)
    yield "backward without forward", calls("forward_sft")(backward)
    yield "backward after an unsaved forward", calls("save_for_backward")(unsaved, backward)
    yield "backward twice", calls("forward_sft")(forward, backward, backward)
    depth = "max_cache_depth"
    yield "two forwards outstanding", calls(depth, "1", after=_outstanding_still_answers)(forward, forward)
    deep = calls(depth, "3", of=lambda setup: setup.another(max_cache_depth=3))
    yield "four forwards outstanding of three", deep(forward, forward, forward, forward)


def _outstanding_still_answers(setup: Setup) -> None:
    """The forward that was outstanding when something was refused has its gradients, and the same bits."""
    found = backward_of(setup.layer, setup.inputs)
    expected = setup.target.run(SMALL, setup.inputs)
    setup.target.expect_same_bits("backward after the refusal", expected, found, tuple(found))


def _inputs() -> Rows:
    def forward(name: str, change: Callable[[Tensor], Any]) -> Act:
        return lambda setup: setup.forward(**{name: change(getattr(setup.inputs, name))})

    other_dtype = {"hidden_states": torch.float32, "expert_ids": torch.int32, "weights": torch.bfloat16}
    for name, dtype in other_dtype.items():
        text = str(dtype).removeprefix("torch.")
        yield f"{name} dtype", Refusal(WRONG, (name, text), forward(name, lambda t, d=dtype: t.to(d)))  # type: ignore[misc]
        yield f"{name} columns", Refusal(VALUE, (name,), forward(name, lambda t: t[:, :-1]))
        yield f"{name} one dimension", Refusal(VALUE, (name,), forward(name, lambda t: t[0]))
        yield f"{name} three dimensions", Refusal(VALUE, (name,), forward(name, lambda t: t[None]))
        yield f"{name} device", Refusal(WRONG, (name, "meta"), forward(name, lambda t: t.to("meta")))
        yield f"{name} no tensor", Refusal(WRONG, (name,), forward(name, lambda t: t.tolist()))
        yield f"{name} None", Refusal(WRONG, (name,), forward(name, lambda t: None))
    # which of the three has the wrong number of rows is unknown, so any may be named
    yield "expert_ids rows", Refusal(VALUE, ("expert_ids",), forward("expert_ids", lambda t: t[:-1]))
    yield "weights rows", Refusal(VALUE, ("weights",), forward("weights", lambda t: t[:-1]))
    yield "weights float64", Refusal(WRONG, ("weights", "float64"), forward("weights", lambda t: t.double()))
    half = forward("hidden_states", lambda t: t.half())
    yield "hidden_states float16", Refusal(WRONG, ("hidden_states", "float16"), half)

    for value in (SMALL.num_experts, SMALL.num_experts + 100, -2, 2**31, 2**62, -(2**63)):

        def spoil(ids: Tensor, value: int = value) -> Tensor:
            ids = ids.clone()
            ids[5, 1] = value
            return ids

        mentions = ("expert_ids", str(value), "5", "1")
        yield f"expert id {value}", Refusal(VALUE, mentions, forward("expert_ids", spoil))

    few = SMALL.qlen - 1
    rows = ("chunked_prefill_size", str(SMALL.qlen), str(few))
    too_long = Refusal(VALUE, rows, lambda setup: setup.another(chunked_prefill_size=few).forward())
    yield "more rows than chunked_prefill_size", too_long

    for what, errors, change in (
        ("too few rows", (ValueError, RuntimeError), lambda t: t[:-1]),
        ("too many rows", (ValueError, RuntimeError), lambda t: torch.cat([t, t])),
        ("no rows", (ValueError, RuntimeError), lambda t: t[:0]),
        ("columns", VALUE, lambda t: t[:, :-1]),
        ("dimensions", VALUE, lambda t: t[0]),
        ("dtype", WRONG, lambda t: t.float()),
        ("device", WRONG, lambda t: t.to("meta")),
        ("None", WRONG, lambda t: None),
    ):

        def backward(setup: Setup, change: Callable[[Tensor], Any] = change) -> None:
            setup.forward()
            setup.layer.backward(change(setup.inputs.grad_output))

        yield f"grad_output {what}", Refusal(errors, ("grad_output",), backward, _outstanding_still_answers)


# contract: the row or sentence of docs/contract.md that the refusals of a function belong to
PARTS: tuple[tuple[str, Callable[[], Rows]], ...] = (
    ("Bad input is refused before anything is computed or changed.", _constructor),
    ("base weights, LoRA or physical_map of another shape", _weights),
    ("forward before the base weights or LoRA, update before LoRA", _order),
    ("hidden_states, expert_ids or weights of another shape; more rows than chunked_prefill_size", _inputs),
)
