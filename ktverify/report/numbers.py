"""Format numbers as text, the same way in every table, page and picture."""

from __future__ import annotations

import math

from ktverify.system.timing import Ratio, Statistics

# a cell that has no value
NOTHING = "–"
# a difference that is smaller than the spread between rounds
TOO_NOISY = "too noisy to tell"


def number(value: float, digits: int = 3, like: float | None = None) -> str:
    """Round to `digits` significant digits, without an exponent: 0.0123, 1.23, 12.3, 1234; "" for NaN and Inf.

    like: use as many decimals as this number has.
    """
    scale = value if like is None else like
    if not math.isfinite(value) or not math.isfinite(scale):
        return ""
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(scale)))) if scale else 0
    return f"{value:.{decimals}f}"


def mean_and_std(values: Statistics, digits: int = 3) -> str:
    """ "15.75 ± 9.54", both with the decimals of the mean."""
    return f"{number(values.mean, digits)} ± {number(values.std, digits, like=values.mean)}"


# of times: the two that tell on a machine with neighbours first
LOWEST = ("min ms", "p10", "median")
STATISTICS = (*LOWEST, "p95", "max", "mean ± std")


def statistics_cells(ms: Statistics) -> tuple[str, ...]:
    """The cells under STATISTICS."""
    return (*lowest_cells(ms), number(ms.percentiles[95]), number(ms.max), mean_and_std(ms))


def lowest_cells(ms: Statistics) -> tuple[str, str, str]:
    """The cells under LOWEST."""
    return number(ms.min), number(ms.percentiles[10]), number(ms.median)


def count(value: float) -> str:
    """A whole number with commas: 16,000."""
    return f"{value:,.0f}"


def many(count: int, noun: str) -> str:
    """ "1 check", "2 checks"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def ratio(value: float) -> str:
    """Two decimals, and three significant digits from 10 on."""
    return f"{value:.2f}" if value < 10 else number(value)


def compared(found: Ratio | None, unit: str = "") -> str:
    """The ratio of two series of times; in words where the spread between rounds is larger."""
    return NOTHING if found is None else f"{ratio(found.value)}{unit}" if found.clear else TOO_NOISY


def percent(share: float, decimals: int = 1) -> str:
    """0.45 -> "45.0 %"."""
    return f"{100 * share:.{decimals}f} %"


def error(value: float, decimals: int = 2) -> str:
    """An error or a budget: 0 -> "0", 0.00243 -> "2.43e-03"."""
    return "0" if value == 0 else f"{value:.{decimals}e}" if math.isfinite(value) else str(value)


def used_budget(used: float) -> str:
    """A share of a budget: 0.874 -> "87 %", 0.0123 -> "1.2 %"; "inf" for an exact gate that failed, "" for NaN."""
    if not math.isfinite(used):
        return "" if math.isnan(used) else "inf"
    return percent(used, 0 if used >= 0.0995 or used == 0 else 1)
