"""Pipelines of a tiny base and a tiny teacher, command-line arguments for them, and their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ktverify.bench.c2c.models import Side
from ktverify.bench.c2c.pipeline import Pipeline
from ktverify.bench.c2c.projector import Projectors

NEW_TOKENS = 8


def pipeline(base: Side, teacher: Side, *, teaching: bool = False, template: bool = True) -> Pipeline:
    """With projectors that are the identity, or that teach: then every one of them changes what it is given."""
    projectors = Projectors(base.cache_shapes(), teacher.cache_shapes())
    if teaching:
        generator = torch.Generator().manual_seed(11)
        for parameter in projectors.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return Pipeline(base, teacher, projectors, template=template)


def alone(base: Side, ids: Sequence[int], tokens: int = NEW_TOKENS) -> list[int]:
    """What transformers' own greedy generation of the base generates after `ids`."""
    given = torch.tensor([list(ids)])
    with torch.inference_mode():
        made = base.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False
        )
    found: list[int] = made[0, len(ids) :].tolist()
    return found


def options(pair: tuple[Path, Path], output: Path, tokens: int = 3) -> list[str]:
    """The options that every command on that pair takes."""
    models = ["--base_model", str(pair[0]), "--teacher_model", str(pair[1])]
    return [*models, "--output", str(output), "--max_new_tokens", str(tokens), "--warmup_steps", "0"]


def write_prompts(path: Path, count: int) -> Path:
    """A file of `count` prompts, every other one under the name question; with letters of several bytes, and one that
    is a line's end for Python and none for JSON."""
    rows = [
        {("question" if number % 2 else "prompt"): f"Wie groß\u2028ist {number} + {number}?"} for number in range(count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, object]]:
    """The records of a file as plain JSON."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def without_times(path: Path) -> list[dict[str, object]]:
    """The records of a file, of their timing only what no clock says."""
    found = lines(path)
    for record in found:
        timing = record["timing"]
        assert isinstance(timing, dict)
        record["timing"] = {name: timing[name] for name in ("projector_calls", "num_generated_tokens")}
        assert len(timing["decode_step_times_ms"]) == timing["num_generated_tokens"]
    return found
