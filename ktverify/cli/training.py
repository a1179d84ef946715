"""The training commands: make-tiny, train, verify-training, compare-curves, export-merged,
export-adapter, quantise, memory, throughput.

Light until a command is called: help needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.cli.options import expanded, print_verdict
from ktverify.cli.progress import progress
from ktverify.errors import NotFinite, WrongKeys
from ktverify.training.pretrained import DTYPES, quiet

if TYPE_CHECKING:
    from ktverify.training.config import TrainConfig

_CONFIG = typer.Argument(metavar="CONFIG.yaml", help="the training's configuration")
_Base = Annotated[
    str | None, typer.Option(help="the base model (default: the one that the adapter names)", callback=expanded)
]
_Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run the base model's own code")]
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def make_tiny(
    family: Annotated[
        str,
        typer.Argument(
            help="deepseek_v2, deepseek_v3, qwen2_moe, qwen3_moe, mixtral, glm4_moe, olmoe; without experts: qwen3"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the directory to write")],
    seed: Annotated[int, typer.Option(help="of the weights", min=0)] = 0,
    sizes: Annotated[
        str,
        typer.Option(metavar="NAME=N,…", help="put over the family's, as its config.json names them; vocab_size too"),
    ] = "",
) -> None:
    """Write a small random checkpoint of a family, with a tokenizer. Needs no network.

    \b
    Examples:  python -m ktverify make-tiny deepseek_v2 --out tiny/deepseek_v2
               python -m ktverify make-tiny qwen3 --out tiny/wide --sizes hidden_size=104,num_hidden_layers=3
    """
    quiet("training", "peft", "yaml")
    from ktverify.training import tiny

    with progress(f"a tiny {family}"):
        written = tiny.make_tiny(family, out, seed=seed, sizes=tiny.parse_sizes(sizes))
    size = sum(path.stat().st_size for path in written.iterdir())
    typer.echo(f"{written}: {family}, {size / 1024:.0f} KiB")


def train(context: typer.Context, config: Annotated[Path, _CONFIG]) -> None:
    """Fine-tune with LoRA, experts in the engine, as a LLaMA-Factory configuration says.

    Any key may be put over the file's as --key value. Left in output_dir: the adapter (stock peft loads it),
    checkpoints, loss.jsonl, loss.png, training.json. docs/training.md lists the keys.

    \b
    Examples:  python -m ktverify train examples/minimal.yaml
               python -m ktverify train examples/minimal.yaml --learning_rate 1e-3 --max_steps 20
               python -m ktverify train examples/minimal.yaml --resume_from_checkpoint true
               torchrun --nproc-per-node 2 -m ktverify train examples/minimal.yaml --kt_ep true
    """
    chosen = _read_config(context, config)
    from ktverify.system.limits import format_bytes
    from ktverify.training.curves import to_text
    from ktverify.training.run import run

    try:
        trained = run(chosen, config.resolve().parent, during=progress)
    except NotFinite as error:
        print_verdict(False, str(error))
        raise
    if not trained.first:
        return
    if trained.note:
        typer.echo(trained.note)
        return
    done = trained.summary
    slope = "" if math.isnan(done.slope) else f", slope {done.slope:.2e} a step"  # one logged step has none
    typer.echo(f"loss {to_text(done.first_loss)} to {to_text(done.last_loss)}{slope}")
    typer.echo(
        f"{done.steps} steps, {done.tokens} tokens in {done.seconds:.1f} s, {done.tokens_per_s:.0f} tokens/s, peak "
        f"memory {format_bytes(done.peak_rss)}"
    )
    typer.echo(f"{chosen.output_dir}: adapter_model.safetensors, loss.jsonl, loss.png, training.json")


def verify_training(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a training's output directory")],
    base: _Base = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Accept what a training left, or say what is wrong with it. Exit code 1 if anything is.

    \b
    Asked: files, NaN or Inf, whether the adapter moved, loss finite and falling (fitted slope), keys and shapes
    against the base, loading in stock peft, generation finite and other than the base's.
    Example:  python -m ktverify verify-training saves/minimal
    """
    quiet("training", "peft", "yaml")
    from ktverify.training.acceptance import verify_training as ask

    bad = asked = 0
    not_asked = []
    for answer in ask(directory, base, trust=trust_remote_code):
        word = {None: "----", True: "PASS", False: "FAIL"}[answer.passed]
        typer.echo(f"{word} {answer.name:11} {answer.text}")
        if answer.passed is None:
            not_asked.append(answer.name)
        else:
            asked += 1
            bad += not answer.passed
    more = f"; not asked: {', '.join(not_asked)}" if not_asked else ""
    print_verdict(not bad, f"{directory}: {asked - bad} of {asked}{more}")


