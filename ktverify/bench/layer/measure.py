"""Time one layer in this process: `python -m ktverify.bench.layer.measure SPOT` prints lines of JSON.

The first results are compared with the oracle: a wrong result gets no time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ktverify.bench.host import resident_bytes
from ktverify.bench.layer.record import Line, MemoryLine, RepeatLine, Spot, SpotLine, SpotOtherLoadLine
from ktverify.bench.results import compare_results, errors_of, first_wrong
from ktverify.bench.shapes import weight_bytes
from ktverify.spec.cases import Case, flops
from ktverify.spec.names import GRAD_INPUT, GRAD_NAMES, LORA_NAMES, OUTPUT
from ktverify.system.limits import format_bytes
from ktverify.system.machine import read_machine
from ktverify.system.timing import Clock, OtherLoad, time_rounds

# number of rows that are compared with the oracle; each depends on its own token alone
CHECKED_ROWS = 16
SMALLEST = "E=1,k=1,H=32,I=32,T=1,r=1"


def check_fits(spots: Sequence[Spot]) -> None:
    """Raise MemoryError if the weights of the largest spot, as tensors and packed, do not fit."""
    largest = max((Case.parse(spot.case) for spot in spots), key=lambda case: weight_bytes(case, case.num_experts))
    needed = 2 * weight_bytes(largest, largest.num_experts)
    free = read_machine().memory_available_bytes
    if needed > free:
        raise MemoryError(
            f"{largest.id} needs {format_bytes(needed)} for its weights, as tensors and packed; {format_bytes(free)} "
            "are free; take fewer experts"
        )


def line_count(spots: Sequence[Spot]) -> int:
    """The number of lines of all processes."""
    return sum(spot.warmup + spot.repeats + 3 for spot in spots)


class MeasuredLayer:
    """One loaded layer and its inputs. Only the layer keeps the base weights."""

    def __init__(self, spot: Spot) -> None:
        import torch

        from ktverify.checks.altered_inputs import rows_of
        from ktverify.engines.native.layer import KTMoEWrapper
        from ktverify.engines.run import build_layer
        from ktverify.judge import reference
        from ktverify.spec.inputs import make_inputs

        self.spot, self.case, self.clock = spot, Case.parse(spot.case), Clock()
        self.before = resident_bytes()
        inputs = make_inputs(self.case)
        self.active = len(inputs.active)
        self.rows = (inputs.hidden_states, inputs.expert_ids, inputs.weights)
        self.grad_output = inputs.grad_output
        expected = reference.forward_backward(rows_of(inputs, slice(CHECKED_ROWS)), dtype=torch.float32)
        self.expected = {name: expected[name] for name in (OUTPUT, GRAD_INPUT)}
        self.layer: Any = build_layer(KTMoEWrapper, self.case, inputs, isa=spot.isa, tp=spot.tp, threads=spot.threads)

    def forward(self, *, save: bool = True) -> Any:
        return self.layer.forward_sft(*self.rows, save_for_backward=save)

    def backward(self) -> Any:
        return self.layer.backward(self.grad_output)

    def both(self) -> None:
        self.forward()
        self.backward()

    def grown(self) -> int:
        """Growth of the resident memory since before the inputs were made."""
        return resident_bytes() - self.before

    def check(self) -> dict[str, float]:
        """rel_l2 of output and grad_input of the first rows. RuntimeError for a wrong one."""
        results = {OUTPUT: self.forward()[:CHECKED_ROWS], GRAD_INPUT: self.backward()[0][:CHECKED_ROWS]}
        found = compare_results(results, self.expected)
        wrong = first_wrong(found)
        if wrong:
            raise RuntimeError(f"case {self.case.id}: {wrong}; a wrong result gets no time")
        return errors_of(found)

    def repeats(self) -> Iterator[RepeatLine]:
        """Time all repeats; `saving` and `backward` are a pair as `both` is, with a clock for each."""
        calls = {
            "forward": lambda: self.forward(save=False),
            "both": self.both,
            "saving": self.forward,
            "backward": self.backward,
        }
        for number, ns in time_rounds(calls, warmup=self.spot.warmup, repeats=self.spot.repeats, clock=self.clock):
            times = {f"{name}_ns": taken for name, taken in ns.items()}
            yield RepeatLine.model_validate({"number": self.spot.number, "repeat": number, **times})

    def train(self, steps: int) -> tuple[int, int]:
        """Growth of memory after the first of `steps` AdamW steps and after the last; without steps, the growth now."""
        if not steps:
            return self.grown(), self.grown()
        import torch

        parameters = [getattr(self.layer, name) for name in LORA_NAMES]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        first = 0
        for step in range(steps):
            self.forward()
            _, grads = self.backward()
            for parameter, name in zip(parameters, GRAD_NAMES, strict=True):
                parameter.grad = grads[name]
            optimizer.step()
            optimizer.zero_grad()
            self.layer.update_lora_weights()
            del grads
            first = first if step else self.grown()
        return first, self.grown()


def spot_lines(spot: Spot) -> Iterator[Line]:
    """Measure a spot in this process."""
    # memory that torch allocates permanently in its first step is not the layer's
    MeasuredLayer(spot.model_copy(update={"case": SMALLEST, "tp": 1})).train(min(1, spot.steps))
    layer = MeasuredLayer(spot)
    loaded = layer.grown()
    first = layer.clock.time(lambda: layer.forward(save=False))
    packed = layer.grown()
    yield SpotLine(
        number=spot.number,
        isa=layer.layer.isa,
        workers=layer.layer.threads,
        weights=weight_bytes(layer.case, layer.active),
        flops=flops(layer.case),
        first_ns=first,
        rel_l2=layer.check(),
    )
    load = OtherLoad()
    yield from layer.repeats()
    yield SpotOtherLoadLine(number=spot.number, others=load.share())
    first_step, last_step = layer.train(spot.steps)
    yield MemoryLine(number=spot.number, loaded=loaded, packed=packed, first_step=first_step, last_step=last_step)


if __name__ == "__main__":
    for line in spot_lines(Spot.model_validate_json(sys.argv[1])):
        print(line.model_dump_json(), flush=True)
