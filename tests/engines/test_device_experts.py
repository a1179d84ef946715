"""Experts on a device beside the engine: the order of their calls, and the script that asks a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ktverify.engines.native.device_experts import DeviceExperts
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from tests.support.command_line import python

CASE = Case.parse("E=4,k=2,H=32,I=16,T=9,r=4,alpha=8")


class Noted:
    """Another object, whose calls are written down."""

    def __init__(self, of: Any, calls: list[str]) -> None:
        self._of, self._calls = of, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        if name not in ("forward", "backward"):
            return found

        def noted(*given: Any) -> Any:
            self._calls.append(f"engine {name}")
            return found(*given)

        return noted


def test_the_device_is_started_before_the_engine_and_awaited_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes both compute at the same time where the device is a GPU."""
    calls: list[str] = []

    def note(name: str) -> None:
        plain: Callable[..., Any] = getattr(DeviceExperts, name)

        def noted(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return plain(*given, **named)

        monkeypatch.setattr(DeviceExperts, name, noted)

    for name in ("launch", "launch_backward", "_finish"):
        note(name)
    inputs = make_inputs(CASE)
    layer: Any = build_layer(KTMoEWrapper, CASE, inputs, gpu_experts_mask=[True, False] * 2, gpu_device="cpu")
    layer._native = Noted(layer._native, calls)
    run_layer(layer, inputs)
    assert calls == ["launch", "engine forward", "_finish", "launch_backward", "engine backward", "_finish"]


def test_the_script_for_a_gpu_skips_without_one() -> None:
    run = "import runpy, sys; sys.argv = ['script']; runpy.run_path('examples/hybrid_on_gpu.py', run_name='__main__')"
    done = python("-c", run, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SKIP torch ")
    assert done.stdout.rstrip().endswith(" sees no GPU here")