def compare_curves(
    old: Annotated[Path, typer.Argument(help="a run's directory, loss.jsonl or trainer_state.json")],
    new: Annotated[Path, typer.Argument(help="the same of the run to judge")],
    plot: Annotated[Path | None, typer.Option(help="draw both into this PNG")] = None,
) -> None:
    """Compare two loss histories step by step. Exit code 1 where they differ by more than 5 % anywhere.

    \b
    Example:  python -m ktverify compare-curves saves/stock saves/engine --plot curves.png
    """
    from ktverify.training import curves

    first, second = curves.read_curve(old), curves.read_curve(new)
    if plot is not None:
        curves.draw({str(old): first, str(new): second}, plot)
        typer.echo(str(plot))
    for path, curve in ((old, first), (new, second)):
        if curve.problem:
            print_verdict(False, f"{path}: {curve.problem}")
    found = curves.compare(first, second)
    typer.echo(
        f"{len(found.steps)} steps: mean {found.mean:.2%}, largest {found.largest:.2%} at step "
        f"{found.largest_at}, final {found.final:.2%}"
    )
    typer.echo(f"slope {found.slopes[0]:.3e} and {found.slopes[1]:.3e} a step")
    print_verdict(found.passed, f"largest difference {found.largest:.2%}, at most {curves.MAX_RELATIVE:.0%}")


def export_merged(
    adapter: Annotated[Path, typer.Argument(help="a directory with an adapter")],
    out: Annotated[Path, typer.Option(help="the directory to write")],
    base: _Base = None,
    trust_remote_code: _Trust = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"of what the adapter changes: {' or '.join(DTYPES)} (default: as it was)")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="routed experts as codes: int8, int4 or fp8 (default: no codes are made)")
    ] = None,
    group: Annotated[int, typer.Option(help="of --to int4: weights that share a scale, 32 or 128")] = 32,
) -> None:
    """Merge an adapter into its base model and write an ordinary checkpoint; what it does not change stays as it was.

    With --to a line says how much the codes change the merged weights.

    \b
    Examples:  python -m ktverify export-merged saves/minimal --out merged/minimal
               python -m ktverify export-merged saves/minimal --out merged/minimal-int8 --to int8
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype is {dtype!r}, it takes {' or '.join(DTYPES)}")
    quiet("training", "peft", "yaml")
    from ktverify.training.export import export_merged as merge

    with progress("merging"):
        written = merge(adapter, out, base=base, dtype=dtype, trust=trust_remote_code, to=to, group=group)
    typer.echo(f"{written}: merged checkpoint")


def export_adapter(
    adapter: Annotated[Path, typer.Argument(help="a directory with an adapter")],
    out: Annotated[Path, typer.Option(help="the directory to write")],
    form: Annotated[str, typer.Option("--format", help="peft, per-expert (vLLM, SGLang) or kt (kt-kernel)")],
    base: _Base = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Write an adapter's LoRA of the experts in another format, without changing what it computes.

    Adapters of all formats are read: --format peft is the way back.

    \b
    Examples:  python -m ktverify export-adapter saves/minimal --out saves/served --format per-expert
               python -m ktverify export-adapter saves/served --out saves/again --format peft
    """
    quiet("training", "peft", "yaml")
    from ktverify.training import adapter_formats

    written = adapter_formats.export_adapter(adapter, out, form, base=base, trust=trust_remote_code)
    typer.echo(f"{written}: {form}")


def quantise(
    checkpoint: Annotated[Path, typer.Argument(help="a model's directory, in bf16")],
    to: Annotated[str, typer.Option(help="int8 (a scale for each row), int4 (for each group) or fp8 (for 128 x 128)")],
    out: Annotated[Path, typer.Option(help="the directory to write")],
    group: Annotated[int, typer.Option(help="of int4: weights that share a scale, 32 or 128")] = 32,
) -> None:
    """Write a checkpoint's routed experts in a quantised format, and everything else as it is.

    Tensors and config.json are those of published checkpoints: FP8 by blocks, or compressed-tensors. docs/training.md
    says who reads which.

    \b
    Example:  python -m ktverify quantise models/qwen3 --to int4 --out models/qwen3-int4
    """
    from ktverify.system.limits import format_bytes
    from ktverify.training.quantise import quantise_checkpoint

    with progress(f"{checkpoint} to {to}", total=1.0) as say:
        found = quantise_checkpoint(checkpoint, out, to, group=group, say=say)
    before, after = format_bytes(found.bytes_before), format_bytes(found.bytes_after)
    typer.echo(f"{found.folder}: {found.matrices} matrices of routed experts in {to}, {before} became {after}")
    typer.echo(found.loss())
    typer.echo(f"left as they were, {format_bytes(sum(found.left.values()))}: {', '.join(sorted(found.left))}")
    if found.cut_blocks:
        typer.echo("blocks at an edge have fewer than 128 x 128 weights: transformers reads them with wrong scales")


