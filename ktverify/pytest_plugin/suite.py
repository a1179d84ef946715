"""What a run of the suites needs besides options: fixtures, and which tests run beside each other.

A family is a folder of the suites. Its tests get an xdist group of their own (one per instruction set where a family
covers several), computing tests share a lock that timing tests take alone, and every run leaves its records in a run
directory. Tests elsewhere may use the fixtures; they leave no records.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch

from ktverify.checks import isas
from ktverify.checks.registry import PRELOAD
from ktverify.engines import registry
from ktverify.isolation import hosted, locks
from ktverify.isolation.child import BIG, DEFAULT, ChildPool
from ktverify.pytest_plugin.ask import Ask
from ktverify.pytest_plugin.options import AUTO, judges_an_engine
from ktverify.pytest_plugin.recording import Recording, about_key, is_worker, own_records_key, recorded_key
from ktverify.pytest_plugin.selection import (
    ACCURACY_FAMILIES,
    accuracy_parameters,
    family_of,
    group_of,
    urgency,
)
from ktverify.runs.record import AnyRecord
from ktverify.spec.cases import Case
from ktverify.system import limits
from ktverify.system.files import search_in

_FRESH = "ktverify_fresh"
recording_key = pytest.StashKey[Recording]()


def pytest_configure(config: pytest.Config) -> None:
    # the processes that compute start beside the package, wherever this one did
    search_in(config.invocation_params.dir)
    config.option.engine = hosted.absolute(config.option.engine, config.invocation_params.dir)
    if path := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in path.split(os.pathsep))
    if config.option.fresh == AUTO:
        # the controller's, so that all workers draw the same
        config.option.fresh = config.workerinput[_FRESH] if is_worker(config) else secrets.randbelow(1 << 31)  # type: ignore[attr-defined]
    limits.limit_libraries()
    if is_worker(config):
        # workers share the processors; torch's own threads, here and in processes that tests start, would spin for
        # one that another worker has
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    if judges_an_engine(config):
        config.stash[recording_key] = Recording(config)
        config.pluginmanager.register(config.stash[recording_key])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput[_FRESH] = node.config.option.fresh


def pytest_report_header(config: pytest.Config) -> str:
    return f"new inputs: --fresh {config.option.fresh}" if config.option.fresh is not None else ""


# ---- which tests there are, and which run beside each other


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "claim" in names and family_of(metafunc.definition):
        claims = registry.facts(metafunc.config.option.engine).capabilities.all_claims()
        # an engine that declares nothing has one test, which is skipped
        metafunc.parametrize("claim", claims or [None], ids=lambda claim: str(claim).replace(" ", "-"))
    if "isa" not in names or any("isa" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return
    family = family_of(metafunc.definition)
    if family in ACCURACY_FAMILIES:
        metafunc.parametrize("check,isa", list(accuracy_parameters(metafunc.config, family)))
    else:
        planned = isas.planned(metafunc.config.option.engine, metafunc.config.option.isa)
        metafunc.parametrize("isa", planned, ids=[isa.id for isa in planned], scope="session")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole groups to a worker, in the order in which they were collected.

    xdist's own loadgroup writes the group into an attribute that pytest 9.2 no longer reads, so it groups nothing.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    # by default the groups with the most tests come first; here the longest have few
    config.option.loadscopereorder = False
    return ByGroup(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=urgency)
    # the process that was asked for the engine's instruction sets
    hosted.end_all()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    # a third of the time of the imports would go into looking for garbage, which they do not make
    gc.disable()
    try:
        return (yield)
    finally:
        # nor need later collections look through the million objects of pytest and torch
        gc.enable()
        gc.collect()
        gc.freeze()


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
def fresh(request: pytest.FixtureRequest) -> int | None:
    """The seed of --fresh, None when the goldens are compared with."""
    seed: int | None = request.config.option.fresh
    return seed


@pytest.fixture(scope="session")
def children(pytestconfig: pytest.Config) -> Iterator[ChildPool]:
    """The processes that engines run in, one at a time: see ChildPool."""
    limits = (pytestconfig.option.time_limit, pytestconfig.option.memory_limit)
    hosts = not registry.ours(pytestconfig.option.engine)
    with ChildPool(DEFAULT.but(*limits), BIG.but(*limits), PRELOAD, hosts=hosts) as pool:
        yield pool


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[AnyRecord], None]:
    """Add a record to the run; a test that calls it gets no check record besides."""

    def add(result: AnyRecord) -> None:
        request.node.stash[own_records_key] = True
        request.config.stash[recording_key].add(result)

    return add


@pytest.fixture
def about(request: pytest.FixtureRequest) -> Callable[[Case | None, int], None]:
    """Note for the record of which case's forward and backward, at which TP degree, the test is about to judge."""

    def note(case: Case | None, tp: int = 1) -> None:
        request.node.stash[about_key] = (case, tp)

    return note


@pytest.fixture
def ask(
    request: pytest.FixtureRequest,
    engine: str,
    fresh: int | None,
    children: ChildPool,
    about: Callable[[Case | None, int], None],
    record: Callable[[AnyRecord], None],
) -> Ask:
    """Runs checks of the registry on the engine of this run: see Ask."""

    def recorded(error: BaseException) -> None:
        request.node.stash[recorded_key] = error

    return Ask(engine, request.config.option.isa, fresh, children, about, record, recorded)
