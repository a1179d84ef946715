"""`python -m ktverify bench transformer` and `bench memory`: parse, measure or count, print. Help needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.cli import options

if TYPE_CHECKING:
    from ktverify.bench.transformer.memory import PartMemory
    from ktverify.bench.transformer.record import Line
    from ktverify.bench.transformer.sizes import ModelSize

STUDY = (0, 1, 2, 5)  # warm-ups
# largest relative difference between the count and what autograd saves
TOLERANCE = 0.05


def transformer(
    preset: options.Preset = "small",
    context_length: options.ContextLength = 256,
    batch_size: options.BatchSize = 4,
    d_model: options.DModel = None,
    d_ff: options.DFf = None,
    num_layers: options.NumLayers = None,
    num_heads: options.NumHeads = None,
    vocab_size: options.VocabSize = 10_000,
    rope_theta: Annotated[float, typer.Option("--rope_theta", help="base of the rotations' wavelengths")] = 10_000.0,
    dtype: options.ModelDtype = "float32",
    attention: options.Attention = "plain",
    warmup_steps: Annotated[int, typer.Option("--warmup_steps", help="steps that don't count", min=0)] = 5,
    num_steps: Annotated[int, typer.Option("--num_steps", help="steps that do", min=1)] = 10,
    forward_only: Annotated[bool, typer.Option("--forward_only", help="no backward; nothing is kept for one")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="of torch (default: its own choice)", min=1)] = None,
    warmup_study: Annotated[
        bool,
        typer.Option("--warmup_study", help="0, 1, 2 and 5 warm-ups, each in a fresh process"),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="in turn with each step, time one by an independent loop, and compare")
    ] = False,
    out: options.Out = None,
    show: options.Show = None,
    as_json: options.Lines = False,
) -> None:
    """Time forward and backward of a decoder-only transformer.

    RMSNorm, RoPE, SwiGLU, causal attention. Times are taken in a process of its own, the device waited for on both
    sides. Written: transformer.jsonl (every step), .md, .html, .tsv, .png. A model that does not fit is refused with
    what it would need. Ctrl-C leaves what was measured.

    Exit code 1 if --check finds the median step more than 3 % off.

    \b
    Examples:  python -m ktverify bench transformer small --num_steps 20
               python -m ktverify bench transformer small --warmup_study
               python -m ktverify bench transformer --d_model 512 --d_ff 2048 --num_layers 4 --num_heads 8
               python -m ktverify bench transformer xl --forward_only --dtype bfloat16 --device cuda
    """
    from ktverify.bench import timed_run
    from ktverify.bench.transformer import measure, record
    from ktverify.bench.transformer.sizes import resolve

    if show is not None:
        _conclude(show, record.read(show), as_json)
        return
    given = {name: value for name, value in locals().items() if name in options.SIZES}
    settings = record.TransformerSettings(
        size=resolve(preset, given),
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        forward_only=forward_only,
        device=device,
        threads=threads,
        check=check,
    )
    measure.check_fits(settings)
    warmups = STUDY if warmup_study else (warmup_steps,)
    processes = [settings.model_copy(update={"warmup_steps": warmup}) for warmup in warmups]
    code = timed_run.measure(
        "transformer",
        record.FILE,
        partial(record.TransformerLine, settings=settings, warmups=warmups),
        timed_run.lines_of_processes(measure.__name__, processes, record.Line),
        measure.line_count(settings, warmups),
        partial(_conclude, as_json=as_json),
        out,
    )
    raise typer.Exit(code)


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> bool:
    """Write the views, then print. False if --check found a difference; NothingMeasured without a step that counts."""
    from ktverify.bench import timed_run
    from ktverify.bench.transformer import record, views

    return timed_run.conclude(directory / record.FILE, lines, views.view(lines), "no step that counts", as_json)


def memory(
    preset: options.Preset = "small",
    context_length: options.ContextLength = 256,
    batch_size: options.BatchSize = 4,
    d_model: options.DModel = None,
    d_ff: options.DFf = None,
    num_layers: options.NumLayers = None,
    num_heads: options.NumHeads = None,
    vocab_size: options.VocabSize = 10_000,
    dtype: options.ModelDtype = "float32",
    attention: options.Attention = "plain",
    check: Annotated[
        bool, typer.Option("--check", help="also measure what autograd keeps; of plain attention without memory")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Count what one training step of a transformer takes, part by part.

    Parameters, gradients, AdamW, activations. Counted, not measured: any model on any machine. Activations are all that
    autograd keeps from forward to backward, with one line for a step in which a single layer is alive at a time. GiB
    are 2^30 bytes.

    Exit code 1 if --check finds another size than was counted, by more than 5 %.

    \b
    Examples:  python -m ktverify bench memory 2.7b
               python -m ktverify bench memory xl --context_length 1024 --attention fused
               python -m ktverify bench memory medium --check
    """
    from ktverify.bench.transformer.memory import one_layer_live, step_memory
    from ktverify.bench.transformer.sizes import resolve

    given = {name: value for name, value in locals().items() if name in options.SIZES}
    size = resolve(preset, given)
    step = step_memory(size)
    found: dict[str, Any] = {
        "kind": "memory",
        "size": asdict(size),
        "parts": [asdict(part) for part in (*step.parts, step.all)],
        "total_bytes": step.all.total_bytes,
        "one_layer_live_elements": one_layer_live(size),
    }
    measured = _measure(size, step.all) if check else None
    if measured is not None:
        found["measured_activation_bytes"] = measured
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(size, (*step.parts, step.all), found)
    if measured is not None and abs(measured / step.all.activation_bytes - 1) > TOLERANCE:
        raise typer.Exit(1)


