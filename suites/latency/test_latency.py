"""Times of one layer at qlen 128: forward, forward and backward, and what tensor parallelism gains.

This test never runs while another test computes. It asserts that the timed results were right, and that no time is
shorter than what the machine needs to read and multiply; no time is too long: on a shared machine a time drifts by a
factor of two, and only ratios of minima of one run mean anything.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ktverify.checks import isas, latency
from ktverify.checks.target import Target
from ktverify.errors import Unsupported
from ktverify.pytest_plugin.ask import Ask
from ktverify.report.numbers import TOO_NOISY
from ktverify.runs.record import AnyRecord
from ktverify.spec.cases import Case
from ktverify.system.timing import Ratio, Statistics

# DeepSeek-V2-Lite's layer, whole
CASE = Case.parse("deepseek_v2_lite_t16,T=128")
DEGREES = (1, 2)


@pytest.mark.latency
@pytest.mark.slow
def test_layer(ask: Ask, record: Callable[[AnyRecord], None]) -> None:
    isa = isas.planned(ask.engine, ask.chosen_isa)[0]
    if isa.emulated:
        pytest.skip("AMX is emulated here, its times mean nothing")
    # an idle child's memory is not this test's to use
    ask.children.close()
    target, env = Target(ask.engine, isa.name), latency.environment()
    timings, unsupported = ask.children.call_fresh(latency.measure, env=env, target=target, case=CASE, degrees=DEGREES)
    latency.check_samples(timings)
    times = {(timing.what, timing.tp): Statistics.of(timing.samples_ms) for timing in timings}
    for timing in timings:
        gain = Ratio.of(times[timing.what, 1], times[timing.what, timing.tp])
        text = f"{gain.value:.2f} times as fast as TP 1" if gain.clear else f"{TOO_NOISY} whether faster than TP 1"
        message = text if timing.tp > 1 else ""
        record(latency.record_of(timing, ask.engine, CASE, isa=isa.label, message=message))
    latency.expect_plausible(timings)
    if unsupported:
        raise Unsupported(unsupported)
