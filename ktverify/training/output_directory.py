"""The directory that a training or an export writes into: whether it may be used, and what is removed before.

`choose_start` decides, from output_dir, overwrite_output_dir and resume_from_checkpoint, and changes nothing.
`remove_earlier_run` is called once nothing can be refused any more.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktverify.training import checkpoints
from ktverify.training.curves import LOSS_FILE, STATE_FILE

SUMMARY_FILE, LOSS_PICTURE, SAVING = "training.json", "loss.png", ".saving-"
# files of an earlier run, which could be mistaken for files of this one; everything else in the directory stays
_EARLIER = ("adapter_config.json", "adapter_model.*", LOSS_FILE, LOSS_PICTURE, SUMMARY_FILE, STATE_FILE, f"{SAVING}*")


def choose_start(output: Path, wanted: bool | str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a fresh start. Changes nothing.

    ValueError where `output` is a file, is not empty and not the directory of that checkpoint's run, or has none."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file")
    start = checkpoints.choose(wanted, output) if wanted else None
    if start is not None and _is_of(start, output):
        return start
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        ours = "resume_from_checkpoint: true" if start is None else f"a checkpoint of {output}"
        raise ValueError(
            f"output_dir {output} exists and is not empty: name another, or give overwrite_output_dir: true or {ours}"
        )
    return start


def remove_earlier_run(output: Path, start: Path | None) -> None:
    """Remove the files of an earlier run in `output`; of the run that is resumed, only checkpoints after `start`."""
    if start is not None and _is_of(start, output):
        # the step is read from the state, because a checkpoint given by its path may have any name
        reached = json.loads((start / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        for path in checkpoints.checkpoints_in(output):
            if checkpoints.step_of(path) > reached:
                _remove(path)
        return
    for path in [*checkpoints.checkpoints_in(output), *(path for name in _EARLIER for path in output.glob(name))]:
        _remove(path)


def resume_hint(output: Path) -> str:
    """What a run that was stopped in `output` can resume from, and how."""
    try:
        last = checkpoints.choose(True, output)
    except ValueError:
        again = "begin anew with --overwrite_output_dir true; a smaller --save_steps keeps more"
        return f"{output} has no checkpoint yet: {again}"
    return f"{last} and {LOSS_FILE} are kept: the same command with --resume_from_checkpoint true goes on from there"


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` (new or empty) at the end; after an error nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _is_of(checkpoint: Path, output: Path) -> bool:
    return checkpoint.resolve().parent == output.resolve()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
