"""The tables of a run of the suites, and accuracy.md and latency.md made of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from ktverify.engines.capabilities import WORKS
from ktverify.report.grid import Grid, markdown_table
from ktverify.report.numbers import error, many, mean_and_std, number, used_budget
from ktverify.report.problems import ENDED, group_text, problems
from ktverify.runs.record import (
    NOT_RUN,
    VERDICT_ORDER,
    AccuracyRecord,
    AnyRecord,
    CheckRecord,
    LatencyRecord,
    VerdictName,
    worst_first,
)
from ktverify.runs.store import Run
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.instruction_sets import ISA_FLAGS
from ktverify.system.limits import format_bytes

NO_ISA = "no ISA"
REFUSALS = "test_refused["  # the test of every family whose calls must be refused
NEAREST = "nearest to its budget"

OVERVIEW_VERDICTS: tuple[VerdictName, ...] = get_args(VerdictName)
ACCURACY_NOTE = (
    "Sorted by verdict, then by how much of the budget was used. “gate” is the gate that decided: the one that failed, "
    "or that came nearest to its budget; “budget” and “used” are that gate's."
)
RATES_NOTE = "tokens/s, GFLOP/s and GB/s are taken at the minimum."


def isa_rank(isa: str) -> tuple[int, str]:
    """Sort key of an ISA: best first, then unknown ones by name."""
    known = list(ISA_FLAGS)
    name = base_isa(isa)
    return (known.index(name) if name in known else len(known), isa)


def base_isa(isa: str) -> str:
    """The instruction set without how it was run: "amx_bf16 (emulated)" -> "amx_bf16"."""
    return isa.partition(" ")[0]


# ---- the verdict and the header


def run_verdict(run: Run) -> tuple[bool, str]:
    """(passed, one sentence) of a run: every printer begins with it."""
    counts = Counter(record.verdict for record in run.records)
    ran = sum(count for name, count in counts.items() if name not in NOT_RUN)
    bad = [f"{counts[name]} {name}" for name in VERDICT_ORDER if counts[name] and name not in (*NOT_RUN, "PASS")]
    not_run = ", ".join(f"{counts[name]} {name}" for name in VERDICT_ORDER if counts[name] and name in NOT_RUN)
    if ran == 0:
        return False, f"Nothing was checked: {not_run or 'the run has no records'}."
    checks, aside = many(ran, "check"), f" ({not_run})" if not_run else ""
    if bad:
        return False, _what_failed(run.records, f"{', '.join(bad)} of {checks}", aside)
    if not run.finished:
        return False, f"The run did not finish: {checks} passed so far{aside}."
    if run.head is not None and run.head.exit_status not in (0, None):
        how = "was interrupted" if run.head.exit_status == 2 else f"ended with exit status {run.head.exit_status}"
        return False, f"{checks} passed{aside}, but pytest {how}."
    if run.lost:
        return False, f"{checks} passed{aside}, but {many(len(run.lost), 'record')} could not be read: {run.lost[0]}."
    return True, f"{'All ' if ran > 1 else ''}{checks} passed{aside}."


def _what_failed(records: Sequence[AnyRecord], counts: str, aside: str) -> str:
    """The sentence of a run with failures: whether numbers are wrong, or bad arguments are only not refused."""
    failed = [record for record in records if record.verdict not in (*NOT_RUN, "PASS")]
    # one that dies of bad arguments is worse than one that takes them
    missing = sum(
        isinstance(record, CheckRecord) and record.name.startswith(REFUSALS) and record.verdict == "FAIL"
        for record in failed
    )
    refusals = many(missing, "refusal")
    if missing == len(failed) and any(isinstance(r, AccuracyRecord) and r.verdict == "PASS" for r in records):
        return f"Right numbers, {refusals} missing: {counts}{aside}."
    return f"{counts}{aside}{f'; {refusals} missing among them' if missing else ''}."


def head_lines(run: Run) -> list[tuple[str, str]]:
    """The header of every report, as (name, value) pairs."""
    head = run.head
    if head is None:
        return [("run", run.directory.name), ("machine", "not known: the run's head was lost")]
    machine = head.machine
    used = sorted({r.isa for r in run.records if r.isa and r.verdict not in NOT_RUN}, key=isa_rank)
    nodes = [f"node {n.node}: CPUs {n.cpus}, {format_bytes(n.memory_bytes)}" for n in machine.numa]
    memory = format_bytes(machine.memory_total_bytes)
    if machine.memory_limit_bytes and machine.memory_limit_bytes < machine.memory_total_bytes:
        memory += f", control group allows {format_bytes(machine.memory_limit_bytes)}"
    isas = f"{', '.join(used)} used" if used else "the engine reports none"
    amx = " (AMX emulated)" if machine.amx.emulated else ""
    works = [r.message.partition(WORKS)[2] for r in run.checks if r.verdict == "UNSUPPORTED" and WORKS in r.message]
    return [
        ("run", run.directory.name),
        ("engine", head.engine),
        ("CPU", f"{machine.cpu} ({machine.architecture})"),
        ("ISA", f"{isas}; this machine runs {', '.join(machine.isas)}{amx}"),
        ("threads", f"{machine.threads} allowed of {machine.cpus_online}, {head.workers} worker(s)"),
        ("NUMA", "; ".join(nodes) or "not reported by the system"),
        ("memory", f"{memory}; transparent huge pages: {machine.huge_pages or 'not reported'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("system", machine.system),
        ("commit", head.commit or "no checkout"),
        ("command", head.command or "not recorded"),
        ("time", _time_text(head.duration_s)),
        *([("contract", head.contract)] if head.contract else []),
        *([("disclaimed, but works", ", ".join(works))] if works else []),
    ]


def _time_text(duration_s: float | None) -> str:
    if duration_s is None:
        return "not finished"
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{duration_s:.1f} s"


# ---- tables


@dataclass(frozen=True)
class OverviewRow:
    """One family on one ISA: how often each verdict occurred, and the record that came nearest to its budget."""

    family: str
    isa: str
    counts: Counter[VerdictName]
    worst: AccuracyRecord | None

    @property
    def worst_text(self) -> str:
        """Like "94 % grad_up_lora_a of mixtral_8x7b@seed=0"; empty without comparisons."""
        if self.worst is None:
            return ""
        if self.worst.used == 0:
            return "every tensor exact"
        return f"{used_budget(self.worst.used)} {self.worst.tensor} of {self.worst.case}"


def overview(run: Run) -> list[OverviewRow]:
    """One row per (family, ISA), families by name, each family's ISAs best first."""
    rows = []
    for family, isa in sorted({(r.family, r.isa) for r in run.records}, key=lambda key: (key[0], isa_rank(key[1]))):
        members = [r for r in run.records if (r.family, r.isa) == (family, isa)]
        compared = [r for r in members if isinstance(r, AccuracyRecord) and r.gates and r.verdict not in NOT_RUN]
        worst = next(iter(worst_first(compared)), None)
        rows.append(OverviewRow(family, isa, Counter(record.verdict for record in members), worst))
    return rows


