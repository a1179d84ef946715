"""The engines of the bench: which are measured together, what the command takes, what kt-kernel's peer computes on."""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktverify import _native
from ktverify.bench import engines, input_files
from ktverify.bench.groups import form_groups
from ktverify.bench.host import BenchInputs
from ktverify.bench.record import BenchJournal, EngineLine, HeadLine
from ktverify.isolation.host import module_at
from ktverify.spec.names import BACKWARD_TENSORS
from tests.support.command_line import call, ends, refused
from tests.support.shape_bench import SHAPE, head, measured, pretended, turns

# ---- which engines are measured together


@pytest.mark.parametrize(
    ("memory", "used", "groups", "left_out"),
    [
        (40, 1.0, ["native a b"], ""),
        (18, 1.0, ["native a", "native b"], ""),
        (14, 1.0, ["native a"], "b"),
        # the native engine holds only the experts that are used
        (14, 0.25, ["native a", "native b"], ""),
        (8, 1.0, ["native"], "a b"),
        (4, 1.0, [], "native a b"),
    ],
)
def test_engines_that_do_not_fit_together_run_in_pairs(
    memory: int, used: float, groups: list[str], left_out: str
) -> None:
    every = [pretended("native", 1.0), pretended("a", 1.0), pretended("b", 2.0)]
    weights = 5 << 30
    found, left = form_groups(every, weights, int(weights * used), memory << 30)
    assert [" ".join(engine.name for engine in group) for group in found] == groups
    assert sorted(engine.name for engine, _ in left) == sorted(left_out.split())
    if left_out == "b":
        assert "needs 17.8 GB" in left[0][1]


# ---- the command


def test_an_earlier_run_is_printed_as_lines(tmp_path: Path) -> None:
    with contextlib.closing(BenchJournal(tmp_path)) as journal:
        journal.add(head([]))
    # nothing was measured, so nothing was right
    shown = ends(call("bench", "--show", str(tmp_path), "--json"), 1)
    assert [HeadLine.model_validate_json(line) for line in shown.splitlines()] == journal.lines


def test_a_given_path_is_never_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KTVERIFY_KT_PYTHON", raising=False)
    (_, kt) = engines.find(["kt_kernel"], {})
    assert kt.missing.startswith("not installed: run `make peers`")
    monkeypatch.setenv("KTVERIFY_KT_PYTHON", "/nowhere/python")
    refused(call("bench", "tiny=1"), "shape|case")
    refused(call("bench", "--list", "--peers", "kt_kernel"), "KTVERIFY_KT_PYTHON is '/nowhere/python'")
    here = tmp_path / ".peers" / "kt" / "bin"
    here.mkdir(parents=True)
    (here / "python").touch()
    monkeypatch.delenv("KTVERIFY_KT_PYTHON")
    (_, kt) = engines.find(["kt_kernel"], {})
    assert kt.python == here / "python"


def test_another_build_runs_beside_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KTVERIFY_OTHER_BUILD", raising=False)
    (_, other) = engines.find(["other_build"], {})
    assert other.missing == "not named: set KTVERIFY_OTHER_BUILD to another build of this engine's _native.so"
    wanted = "--peers other_build: not named: set KTVERIFY_OTHER_BUILD"
    refused(call("bench", "e16_t128", "--peers", "other_build"), wanted)
    copied = tmp_path / "before.so"
    shutil.copy(_native.__file__, copied)
    monkeypatch.setenv("KTVERIFY_OTHER_BUILD", str(copied))
    written = measured(tmp_path / "run", engines.find(["other_build"], {}))
    (mine, its) = (turns(written, name) for name in ("native", "other_build"))
    assert len(mine) == len(its) > 0
    (about,) = (line.about for line in written.lines if isinstance(line, EngineLine) and line.engine == "other_build")
    assert about["build"] == str(copied)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["e16_t127"], "no shape is called 'e16_t127'; there are e16_t"),
        (["--peers", "nobody", "--list"], "no engine is called 'nobody'"),
        (["--peers", "kt_kernel_mxfp4", "--list"], "no engine is called 'kt_kernel_mxfp4'"),
        (["--peers", "torch_loop_fp8", "--list"], "no engine is called 'torch_loop_fp8'"),
        (["E=4,k=2,H=64,I=32,T=0,r=8"], "T is 0"),
        (["--isa", "avx1024"], "--isa is 'avx1024', this machine runs"),
        (["--show", "/nowhere"], "/nowhere"),
    ],
)
def test_bench_refuses_in_one_line(arguments: list[str], wanted: str) -> None:
    refused(call("bench", *arguments), wanted)


def test_all_engines_get_the_same_threads_and_patience() -> None:
    own, foreign = pretended("native", 1.0), replace(pretended("b", 1.0), python=Path("/peers/kt/bin/python"))
    wanted = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    for engine in (own, foreign):
        assert wanted.items() <= engines.environment(engine, threads=3, isa="avx512_bf16").items()
    assert "PYTHONPATH" not in engines.environment(foreign, threads=3, isa="")


def test_kt_kernel_computes_on_the_benchs_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, tuple[Any, ...]] = {}

    class Wrapper:
        moe = SimpleNamespace(
            forward_sft=lambda *given: called.update(forward=given),
            backward=lambda *given: called.update(backward=given),
        )

        def __init__(self, *, num_experts: int, gpu_experts_mask: None, **arguments: Any) -> None:
            self.num_experts = num_experts

        def load_weights_from_tensors(self, *weights: torch.Tensor) -> None: ...
        def init_lora_weights(self, *parameters: torch.Tensor) -> None: ...

    fake = SimpleNamespace(KTMoEWrapper=Wrapper, __version__="0", __cpu_variant__="amx")
    monkeypatch.setitem(sys.modules, "kt_kernel", fake)
    input_files.write(SHAPE.case, tmp_path, plain=False)
    inputs = BenchInputs(tmp_path, 1, "", {}, module_at)
    peer = module_at(engines.PEERS / "kt_kernel.py").load(inputs)
    peer.forward_saving()
    peer.backward()
    t, made = inputs.tensors, peer.results()
    wanted = [t["expert_ids"], t["weights"], t["hidden_states"], made["output"]]
    assert called["forward"][1:] == (SHAPE.case.top_k, *(tensor.data_ptr() for tensor in wanted), True)
    wanted = [t["grad_output"], *(made[name] for name in BACKWARD_TENSORS)]
    assert called["backward"][: len(wanted)] == tuple(tensor.data_ptr() for tensor in wanted)
    assert peer.about == {"isa": "amx"}
