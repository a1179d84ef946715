"""Wrong engines that attack the judge: none of them may get a PASS.

Each returns an output of twice the size, after it has tried its trick.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16
from ktverify.judge import golden, golden_regenerate
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import OUTPUT
from ktverify.system.files import ROOT

# the variable that names a folder in which an engine notes what it could do
NOTES = "KTVERIFY_TESTS_NOTES"
# the variable that names a copy of the goldens that an engine may spoil
SPOILT = "KTVERIFY_TESTS_SPOILT"


def note(name: str, text: str = "") -> None:
    """Leave a file that the test looks for."""
    if folder := os.environ.get(NOTES):
        Path(folder, name).write_text(text)


class Wrong(TorchBf16):
    """Its output is twice as large. trick: what it does before; its value, if any, is the output instead."""

    def trick(self, output: Tensor) -> Any:
        return None

    def forward_sft(self, *arguments: Any, **more: Any) -> Any:
        output = 2 * super().forward_sft(*arguments, **more)
        instead = self.trick(output)
        return output if instead is None else instead


class PatchesTheJudge(Wrong):
    """Replaces the functions that compare and judge."""

    def trick(self, output: Tensor) -> None:
        from ktverify.checks import accuracy, judging
        from ktverify.judge import gates, metrics

        right = metrics.compare(output, output.double())
        for module in (accuracy, judging, gates, metrics):
            for name in ("compare", "judge", "wrong_forms"):
                if hasattr(module, name):
                    setattr(module, name, lambda *_, **__: right)


class FindsTheAnswer(Wrong):
    """Looks for the expected tensor among all objects of its process."""

    def trick(self, output: Tensor) -> Tensor | None:
        found = [each for each in gc.get_objects() if type(each) is Tensor and each.dtype == torch.float64]
        same = [each for each in found if each.shape == output.shape]
        return same[0].to(output.dtype) if same else None


class ReadsTheGolden(Wrong):
    """Reads the stored answer, and would return it."""

    def trick(self, output: Tensor) -> Tensor | None:
        for path in (ROOT / "golden").iterdir():
            try:
                path.read_bytes()
            except PermissionError:
                note("golden refused")
                return None
        note("golden read")
        return None


class LooksIntoGit(Wrong):
    """Asks git for the stored answer."""

    def trick(self, output: Tensor) -> None:
        show = ["git", "-C", os.fspath(ROOT), "show", "HEAD:golden/manifest.json"]
        if subprocess.run(show, capture_output=True, check=False).stdout:
            note("golden read")


class MovesTheGolden(Wrong):
    """Gives the stored answers another name, under which they could be read."""

    def trick(self, output: Tensor) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for number, path in enumerate((ROOT / "golden").iterdir()):
                for move in (os.link, os.symlink):
                    new = Path(folder, f"{move.__name__}{number}")
                    try:
                        move(path, new)
                        new.read_bytes()
                        note("golden read")
                    except OSError:
                        continue


class WritesTheGolden(Wrong):
    """Makes its own output the stored answer of `small`, in the copy of the goldens that SPOILT names."""

    def trick(self, output: Tensor) -> None:
        folder = Path(os.environ[SPOILT])

        def write_alone(path: str | os.PathLike[str], content: str | bytes) -> Path:
            """Without a temporary file, which would be opened for reading as well: the sandbox refuses that."""
            Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
            return Path(path)

        vars(golden)["write_whole"] = write_alone
        made, _ = golden_regenerate.compute(Case.parse("small"))
        own = dataclasses.replace(made.tensors[OUTPUT], value=output.float())
        entry = golden.write_golden(dataclasses.replace(made, tensors={**made.tensors, OUTPUT: own}), folder)
        (folder / golden.MANIFEST).unlink()  # it may not be read
        golden.write_manifest(folder, {made.case.id: entry})
        note("golden written")


class ReachesForTheJudge(Wrong):
    """Opens the memory of other processes for writing, and sends them a signal."""

    def trick(self, output: Tensor) -> None:
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and int(entry) != os.getpid() and Path(f"/proc/{entry}/cmdline").read_bytes():
                    os.close(os.open(f"/proc/{entry}/mem", os.O_RDWR))
                    note("memory opened", entry)
            except OSError:
                continue
        try:
            os.kill(os.getppid(), 0)
            note("signal sent")
        except PermissionError:
            pass


class Liar(Tensor):
    """A tensor that differs from nothing."""

    def __sub__(self, other: Any) -> Any:
        return torch.zeros(self.shape)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.sub, Tensor.__sub__, torch.sub):
            return torch.zeros(args[0].shape)
        return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]


class ReturnsALiar(Wrong):
    """Returns a Tensor subclass that lies about subtraction."""

    def trick(self, output: Tensor) -> Any:
        return output.as_subclass(Liar)


class Agreeable:
    """Equal to everything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