def overview_grid(rows: Sequence[OverviewRow]) -> Grid:
    """Verdicts that never occurred have no column, except PASS."""
    verdicts = [name for name in OVERVIEW_VERDICTS if name == "PASS" or any(row.counts[name] for row in rows)]
    cells = [
        {
            "family": row.family,
            "ISA": row.isa or NO_ISA,
            **{name: str(row.counts[name] or "") for name in verdicts},
            NEAREST: row.worst_text,
        }
        for row in rows
    ]
    return Grid.of(cells, "Overview", left=("ISA", NEAREST))


def strict_grid(records: Iterable[AccuracyRecord]) -> Grid:
    """rel_l2 of each tensor over the cases on which an engine with fp32 sums has strict limits. No rows for an engine
    that does not claim fp32 sums."""
    gates = [(record.tensor, gate) for record in records for gate in record.gates if gate.gate == "rel_l2_own"]
    rows = []
    for tensor in ALL_TENSORS:
        mine = [gate for name, gate in gates if name == tensor]
        if mine:
            values, limits = [gate.value for gate in mine], [gate.budget for gate in mine]
            rows.append(
                {
                    "rel-L2, strict cases": tensor,
                    "n": str(len(values)),
                    "median": error(statistics.median(values)),
                    "worst": error(max(values)),
                    "limit": " to ".join(dict.fromkeys(map(error, (min(limits), max(limits))))),
                }
            )
    return Grid.of(rows)


def accuracy_rows(run: Run) -> list[AccuracyRecord]:
    """The records of the accuracy table, worst first. Tensors without a result (ended, not run) share one per case."""
    rows: dict[object, list[AccuracyRecord]] = {}
    for record in worst_first(run.accuracy):
        silent = record.verdict in (*NOT_RUN, *ENDED)
        key = (record.verdict, record.family, record.isa, record.case, record.tp, record.source)
        rows.setdefault(key if silent else id(record), []).append(record)
    return [
        alike[0] if len(alike) == 1 else alike[0].model_copy(update={"tensor": f"{len(alike)} tensors"})
        for alike in rows.values()
    ]


