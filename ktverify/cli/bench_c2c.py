"""`python -m ktverify bench c2c`: single, batch, dataset, merge; and `bench analyze`. Help needs no torch."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.bench.c2c import prompts
from ktverify.cli import options
from ktverify.cli.options import expanded, named
from ktverify.cli.progress import progress
from ktverify.isolation.interrupt import INTERRUPTED
from ktverify.system.files import write_whole
from ktverify.training.pretrained import quiet

if TYPE_CHECKING:
    from ktverify.bench.c2c.record import C2cSettings, PromptRecord

_MANY = 12  # more prompts than this are printed as a distribution alone


def single(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text (default: the first built-in one)")] = "",
    base_model: options.BaseModel = options.BASE,
    teacher_model: options.TeacherModel = options.TEACHER,
    projectors: options.ProjectorFile = None,
    max_new_tokens: options.MaxNewTokens = 64,
    profile_tokens: Annotated[
        int, named("profile_tokens", "new tokens of the run for operators; 0: no such run", min=0)
    ] = 8,
    warmup_steps: options.Warmup = 1,
    dtype: options.PairDtype = "bfloat16",
    device: options.Device = "cpu",
    template: options.Template = True,
    output: options.Output = None,
    as_json: options.Json = False,
) -> None:
    """Time one prompt, stage by stage, and see which operators the time goes to.

    Written beside each other: NAME.jsonl (the record), .tsv, .trace.json (the stages, for ui.perfetto.dev), .png (the
    same, drawn), .operators.tsv and .operators.trace.json (a second run, under torch's profiler), .run.json (settings,
    machine, versions, warm-up).

    \b
    Examples:  python -m ktverify bench c2c single "Why is the sky blue?"
               python -m ktverify bench c2c single --base_model tiny/base --teacher_model tiny/teacher
    """
    text = prompt.strip() or prompts.built_in()[0]
    chosen = _settings(locals(), source="argument", start=0, count=1)
    if output is not None and output.exists():
        raise ValueError(f"{output} exists: remove it or name another --output")
    quiet("bench c2c")
    from ktverify.bench.c2c.single import run_single, show_single

    with _output(output) as path, progress(f"{base_model} taught by {teacher_model}"):
        found = run_single(chosen, text, projectors, path, warmups=warmup_steps, profile_tokens=profile_tokens)
    if as_json:
        typer.echo(found[0].model_dump_json())
    else:
        show_single(*found)


def batch(
    base_model: options.BaseModel = options.BASE,
    teacher_model: options.TeacherModel = options.TEACHER,
    projectors: options.ProjectorFile = None,
    max_new_tokens: options.MaxNewTokens = 64,
    warmup_steps: options.Warmup = 1,
    dtype: options.PairDtype = "bfloat16",
    device: options.Device = "cpu",
    template: options.Template = True,
    output: options.Output = None,
    as_json: options.Json = False,
) -> None:
    """Time the five built-in prompts: short, long, prose, code, arithmetic, characters beyond ASCII.

    Written: NAME.jsonl (a record a prompt), .tsv, .run.json. Started again with the same --output, it continues after
    the last whole record.

    \b
    Example:  python -m ktverify bench c2c batch --max_new_tokens 32 --output five.jsonl
    """
    texts = prompts.built_in()
    chosen = _settings(locals(), source="built-in", start=0, count=len(texts))
    with _output(output) as path:
        _run(chosen, texts, projectors, path, warmup_steps, as_json=as_json)


def dataset(
    dataset: Annotated[
        str | None, named("dataset", "a data set of the hub, or a directory; needs datasets", callback=expanded)
    ] = None,
    subset: Annotated[str | None, named("subset", "its configuration, where it has several")] = None,
    split: Annotated[str, named("split", "which part of it")] = "test",
    dataset_file: Annotated[Path | None, named("dataset_file", "instead: JSON lines with prompt or question")] = None,
    num_samples: Annotated[int | None, named("num_samples", "so many prompts (default: all)", min=1)] = None,
    start: Annotated[int, named("start", "number of the first prompt, from 0", min=0)] = 0,
    shard: Annotated[str, named("shard", "k/n: of these, every n-th from the k-th on", metavar="K/N")] = "1/1",
    base_model: options.BaseModel = options.BASE,
    teacher_model: options.TeacherModel = options.TEACHER,
    projectors: options.ProjectorFile = None,
    max_new_tokens: options.MaxNewTokens = 64,
    warmup_steps: options.Warmup = 1,
    dtype: options.PairDtype = "bfloat16",
    device: options.Device = "cpu",
    template: options.Template = True,
    output: options.Output = None,
    as_json: options.Json = False,
) -> None:
    """Time the prompts of a data set, one after the other.

    Written as in batch. Killed or interrupted, and started again with the same options and --output, it continues after
    the last whole record. Several processes or machines share the work by --shard 1/3, 2/3, 3/3, or by --start and
    --num_samples, each with an --output of its own; `merge` joins them.

    \b
    Examples:  python -m ktverify bench c2c dataset --dataset openai/gsm8k --subset main --num_samples 100
               python -m ktverify bench c2c dataset --dataset_file lines.jsonl --shard 1/2 --output part1.jsonl
    """
    given = locals()
    number, of = _shard(shard)
    texts, source = _texts(dataset, subset, split, dataset_file, start, num_samples)
    chosen = _settings(given, source=source, start=start, count=len(texts), shard=(number, of))
    mine = texts[number - 1 :: of]
    if not mine:
        raise ValueError(
            f"--shard {shard} of {len(texts)} prompts has none; it takes at most as many shards as prompts"
        )
    with _output(output) as path:
        _run(chosen, mine, projectors, path, warmup_steps, as_json=as_json)


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="the shards' files of records")],
    output: Annotated[Path, named("output", "the file to write, NAME.jsonl")],
    as_json: options.Json = False,
) -> None:
    """Join the files of shards or ranges into the file that one run would have written.

    Refused where settings differ, an id is there twice, or one is missing.

    \b
    Example:  python -m ktverify bench c2c merge part1.jsonl part2.jsonl --output whole.jsonl
    """
    from ktverify.bench.c2c import store, views

    joined = store.merge(files, output)
    write_whole(store.beside(output, ".tsv"), views.prompt_table(joined, "\t"))
    if as_json:
        typer.echo(json.dumps({"output": str(output), "records": len(joined)}))
    else:
        typer.echo(f"{output}: {len(joined)} records of {len(files)} files, ids {joined[0].id} to {joined[-1].id}")


def analyze(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="files of records, NAME.jsonl")],
    out: Annotated[Path | None, named("out", "the folder to write into (default: the first file's)")] = None,
    as_json: options.Json = False,
) -> None:
    """How the times of many prompts are distributed: the slowest ten, histograms, CSV.

    Written: NAME.analysis.csv (a row a prompt), NAME.analysis.png, NAME.analysis.md, named after the first file. A last
    line that was cut off is left out.

    \b
    Examples:  python -m ktverify bench analyze timing.jsonl
               python -m ktverify bench analyze part1.jsonl part2.jsonl --out analysis
    """
    from ktverify.bench.c2c import store, views
    from ktverify.report.console import make_console, print_grids
    from ktverify.report.grid import markdown

    records = [record for path in files for record in store.read_records(path)]
    if not records:
        raise ValueError(f"{', '.join(map(str, files))}: there is no whole record")
    slowest = views.slowest(records)
    warning = store.warning(files)
    slowest_grid = views.prompts_grid(f"the slowest {len(slowest)}", slowest, [warning] if warning else [])
    grids = [views.distribution_grid(records, store.notes(files)), slowest_grid]
    stem = (files[0].parent if out is None else out) / files[0].name
    files_of: dict[str, str | bytes] = {
        ".analysis.csv": views.prompt_table(records, ","),
        ".analysis.md": "\n\n".join(map(markdown, grids)) + "\n",
        ".analysis.png": views.draw_histogram(records, warning),
    }
    written = [write_whole(store.beside(stem, ending), content) for ending, content in files_of.items()]
    if not as_json:
        print_grids(make_console(), grids, written)
        return
    found = {
        "records": len(records),
        "statistics": {name: asdict(statistics) for name, statistics in views.distribution(records).items()},
        "slowest": [{"id": record.id, "total_ms": record.timing.total_ms} for record in slowest],
        "written": [str(path) for path in written],
    }
    typer.echo(json.dumps(found))


C2C: dict[str, Callable[..., None]] = {"single": single, "batch": batch, "dataset": dataset, "merge": merge}
C2C_HELP = """Time a pipeline of two models: a base receives a teacher's KV cache, then decodes.

