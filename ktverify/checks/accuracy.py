"""One case, one engine, every tensor: what `repro` and `verify` run.

Comes in: an engine's name and a case. Goes out: accuracy records, the same that the suites write, so that the same
printers show them. Expected values are the committed goldens where they fit, else the oracle, live.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ktverify.engines import registry
from ktverify.engines.run import (
    CONSTRUCTOR,
    IMPORT,
    METHOD,
    RAISED,
    build_layer,
    call_of,
    forward,
    method_of,
    run_case,
    run_layer,
)
from ktverify.errors import EngineDied, EngineRaised
from ktverify.judge import reference
from ktverify.judge.bf16_baseline import peer_error
from ktverify.judge.gates import ALL_ON, GateResult, Judgement, Verdict, judge
from ktverify.judge.metrics import Difference, compare
from ktverify.runs.record import AccuracyRecord, VerdictName, accuracy_record, worst_first
from ktverify.spec.cases import Case, catalogue
from ktverify.spec.inputs import Inputs, inputs_sha256, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_NAMES, LORA_NAMES, OUTPUT
from ktverify.system.machine import amx_state

METHODS = (METHOD, f"{METHOD}_SkipLoRA")
MODES = ("forward", "backward", "training", "all")
TP_CHOICES = ("no-tp", "tp", "all")
DEFAULT_CASE = "qwen3_30b_a3b_e8"
TRAINING_STEPS = 10
LEARNING_RATE = 1e-3
# characters of an error that a record keeps
MESSAGE = 4000


class Expected(Protocol):
    """The right answer: `compare` an engine's tensor with it; `peer` is the plain bf16 program's rel_l2 by tensor."""

    @property
    def peer(self) -> dict[str, float]: ...
    def compare(self, name: str, actual: torch.Tensor) -> Difference: ...


@dataclass
class LiveOracle:
    """Expected values computed here and now, in fp64: by name, as `ktverify.names` lists them."""

    tensors: dict[str, torch.Tensor]
    peer: dict[str, float]

    @classmethod
    def of(cls, inputs: Inputs, *, skip_lora: bool = False) -> LiveOracle:
        """The oracle and the plain bf16 peer of `inputs`. The peer always has LoRA; its budget only widens a little."""
        tensors = reference.forward_backward(inputs, skip_lora=skip_lora)
        whole = reference.forward_backward(inputs) if skip_lora else tensors
        return cls(tensors, peer_error(inputs, whole))

    def compare(self, name: str, actual: torch.Tensor) -> Difference:
        return compare(actual, self.tensors[name])


def as_told(error: BaseException) -> Exception:
    """What `lost` takes of an engine's exception. Raises what is none: the constructor's, and a lack of memory.

    The constructor refuses what it is not made for; sys.exit refuses nothing.
    """
    if isinstance(error, NotImplementedError | EngineDied):
        return error
    refusal = method_of(error) in ("", IMPORT, CONSTRUCTOR) and not isinstance(error, SystemExit)
    if isinstance(error, MemoryError) or refusal:
        raise error
    return EngineRaised.of(error, method_of(error))


@dataclass
class Checked:
    """What checking a case found: its records, and what they were made of (for `--dump`).

    source: where `expected` is from, "golden" or "fresh".
    """

    case: Case
    inputs: Inputs
    actual: dict[str, torch.Tensor]
    expected: Expected
    source: str
    records: list[AccuracyRecord] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.records) and all(record.verdict == "PASS" for record in self.records)


def source_of(case: Case, *, fresh: bool, method: str = METHOD) -> str:
    """Where the right answer comes from: "golden" for an unchanged row of the catalogue that has one, else "fresh"."""
    from ktverify.judge import golden

    of_catalogue = not fresh and method == METHOD and catalogue().get(case.name) == case
    return "golden" if of_catalogue and golden.has(case) else "fresh"


def expected_of(case: Case, inputs: Inputs, *, fresh: bool, method: str = METHOD) -> tuple[Expected, str]:
    """(expected values, `source_of` them): the golden, or the live oracle.

    ValueError when a golden is there but belongs to other inputs.
    """
    source = source_of(case, fresh=fresh, method=method)
    if source == "fresh":
        return LiveOracle.of(inputs, skip_lora=method != METHOD), source
    from ktverify.judge import golden

    kept = golden.load(case)
    if kept.inputs_sha256 != inputs_sha256(inputs):
        raise ValueError(
            f"the golden of {case.id} is of other inputs than this generator makes; "
            "run `python -m ktverify.golden regenerate`, or compare with --fresh"
        )
    return kept, source


def unanswered(case: Case, *, fresh: bool, method: str = METHOD) -> Checked:
    """What is known of a case whose engine ended its process: its inputs, and what they have to give."""
    inputs = make_inputs(case)
    return Checked(case, inputs, {}, *expected_of(case, inputs, fresh=fresh, method=method))


def check_case(
    engine: str,
    case: Case,
    *,
    isa: str | None = None,
    tp: int = 1,
    threads: int | None = None,
    method: str = METHOD,
    fresh: bool = False,
    backward: bool = True,
    tensors: Sequence[str] | None = None,
    given: Checked | None = None,
    gates_off: frozenset[str] = ALL_ON,
) -> Checked:
    """Run `case` through `engine` and judge each of `tensors` (default: all that were computed).

    given: an earlier result of the same case, whose inputs and expected values are used again. gates_off: gates
    to leave out. Raises ValueError for an unknown tensor or method, and what the engine's constructor raises; what its
    methods raise is a CRASH of what they did not give: an output is judged where the backward raises.
    """
    wanted = check_names(tensors, backward)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, it takes one of {', '.join(METHODS)}")
    if case.intermediate % tp:
        raise ValueError(f"TP {tp} does not divide I = {case.intermediate} of {case.id}")
    with call_of(IMPORT):
        factory = registry.find(engine)
    started = time.perf_counter()
    if given is not None:
        inputs, expected, source = given.inputs, given.expected, given.source
    else:
        inputs = make_inputs(case)
        expected, source = expected_of(case, inputs, fresh=fresh, method=method)
    more = {} if method == METHOD else {"method": method}
    label = isa_label(engine, isa)
    actual: dict[str, torch.Tensor] = {}
    raised = None
    try:
        run_case(factory, case, inputs=inputs, isa=isa, tp=tp, threads=threads, backward=backward, into=actual, **more)
    except RAISED as error:
        raised = as_told(error)
    actual = {name: tensor.detach() for name, tensor in actual.items()}
    checked = Checked(case, inputs, actual, expected, source)
    duration = time.perf_counter() - started
    for name in [name for name in wanted if name in actual]:
        repro = repro_command(case, engine=engine, isa=label, tensor=name, tp=tp, fresh=fresh, method=method)
        where: dict[str, Any] = {
            "family": "forward" if name == OUTPUT else "backward",
            "case": case,
            "tensor": name,
            "engine": engine,
            "isa": label,
            "threads": threads or 0,
            "tp": tp,
            "source": source,
            "duration_s": duration,
            "repro": repro,
        }
        if method != METHOD and name in GRAD_NAMES:
            checked.records.append(_skipped_gradient(actual[name], where))
            continue
        difference = expected.compare(name, actual[name])
        own = registry.strict(engine)
        judgement = judge(
            case, name, difference, expected.peer[name], own_engine=own, isa=isa_name(label), gates_off=gates_off
        )
        checked.records.append(accuracy_record(judgement, difference, **where))
    if raised is not None:
        missing = [name for name in wanted if name not in actual]
        if not missing and not isinstance(raised, NotImplementedError):
            # what went wrong after the last tensor came, as in the clean-up, is told beside that one's own record
            missing = [wanted[-1]]
        checked.records += lost(raised, missing, engine, case, label, tp=tp, source=source, method=method)
    return checked


def lost(
    error: BaseException,
    tensors: Sequence[str],
    engine: str,
    case: Case,
    label: str,
    *,
    tp: int = 1,
    source: str = "golden",
    method: str = METHOD,
    family: str = "",
) -> list[AccuracyRecord]:
    """The records of `tensors` of a case whose engine gave none: UNSUPPORTED where it says so, else what `error` is.

    family: where it is neither forward nor backward.
    """
    verdict, message = verdict_of(error)
    if family == "training":
        repro = verify_command(case, engine=engine, isa=label, tp=tp)
    else:
        repro = repro_command(case, engine=engine, isa=label, tp=tp, fresh=source == "fresh", method=method)
    return [
        AccuracyRecord(
            family=family or ("forward" if name == OUTPUT else "backward"),
            engine=engine,
            isa=label,
            verdict=verdict,
            message=message,
            case=case.id,
            why=case.why,
            tensor=name,
            tp=tp,
            source=source,
            repro=repro,
        )
        for name in tensors
    ]


def verdict_of(error: BaseException) -> tuple[VerdictName, str]:
    """What an engine's exception means where nothing was to be refused, and its text.

    NotImplementedError is an engine's word for what it cannot do; an exception that has a `verdict` tells it.
    """
    if isinstance(error, NotImplementedError):
        reason = " ".join(str(error).split()) or "the engine gave no reason"
        return "UNSUPPORTED", f"UNSUPPORTED {reason}"[:MESSAGE]
    verdict: VerdictName = getattr(error, "verdict", "CRASH")
    name = "" if hasattr(error, "verdict") else f"{type(error).__name__}: "
    return verdict, f"{name}{error}"[:MESSAGE]


def check_names(tensors: Sequence[str] | None, backward: bool) -> tuple[str, ...]:
    """The tensors to judge, in the contract's order. ValueError for a name that is none, or needs the backward."""
    computed = ALL_TENSORS if backward else (OUTPUT,)
    if not tensors:
        return computed
    for name in tensors:
        if name not in computed:
            raise ValueError(f"tensor is {name!r}, it takes one of {', '.join(computed)}")
    return tuple(name for name in ALL_TENSORS if name in tensors)


