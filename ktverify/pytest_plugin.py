"""How a run of the suites is put together.

A family is a folder beside this file. Its tests get an xdist group of their own (one per instruction set where a
family covers several), computing tests share a lock that timing tests take alone, and every run leaves its records in
a run directory. A run that selected accuracy families but compared nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify.checks import case_accuracy, isas, processes
from ktverify.checks.accuracy import verdict_of
from ktverify.checks.isas import Isa
from ktverify.checks.target import expect
from ktverify.engines import registry
from ktverify.errors import EngineFailed, NotPassed, PropertyFailed, Unsupported
from ktverify.isolation import locks
from ktverify.isolation.child import ChildPool, choose_limits, limits_of, raised_by_the_engine
from ktverify.report.failure_text import text_of
from ktverify.report.run_pages import write_run
from ktverify.runs.jsonl import new_directory
from ktverify.runs.record import NOT_RUN, AccuracyRecord, CheckRecord, Result, VerdictName
from ktverify.runs.store import Recorder, Run, load, start_run
from ktverify.spec import cases
from ktverify.spec.cases import Case
from ktverify.system.paths import ROOT

SUITES = ROOT / "suites"
ACCURACY_FAMILIES = ("forward", "backward")
# these judge the suites themselves and what the project builds on its own engine, whatever --engine names
NOT_OF_ENGINES = ("c2c", "meta", "training")
_RUN_DIR = "ktverify_run_dir"

recorder_key = pytest.StashKey[Recorder]()
run_key = pytest.StashKey[Run]()
nothing_key = pytest.StashKey[bool]()


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return value


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ktverify", "the layer under test")
    group.addoption("--engine", default="native", help=f"engine name, {registry.OWN} (default: native)")
    group.addoption("--isa", default="all", help="one instruction set of the native engine (default: all it can run)")
    group.addoption("--fresh", type=int, metavar="SEED", help="draw new inputs and compute the oracle live")
    group.addoption("--cases", metavar="GLOB", help="only the catalogue's cases whose name matches")
    group.addoption(
        "--tier", choices=("default", "big", "full"), help="only the cases of one tier (default: default and big)"
    )
    group.addoption(
        "--time-limit", type=_above_zero, metavar="SECONDS", help="for one call (default: 300, of a big case 900)"
    )
    group.addoption(
        "--memory-limit", type=_above_zero, metavar="GIB", help="resident, for one call (default: 3, of a big case 7)"
    )
    group.addoption("--run-dir", type=Path, help="where the records go (default: reports/runs/<stamp>)")


# ---- a run and its records


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    # the processes that compute start in the checkout, wherever this one did
    config.option.engine = registry.absolute(config.option.engine, config.invocation_params.dir)
    if path := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in path.split(os.pathsep))
    choose_limits(config.option.time_limit, config.option.memory_limit)
    if _is_worker(config):
        # workers share the processors; torch's own threads, here and in processes that tests start, would spin for
        # one that another worker has
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def _check_choices(config: pytest.Config) -> None:
    """pytest.UsageError for an engine, instruction set or case that is not there: at once, and with no run left."""
    option = config.option
    try:
        registry.find(option.engine)
        isas.planned(option.engine, option.isa)
        _chosen_cases(config)
    except (ValueError, ImportError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly:
        return
    if _is_worker(config):
        config.stash[recorder_key] = Recorder(config.workerinput[_RUN_DIR])  # type: ignore[attr-defined]
        return
    _check_choices(config)
    config.stash[seen_key] = _Seen()
    config.pluginmanager.register(config.stash[seen_key])
    run_dir = config.option.run_dir or new_directory(reports=config.rootpath / "reports")
    workers = getattr(config.option, "numprocesses", None) or 1
    command = shlex.join(["pytest", *config.invocation_params.args])
    try:
        config.stash[recorder_key] = start_run(run_dir.resolve(), config.option.engine, command, workers)
    except FileExistsError as error:
        raise pytest.UsageError(f"--run-dir: {error}") from None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    if recorder_key in node.config.stash:
        node.workerinput[_RUN_DIR] = str(node.config.stash[recorder_key].run_dir)


class _Seen:
    """Folders of all tests that were reported, from whichever worker."""

    def __init__(self) -> None:
        self.folders: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.folders.update(Path(report.nodeid.partition("::")[0]).parts[:-1])


seen_key = pytest.StashKey[_Seen]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if _is_worker(config) or recorder_key not in config.stash:
        return
    recorder = config.stash[recorder_key]
    records = load(recorder.run_dir).records
    compared = any(isinstance(record, AccuracyRecord) and record.verdict not in NOT_RUN for record in records)
    selected = not config.stash[seen_key].folders.isdisjoint(ACCURACY_FAMILIES)
    config.stash[nothing_key] = selected and not compared
    broken = any(record.verdict not in ("PASS", *NOT_RUN) for record in records)
    # where everything is UNSUPPORTED or skipped, nothing was shown to be right
    passed = any(record.verdict == "PASS" for record in records) or not records
    if session.exitstatus == pytest.ExitCode.OK and (broken or config.stash[nothing_key] or not passed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    run = recorder.finish(int(session.exitstatus))
    write_run(run)
    config.stash[run_key] = run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash.get(run_key, None)
    if run is None:
        return
    left_out = _left_out(config)
    if left_out:
        folders = ", ".join(f"suites/{family}" for family in left_out)
        terminalreporter.write_line(f"left out, not about {config.option.engine}: {folders} (they run when named)")
    if config.stash[nothing_key]:
        terminalreporter.write_line("FAIL: this run selected accuracy families but compared nothing", red=True)
    with contextlib.suppress(ValueError):
        terminalreporter.write_line(f"report: {os.path.relpath(run.directory)}/report.html")


def family_of(item: pytest.Item) -> str:
    """The folder below suites/ that the test stands in."""
    try:
        return item.path.relative_to(SUITES).parts[0]
    except ValueError:
        return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    config = item.config
    raised = None if call.excinfo is None else call.excinfo.value
    verdict, message = _verdict(report, raised)
    if verdict == "UNSUPPORTED":
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, message)
    elif raised is not None and report.failed and config.option.tbstyle == "auto":
        # a bug of what the suites judge themselves is their own
        said = "" if family_of(item) in NOT_OF_ENGINES else text_of(raised, _repeat(item))
        report.longrepr = said or report.longrepr
    # accuracy and latency tests write records of their own, one per tensor or timing; all others get one per test, and
    # so does a failure that those records do not tell of
    told = item.stash.get(own_records_key, False) and (raised is None or raised is item.stash.get(told_key, None))
    if recorder_key in config.stash and (report.when == "call" or not report.passed) and not told:
        isa = getattr(item, "callspec", None)
        chosen = isa.params.get("isa") if isa is not None else None
        case, tp = item.stash.get(about_key, (None, 1))
        config.stash[recorder_key].add(
            CheckRecord(
                family=family_of(item),
                name=item.name.partition("@")[0],
                case="" if case is None else case.id,
                tp=tp,
                repro="" if verdict in ("PASS", *NOT_RUN) else _repeat(item),
                engine=config.option.engine,
                isa=chosen.label if isinstance(chosen, Isa) else "",
                verdict=verdict,
                message=message,
                duration_s=call.duration,
            )
        )
    return report


def _repeat(item: pytest.Item) -> str:
    """The command that runs one test again, in the checkout."""
    option = item.config.option
    words = ["pytest", item.nodeid, "--engine", option.engine]
    words += [] if option.fresh is None else ["--fresh", str(option.fresh)]
    return shlex.join(words)


def _verdict(report: pytest.TestReport, raised: BaseException | None) -> tuple[VerdictName, str]:
    """The verdict on a test, and what was raised in it."""
    if raised is None:
        return ("PASS" if report.passed else "SKIP" if report.skipped else "FAIL"), ""
    if isinstance(raised, (EngineFailed, PropertyFailed, Unsupported)) or raised_by_the_engine(raised):
        return verdict_of(raised)
    text = str(raised) if isinstance(raised, (AssertionError, pytest.skip.Exception)) else ""
    return ("SKIP" if report.skipped else "FAIL"), (text or f"{type(raised).__name__}: {raised}").strip()[:2000]


own_records_key = pytest.StashKey[bool]()
about_key = pytest.StashKey[tuple[Case | None, int]]()
told_key = pytest.StashKey[BaseException]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Result], None]:
    """Adds a record to the run; a test that calls it writes no check record besides."""

    def add(result: Result) -> None:
        request.node.stash[own_records_key] = True
        request.config.stash[recorder_key].add(result)

    return add


@pytest.fixture
def about(request: pytest.FixtureRequest) -> Callable[[Case | None, int], None]:
    """Tells the record of which case's forward and backward, at which TP degree, the test is about to judge."""

    def tell(case: Case | None, tp: int = 1) -> None:
        request.node.stash[about_key] = (case, tp)

    return tell


