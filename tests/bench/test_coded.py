"""Base weights of the bench in fewer bits: the codes stand for the weights of the grid, and their peers are timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ktverify.bench import coded, engines, summary
from ktverify.bench.layer import quantised_memory
from ktverify.bench.measure import Bench, ShapeBenchSettings
from ktverify.bench.record import BenchJournal
from ktverify.bench.shapes import Shape
from ktverify.engines.quantised import dequantised
from ktverify.spec.cases import Case

FORMATS = {"fp8": 128, "int8": 0, "int4": 32, "mxfp4": 32}
SHAPE = Shape("tiny", "small enough to wait for", Case.parse("E=4,k=2,H=64,I=32,T=17,r=8"))


class Silent:
    def begin(self, text: str, steps: int) -> None: ...
    def say(self, text: str) -> None: ...
    def advance(self) -> None: ...


@pytest.mark.parametrize("format", FORMATS)
def test_codes_stand_for_the_weights_of_the_grid(format: str) -> None:
    drawn = torch.randn(2, 160, 96, generator=torch.Generator().manual_seed(1)).mul(0.02).bfloat16()
    step = coded.step_of(drawn)
    weights = coded.on_grid(drawn, step)
    assert set((weights.float() / step).flatten().tolist()) == {n * s for n in (0, 1, 2, 3, 4, 6) for s in (1, -1)}
    assert float((weights - drawn).abs().mean()) < step
    codes, scales = coded.codes_of(format, weights, step)
    for of_codes, of_scales, expected in zip(codes, scales, weights, strict=True):
        assert torch.equal(dequantised(format, FORMATS[format], of_codes, of_scales, None), expected)


def test_peers_of_fewer_bits_are_right_and_have_their_own_roofline(tmp_path: Path) -> None:
    found = engines.find([f"native_{format}" for format in FORMATS], {})
    settings = ShapeBenchSettings(rounds=1, warmup=1, threads=1, pause_s=0.0, patience_s=0.0, read_bytes=1 << 22)
    journal = BenchJournal(tmp_path)
    Bench(found, settings, journal, Silent()).measure(SHAPE)
    journal.close()
    (measured,) = summary.summarise(journal.lines)
    bits = {engine.line.engine: engine.line.bits for engine in measured.engines}
    assert bits == {"native": 16, "native_fp8": 8, "native_int8": 8, "native_int4": 4, "native_mxfp4": 4}
    assert {(engine.line.forward, engine.line.backward) for engine in measured.engines} == {("PASS", "PASS")}
    # the same weights, so the same results
    assert len({engine.line.rel_l2["output"] for engine in measured.engines}) == 1


def test_kt_kernels_formats_are_peers_in_its_own_python() -> None:
    names = ["kt_kernel_fp8", "kt_kernel_int8", "kt_kernel_int4"]
    found = engines.find(names, {"kt_python": sys.executable})[1:]
    assert [(engine.name, engine.bits) for engine in found] == list(zip(names, (8, 8, 4), strict=True))
    assert {(str(engine.python), engine.missing) for engine in found} == {(sys.executable, "")}


@pytest.mark.parametrize("format", FORMATS)
def test_the_memory_of_a_layer_is_printed(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    quantised_memory.main(format, "E=4,k=2,H=64,I=32,T=8,r=4")
    loaded, forward, backward = capsys.readouterr().out.splitlines()
    assert loaded.startswith("loaded: at most ")
    assert forward.startswith("forward, 4 experts packed")
    assert backward.startswith("backward")
