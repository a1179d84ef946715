"""The directory that a training or an export writes into: what a run resumes from, what is removed before.

The Trainer writes a checkpoint file by file, trainer_state.json last, and may be killed in between. A checkpoint is
complete if all its files can be read; only such a checkpoint is resumed from.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktverify.errors import one_line
from ktverify.system.files import unwritten
from ktverify.training.curves import LOSS_FILE, STATE_FILE

SUMMARY_FILE, LOSS_PICTURE, SAVING = "training.json", "loss.png", ".ktverify-saving-"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHECKPOINT_FILES = (*ADAPTER_FILES, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE)
# files of a checkpoint that a finished training does not have
_FOR_RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin")
# files of an earlier run, which could be mistaken for files of this one; everything else in the directory stays
_EARLIER = (*ADAPTER_FILES, "adapter_model.bin", LOSS_FILE, LOSS_PICTURE, SUMMARY_FILE, STATE_FILE, f"{SAVING}*")
# errors of a write alone
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what torch.save says where a write fails; it has no number of the error
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container.*unexpected pos")


def choose_start(output: Path, wanted: bool | str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a fresh start. Changes nothing.

    ValueError where `output` is a file, is not empty and not the directory of that checkpoint's run, or has none."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file")
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir {output} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {output} cannot be written: {there} is read-only for this user")
    start = choose_checkpoint(wanted, output) if wanted else None
    if start is not None and _is_of(start, output):
        return start
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        ours = "resume_from_checkpoint: true" if start is None else f"a checkpoint of {output}"
        raise ValueError(
            f"output_dir {output} exists and is not empty: name another, or give overwrite_output_dir: true or {ours}"
        )
    return start


def remove_earlier_run(output: Path, start: Path | None) -> None:
    """Remove the files of an earlier run in `output`; of the run that is resumed, only checkpoints after `start`, what
    a stopped save left and the summary."""
    if start is not None and _is_of(start, output):
        reached = step_reached(start)
        later = [path for path in checkpoints_in(output) if step_of(path) > reached]
        # without its summary this is no finished run, until it ends again
        for path in [*later, output / SUMMARY_FILE, *output.glob(f"{SAVING}*")]:
            _remove(path)
        return
    for path in [*checkpoints_in(output), *(path for name in _EARLIER for path in output.glob(name))]:
        _remove(path)


def remove_old_checkpoints(output: Path, keep: int | None) -> None:
    """Remove all checkpoints but the `keep` newest; None keeps all.

    Not left to the Trainer, which also removes folders like checkpoint-best or checkpoint-50-mine."""
    for path in checkpoints_in(output)[keep or sys.maxsize :]:
        _remove(path)


def resume_hint(output: Path) -> str:
    """What a run that was stopped in `output` can resume from, and how."""
    try:
        last = choose_checkpoint(True, output)
    except ValueError:
        again = "begin anew with --overwrite_output_dir true; a smaller --save_steps keeps more"
        return f"{output} has no checkpoint yet: {again}"
    return f"{last} and {LOSS_FILE} are kept: the same command with --resume_from_checkpoint true goes on from there"


def is_finished(output: Path, start: Path) -> bool:
    """Whether a training ended in `output` with the weights of the checkpoint `start`, and wrote all of its files."""
    files = (*ADAPTER_FILES, STATE_FILE, LOSS_FILE, SUMMARY_FILE)
    weights = ADAPTER_FILES[1]
    return all((output / name).is_file() for name in files) and filecmp.cmp(
        output / weights, start / weights, shallow=False
    )


def adopt(start: Path, output: Path) -> None:
    """Put adapter, tokenizer and state of the checkpoint `start` into `output`, as the end of a training does."""
    with files_together(output) as saving:
        for path in start.iterdir():
            if path.is_file() and path.name not in _FOR_RESUMING:
                shutil.copyfile(path, saving / path.name)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Let the error of a full disk name `target` and say what to do: libraries name no file. Other errors stay."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            number = error.errno if error.strerror else None  # without it, the text names the file already
        else:
            found = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors and tokenizers
            number = int(found[1]) if found else None
        if number in _FULL:
            raise unwritten(target, OSError(number, os.strerror(number))) from error
        if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
            raise OSError(
                f"{target} cannot be written: torch could not write a file ({one_line(error)[:80]}), mostly because "
                "the disk is full; make room, or name another folder"
            ) from error
        raise


@contextmanager
def files_together(output: Path) -> Iterator[Path]:
    """A directory to fill, whose files are then moved into `output`; each appears whole, the weights last."""
    output.mkdir(parents=True, exist_ok=True)
    with writing(output), tempfile.TemporaryDirectory(prefix=SAVING, dir=output) as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, output / path.name)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` (new or empty) at the end; after an error nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        with writing(target):
            yield part
            part.chmod(0o755)
            os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def copy_others(checkpoint: Path, into: Path, but: Container[Path]) -> None:
    """Copy the files and folders of a checkpoint, without those of `but`, hidden ones, folders checkpoint-* and links
    to nothing."""
    for path in sorted(checkpoint.iterdir()):
        if path in but or path.name.startswith("."):
            continue
        if path.is_file():
            shutil.copyfile(path, into / path.name)
        elif path.is_dir() and not path.name.startswith("checkpoint-"):
            shutil.copytree(path, into / path.name, ignore_dangling_symlinks=True)


def _is_of(checkpoint: Path, output: Path) -> bool:
    return checkpoint.resolve().parent == output.resolve()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- checkpoints


def step_of(checkpoint: Path) -> int:
    """50 for checkpoint-50; -1 for another name."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found.group(1)) if found else -1


