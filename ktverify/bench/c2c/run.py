"""A run: load the models once, warm up, then time prompt after prompt and write each record at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ktverify.bench.c2c import store
from ktverify.bench.c2c.models import load_side
from ktverify.bench.c2c.pipeline import Pipeline, Response
from ktverify.bench.c2c.projector import Projectors
from ktverify.bench.c2c.record import C2cSettings, ModelPair, PromptRecord, PromptTiming, Sitting
from ktverify.bench.timed_run import RunLine
from ktverify.system import machine
from ktverify.system.timing import OtherLoad, Timeline, use_device
from ktverify.training.pretrained import DTYPES

WARMUP_TOKENS = 4


def check(settings: C2cSettings) -> None:
    """Raise ValueError for a missing device or an unknown dtype, before anything is loaded."""
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype is {settings.dtype!r}, it takes {' or '.join(DTYPES)}")
    kind = settings.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device is {settings.device!r}, it takes cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {settings.device!r}, but torch finds no CUDA device; it takes cpu here")


def load(settings: C2cSettings, projectors: Path | None) -> Pipeline:
    """Load both models and the projectors. ValueError, in one line, if one cannot be loaded."""
    check(settings)
    use_device(settings.device)
    options = {"dtype": settings.dtype, "device": settings.device}
    base = load_side(settings.base_model, "--base_model", **options)
    teacher = load_side(settings.teacher_model, "--teacher_model", **options)
    shapes = base.cache_shapes(), teacher.cache_shapes()
    between = Projectors(*shapes) if projectors is None else Projectors.load(projectors, *shapes)
    return Pipeline(base, teacher, between, template=settings.template)


def warm_up(pipeline: Pipeline, settings: C2cSettings, prompt: str, times: int) -> tuple[float, ...]:
    """Run `prompt` briefly, `times` times; returns milliseconds, which do not count."""
    found = []
    for _ in range(times):
        timeline = Timeline(settings.device)
        pipeline.run(prompt, min(settings.max_new_tokens, WARMUP_TOKENS), timeline)
        found.append(PromptTiming.of(timeline).total_ms)
    return tuple(found)


def time_prompt(pipeline: Pipeline, settings: C2cSettings, number: int, prompt: str) -> tuple[PromptRecord, Timeline]:
    """Time one prompt: its record, and the time line that the record sums up."""
    timeline = Timeline(settings.device)
    response: Response = pipeline.run(prompt, settings.max_new_tokens, timeline)
    models = ModelPair(base_model=settings.base_model, teacher_model=settings.teacher_model)
    record = PromptRecord(
        id=number, prompt=prompt, response=response.text, model_config=models, timing=PromptTiming.of(timeline)
    )
    return record, timeline


def sitting(from_id: int, warmup_ms: tuple[float, ...]) -> Sitting:
    """This run of the program."""
    return Sitting(
        **{**RunLine.facts(Path()), "stamp": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())},
        transformers=machine.package_version("transformers"),
        threads=torch.get_num_threads(),
        from_id=from_id,
        warmup_ms=warmup_ms,
    )


class PromptRun:
    """Times prompts into the file `path`, without those that are there already.

    prompts: those of `settings.ids`, in order. ValueError if the file belongs to another run; then nothing is loaded.
    """

    def __init__(self, settings: C2cSettings, prompts: Sequence[str], path: Path) -> None:
        store.info_path(path)
        self.settings, self.path = settings, path
        self.file = store.RecordFile(path)
        try:
            store.check_resumable(path, settings, self.file.done, prompts)
        except BaseException:
            self.file.close()
            raise
        done = len(self.file.done)
        self.left = list(zip(settings.ids, prompts, strict=True))[done:]
        self._sittings: list[Sitting] = []
        self._load: OtherLoad | None = None

    def records(self, load_pipeline: Callable[[], Pipeline], warmups: int) -> Iterator[tuple[PromptRecord, Timeline]]:
        """Each record, after it was written, and its time line."""
        if not self.left:
            return
        pipeline = load_pipeline()
        for number, prompt in self.left:
            for side in (pipeline.base, pipeline.teacher):
                side.check_length(prompt, f"prompt {number}")
        number, prompt = self.left[0]
        now = sitting(number, warm_up(pipeline, self.settings, prompt, warmups))
        earlier = store.read_info(self.path).sittings if self.file.done else ()
        self._sittings = [*earlier, now]
        store.write_info(self.path, self.settings, self._sittings)
        self._load = OtherLoad()
        for number, prompt in self.left:
            record, timeline = time_prompt(pipeline, self.settings, number, prompt)
            self.file.write(record)
            yield record, timeline

    def close(self) -> None:
        """Write the share of other programs to the info file, also after an interrupt."""
        self.file.close()
        if self._load is not None:
            *earlier, now = self._sittings
            others = self._load.share()
            store.write_info(self.path, self.settings, [*earlier, now.model_copy(update={"others": others})])
