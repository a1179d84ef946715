"""`python -m ktverify bench memory`: parse, count, print. Help needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.cli import bench_options

if TYPE_CHECKING:
    from ktverify.bench.transformer.memory import PartMemory
    from ktverify.bench.transformer.sizes import ModelSize
    from ktverify.report.grid import Grid


def memory(
    preset: bench_options.Preset = "small",
    context_length: bench_options.ContextLength = 256,
    batch_size: bench_options.BatchSize = 4,
    d_model: bench_options.DModel = None,
    d_ff: bench_options.DFf = None,
    num_layers: bench_options.NumLayers = None,
    num_heads: bench_options.NumHeads = None,
    vocab_size: bench_options.VocabSize = 10_000,
    dtype: bench_options.ModelDtype = "float32",
    attention: bench_options.Attention = "plain",
    check: Annotated[
        bool, typer.Option("--check", help="also measure what autograd keeps; of plain attention without memory")
    ] = False,
    as_json: bench_options.Json = False,
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

    given = {name: value for name, value in locals().items() if name in bench_options.SIZES}
    size = resolve(preset, given)
    step = step_memory(size)
    found: dict[str, Any] = {
        "kind": "memory",
        "size": asdict(size),
        "parts": [asdict(part) for part in (*step.parts, step.all)],
        "total_bytes": step.all.total_bytes,
        "one_layer_live_elements": one_layer_live(size),
    }
    measured = _measure(size) if check else None
    if measured is not None:
        found["measured_activation_bytes"] = measured
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(size, (*step.parts, step.all), found)
    if measured is not None and abs(measured / step.all.activation_bytes - 1) > TOLERANCE:
        raise typer.Exit(1)


# largest relative difference between the count and what autograd saves
TOLERANCE = 0.05


def _measure(size: ModelSize) -> int:
    """Bytes that autograd saves in the real model. Fused attention is computed: on shapes alone torch takes another."""
    from ktverify.bench.transformer.memory import step_memory
    from ktverify.bench.transformer.saved_tensors import saved_bytes
    from ktverify.system import machine

    if size.attention == "plain":
        return saved_bytes(size, "meta")
    whole = step_memory(size).all
    needed, available = (
        whole.parameter_bytes + 2 * whole.activation_bytes,
        machine.read_machine().memory_available_bytes,
    )
    if needed > available:
        raise MemoryError(
            f"--check of fused attention computes: {size.name} takes {gib(needed)}, {gib(available)} are free"
        )
    return saved_bytes(size, "cpu")


def gib(count: float) -> str:
    """Two decimals of 2^30 bytes, as the usual tables have them."""
    return f"{count / 2**30:.2f} GiB"


def grid(size: ModelSize, parts: tuple[PartMemory, ...]) -> Grid:
    """A row for each part, all layers together, and their sum."""
    from ktverify.report.grid import Grid

    rows = []
    for part in parts:
        sizes = (part.parameter_bytes, part.gradient_bytes, part.optimizer_bytes, part.activation_bytes)
        cells = [f"{count / 2**30:.2f}" for count in (*sizes, part.total_bytes)]
        rows.append((part.part, f"{part.parameters:,}", *cells[:3], f"{part.activations:,}", *cells[3:]))
    headings = ("part", "parameters", "GiB", "gradients GiB", "AdamW GiB", "activations", "GiB", "all GiB")
    return Grid(size.text, (), headings, tuple(rows))


def _print(size: ModelSize, parts: tuple[PartMemory, ...], found: dict[str, Any]) -> None:
    from ktverify.report.console import make_console, print_grid, print_pairs

    console, whole = make_console(), parts[-1]
    console.print(f"a training step holds {gib(whole.total_bytes)}", style="bold")
    print_grid(console, grid(size, parts))
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