def check_training(
    engine: str,
    case: Case,
    *,
    isa: str | None = None,
    tp: int = 1,
    threads: int | None = None,
    steps: int = TRAINING_STEPS,
    learning_rate: float = LEARNING_RATE,
) -> Iterator[tuple[float, list[AccuracyRecord]]]:
    """Forward, backward, AdamW and update_lora_weights, `steps` times; yields each step's loss and records.

    The loss is half the mean squared distance of the output to a fixed target. In each step the oracle gets the
    parameters that the optimizer left and the engine's upstream gradient, so that the budgets of a single call hold for
    every step and an engine that goes on with old weights is off by the whole update. Judged by the peer's budgets: the
    limits of the project's own engine, and the bits of an integer case, are agreed for the inputs of the catalogue, and
    after a step parameters and upstream gradient are others.
    """
    with call_of(IMPORT):
        factory = registry.find(engine)
    inputs = make_inputs(case)
    label = isa_label(engine, isa)
    target = inputs.grad_output.float()
    layer = build_layer(factory, case, inputs, isa=isa, tp=tp, threads=threads)
    with call_of("parameters"):
        parameters = [getattr(layer, name) for name in LORA_NAMES]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for step in range(steps):
        started = time.perf_counter()
        with call_of("parameters"):
            lora = {name: getattr(layer, name).detach().clone() for name in LORA_NAMES}
        output = forward(layer, inputs, save=False)
        distance = output.float() - target
        # AdamW divides every gradient by its own size, so the mean's constant factor may be left out of the gradient
        loss = 0.5 * float(distance.square().mean())
        upstream = distance.to(torch.bfloat16)
        here = replace(inputs, lora=lora, grad_output=upstream)
        actual = {name: tensor.detach().clone() for name, tensor in run_layer(layer, here).items()}
        expected = LiveOracle.of(here)
        records = []
        for name in ALL_TENSORS:
            difference = expected.compare(name, actual[name])
            judgement = judge(case, name, difference, expected.peer[name], isa=isa_name(label))
            record = accuracy_record(
                judgement,
                difference,
                family="training",
                case=case,
                tensor=name,
                engine=engine,
                isa=label,
                threads=threads or 0,
                tp=tp,
                source=f"step {step + 1}",
                duration_s=time.perf_counter() - started,
                repro=verify_command(case, engine=engine, isa=label, tp=tp),
            )
            records.append(record)
        yield loss, records
        for parameter, name in zip(parameters, GRAD_NAMES, strict=True):
            parameter.grad = actual[name].to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        with call_of("update_lora_weights"):
            layer.update_lora_weights()


