"""verify-training: nine questions about a training's output directory, answered with stock peft."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ktverify.errors import AdapterMismatch, NoBase
from ktverify.training.adapter import base_of, load_adapter
from ktverify.training.curves import LOSS_FILE, STATE_FILE, read_curve
from ktverify.training.output_directory import ADAPTER_FILES, SUMMARY_FILE, step_reached
from ktverify.training.pretrained import load_pretrained

_PROMPT = "What is the capital of France?"
_NEW_TOKENS = 12


@dataclass(frozen=True)
class Answer:
    """One question's name, whether the directory passes it, and what was found; passed is None where it cannot be
    asked."""

    name: str
    passed: bool | None
    text: str


def verify_training(directory: Path, base: str | None = None, *, trust: bool = False) -> Iterator[Answer]:
    """The answers for `directory`, in order. base: the base model's path (default: the one that the adapter names);
    trust: run the base model's own code.

    Stops at an answer that makes further questions impossible. A directory that `train` did not write need not have a
    loss history, nor name a base model that is here. ValueError for a directory that does not exist, and where the base
    model cannot be loaded otherwise."""
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory}: name the output_dir of a training")
    missing = [name for name in ADAPTER_FILES if not (directory / name).is_file()]
    yield Answer("files", not missing, f"missing: {', '.join(missing)}" if missing else ", ".join(ADAPTER_FILES))
    if missing:
        return
    try:
        tensors = load_file(directory / ADAPTER_FILES[1])
    except (SafetensorError, OSError) as error:
        yield Answer("readable", False, f"{ADAPTER_FILES[1]}: {error}")
        return
    yield Answer("readable", True, f"{len(tensors)} tensors")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    yield Answer("finite", not broken, f"NaN or Inf in {broken[0]}" if broken else "no NaN, no Inf")
    zero = [name for name, tensor in tensors.items() if "lora_B" in name and not bool(tensor.any())]
    count = sum("lora_B" in name for name in tensors)
    norms = [float(tensor.float().norm()) for name, tensor in tensors.items() if "lora_B" in name]
    moved = f"{count} lora_B moved, with norms from {min(norms):.3g} to {max(norms):.3g}" if norms else "has no lora_B"
    yield Answer("trained", bool(norms) and not zero, f"{len(zero)} of {count} lora_B are all zero" if zero else moved)
    foreign = not (directory / SUMMARY_FILE).is_file()
    yield _loss(directory, foreign)
    try:
        yield from _with_base(directory, base, len(tensors), trust)
    except NoBase as error:
        if base is not None or not foreign:
            raise
        for name in ("keys", "loads", "logits", "generation"):
            yield Answer(name, None, f"{error}; give --base")


def _loss(directory: Path, foreign: bool) -> Answer:
    if foreign and not any((directory / name).is_file() for name in (LOSS_FILE, STATE_FILE)):
        return Answer("loss", None, f"there is no {LOSS_FILE} and no {STATE_FILE}")
    try:
        curve = read_curve(directory)
    except ValueError as error:
        return Answer("loss", False, str(error))
    if curve.problem:
        return Answer("loss", False, curve.problem)
    reached = _last_step(directory)
    if curve.steps[-1] < reached:
        return Answer("loss", False, f"the history ends at step {curve.steps[-1]}, the training at step {reached}")
    if len(curve.losses) < 2:
        return Answer("loss", False, "was logged once, which shows no slope: train longer, or log more often")
    text = f"{curve.losses[0]:.3f} to {curve.losses[-1]:.3f} in {curve.steps[-1]} steps, slope {curve.slope:.2e} a step"
    return Answer("loss", curve.slope < 0, text if curve.slope < 0 else f"does not fall: {text}")


def _last_step(directory: Path) -> int:
    try:
        return step_reached(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _with_base(directory: Path, base: str | None, count: int, trust: bool) -> Iterator[Answer]:
    try:
        path = base_of(directory, base)
        model, tokenizer = load_pretrained(path, option="--base", trust=trust)
    except ValueError as error:
        raise NoBase(str(error)) from None
    model.eval()
    before = _generate(model, tokenizer)
    try:
        adapted = load_adapter(model, directory)
    except AdapterMismatch as error:
        yield Answer("keys", False, str(error))
        return
    except ValueError as error:
        yield Answer("loads", False, str(error))
        return
    yield Answer("keys", True, f"{count} keys and shapes")
    yield Answer("loads", True, f"in stock peft, on {path}")
    after = _generate(adapted, tokenizer)
    finite = bool(torch.isfinite(after[1]).all())
    yield Answer("logits", finite, "finite" if finite else "NaN or Inf in the adapted model's logits")
    differs = before[0] != after[0]
    shown = tokenizer.decode(after[0], skip_special_tokens=True).strip()
    yield Answer("generation", differs, f"{shown!r}" if differs else "the same as the base model's")


def _generate(model: Any, tokenizer: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after the prompt, and the logits of each; without a chat template the prompt stands for itself."""
    text = _PROMPT
    if getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": _PROMPT}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        made = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    return made.sequences[0, given["input_ids"].shape[1] :].tolist(), torch.cat(made.logits)
