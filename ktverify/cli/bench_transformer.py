"""`python -m ktverify bench transformer`: parses, measures, prints. Light until it is called: help needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import transformer_options
from ktverify.errors import NothingMeasured
from ktverify.isolation.interrupt import INTERRUPTED

if TYPE_CHECKING:
    from ktverify.bench.transformer.record import Line

STUDY = (0, 1, 2, 5)


def transformer(
    preset: transformer_options.Preset = "small",
    context_length: transformer_options.ContextLength = 256,
    batch_size: transformer_options.BatchSize = 4,
    d_model: transformer_options.DModel = None,
    d_ff: transformer_options.DFf = None,
    num_layers: transformer_options.NumLayers = None,
    num_heads: transformer_options.NumHeads = None,
    vocab_size: transformer_options.VocabSize = 10_000,
    rope_theta: Annotated[float, typer.Option("--rope_theta", help="base of the rotations' wavelengths")] = 10_000.0,
    dtype: transformer_options.Dtype = "float32",
    attention: transformer_options.Attention = "plain",
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
    out: Annotated[
        Path | None, typer.Option(help="where it is written (default: reports/runs/<stamp>-transformer)")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="measure nothing: print and draw this earlier run again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the JSON lines instead of the tables")] = False,
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
    from ktverify.bench.transformer import record

    if show is not None:
        _conclude(show, record.read(show), as_json)
        return
    from ktverify.bench.timed_run import RunLine, collect, if_there_is_any
    from ktverify.bench.transformer.measure import check_fits, line_count, measured
    from ktverify.bench.transformer.sizes import resolve
    from ktverify.runs.jsonl import new_directory

    given = {name: value for name, value in locals().items() if name in transformer_options.SIZES}
    settings = record.TransformerSettings(
        size=resolve(preset, given),
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        forward_only=forward_only,
        device=device,
        threads=threads,
        check=check,
    )
    check_fits(settings)
    directory = out if out is not None else new_directory("transformer")
    warmups = STUDY if warmup_study else (warmup_steps,)
    head = record.TransformerLine(**RunLine.facts(directory), settings=settings, warmups=warmups)
    lines, stopped = collect(
        directory / record.FILE,
        head,
        measured(settings, warmups),
        line_count(settings, warmups),
        f"timing {settings.size.name}",
    )
    right = True
    with if_there_is_any(stopped):
        right = _conclude(directory, lines, as_json)
    if stopped or not right:
        raise typer.Exit(INTERRUPTED if stopped else 1)


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> bool:
    """Write the views, then print; False where the check failed. ValueError for a run that has no step that counts."""
    from ktverify.bench.transformer import record
    from ktverify.bench.transformer import views as transformer_views
    from ktverify.report import pages

    view = transformer_views.view(lines)
    if view is None:
        raise NothingMeasured(f"{directory / record.FILE} has no step that counts")
    pages.conclude(view, lines, directory / record.FILE, as_json)
    return not any(text.startswith("FAIL") for name, text in view.facts if name == "check")
