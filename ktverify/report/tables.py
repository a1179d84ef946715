"""Tables in Markdown: accuracy.md and latency.md, and the rows that the HTML page and the console show as well.

Comes in: a run. Goes out: text. Numbers are formatted here and nowhere else, so that every printer shows the same ones.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from ktverify.report.problems import ENDED, group_text, problems
from ktverify.runs.record import (
    NOT_RUN,
    VERDICT_ORDER,
    AccuracyRecord,
    LatencyRecord,
    Result,
    RunRecord,
    VerdictName,
    worst_first,
)
from ktverify.runs.store import Run
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.machine import ISA_FLAGS, format_bytes

NO_ISA = "no ISA"

# the order in which an overview counts them
OVERVIEW_VERDICTS: tuple[VerdictName, ...] = (
    "PASS",
    "FAIL",
    "CRASH",
    "TIMEOUT",
    "OOM",
    "MISTRUSTED",
    "UNSUPPORTED",
    "SKIP",
)


@dataclass(frozen=True)
class Column:
    """A column: its heading, how a record fills it, and whether it is a number (right-aligned, same-width digits)."""

    heading: str
    cell: Callable[..., str]
    numeric: bool = False


def error_text(value: float) -> str:
    """An error or a budget: 0 -> "0", 0.00243 -> "2.43e-03"."""
    if value == 0:
        return "0"
    return f"{value:.2e}" if math.isfinite(value) else str(value)


def used_text(used: float) -> str:
    """A share of a budget in percent: 0.874 -> "87 %"; an exact gate that was broken is "inf"."""
    if not math.isfinite(used):
        return "" if math.isnan(used) else "inf"
    return f"{100 * used:.0f} %" if used >= 0.0995 or used == 0 else f"{100 * used:.1f} %"


def cosine_text(value: float) -> str:
    return f"{value:.7f}" if math.isfinite(value) else str(value)


def figures(value: float, like: float | None = None) -> str:
    """Four significant digits without an exponent: 0.01234, 12.34, 12345; or as many decimals as `like` has then."""
    scale = value if like is None else like
    if not math.isfinite(value) or not math.isfinite(scale):
        return ""
    decimals = max(0, 3 - math.floor(math.log10(abs(scale)))) if scale else 0
    return f"{value:.{decimals}f}"


def _budget(record: AccuracyRecord) -> str:
    gate = record.deciding_gate
    return error_text(gate.budget) if gate is not None else ""


# where nothing was compared (a crash, a skip) there are no numbers: empty, since nan would be a finding
ACCURACY_COLUMNS: tuple[Column, ...] = (
    Column("verdict", lambda r: r.verdict),
    Column("family", lambda r: r.family),
    Column("case", lambda r: r.case),
    Column("tensor", lambda r: r.tensor),
    Column("ISA", lambda r: r.isa),
    Column("TP", lambda r: str(r.tp), numeric=True),
    Column("mean-rel", lambda r: error_text(r.mean_rel) if r.gates else "", numeric=True),
    Column("rel-L2", lambda r: error_text(r.rel_l2) if r.gates else "", numeric=True),
    Column("cosine", lambda r: cosine_text(r.cosine) if r.gates else "", numeric=True),
    Column("max abs", lambda r: error_text(r.max_abs) if r.gates else "", numeric=True),
    Column("gate", lambda r: r.deciding_gate.gate if r.deciding_gate else ""),
    Column("budget", _budget, numeric=True),
    Column("used", lambda r: used_text(r.used), numeric=True),
)

LATENCY_COLUMNS: tuple[Column, ...] = (
    Column("case", lambda r: r.case),
    Column("what", lambda r: r.what),
    Column("ISA", lambda r: r.isa),
    Column("threads", lambda r: str(r.threads), numeric=True),
    Column("TP", lambda r: str(r.tp), numeric=True),
    Column(
        "mean ± std ms",
        lambda r: f"{figures(r.ms.mean)} ± {figures(r.ms.std, r.ms.mean)}" if r.ms else "",
        numeric=True,
    ),
    Column("median ms", lambda r: figures(r.ms.median) if r.ms else "", numeric=True),
    Column("min ms", lambda r: figures(r.ms.min) if r.ms else "", numeric=True),
    Column("max ms", lambda r: figures(r.ms.max) if r.ms else "", numeric=True),
    Column("tokens/s", lambda r: figures(r.per_second(r.tokens)), numeric=True),
    Column("GFLOP/s", lambda r: figures(r.per_second(r.flops) / 1e9), numeric=True),
    Column("GB/s", lambda r: figures(r.per_second(r.bytes) / 1e9), numeric=True),
    Column("n", lambda r: str(len(r.samples_ms)), numeric=True),
    Column("verdict", lambda r: r.verdict),
)


@dataclass(frozen=True)
class OverviewRow:
    """One family on one ISA: how often each verdict fell, and the record that came nearest to its budget."""

    family: str
    isa: str
    counts: dict[VerdictName, int]
    worst: AccuracyRecord | None

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def worst_text(self) -> str:
        """Like "94 % grad_up_lora_a of mixtral_8x7b@seed=0"; empty without comparisons."""
        if self.worst is None:
            return ""
        if self.worst.used == 0:
            return "every tensor exact"
        return f"{used_text(self.worst.used)} {self.worst.tensor} of {self.worst.case}"


def overview(records: Iterable[Result]) -> list[OverviewRow]:
    """One row per (family, ISA), families by name, each family's ISAs best first."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for record in records:
        groups.setdefault((record.family, record.isa), []).append(record)
    rows = []
    for (family, isa), members in groups.items():
        compared = [r for r in members if isinstance(r, AccuracyRecord) and r.gates and r.verdict not in NOT_RUN]
        worst = worst_first(compared)[0] if compared else None
        assert worst is None or isinstance(worst, AccuracyRecord)
        counts = Counter(record.verdict for record in members)
        rows.append(OverviewRow(family, isa, {name: counts.get(name, 0) for name in VERDICT_ORDER}, worst))
    return sorted(rows, key=lambda row: (row.family, isa_rank(row.isa)))