def accuracy_grid(records: Iterable[AccuracyRecord]) -> Grid:
    """A row per record. Where nothing was compared (a crash, a skip) the numbers are empty: nan would be a finding."""
    rows = []
    for r in records:
        gate = r.deciding_gate
        rows.append(
            {
                "verdict": r.verdict,
                "family": r.family,
                "case": r.case,
                "tensor": r.tensor,
                "ISA": r.isa,
                "TP": str(r.tp),
                "mean-rel": error(r.mean_rel) if r.gates else "",
                "rel-L2": error(r.rel_l2) if r.gates else "",
                "cosine": f"{r.cosine:.7f}" if r.gates else "",
                "max abs": error(r.max_abs) if r.gates else "",
                "gate": gate.gate if gate else "",
                "budget": error(gate.budget) if gate else "",
                "used": used_budget(r.used),
            }
        )
    return Grid.of(rows, "Every tensor", notes=(ACCURACY_NOTE,), left=("family", "case", "tensor", "ISA", "gate"))


def latency_grid(records: Iterable[LatencyRecord]) -> Grid:
    """A row per measurement: what is not PASS on top, then by case, what was timed, ISA and TP."""
    rows = []
    for r in sorted(
        records, key=lambda r: (VERDICT_ORDER.index(r.verdict), r.case, r.what, isa_rank(r.isa), r.tp, r.threads)
    ):
        ms = r.ms
        rows.append(
            {
                "case": r.case,
                "what": r.what,
                "ISA": r.isa,
                "threads": str(r.threads),
                "TP": str(r.tp),
                "min ms": number(ms.min, 4) if ms else "",
                "p10 ms": number(ms.percentiles[10], 4) if ms else "",
                "median ms": number(ms.median, 4) if ms else "",
                "mean ± std ms": mean_and_std(ms, 4) if ms else "",
                "max ms": number(ms.max, 4) if ms else "",
                "tokens/s": number(r.per_second(r.tokens), 4),
                "GFLOP/s": number(r.per_second(r.flops) / 1e9, 4),
                "GB/s": number(r.per_second(r.bytes) / 1e9, 4),
                "n": str(len(r.samples_ms)),
                "verdict": r.verdict,
            }
        )
    return Grid.of(rows, "Latency", notes=(RATES_NOTE,), left=("what", "ISA", "verdict"))


def checks_grid(run: Run) -> Grid:
    """A row per check that is no comparison of tensors, worst first."""
    rows = [
        {
            "verdict": record.verdict,
            "family": record.family,
            "check": record.name,
            "ISA": record.isa,
            "message": record.message.partition("\n")[0],
            "seconds": f"{record.duration_s:.2f}",
        }
        for record in worst_first(run.checks)
    ]
    return Grid.of(rows, "Other checks", left=("family", "check", "ISA", "message"))


# ---- Markdown


def _page(title: str, run: Run, *parts: str) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in head_lines(run))
    passed, sentence = run_verdict(run)
    return "\n\n".join([f"# {title}: {'PASS' if passed else 'FAIL'}", sentence, facts, *filter(None, parts)]) + "\n"


def _section(grid: Grid) -> str:
    heading = f"## {grid.title}\n\n" if grid.title else ""
    notes = "".join(f"{note}\n\n" for note in grid.notes)
    return f"{heading}{notes}{markdown_table(grid)}" if grid.rows else ""


def accuracy_markdown(run: Run) -> str:
    """accuracy.md: verdict, header, overview by family and ISA, what did not pass, then every tensor, worst first."""
    found = problems(run)
    failures = "## What did not pass\n\n```\n" + "\n\n".join(map(group_text, found)) + "\n```" if found else ""
    grids = (overview_grid(overview(run)), strict_grid(run.accuracy), accuracy_grid(accuracy_rows(run)))
    *summary, every_tensor = map(_section, grids)
    return _page("Accuracy", run, *summary, failures, every_tensor)


def latency_markdown(run: Run) -> str:
    """latency.md: verdict, header and the table of times."""
    warmups = " or ".join(str(count) for count in sorted({record.warmup for record in run.latency}))
    about = f"Wall time of one iteration after {warmups} warm-up iterations." if warmups else ""
    return _page("Latency", run, about or "This run measured no times.", _section(latency_grid(run.latency)))
