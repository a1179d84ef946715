"""Time steps of a transformer: `python -m ktverify.bench.transformer.measure SETTINGS` prints lines of JSON.

A step is forward with the loss, and backward. Gradients are dropped before it, outside of the time, so that backward
allocates them, as after optimizer.zero_grad().
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from ktverify.bench.transformer.memory import step_memory, timing_bytes
from ktverify.bench.transformer.record import EndLine, Line, ProcessLine, StepLine, TransformerSettings
from ktverify.system.limits import format_bytes
from ktverify.system.timing import Clock, time_rounds, use_device


def check_fits(settings: TransformerSettings) -> None:
    """Raise MemoryError if the steps do not fit; its text has what they need and what would need less.

    RuntimeError without the device. Nothing is allocated.
    """
    needed, free = timing_bytes(settings.size, forward_only=settings.forward_only), free_bytes(settings.device)
    if needed <= free:
        return
    size, whole = settings.size, step_memory(settings.size).all
    kinds = {"parameters": whole.parameter_bytes}
    if not settings.forward_only:
        kinds |= {"gradients": whole.gradient_bytes, "activations": whole.activation_bytes}
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in kinds.items())
    what = "forward" if settings.forward_only else "forward and backward"
    less = "--dtype bfloat16, a smaller --batch_size or --context_length"
    if not settings.forward_only:
        alone = format_bytes(timing_bytes(size, forward_only=True))
        less = f"--forward_only (takes {alone}), {less}"
    raise MemoryError(
        f"{size.name} needs {format_bytes(needed)} for {what} ({parts}, and working memory), {format_bytes(free)} are "
        f"free on {settings.device}; less take {less}"
    )


def free_bytes(device: str) -> int:
    """Free memory of a device in bytes. ValueError for a wrong name, RuntimeError if the device does not exist."""
    if device == "cpu":
        from ktverify.system import machine

        return machine.read_machine().memory_available_bytes
    if device.partition(":")[0] != "cuda":
        raise ValueError(f"--device is {device!r}, it takes cpu, cuda or cuda:N")
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"--device is {device!r}, torch sees no CUDA device here; it takes cpu")
    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def line_count(settings: TransformerSettings, warmups: tuple[int, ...]) -> int:
    """The number of lines of all processes."""
    return sum(warmup + settings.num_steps + 3 for warmup in warmups)


class Stepper:
    """A model, a batch and a clock."""

    def __init__(self, settings: TransformerSettings) -> None:
        import torch

        from ktverify.bench.transformer.model import Transformer, batch_of

        torch.manual_seed(0)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings, self.clock = settings, Clock(settings.device)
        self.model = Transformer(settings.size, settings.device)
        self.batch = batch_of(settings.size, settings.device)
        self.loss: Any = None

    def forward(self) -> None:
        import torch

        with torch.set_grad_enabled(not self.settings.forward_only):
            self.loss = self.model(*self.batch)

    def backward(self) -> None:
        self.loss.backward()

    def prepare(self) -> None:
        """Drop the gradients, so that backward allocates them, as after optimizer.zero_grad()."""
        self.loss = None
        self.model.zero_grad(set_to_none=True)

    def timed(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Time all steps: each one's number, below 0 for a warm-up, and nanoseconds of its forward and backward."""
        s = self.settings
        calls = {"forward": self.forward} | ({} if s.forward_only else {"backward": self.backward})
        return time_rounds(calls, warmup=s.warmup_steps, repeats=s.num_steps, clock=self.clock, prepare=self.prepare)

    def loop(self) -> int:
        """Nanoseconds of a whole step by `independent_step`."""
        self.prepare()
        seconds, self.loss = independent_step(self.model, self.batch, backward=not self.settings.forward_only)
        return int(1e9 * seconds)


def independent_step(model: Any, batch: Any, *, backward: bool) -> tuple[float, Any]:
    """Seconds of a step, and its loss, timed as in a plain training loop, without the Stepper and its Clock.

    Reading a value of the result waits for the device.
    """
    import torch

    begin = time.perf_counter()
    if backward:
        loss = model(*batch)
        loss.backward()
        model.embedding.weight.grad.flatten()[0].item()
    else:
        with torch.no_grad():
            loss = model(*batch)
        loss.item()
    return time.perf_counter() - begin, loss.detach()


def process_lines(settings: TransformerSettings) -> Iterator[Line]:
    """Measure the steps in this process."""
    import torch

    from ktverify.bench.timed_run import OtherLoadLine
    from ktverify.system.timing import OtherLoad

    use_device(settings.device)
    stepper, warmup = Stepper(settings), settings.warmup_steps
    cuda = settings.device.startswith("cuda")
    name = torch.cuda.get_device_name(settings.device) if cuda else "cpu"
    yield ProcessLine(warmup=warmup, device=name, threads=torch.get_num_threads())
    load = OtherLoad()
    for step, ns in stepper.timed():
        loop = stepper.loop() if settings.check and step >= 0 else None
        yield StepLine(warmup=warmup, step=step, forward_ns=ns["forward"], backward_ns=ns.get("backward"), loop_ns=loop)
    yield OtherLoadLine(others=load.share())
    peak = torch.cuda.max_memory_allocated(settings.device) if cuda else resident_peak()
    yield EndLine(warmup=warmup, peak=peak, loss=float(stepper.loss.detach()))


def resident_peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def agreement(steps: list[StepLine]) -> float:
    """Median of the timed steps, divided by that of the independent loop. ValueError without --check."""
    pairs = [(step.ns, step.loop_ns) for step in steps if step.loop_ns is not None]
    if not pairs:
        raise ValueError("no step was also timed by the independent loop")
    return statistics.median(ours for ours, _ in pairs) / statistics.median(theirs for _, theirs in pairs)


if __name__ == "__main__":
    for line in process_lines(TransformerSettings.model_validate_json(sys.argv[1])):
        print(line.model_dump_json(), flush=True)