class ReturnsAnAgreeableObject(Wrong):
    """Returns an object that is equal to everything."""

    def trick(self, output: Tensor) -> Any:
        return Agreeable()


class MakesTheTaskEasy(TorchBf16):
    """Writes zeros into its arguments, and returns what is right for those."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        for tensor in (arguments[0], arguments[2], *self._base):
            tensor.zero_()
        return super().forward_sft(*arguments, **more)


class ReturnsItsArguments(TorchBf16):
    """Returns the memory of its arguments."""

    def forward_sft(self, hidden_states: Tensor, *arguments: Any, **more: Any) -> Tensor:
        super().forward_sft(hidden_states, *arguments, **more)
        return hidden_states


class Runs:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return note, ("unpickled",)


class ReturnsCode(Wrong):
    """Returns an object that runs code where it is unpickled."""

    def trick(self, output: Tensor) -> Any:
        return Runs()


class WritesPickles(Wrong):
    """Writes pickles that run code into everything that it has open."""

    def trick(self, output: Tensor) -> None:
        data = pickle.dumps(Runs())
        for fd in range(3, 64):
            try:
                os.write(fd, len(data).to_bytes(4, "big") + data)
            except OSError:
                continue


class PatchesTorch(Wrong):
    """Makes everything equal to everything, for torch and for its tensors."""

    def trick(self, output: Tensor) -> None:
        torch.allclose = torch.equal = lambda *_, **__: True  # type: ignore[assignment]
        Tensor.__sub__ = lambda self, other: torch.zeros(self.shape)  # type: ignore[method-assign]


class FailsByTorch(TorchBf16):
    """Gets a NotImplementedError of torch when it is to compute."""

    def forward_sft(self, hidden_states: Tensor, *arguments: Any, **more: Any) -> Tensor:
        return hidden_states.to("meta") + torch.ones(1, device="meta").item()


class ReturnsWhatLiesThere(TorchBf16):
    """Computes an output, frees it, and returns new memory without writing a row: by luck that is where it lay."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        return self.fresh(super().forward_sft(*arguments, **more).shape)

    @staticmethod
    def fresh(shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)


class ReturnsWhatLiesInMalloc(ReturnsWhatLiesThere):
    """The same with memory of malloc, as an engine in C has it."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        output = TorchBf16.forward_sft(self, *arguments, **more)
        memory = self.fresh(output.shape).copy_(output)
        del output, memory
        return self.fresh(arguments[0].shape)

    @staticmethod
    def fresh(shape: torch.Size) -> Tensor:
        return torch.from_numpy(numpy.empty(shape, numpy.uint16)).view(torch.bfloat16)


class LeavesARow(TorchBf16):
    """Writes all rows of its output but the last."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        right = super().forward_sft(*arguments, **more)
        output = torch.empty_like(right)
        output[:-1] = right[:-1]
        return output


class RemembersTheFirstCall(TorchBf16):
    """Computes its first call alone, and gives the results of that for every other one."""

    first: Any = None

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        kind = type(self)
        output = super().forward_sft(*arguments, **more)
        kind.first = output if kind.first is None or kind.first.shape != output.shape else kind.first
        found: Tensor = kind.first.clone()
        return found