def loss_problem(losses: Sequence[float]) -> str:
    """What is wrong with the losses of a training, "" if nothing: they must be finite, and end below their start."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
    if len(losses) < 2 or losses[-1] >= losses[0]:
        return f"the loss does not fall: {losses[0]:.6g} at first, {losses[-1]:.6g} in the end"
    return ""


def worst_of_steps(steps: Sequence[Sequence[AccuracyRecord]]) -> list[AccuracyRecord]:
    """For each tensor the record of the step that did worst, in the contract's order."""
    worst: dict[str, AccuracyRecord] = {}
    for record in worst_first([record for records in steps for record in records]):
        assert isinstance(record, AccuracyRecord)
        worst.setdefault(record.tensor, record)
    return [worst[name] for name in ALL_TENSORS if name in worst]


def tp_degrees(case: Case, choice: str) -> tuple[int, ...]:
    """The tensor-parallel degrees of `no-tp`, `tp` or `all` for a case. ValueError for another word, or for none."""
    if choice not in TP_CHOICES:
        raise ValueError(f"--tp is {choice!r}, it takes one of {', '.join(TP_CHOICES)}")
    if choice == "no-tp":
        return (1,)
    degrees = tuple(degree for degree in case.tp if degree > 1 or choice == "all")
    if not degrees:
        raise ValueError(f"{case.id} has no TP degree above 1: I = {case.intermediate}")
    return degrees


