"""SIGKILL at random moments: no file is torn, and what is started again ends like what was never killed.

KTVERIFY_KILLS: how many kills of each command; without it one, of the shortest command. KTVERIFY_KILL_SEED: the seed
of their moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ktverify.bench.c2c import store as c2c_store
from ktverify.bench.layer import record as layer_record
from ktverify.errors import NoGolden
from ktverify.judge import golden
from ktverify.runs import jsonl, store
from ktverify.spec.cases import select
from ktverify.system.files import ROOT
from ktverify.training import output_directory
from ktverify.training.curves import LOSS_FILE
from ktverify.training.tiny import make_tiny
from tests.support import c2c
from tests.support.command_line import call, started

KILLS = int(os.environ.get("KTVERIFY_KILLS", "1"))
SEED = int(os.environ.get("KTVERIFY_KILL_SEED", "1"))
IN_A_ROW = 3  # kills of one run, before it is left to end
FEW = "one_token_odd,odd_sizes,exact_small,tiny,no_token"


@dataclass
class Killed:
    """A command and what must hold of the folder that it writes.

    program: its arguments, of Python. whole: raises where a file is torn, after every kill. ended: what the folder
    holds after the end, to compare with a run that was not killed. again: run it once more after its end changes
    nothing.
    """

    program: Callable[[Path], list[str]]
    whole: Callable[[Path], None]
    ended: Callable[[Path], Any]
    again: bool = True
    code: int = 0
    fresh: bool = False  # a killed run is not continued: the next one has a folder of its own
    moments: list[str] = field(default_factory=list)


def snapshot(folder: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes of all files in a folder, while another process changes them."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found.append((f"{place}/{name}", os.stat(f"{place}/{name}").st_size))
    return tuple(sorted(found))


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_after(process: subprocess.Popen[bytes], folder: Path, changes: int, more_s: float) -> tuple[bool, str]:
    """SIGKILL once the folder has changed so often, and some time has passed: whether the command still ran, and what
    was reached by then."""
    seen, before = 0, snapshot(folder)
    while process.poll() is None and seen < changes:
        now = snapshot(folder)
        seen += now != before
        before = now
        time.sleep(0.001)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(more_s)
    alive = process.poll() is None
    process.kill()
    process.wait()
    # what the process started goes with it, sooner or later
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return alive, f"{'killed' if alive else 'ended'} after {seen} changes"


# ---- what must hold of each command


def training(base: Path) -> Killed:
    settings = {
        "model_name_or_path": base, "dataset": "alpaca_tiny", "max_steps": 9, "save_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "cutoff_len": 48, "lora_rank": 4, "save_total_limit": 2, "seed": 5,
        "lora_dropout": 0.1,
    }  # fmt: skip
    config = base.parent / "train.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()), encoding="utf-8")

    def program(folder: Path) -> list[str]:
        resumable = any(not output_directory.problem_of(path) for path in output_directory.checkpoints_in(folder))
        how = ["--resume_from_checkpoint", "true"] if resumable else ["--overwrite_output_dir", "true"]
        return ["-m", "ktverify", "train", str(config), "--output_dir", str(folder), *how]

    def whole(folder: Path) -> None:
        for name in ("training.json", "adapter_config.json", "trainer_state.json"):
            if (folder / name).is_file():
                json.loads((folder / name).read_text(encoding="utf-8"))
        if (folder / "adapter_model.safetensors").is_file():
            load_file(folder / "adapter_model.safetensors")
        if (folder / LOSS_FILE).is_file():
            jsonl.read_objects(folder / LOSS_FILE)

    def ended(folder: Path) -> Any:
        rows = jsonl.read_objects(folder / LOSS_FILE)
        kept = [{name: row[name] for name in ("step", "loss", "learning_rate", "grad_norm", "tokens")} for row in rows]
        adapter = {name: t.view(-1).tolist() for name, t in load_file(folder / "adapter_model.safetensors").items()}
        return kept, adapter, sorted(path.name for path in folder.glob("checkpoint-*"))

    return Killed(program, whole, ended)


def goldens(_: Path) -> Killed:
    def whole(folder: Path) -> None:
        if (folder / golden.MANIFEST).is_file():
            for case in select(FEW):
                with contextlib.suppress(NoGolden):
                    golden.load(case, folder)

    def ended(folder: Path) -> Any:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

    arguments = ["-m", "ktverify.golden", "regenerate", "--force", "--only", FEW, "--dir"]
    return Killed(lambda folder: [*arguments, str(folder)], whole, ended)


def layer_times(_: Path) -> Killed:
    def whole(folder: Path) -> None:
        lines = layer_record.read(folder) if (folder / layer_record.FILE).is_file() else []
        for page in folder.glob("*.html"):
            assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
        if len(lines) > 2:
            shown = call("bench", "layer", "--show", folder)
            assert shown.exit_code in (0, 2), shown.output
            assert "Traceback" not in shown.output

    case = "E=4,k=2,H=64,I=64,T=8,r=4"
    spots = ["--tp", "1", "--batch_sizes", "1", "--sequence_lengths", "8", "--repeats", "9", "--steps", "0"]
    return Killed(
        lambda folder: ["-m", "ktverify", "bench", "layer", case, *spots, "--out", str(folder)],
        whole,
        lambda folder: sorted(path.name for path in folder.iterdir()),
        again=False,
        fresh=True,
    )


def prompts(base: Path) -> Killed:
    teacher = make_tiny("qwen3", base.parent / "teacher", seed=1)
    given = c2c.write_prompts(base.parent / "prompts.jsonl", 30)

    def program(folder: Path) -> list[str]:
        options = c2c.options((base, teacher), folder / "timing.jsonl", 2)
        return ["-m", "ktverify", "bench", "c2c", "dataset", "--dataset_file", str(given), *options]

    def whole(folder: Path) -> None:
        if (folder / "timing.jsonl").is_file():
            c2c_store.read_records(folder / "timing.jsonl")
        if (folder / "timing.run.json").is_file():
            c2c_store.read_info(folder / "timing.jsonl")

    return Killed(program, whole, lambda folder: c2c.without_times(folder / "timing.jsonl"))


def suite(_: Path) -> Killed:
    def whole(folder: Path) -> None:
        if not any(folder.glob("records*.jsonl")):
            return
        run = store.load(folder)
        assert len(run.lost) <= 1
        for command in ("report", "gate"):
            done = call(command, folder)
            assert "Traceback" not in done.output
            assert (done.exit_code == 0) <= run.finished, done.output

    def ended(folder: Path) -> Any:
        return sorted(
            (record.family, getattr(record, "name", ""), record.verdict) for record in store.load(folder).records
        )

    words = ["suites/tp_constraint", "suites/contract", "-k", "tp_constraint or repeats or degree", "-q"]
    return Killed(
        lambda folder: ["-m", "pytest", "-p", "no:cacheprovider", "--run-dir", str(folder), *words],
        whole,
        ended,
        again=False,
        fresh=True,
    )


COMMANDS: dict[str, Callable[[Path], Killed]] = {
    "train": training,
    "golden": goldens,
    "bench": layer_times,
    "c2c": prompts,
    "suite": suite,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS if "KTVERIFY_KILLS" in os.environ else ["golden"])
def test_a_kill_tears_nothing(name: str, tmp_path: Path) -> None:
    base = (
        make_tiny("qwen3" if name == "c2c" else "qwen3_moe", tmp_path / "base")
        if name in ("train", "c2c")
        else tmp_path
    )
    what, draw = COMMANDS[name](base), random.Random(f"{name} {SEED}")
    folders = (tmp_path / f"out{number}" for number in range(10_000))

    # once to its end, for the number of changes and for the result
    reference = next(folders)
    reference.mkdir()
    process, changes, before = start(what.program(reference)), 0, snapshot(reference)
    while process.poll() is None:
        now = snapshot(reference)
        changes += now != before
        before = now
        time.sleep(0.001)
    assert process.returncode == what.code
    what.whole(reference)
    expected = what.ended(reference)

    folder, in_a_row, killed, reached = next(folders), 0, 0, list[str]()
    folder.mkdir()
    while killed < KILLS:
        # beyond the last change as well: after the end, or just before it
        process = start(what.program(folder))
        alive, how = kill_after(process, folder, draw.randint(0, changes), draw.choice((0.0, 0.01, 0.1, 0.5)))
        reached.append(how)
        killed += alive
        what.whole(folder)
        in_a_row += 1
        if what.fresh or not alive or in_a_row == IN_A_ROW:
            if not what.fresh:
                finish(what, folder, expected, reached)
            folder, in_a_row = next(folders), 0
            folder.mkdir()
    finish(what, folder, expected, reached)
    print(f"{name}: {killed} kills; {'; '.join(reached)}")


def finish(what: Killed, folder: Path, expected: Any, reached: list[str]) -> None:
    """Let the command run to its end: it must end like the one that was never killed. Then start it once more."""
    done = started(*what.program(folder), OMP_NUM_THREADS="1")
    assert done.returncode == what.code, (reached, done.stdout, done.stderr)
    what.whole(folder)
    assert what.ended(folder) == expected, reached
    if what.again:
        assert started(*what.program(folder), OMP_NUM_THREADS="1").returncode == what.code
        assert what.ended(folder) == expected, reached
