"""`python -m ktverify bench transformer`: parse, measure, print. Help needs no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import bench_options

if TYPE_CHECKING:
    from ktverify.bench.transformer.record import Line

STUDY = (0, 1, 2, 5)


def transformer(
    preset: bench_options.Preset = "small",
    context_length: bench_options.ContextLength = 256,
    batch_size: bench_options.BatchSize = 4,
    d_model: bench_options.DModel = None,
    d_ff: bench_options.DFf = None,
    num_layers: bench_options.NumLayers = None,
    num_heads: bench_options.NumHeads = None,
    vocab_size: bench_options.VocabSize = 10_000,
    rope_theta: Annotated[float, typer.Option("--rope_theta", help="base of the rotations' wavelengths")] = 10_000.0,
    dtype: bench_options.ModelDtype = "float32",
    attention: bench_options.Attention = "plain",
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
    out: bench_options.Out = None,
    show: bench_options.Show = None,
    as_json: bench_options.Lines = False,
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
    given = {name: value for name, value in locals().items() if name in bench_options.SIZES}
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