def _measure(size: ModelSize, whole: PartMemory) -> int:
    """Bytes that autograd saves in the real model. Fused attention is computed: on shapes alone torch takes another."""
    from ktverify.bench.transformer.saved_tensors import saved_bytes
    from ktverify.system import machine

    if size.attention == "plain":
        return saved_bytes(size, "meta")
    needed = whole.parameter_bytes + 2 * whole.activation_bytes
    available = machine.read_machine().memory_available_bytes
    if needed > available:
        raise MemoryError(
            f"--check of fused attention computes: {size.name} takes {gib(needed)}, {gib(available)} are free"
        )
    return saved_bytes(size, "cpu")


def gib(count: float) -> str:
    """Two decimals of 2^30 bytes, as the usual tables have them."""
    return f"{count / 2**30:.2f} GiB"


def _print(size: ModelSize, parts: tuple[PartMemory, ...], found: dict[str, Any]) -> None:
    """Print a row for each part, all layers together, and their sum; then what was measured."""
    from ktverify.report.console import make_console, print_grid, print_pairs
    from ktverify.report.grid import Grid

    rows = []
    for part in parts:
        sizes = (part.parameter_bytes, part.gradient_bytes, part.optimizer_bytes, part.activation_bytes)
        cells = [f"{count / 2**30:.2f}" for count in (*sizes, part.total_bytes)]
        rows.append((part.part, f"{part.parameters:,}", *cells[:3], f"{part.activations:,}", *cells[3:]))
    headings = ("part", "parameters", "GiB", "gradients GiB", "AdamW GiB", "activations", "GiB", "all GiB")
    console, whole = make_console(), parts[-1]
    console.print(f"a training step holds {gib(whole.total_bytes)}", style="bold")
    print_grid(console, Grid(size.text, (), headings, tuple(rows)))
    console.print()
    live = found["one_layer_live_elements"]
    pairs = [
        ("activations, all kept", f"{whole.activations:,} elements, {gib(whole.activation_bytes)}"),
        (
            "activations, one layer live",
            f"{live:,} elements, {gib(live * size.element_bytes)}: as with full recomputation, the layers' inputs left "
            "out; the count that published tables have",
        ),
    ]
    measured = found.get("measured_activation_bytes")
    if measured is not None:
        off = measured / whole.activation_bytes - 1
        word = "PASS" if abs(off) <= TOLERANCE else "FAIL"
        pairs.append(("check", f"{word} autograd keeps {gib(measured)}, {100 * off:+.3f} % of the count"))
    print_pairs(console, pairs)