def expert_stats(
    context: typer.Context,
    config: Annotated[Path, _CONFIG],
    out: Annotated[Path, typer.Option(help="the mask file to write, for kt_gpu_experts_mask")],
    experts: Annotated[
        int | None, typer.Option(help="of each layer, on the GPU (default: kt_num_gpu_experts)", min=1)
    ] = None,
) -> None:
    """Count which experts a configuration's data set reaches, and write a mask of the most frequent of each layer.

    Of equally frequent experts, those with the lower ids are taken. The base model computes, without adapter.

    \b
    Example:  python -m ktverify expert-stats examples/minimal.yaml --experts 2 --out mask.json
    """
    chosen = _read_config(context, config)
    number = experts or chosen.kt_num_gpu_experts
    if not number:
        raise ValueError("how many experts go to the GPU is not known: give --experts, or kt_num_gpu_experts")
    from ktverify.training.expert_stats import count_routing
    from ktverify.training.gpu_experts import most_frequent, write_masks

    with progress("counting"):
        counts = count_routing(chosen, config.resolve().parent)
    written = write_masks(out, counts, number)
    for layer, each in enumerate(counts):
        ids = most_frequent(each, number)
        share = sum(each[expert] for expert in ids) / max(1, sum(each))
        typer.echo(f"layer {layer}: {number} of {len(each)} experts take {share:.0%} of the slots".replace("%", " %"))
    typer.echo(f"{written}: kt_gpu_experts_mask")


def memory(
    context: typer.Context,
    config: Annotated[Path, _CONFIG],
    steps: Annotated[int, typer.Option(help="steps after the warm-up; up to four times as many", min=8)] = 10,
) -> None:
    """Resident memory after loading and after each step of a training. Exit code 1 if it grows: a leak.

    \b
    Example:  python -m ktverify memory examples/minimal.yaml
    """
    chosen = _read_config(context, config)
    from ktverify.system.limits import format_bytes
    from ktverify.training.memory_trend import MOST
    from ktverify.training.run import measure_memory

    found = measure_memory(chosen, config.resolve().parent, steps, progress)
    typer.echo(f"loaded    {format_bytes(found.loaded):>10}")
    for number, rss in enumerate(found.steps, start=1):
        typer.echo(f"step {number:3}  {format_bytes(rss):>10}")
    print_verdict(not found.leaks, f"{found.slope / 1024:.1f} KiB a step where it is calmest, at most {MOST // 1024}")


def throughput(
    context: typer.Context,
    config: Annotated[Path, _CONFIG],
    steps: Annotated[int, typer.Option(help="steps after the warm-up", min=3)] = 10,
) -> None:
    """Tokens per second of a training, padding left out: the median of some steps.

    \b
    Example:  python -m ktverify throughput examples/minimal.yaml
    """
    chosen = _read_config(context, config)
    from ktverify.training.run import measure_throughput

    typer.echo(f"{measure_throughput(chosen, config.resolve().parent, steps, progress):.0f} tokens/s")


COMMANDS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "make-tiny": (make_tiny, {}),
    "train": (train, PASS_THROUGH),
    "verify-training": (verify_training, {}),
    "compare-curves": (compare_curves, {}),
    "export-merged": (export_merged, {}),
    "export-adapter": (export_adapter, {}),
    "quantise": (quantise, {}),
    "expert-stats": (expert_stats, PASS_THROUGH),
    "memory": (memory, PASS_THROUGH),
    "throughput": (throughput, PASS_THROUGH),
}
"""Name -> (function, click's context settings), for cli/main.py to register."""


def _read_config(context: typer.Context, path: Path) -> TrainConfig:
    quiet("training", "peft", "yaml")
    from ktverify.training.config import read_config

    try:
        return read_config(path, context.args)
    except WrongKeys as error:
        if len(error.lines) == 1:
            raise
        for line in error.lines:
            typer.echo(line, err=True)
        raise ValueError(f"{path} cannot be used for the {len(error.lines)} reasons above") from None