@dataclass(frozen=True)
class StrictRow:
    """One tensor's rel_l2 over the cases on which an engine with fp32 sums is held to strict limits."""

    tensor: str
    values: tuple[float, ...]
    limits: tuple[float, ...]


STRICT_COLUMNS: tuple[Column, ...] = (
    Column("rel-L2, strict cases", lambda r: r.tensor),
    Column("n", lambda r: str(len(r.values)), numeric=True),
    Column("median", lambda r: error_text(statistics.median(r.values)), numeric=True),
    Column("worst", lambda r: error_text(max(r.values)), numeric=True),
    Column(
        "limit", lambda r: " to ".join(dict.fromkeys(map(error_text, (min(r.limits), max(r.limits))))), numeric=True
    ),
)


def strict_rows(records: Iterable[Result]) -> list[StrictRow]:
    """A row a tensor, in the order of ktverify.names; none for an engine that claims no fp32 sums."""
    gates = [
        (record.tensor, gate)
        for record in records
        if isinstance(record, AccuracyRecord)
        for gate in record.gates
        if gate.gate == "rel_l2_own"
    ]
    rows = []
    for tensor in ALL_TENSORS:
        of_tensor = [gate for name, gate in gates if name == tensor]
        if of_tensor:
            rows.append(StrictRow(tensor, tuple(g.value for g in of_tensor), tuple(g.budget for g in of_tensor)))
    return rows


def isa_rank(isa: str) -> tuple[int, str]:
    """Sort key of an ISA: best first, then what is not known here, by name."""
    known = list(ISA_FLAGS)
    name = base_isa(isa)
    return (known.index(name) if name in known else len(known), isa)


def base_isa(isa: str) -> str:
    """The instruction set without how it was run: "amx_bf16 (emulated)" -> "amx_bf16"."""
    return isa.partition(" ")[0]


def verdict_counts(records: Iterable[Result]) -> dict[VerdictName, int]:
    """How often each verdict fell, those that fell at all, worst first."""
    counts = Counter(record.verdict for record in records)
    return {name: counts[name] for name in VERDICT_ORDER if counts[name]}


def run_verdict(run: Run) -> tuple[bool, str]:
    """(passed, one sentence) of a run: the first thing that every printer says."""
    counts = verdict_counts(run.records)
    ran = sum(count for name, count in counts.items() if name not in NOT_RUN)
    bad = [f"{count} {name}" for name, count in counts.items() if name not in (*NOT_RUN, "PASS")]
    not_run = [f"{count} {name}" for name, count in counts.items() if name in NOT_RUN]
    if ran == 0:
        return False, "Nothing was checked: " + (", ".join(not_run) if not_run else "the run has no records") + "."
    aside = f" ({', '.join(not_run)})" if not_run else ""
    if bad:
        return False, f"{', '.join(bad)} of {ran} checks{aside}."
    if not run.finished:
        return False, f"The run did not finish: {ran} checks passed so far{aside}."
    if run.head is not None and run.head.exit_status not in (0, None):
        how = "was interrupted" if run.head.exit_status == 2 else f"ended with exit status {run.head.exit_status}"
        return False, f"{ran} checks passed{aside}, but pytest {how}."
    return True, f"All {ran} checks passed{aside}."