\b
python -m ktverify bench c2c single "…"        one prompt, with a trace and operator statistics
python -m ktverify bench c2c batch             five built-in prompts
python -m ktverify bench c2c dataset           a data set or a file of prompts; resumes a stopped run
python -m ktverify bench c2c merge FILE...     joins what --shard or --start split
python -m ktverify bench analyze FILE...       distribution, slowest prompts, histogram, CSV
"""


def _settings(given: dict[str, Any], **about: Any) -> C2cSettings:
    """The settings of a command's options; about: where its prompts are from."""
    from ktverify.bench.c2c.record import C2cSettings
    from ktverify.bench.c2c.store import describe

    names = ("base_model", "teacher_model", "dtype", "device", "template", "max_new_tokens")
    chosen = {name: given[name] for name in names}
    return C2cSettings.model_validate({**chosen, "projectors": describe(given["projectors"]), **about})


def _texts(
    dataset: str | None, subset: str | None, split: str, file: Path | None, start: int, count: int | None
) -> tuple[list[str], str]:
    """The prompts of the data set or of the file, and their name for C2cSettings.source."""
    if (dataset is None) == (file is None):
        raise ValueError("give either --dataset NAME or --dataset_file FILE")
    if file is not None:
        return prompts.of_file(file, start, count), file.name
    assert dataset is not None
    found = prompts.of_dataset(dataset, subset, split, start, count)
    return found, f"{dataset}{':' + subset if subset else ''}, split {split}"


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return int(number), int(of)
    raise ValueError(f"--shard is {text!r}, it takes K/N with K from 1 to N, like 1/4")


