"""What a run of suites/ leaves: records in a run directory, and failures printed as the engine's, not the suite's."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Generator
from typing import Any

import pytest

from ktverify.checks import isas
from ktverify.checks.accuracy import verdict_of
from ktverify.checks.isas import Isa
from ktverify.engines import registry
from ktverify.engines.capabilities import CONTRACT
from ktverify.errors import EngineFailed, PropertyFailed, Unsupported
from ktverify.isolation import locks
from ktverify.isolation.child import raised_by_the_engine
from ktverify.pytest_plugin.options import AUTO, MODULE
from ktverify.pytest_plugin.selection import ACCURACY_FAMILIES, chosen_cases, family_in, family_of, selection_of
from ktverify.report.failure_text import text_of
from ktverify.report.pages import write_run
from ktverify.runs.jsonl import new_directory
from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, CheckRecord, VerdictName
from ktverify.runs.store import Recorder, Run, load, start_run
from ktverify.spec.cases import Case
from ktverify.system.files import IN_CLONE, SUITES, in_words
from ktverify.system.printable import shown, shown_line

_RUN_DIR, _DISK_ERROR = "ktverify_run_dir", "ktverify_disk_error"
_LINES = "ktverify_lines"

# what a test notes about itself for its record
own_records_key = pytest.StashKey[bool]()
about_key = pytest.StashKey[tuple[Case | None, int]]()
recorded_key = pytest.StashKey[BaseException]()


def is_worker(config: pytest.Config) -> bool:
    """True in a process of pytest-xdist that runs tests for another."""
    return hasattr(config, "workerinput")


class Recording:
    """The hooks of a run that leaves records; registered only where the command line asks for tests of the suites."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.recorder: Recorder | None = None
        self.run: Run | None = None
        self.compared_nothing = False
        self.disk_error = ""  # why a record could not be written
        # families of all tests that were reported, from any worker
        self.families: set[str] = set()
        # what each worker wrote, and those that ended without a word
        self.lines: dict[str, list[str]] = {}
        self.silent: set[str] = set()

    def pytest_sessionstart(self) -> None:
        config = self.config
        if config.option.collectonly:
            return
        if is_worker(config):
            self.recorder = Recorder(config.workerinput[_RUN_DIR])  # type: ignore[attr-defined]
            return
        self.check_choices()
        workers = getattr(config.option, "numprocesses", None) or 1
        # with the seed that was drawn
        typed = shlex.join(["pytest", *config.invocation_params.args])
        command = re.sub(rf"--fresh[ =]{AUTO}\b", f"--fresh {config.option.fresh}", typed)
        written = registry.facts(config.option.engine).capabilities.contract
        contract = f"judged by {CONTRACT}, the engine {f'is written for {written}' if written else 'names none'}"
        try:
            run_dir = config.option.run_dir or new_directory()
            self.recorder = start_run(
                run_dir.resolve(), config.option.engine, command, workers, selection_of(config), contract
            )
        except OSError as error:
            raise pytest.UsageError(f"--run-dir: {in_words(error)}") from None

    def check_choices(self) -> None:
        """UsageError for an engine, instruction set or case that does not exist: at once, and without a run."""
        option = self.config.option
        try:
            registry.judged(option.engine)
            isas.planned(option.engine, option.isa)
            chosen_cases(self.config)
            os.close(locks.open_lock_dir())
        except (ValueError, ImportError, EngineFailed, PermissionError) as error:
            raise pytest.UsageError(shown_line(str(error))) from None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if self.recorder is not None:
            node.workerinput[_RUN_DIR] = str(self.recorder.run_dir)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.families.add(family_in(report.nodeid))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if is_worker(self.config) or self.recorder is None:
            return
        with contextlib.suppress(OSError):
            self.recorder.restore(self.lines, self.silent)
        records = load(self.recorder.run_dir).records
        compared = any(isinstance(record, AccuracyRecord) and record.verdict not in NOT_RUN for record in records)
        self.compared_nothing = not compared and not self.families.isdisjoint(ACCURACY_FAMILIES)
        broken = any(record.verdict not in ("PASS", *NOT_RUN) for record in records)
        # where everything is UNSUPPORTED or skipped, nothing was shown to be right
        passed = any(record.verdict == "PASS" for record in records) or not records
        if session.exitstatus == pytest.ExitCode.OK and (broken or self.compared_nothing or not passed):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.disk_error:
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        try:
            self.run = self.recorder.finish(int(session.exitstatus))
            write_run(self.run)
        except OSError as error:
            self.disk_error = self.disk_error or in_words(error)
            session.exitstatus = pytest.ExitCode.INTERRUPTED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended."""
        output = getattr(node, "workeroutput", None)
        if output is None:
            self.silent.add(node.gateway.id)
            return
        self.lines[node.gateway.id] = output.get(_LINES, [])
        self.disk_error = self.disk_error or output.get(_DISK_ERROR, "")

    def add(self, record: AnyRecord) -> None:
        """Add a record. A run that cannot be written ends here, with one line."""
        assert self.recorder is not None
        try:
            self.recorder.add(record)
            if is_worker(self.config):
                self.config.workeroutput[_LINES] = self.recorder.lines  # type: ignore[attr-defined]
        except OSError as error:
            self.disk_error = in_words(error)
            if is_worker(self.config):
                self.config.workeroutput[_DISK_ERROR] = self.disk_error  # type: ignore[attr-defined]
            pytest.exit(self.disk_error, returncode=int(pytest.ExitCode.INTERRUPTED))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.disk_error:
            terminalreporter.write_line(f"FAIL: the run is not whole: {self.disk_error}", red=True)
        if self.run is None:
            return
        if self.compared_nothing:
            terminalreporter.write_line("FAIL: this run selected accuracy families but compared nothing", red=True)
        with contextlib.suppress(ValueError):
            terminalreporter.write_line(f"report: {os.path.relpath(self.run.directory)}/report.html")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if not family_of(item):
            return report
        raised = None if call.excinfo is None else call.excinfo.value
        verdict, message = verdict_on(report, raised)
        if verdict == "UNSUPPORTED":
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, shown(message))
        elif raised is not None and report.failed and self.config.option.tbstyle == "auto":
            report.longrepr = text_of(raised, _repeat(item)) or report.longrepr
            if shown(report.longreprtext) != report.longreprtext:
                report.longrepr = shown(report.longreprtext)
        # accuracy and latency tests write records of their own, one per tensor or timing; all others get one per test,
        # and so does a failure that those records do not report
        reported = raised is None or raised is item.stash.get(recorded_key, None)
        recorded = item.stash.get(own_records_key, False) and reported
        if self.recorder is not None and (report.when == "call" or not report.passed) and not recorded:
            self.add(self._check_record(item, verdict, message, call.duration))
        return report

    def _check_record(self, item: pytest.Item, verdict: VerdictName, message: str, duration: float) -> CheckRecord:
        spec = getattr(item, "callspec", None)
        isa = spec.params.get("isa") if spec is not None else None
        case, tp = item.stash.get(about_key, (None, 1))
        return CheckRecord(
            family=family_of(item),
            name=item.name.partition("@")[0],
            case="" if case is None else case.id,
            tp=tp,
            repro="" if verdict in ("PASS", *NOT_RUN) else _repeat(item),
            engine=self.config.option.engine,
            isa=isa.label if isinstance(isa, Isa) else "",
            verdict=verdict,
            message=message,
            duration_s=duration,
        )


def _repeat(item: pytest.Item) -> str:
    """The command that runs one test again, in the checkout or wherever the package is installed."""
    option = item.config.option
    module = ".".join(item.path.relative_to(SUITES).with_suffix("").parts)
    installed = ["--pyargs", f"{MODULE}.{module}::{item.nodeid.partition('::')[2]}"]
    words = ["pytest", *([item.nodeid] if IN_CLONE else installed), "--engine", option.engine]
    words += [] if option.fresh is None else ["--fresh", str(option.fresh)]
    return shlex.join(words)


def verdict_on(report: pytest.TestReport, raised: BaseException | None) -> tuple[VerdictName, str]:
    """The verdict on a test, and the text of what was raised in it."""
    if raised is None:
        return ("PASS" if report.passed else "SKIP" if report.skipped else "FAIL"), ""
    if isinstance(raised, (EngineFailed, PropertyFailed, Unsupported)) or raised_by_the_engine(raised):
        return verdict_of(raised)
    text = str(raised) if isinstance(raised, (AssertionError, pytest.skip.Exception)) else ""
    return ("SKIP" if report.skipped else "FAIL"), (text or f"{type(raised).__name__}: {raised}").strip()[:2000]