def step_reached(checkpoint: Path) -> int:
    """The step of a whole checkpoint, from its state: one that is given by its path may have any name."""
    return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def kept_in(checkpoint: Path) -> dict[str, Any]:
    """What `resume.kept_of` gave for the training of a checkpoint; nothing for one of another program."""
    callbacks = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("stateful_callbacks", {})
    kept: dict[str, Any] = callbacks.get("LossLog", {}).get("attributes", {})
    return kept


def problem_of(checkpoint: Path) -> str:
    """Why a run cannot be resumed from this checkpoint; "" if it can."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers.trainer_pt_utils import safe_globals

    for name in CHECKPOINT_FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        for name in ("adapter_config.json", "trainer_state.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        name = STATE_FILE
        step_reached(checkpoint)
        if not {"altering", "others", "steps"} <= kept_in(checkpoint).keys():
            return f"{STATE_FILE} keeps no configuration, so another program or version wrote it"
        name = "adapter_model.safetensors"
        with safe_open(checkpoint / name, framework="pt") as stored:
            stored.keys()
        with safe_globals():  # numpy's random state
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{name} has another form ({one_line(error)[:80]})"
    except (ValueError, SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        return f"{name} cannot be read ({' '.join(str(error).split())[:80]})"
    return ""


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a run, newest first, complete or not."""
    found = [path for path in directory.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def choose_checkpoint(wanted: bool | str, directory: Path) -> Path:
    """The checkpoint to resume from: `wanted` if it is a path, else the newest complete one in `directory`.

    ValueError, with the problem of each checkpoint, where there is none."""
    if isinstance(wanted, str) and not Path(wanted).is_dir():
        raise ValueError(
            f"there is no checkpoint {wanted}: resume_from_checkpoint takes true, or a checkpoint's directory"
        )
    candidates = [Path(wanted)] if isinstance(wanted, str) else checkpoints_in(directory)
    reasons = []
    for path in candidates:
        reason = problem_of(path)
        if not reason:
            return path
        reasons.append(f"{path.name}: {reason}")
    if not candidates:
        raise ValueError(f"{directory} holds no checkpoint to resume from: begin anew with overwrite_output_dir: true")
    raise ValueError(f"no whole checkpoint to resume from; {'; '.join(reasons)}")