def isa_label(engine: str, isa: str | None) -> str:
    """The ISA that a record shows: the one asked for, or the native engine's own choice; "" for other engines."""
    name = isa or ""
    if not name and engine == registry.NATIVE:
        from ktverify.engines.native.layer import chosen_isa

        name = chosen_isa()
    state = amx_state()
    return f"{name} (emulated)" if name == "amx_bf16" and state.emulated and not state.usable else name


def isa_name(label: str) -> str:
    """ "amx_bf16 (emulated)" -> "amx_bf16"."""
    return label.partition(" ")[0]


def repro_command(
    case: Case,
    *,
    engine: str = registry.NATIVE,
    isa: str = "",
    tensor: str = "",
    tp: int = 1,
    fresh: bool = False,
    method: str = METHOD,
) -> str:
    """The command line that repeats one comparison. `isa` may be a label; an emulated one sets the environment."""
    words = [f"{_environment(isa)}python -m ktverify repro '{case.id}'{registry.option(engine)}"]
    words += [f"--isa {isa_name(isa)}"] if isa else []
    words += [f"--tp {tp}"] if tp != 1 else []
    words += [f"--method {method}"] if method != METHOD else []
    words += ["--fresh"] if fresh else []
    words += [f"--tensor {tensor}"] if tensor else []
    return " ".join(words)


def verify_command(case: Case, *, engine: str = registry.NATIVE, isa: str = "", tp: int = 1) -> str:
    """The command line that repeats a training check."""
    words = [
        f"{_environment(isa)}python -m ktverify verify --mode training --case '{case.id}'{registry.option(engine)}"
    ]
    words += [f"--isa {isa_name(isa)}"] if isa else []
    words += ["--tp tp"] if tp != 1 else []
    return " ".join(words)


def dump(checked: Checked, path: str) -> list[str]:
    """Save what a case was made of as safetensors: `inputs.*`, `actual.*`, `expected.*`; returns the names.

    Base weights of the active experts only, as `inputs.gate_proj.<expert>`, since all of them may be gigabytes.
    Expected values are the fp64 oracle's, computed here if the comparison was with a golden.
    """
    from safetensors.torch import save

    from ktverify.system.files import write_whole

    inputs = checked.inputs
    tensors: dict[str, torch.Tensor] = {
        f"inputs.{name}": getattr(inputs, name)
        for name in ("hidden_states", "expert_ids", "weights", "grad_output", "physical_map")
    }
    tensors.update({f"inputs.{name}": tensor for name, tensor in inputs.lora.items()})
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors.update({f"inputs.{name}.{expert}": getattr(inputs, name)[expert] for expert in inputs.active})
    oracle = checked.expected if isinstance(checked.expected, LiveOracle) else LiveOracle.of(inputs)
    for name, tensor in checked.actual.items():
        tensors[f"actual.{name}"] = tensor
        tensors[f"expected.{name}"] = oracle.tensors[name]
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"case": checked.case.id})
    write_whole(path, data)
    return sorted(tensors)


def _environment(isa: str) -> str:
    return "KTVERIFY_EMULATE_AMX=1 " if isa.endswith("(emulated)") else ""


def _skipped_gradient(actual: torch.Tensor, where: dict[str, Any]) -> AccuracyRecord:
    """The record of a LoRA gradient under SkipLoRA: it must be exactly zero."""
    difference = compare(actual, torch.zeros_like(actual))
    count = float(torch.count_nonzero(actual))
    verdict = Verdict.PASS if count == 0 else Verdict.FAIL
    used = 0.0 if count == 0 else float("inf")
    gate = GateResult("stray", count, 0.0, used, verdict, "SkipLoRA gives base gradients only")
    line = f"{verdict.value} {where['tensor']} stray {count:.0f}, budget 0"
    return accuracy_record(Judgement(verdict, (gate,), line), difference, **where)