# ---- which tests there are, and who runs beside whom


def _isas_of(case: Case, planned: list[Isa]) -> list[Isa]:
    """Big cases skip kernels that would take minutes and show nothing that small cases do not: portable, emulated."""
    fast = [isa for isa in planned if not (isa.emulated or isa.name == "scalar")]
    return planned if case.tier == "default" else fast or planned[:1]


def _chosen_cases(config: pytest.Config) -> list[Case]:
    """The cases that --cases and --tier select. ValueError where there are none."""
    option = config.option
    tiers = (option.tier,) if option.tier else ("default", "big")
    chosen = [case for case in cases.select(option.cases) if case.tier in tiers]
    if not chosen:
        where = f"--cases {option.cases or '*'} in tier {' or '.join(tiers)}"
        raise ValueError(f"{where}: there is no such case; python -m ktverify list prints all")
    return chosen


def _cases_and_isas(config: pytest.Config) -> Iterator[Any]:
    option = config.option
    planned = isas.planned(option.engine, option.isa)
    for case in _chosen_cases(config):
        big = case.tier != "default"
        for isa in _isas_of(case, planned):
            group, marks = ("big-", [pytest.mark.big]) if big else ("", [])
            yield pytest.param(case, isa, id=f"{group}{isa.id}-{case.name}", marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "isa" not in names or any("isa" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return
    option = metafunc.config.option
    if "case" in names and family_of(metafunc.definition) in ACCURACY_FAMILIES:
        metafunc.parametrize("case,isa", list(_cases_and_isas(metafunc.config)))
    else:
        planned = isas.planned(option.engine, option.isa)
        metafunc.parametrize("isa", planned, ids=[isa.id for isa in planned], scope="session")


def group_of(nodeid: str) -> str:
    """The group of tests that one worker runs one after the other, read from a test's id.

    A family, and in it each instruction set by itself; of meta, each file. The big cases of all families: gigabytes of
    inputs are made once for forward and backward.
    """
    path, _, name = nodeid.partition("::")
    family, file = Path(path).parts[-2:]
    if family == "meta":
        return f"{family}-{file}"
    found = re.search(r"\[(big|" + "|".join(isas.IDS) + r")[-\]]", name)
    if found and found.group(1) == "big":
        return "big"
    return f"{family}-{found.group(1)}" if found else family


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole groups go to a worker, in the order in which they were collected.

    xdist's own loadgroup writes the group into an attribute that pytest 9.2 no longer reads, so it groups nothing.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    # by default the groups with the most tests come first; here the longest have few
    config.option.loadscopereorder = False
    return ByGroup(config, log)


def _urgency(item: pytest.Item) -> tuple[int, str]:
    """Long groups first, so that no worker begins one when the others are done; timings when most are done."""
    if item.get_closest_marker("big"):
        spec = getattr(item, "callspec", None)
        return 0, spec.params["case"].name if spec is not None and "case" in spec.params else ""
    return (2 if item.get_closest_marker("latency") else 1), ""


def _left_out(config: pytest.Config) -> tuple[str, ...]:
    """The families among those asked for that a run of another engine than the project's own leaves out.

    Those that the command line names, by their folder or a path inside it, are run.
    """
    if config.option.engine == registry.NATIVE:
        return ()
    start = config.invocation_params.dir
    asked = [(start / argument.partition("::")[0]).resolve() for argument in config.args]
    found = []
    for family in NOT_OF_ENGINES:
        folder = SUITES / family
        named = any(path.is_relative_to(folder) for path in asked)
        if not named and any(folder.is_relative_to(path) for path in asked):
            found.append(family)
    return tuple(found)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = _left_out(config)
    if left_out:
        others = [item for item in items if family_of(item) in left_out]
        items[:] = [item for item in items if family_of(item) not in left_out]
        config.hook.pytest_deselected(items=others)
    items.sort(key=_urgency)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with contextlib.ExitStack() as held:
        if item.get_closest_marker("big"):
            held.enter_context(locks.big())
        held.enter_context(locks.computing(alone=item.get_closest_marker("latency") is not None))
        held.enter_context(locks.lent_to_children())
        return (yield)


# ---- what tests use


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> str:
    """Name of the engine under test."""
    return str(request.config.option.engine)


@pytest.fixture(scope="session")
def fresh(request: pytest.FixtureRequest) -> int | None:
    """The seed of --fresh, None when the goldens are compared with."""
    seed: int | None = request.config.option.fresh
    return seed


@pytest.fixture(scope="session")
def children() -> Iterator[ChildPool]:
    """The processes that engines run in, one at a time: see ChildPool."""
    with ChildPool() as pool:
        yield pool


@pytest.fixture
def judge_case(
    engine: str,
    fresh: int | None,
    children: ChildPool,
    record: Callable[[Result], None],
    request: pytest.FixtureRequest,
) -> Callable[[str, Case, Isa], None]:
    """Runs a case of a family in a child process, records every tensor and fails unless all of them passed."""

    def judge(family: str, case: Case, isa: Isa) -> None:
        big = case.tier != "default"
        child = children.get(isa.env, big=big)
        # what fails here, a golden above all, is no fault of the engine's
        try:
            child.call(case_accuracy.prepare, case=case, fresh=fresh)
        except (OSError, ValueError) as error:
            pytest.fail(f"{case.id} cannot be judged: {error}", pytrace=False)
        try:
            records = child.call(
                case_accuracy.check_case,
                family=family,
                engine=engine,
                case=case,
                isa=isa.name,
                fresh=fresh,
            )
        except Exception as error:
            for lost in case_accuracy.lost(family, engine, case, isa.label, error):
                record(lost)
            request.node.stash[told_key] = error
            raise
        for result in records:
            record(result)
        try:
            case_accuracy.assert_passed(records)
        except (NotPassed, Unsupported) as error:
            request.node.stash[told_key] = error
            raise
        if big:
            # a peak too short to be seen while it lasted
            peak, most = child.call(processes.peak_memory), limits_of(big=True).memory
            text = f"{case.id} took {peak / 2**30:.1f} GiB, it takes at most {most / 2**30:.1f} GiB"
            expect(peak <= most, text, "resources")

    return judge