@contextlib.contextmanager
def _output(given: Path | None) -> Iterator[Path]:
    """The file of records: the given one, or one in a new folder, which goes again if nothing was written into it."""
    if given is not None:
        yield given
        return
    from ktverify.runs.jsonl import new_directory, remove_if_empty

    directory = new_directory("c2c")
    try:
        yield directory / "timing.jsonl"
    finally:
        remove_if_empty(directory)


def _run(
    settings: C2cSettings, texts: Sequence[str], projectors: Path | None, path: Path, warmups: int, *, as_json: bool
) -> None:
    """Time the prompts that are not yet in the file; print tables of the whole file."""
    quiet("bench c2c")
    from ktverify.bench.c2c.run import PromptRun, check, load
    from ktverify.bench.c2c.views import progress_line, short
    from ktverify.report.console import ProgressBar

    check(settings)
    run = PromptRun(settings, texts, path)
    # SIGTERM ends a run like Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    done, stopped = list(run.file.done), False
    try:
        with ProgressBar() as bar:
            already = f"{len(done)} of {len(texts)} are there already" if done else ""
            bar.begin("prompts", len(texts), len(done), already)
            for record, _ in run.records(lambda: load(settings, projectors), warmups):
                done.append(record)
                bar.say(short(record.prompt, 32))
                bar.advance(f"{len(done)}/{len(texts)}  {progress_line(record)}")
    except KeyboardInterrupt:
        stopped = True
        typer.echo(
            f"stopped after {len(done)} of {len(texts)}; the same command with --output {path} goes on", err=True
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        run.close()
    if done:
        _conclude(done, path, as_json=as_json)
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _conclude(records: Sequence[PromptRecord], path: Path, *, as_json: bool) -> None:
    from ktverify.bench.c2c import store, views
    from ktverify.report.console import make_console, print_grids

    written = [path, write_whole(store.beside(path, ".tsv"), views.prompt_table(records, "\t")), store.info_path(path)]
    if as_json:
        statistics = {name: asdict(found) for name, found in views.distribution(records).items()}
        typer.echo(json.dumps({"output": str(path), "records": len(records), "statistics": statistics}))
        return
    grids = [views.distribution_grid(records, store.notes([path]))]
    if len(records) <= _MANY:
        grids.insert(0, views.prompts_grid("prompt by prompt", records))
    print_grids(make_console(), grids, written)