def head_lines(run: Run) -> list[tuple[str, str]]:
    """The header of every report, as (name, value) pairs."""
    lines = [("run", run.directory.name)]
    head = run.head
    if head is None:
        return [*lines, ("machine", "not known: the run's head was lost")]
    machine = head.machine
    used = sorted({r.isa for r in run.records if r.isa and r.verdict not in NOT_RUN}, key=isa_rank)
    nodes = [f"node {n.node}: CPUs {n.cpus}, {format_bytes(n.memory_bytes)}" for n in machine.numa]
    memory = format_bytes(machine.memory_total_bytes)
    if machine.memory_limit_bytes and machine.memory_limit_bytes < machine.memory_total_bytes:
        memory += f", control group allows {format_bytes(machine.memory_limit_bytes)}"
    told = f"{', '.join(used)} used" if used else "the engine tells none"
    amx = " (AMX emulated)" if machine.amx.emulated else ""
    return [
        *lines,
        ("engine", head.engine),
        ("CPU", f"{machine.cpu} ({machine.architecture})"),
        ("ISA", f"{told}; this machine runs {', '.join(machine.isas)}{amx}"),
        ("threads", f"{machine.threads} allowed of {machine.cpus_online}, {head.workers} worker(s)"),
        ("NUMA", "; ".join(nodes) or "not told by the system"),
        ("memory", f"{memory}; transparent huge pages: {machine.huge_pages or 'not told'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("system", machine.system),
        ("commit", head.commit or "no checkout"),
        ("command", head.command or "not recorded"),
        ("time", _time_text(head)),
    ]


def _time_text(head: RunRecord) -> str:
    if head.duration_s is None:
        return "not finished"
    minutes, seconds = divmod(round(head.duration_s), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{head.duration_s:.1f} s"


def accuracy_rows(run: Run) -> list[AccuracyRecord]:
    """The rows of the accuracy table, worst first; the tensors of which there is nothing to tell in one row a case."""
    rows: dict[object, list[AccuracyRecord]] = {}
    for record in worst_first(run.accuracy):
        assert isinstance(record, AccuracyRecord)
        silent = record.verdict in (*NOT_RUN, *ENDED)
        key = (record.verdict, record.family, record.isa, record.case, record.tp, record.source)
        rows.setdefault(key if silent else id(record), []).append(record)
    return [
        alike[0] if len(alike) == 1 else alike[0].model_copy(update={"tensor": f"{len(alike)} tensors"})
        for alike in rows.values()
    ]


def latency_rows(run: Run) -> list[LatencyRecord]:
    """The rows of the latency table: what has no verdict PASS on top, then by case, what was timed, ISA and TP."""
    return sorted(
        run.latency,
        key=lambda r: (VERDICT_ORDER.index(r.verdict), r.case, r.what, isa_rank(r.isa), r.tp, r.threads),
    )


def overview_columns(rows: Sequence[OverviewRow]) -> list[Column]:
    """The overview's columns; verdicts that never fell have none, except PASS."""
    columns = [Column("family", lambda r: r.family), Column("ISA", lambda r: r.isa or NO_ISA)]
    for name in OVERVIEW_VERDICTS:
        if name == "PASS" or any(row.counts[name] for row in rows):
            columns.append(Column(name, lambda r, name=name: str(r.counts[name] or ""), numeric=True))
    columns.append(Column("nearest to its budget", lambda r: r.worst_text))
    return columns


def markdown(columns: Sequence[Column], rows: Iterable[object]) -> str:
    """A GitHub table. A bar within a cell is escaped, it would end the cell."""
    cells = [[column.cell(row).replace("|", "\\|") for column in columns] for row in rows]
    table = tabulate(
        cells,
        headers=[column.heading for column in columns],
        tablefmt="github",
        colalign=["right" if column.numeric else "left" for column in columns] if cells else None,
        disable_numparse=True,
    )
    return str(table)


def _head_markdown(run: Run) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in head_lines(run))


def accuracy_markdown(run: Run) -> str:
    """accuracy.md: verdict, header, overview by family and ISA, what did not pass, then every tensor, worst first."""
    passed, sentence = run_verdict(run)
    rows = overview(run.records)
    parts = [f"# Accuracy: {'PASS' if passed else 'FAIL'}", sentence, _head_markdown(run)]
    if rows:
        parts += ["## Overview", markdown(overview_columns(rows), rows)]
    strict = strict_rows(run.records)
    if strict:
        parts.append(markdown(STRICT_COLUMNS, strict))
    found = problems(run)
    if found:
        parts += ["## What did not pass", "```\n" + "\n\n".join(map(group_text, found)) + "\n```"]
    if run.accuracy:
        parts += [
            "## Every tensor",
            "Sorted by verdict, then by how much of the budget was used. `gate` is the gate that decided: the one that "
            "failed, or that came nearest to its budget; `budget` and `used` are that gate's.",
            markdown(ACCURACY_COLUMNS, accuracy_rows(run)),
        ]
    return "\n\n".join(parts) + "\n"


def latency_markdown(run: Run) -> str:
    """latency.md: header and the table of times. Rates are taken at the median."""
    parts = ["# Latency", _head_markdown(run)]
    if run.latency:
        warmups = sorted({record.warmup for record in run.latency})
        parts += [
            f"Wall time of one iteration after {' or '.join(map(str, warmups))} warm-up iterations; tokens/s, GFLOP/s "
            "and GB/s are taken at the median.",
            markdown(LATENCY_COLUMNS, latency_rows(run)),
        ]
    else:
        parts.append("This run measured no times.")
    return "\n\n".join(parts) + "\n"