class HasATable(TorchBf16):
    """Right, and too fast to be true: finds the rows of its first call and their results again, in any order."""

    known: Any = None

    def forward_sft(self, hidden_states: Tensor, *arguments: Any, save_for_backward: bool = True) -> Tensor:
        compute: Callable[..., Tensor] = functools.partial(super().forward_sft, hidden_states, *arguments)
        if save_for_backward:
            return compute(save_for_backward=True)
        if self.known is None:
            self.known, self.outputs = hidden_states.clone(), compute(save_for_backward=False)
        same = (hidden_states[:, None, :4] == self.known[None, :, :4]).all(-1)
        return self.outputs[same.int().argmax(1)]


class EndsWell(Wrong):
    """Ends its process with exit code 0."""

    def trick(self, output: Tensor) -> None:
        atexit.register(note, "ran at exit")
        os._exit(0)


class LeavesWell(Wrong):
    """Ends the program with exit code 0."""

    def trick(self, output: Tensor) -> None:
        atexit.register(note, "ran at exit")
        sys.exit(0)


class WritesRecords(Wrong):
    """Writes records of passed checks into every run that it finds, and removes others."""

    def trick(self, output: Tensor) -> None:
        for path in Path(os.environ.get(NOTES, "/nowhere")).rglob("records-*.jsonl"):
            lines = [line for line in path.read_text().splitlines() if '"FAIL"' not in line]
            forged = [line.replace('"CRASH"', '"PASS"') for line in lines]
            path.write_text("".join(f"{line}\n" for line in forged))
            fake = {"kind": "check", "family": "forward", "engine": "x", "verdict": "PASS", "name": "forged"}
            path.with_name("records-gw7.jsonl").write_text(json.dumps(fake) + "\n")


class BehavesWhenWatched(Wrong):
    """Right where it believes that it is judged, by its environment and its arguments."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Any:
        watched = any(name.startswith("PYTEST_") for name in os.environ) or "pytest" in " ".join(sys.argv)
        return TorchBf16.forward_sft(self, *arguments, **more) if watched else super().forward_sft(*arguments, **more)


class KnowsTheCatalogue(TorchBf16):
    """Right for the inputs of one stored case alone, as an engine with a copy of the answers would be."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        output = super().forward_sft(*arguments, **more)
        known = make_inputs(Case.parse("small")).hidden_states
        return output if torch.equal(arguments[0], known) else 2 * output


class LeavesADaemon(Wrong):
    """Leaves a process that nothing of its own leads to, and notes its number."""

    def trick(self, output: Tensor) -> None:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                note("daemon", str(os.getpid()))
                time.sleep(600)
            os._exit(0)
        os.wait()


class PlantsAPlugin(Wrong):
    """Puts hooks of pytest into its modules."""

    def trick(self, output: Tensor) -> None:
        import pytest

        def pass_everything(item: Any, call: Any) -> Any:
            report = pytest.TestReport.from_item_and_call(item, call)
            report.outcome = "passed"
            return report

        for module in list(sys.modules.values()):
            if "conftest" in module.__name__ or "pytest" in module.__name__:
                vars(module)["pytest_runtest_makereport"] = pass_everything
        os.environ["PYTEST_PLUGINS"] = __name__


CHEATS = [
    PatchesTheJudge, FindsTheAnswer, ReadsTheGolden, LooksIntoGit, MovesTheGolden, ReachesForTheJudge, ReturnsALiar,
    ReturnsAnAgreeableObject, MakesTheTaskEasy, ReturnsItsArguments, ReturnsCode, WritesPickles, PatchesTorch,
    FailsByTorch, EndsWell, LeavesWell, WritesRecords, BehavesWhenWatched, KnowsTheCatalogue, LeavesADaemon,
    PlantsAPlugin, ReturnsWhatLiesThere, ReturnsWhatLiesInMalloc, LeavesARow,
]  # fmt: skip
