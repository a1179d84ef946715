"""`python -m ktverify plan`: parse, plan, print. Help needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import options
from ktverify.cli.progress import progress

if TYPE_CHECKING:
    from ktverify.bench.plan.hardware import Hardware
    from ktverify.bench.plan.steps import Routing
    from ktverify.training.moe_model import MoeModel

_Size = Annotated[float | None, typer.Option(metavar="GIB", help="of one machine (default: this machine's)")]
_Rate = Annotated[float | None, typer.Option(metavar="GB/S", help="that one machine reads (default: measured here)")]
NETWORK = 1.25  # GB/s: Ethernet of 10 Gbit/s


def plan(
    config: Annotated[Path, typer.Argument(metavar="MODEL_CONFIG", help="a config.json, or the directory that has it")],
    machines: Annotated[int, typer.Option(help="machines, all alike", min=1)] = 1,
    nodes: Annotated[int | None, typer.Option(help="NUMA nodes of one (default: this machine's)", min=1)] = None,
    memory: _Size = None,
    bandwidth: _Rate = None,
    peak: Annotated[
        float | None, typer.Option(metavar="GFLOP/S", help="that one multiplies and adds (default: measured here)")
    ] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GB/S", help="that one sends to others (default: 1.25, 10 Gbit/s)")
    ] = None,
    local: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="that a process sends to others on its machine (default: measured here)"),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", help="of a GPU in each machine; 0: there is none")] = 0.0,
    gpu_bandwidth: Annotated[float, typer.Option(metavar="GB/S", help="that the GPU reads")] = 0.0,
    gpu_peak: Annotated[float, typer.Option(metavar="TFLOP/S", help="that the GPU multiplies in bf16")] = 0.0,
    gpu_link: Annotated[float, typer.Option(metavar="GB/S", help="between memory and GPU, one way")] = 0.0,
    gpu_experts: Annotated[
        int | None, typer.Option(help="of each layer, on the GPU (default: the best number that fits)", min=1)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="what expert-stats wrote: how often each expert is reached (default: evenly)")
    ] = None,
    tokens: Annotated[int, typer.Option(help="of a step, in all processes together", min=1)] = 2048,
    rank: Annotated[int, typer.Option(help="of LoRA", min=1)] = 8,
    base_format: Annotated[
        str | None, typer.Option("--format", help="bf16, fp8, int8, int4 or mxfp4 (default: the checkpoint's)")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="time layers of the model's sizes here, and plan with what was reached")
    ] = False,
    rounds: Annotated[int, typer.Option(help="of --measure", min=1)] = 12,
    as_json: options.Json = False,
) -> None:
    """How much memory a model's training takes, how long its MoE layers compute, and which split of it is fastest.

    From config.json alone: one process, tensor parallel parts on the NUMA nodes, expert parallel ranks on nodes or
    machines, and experts on a GPU, each with base weights in every format. GiB are 2^30 bytes, GB are 10^9.
    docs/plan.md has the formulas. Times without --measure are lower bounds.

    Exit code 1 if no split fits, or if --measure finds a time that is more than 20 % away from the predicted one.

    \b
    Examples:  python -m ktverify plan models/deepseek-v3 --machines 2 --memory 512 --bandwidth 400 --peak 8000
               python -m ktverify plan models/qwen3/config.json --format int4 --tokens 4096
               python -m ktverify plan models/qwen3 --measure
    """
    given = {"memory": memory, "bandwidth": bandwidth, "peak": peak, "network": network, "local": local}
    gpu = {"memory": gpu_memory, "bandwidth": gpu_bandwidth, "peak": gpu_peak, "link": gpu_link}
    _check_rates(given, gpu)
    from ktverify.training.pretrained import quiet

    quiet("planning")
    from ktverify.bench.plan import measure as measuring
    from ktverify.bench.plan import views
    from ktverify.bench.plan.memory import METHOD_OF, Load
    from ktverify.bench.plan.plan import plan as make_plan
    from ktverify.report.console import make_console, print_grids, print_pairs
    from ktverify.training.moe_model import read_moe_model

    model = read_moe_model(config)
    options.check_choice("--format", base_format, tuple(METHOD_OF))
    load = Load(tokens, rank, base_format or model.stored)
    load.case(model)
    routing = _routing(mask, model)
    with progress("measuring this machine"):
        hardware, sources = _hardware(machines, nodes, given, gpu)
    found = None
    if measure:
        with progress("measuring") as say:
            found = measuring.measure(measuring.request_of(model, load, rounds), say)
    planned = make_plan(
        model,
        hardware,
        load,
        routing=routing,
        efficiency=found.efficiency if found else None,
        gpu_experts=gpu_experts,
    )
    if as_json:
        typer.echo(json.dumps(views.as_json(planned, found, sources)))
    else:
        console = make_console()
        console.print(f"{'PASS' if planned.fastest else 'FAIL'} {planned.verdict}", style="bold")
        if found:
            console.print(f"{'PASS' if found.passed else 'FAIL'} {found.verdict}", style="bold")
        console.print()
        print_grids(console, [*views.grids(planned), *([views.calibration(found)] if found else [])])
        print_pairs(console, sources)
    if not planned.fastest or (found and not found.passed):
        raise typer.Exit(1)


def _check_rates(given: dict[str, float | None], gpu: dict[str, float]) -> None:
    """ValueError unless each is a finite number above 0; of a GPU also 0, for none."""
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value:g}; it takes a finite number above 0")
    for name, value in gpu.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"--gpu-{name} is {value:g}; it takes a finite number of 0 or more")


def _hardware(
    machines: int, nodes: int | None, given: dict[str, float | None], gpu: dict[str, float]
) -> tuple[Hardware, list[tuple[str, str]]]:
    """The machines, and where each number comes from. What is not given is measured or read here."""
    from ktverify.bench.plan.hardware import Hardware, measured_limits, measured_link
    from ktverify.system.machine import read_machine

    facts, sources = read_machine(), []
    looked = measured_limits() if given["bandwidth"] is None or given["peak"] is None else (0.0, 0.0)

    def of(name: str, unit: str, scale: float, here: Callable[[], float], source: str) -> float:
        value, how = given[name], "given"
        if value is None:
            value, how = here() / scale, source
        sources.append((name, f"{value:,.4g} {unit}, {how}"))
        return scale * value

    count = nodes or max(1, len(facts.numa))
    sources.append(("NUMA nodes", f"{count}, {'given' if nodes else 'of this machine'}"))
    network = of("network", "GB/s", 1e9, lambda: 1e9 * NETWORK, "assumed, 10 Gbit/s")
    return Hardware(
        machines=machines,
        nodes=count,
        memory=of("memory", "GiB", 2**30, lambda: float(facts.memory_bytes), "of this machine"),
        bandwidth=of("bandwidth", "GB/s", 1e9, lambda: looked[0], "measured here"),
        peak=of("peak", "GFLOP/s", 1e9, lambda: looked[1], "measured here"),
        network=network,
        # only ranks on the nodes of one machine use it
        local=of("local", "GB/s", 1e9, measured_link, "measured here") if count > 1 else network,
        gpu_memory=2**30 * gpu["memory"],
        gpu_bandwidth=1e9 * gpu["bandwidth"],
        gpu_peak=1e12 * gpu["peak"],
        gpu_link=1e9 * gpu["link"],
    ), sources


def _routing(mask: Path | None, model: MoeModel) -> Routing | None:
    """What the counts in a mask file say; None without one."""
    if mask is None:
        return None
    from ktverify.bench.plan.steps import Routing
    from ktverify.training.gpu_experts import read_counts

    return Routing.of_counts(model, read_counts(mask), str(mask))
