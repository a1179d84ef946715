"""Times of one layer at qlen 128: forward, forward and backward, and what tensor parallelism gains.

These tests never run while another test computes. They assert that the timed results were right, never a time: on a
shared machine a time drifts by a factor of two, and only ratios of one run mean anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from ktverify.checks import isas, latency
from ktverify.checks.target import Target
from ktverify.isolation.child import ChildPool
from ktverify.runs.record import Result
from ktverify.spec.cases import Case

# DeepSeek-V2-Lite's layer, whole
CASE = Case.parse("deepseek_v2_lite_t16,T=128")

pytestmark = [pytest.mark.latency, pytest.mark.slow]


@pytest.fixture(scope="module")
def medians() -> dict[tuple[str, int], float]:
    """Median milliseconds by (what, TP) of the tests that ran so far."""
    return {}


@pytest.mark.parametrize("tp", [1, 2])
def test_layer(
    engine: str,
    children: ChildPool,
    pytestconfig: pytest.Config,
    medians: dict[tuple[str, int], float],
    record: Callable[[Result], None],
    tp: int,
) -> None:
    isa = isas.planned(engine, pytestconfig.option.isa)[0]
    if isa.emulated:
        pytest.skip("AMX is emulated here, its times mean nothing")
    # an idle child's memory is not this test's to use
    children.close()
    target = Target(engine, isa.name)
    timings = children.call_fresh(latency.measure, env=latency.environment(), target=target, case=CASE, tp=tp)
    latency.check_samples(timings)
    for timing in timings:
        medians[timing.what, tp] = statistics.median(timing.samples_ms)
        single = medians.get((timing.what, 1))
        message = f"{single / medians[timing.what, tp]:.2f} times as fast as TP 1" if single and tp > 1 else ""
        record(latency.record_of(timing, engine, CASE, isa=isa.label, tp=tp, message=message))
