"""The command `doctor`: examine the machine, the installed packages and the native module."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from ktverify.isolation import sandbox
from ktverify.system import limits, machine, optional_peers
from ktverify.system.files import GOLDENS, ROOT, RUN_SUITES, install_command, pip_install
from ktverify.system.instruction_sets import ISA_FLAGS
from ktverify.system.limits import format_bytes
from ktverify.system.machine import EMULATION_VARIABLE, Machine

State = Literal["ok", "no", "note"]

MINIMUM_GCC = 12
# declared size of deepseek_v3_t4's base weights, most of it never touched, and the memory that the process then takes
DEEPSEEK_VIRTUAL = 256 * 3 * 7168 * 2048 * 2
DEEPSEEK_RESIDENT = 12 << 30
DEFAULT_TIER = 3 << 30


def doctor() -> None:
    """What will run on this machine, what won't, and why.

    \b
    ok    runs
    no    will not run; the line says what is missing
    note  runs, but is worth knowing

    Exit code 1 if the suites cannot run on the native engine at all.

    \b
    Example:  python -m ktverify doctor
    """
    from rich.text import Text

    from ktverify.report.console import make_console

    console = make_console()
    styles = {"ok": "green", "no": "bold red", "note": "yellow"}
    stopped = False
    for line in examine():
        console.print(
            Text.assemble((line.state.ljust(6), styles[line.state]), (line.name.ljust(16), "bold"), line.text)
        )
        stopped = stopped or (line.needed and line.state == "no")
    if stopped:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Fact:
    """One line of the output. `needed`: without it the suites do not run on the native engine at all."""

    state: State
    name: str
    text: str
    needed: bool = False


def examine(here: Machine | None = None) -> Iterator[Fact]:
    """All facts, one after another, so that a slow one does not delay the others."""
    here = here or machine.read_machine()
    for look in (_system, _amx, _isas, _compiler, _packages, _native, _extras, _memory, _threads, _suites):
        yield from look(here)


def _system(here: Machine) -> Iterator[Fact]:
    yield Fact("ok", "CPU", f"{here.cpu} ({here.architecture})")
    linux = sys.platform == "linux"
    text = here.system if linux else f"{here.system}: the native engine needs Linux; engines in plain torch run"
    yield Fact("ok" if linux else "no", "system", text, needed=True)
    if version := sandbox.landlock():
        yield Fact("ok", "Landlock", f"version {version}: an engine of yours cannot read golden/ or a judge's memory")
    else:
        yield Fact("note", "Landlock", "the kernel has none: an engine of yours could read golden/ while it is judged")


def _isas(here: Machine) -> Iterator[Fact]:
    for isa, flags in ISA_FLAGS.items():
        if isa in here.isas and isa != "amx_bf16":
            yield Fact("ok", isa, "kernels run" if flags else "portable kernels run on every CPU")
        elif isa != "amx_bf16":
            yield Fact("no", isa, f"this CPU lacks {', '.join(flag for flag in flags if flag not in here.flags)}")


def _amx(here: Machine) -> Iterator[Fact]:
    amx = here.amx
    if amx.usable and "amx_bf16" in here.isas:
        held = "already granted" if amx.permitted else "granted when the engine first asks"
        yield Fact("ok", "amx_bf16", f"the CPU has it and the kernel permits it ({held})")
        return
    if amx.cpu and not amx.kernel:
        why = "the CPU has it, but the kernel does not offer the tile state: Linux 5.16 or newer is needed"
    elif amx.cpu:
        why = f"the CPU has tiles but lacks {', '.join(f for f in ISA_FLAGS['amx_bf16'] if f not in here.flags)}"
    else:
        why = "this CPU has no AMX (no amx_tile, amx_bf16 in its flags); Intel Sapphire Rapids and later have"
    yield Fact("no", "amx_bf16", why)
    if amx.emulated:
        yield Fact("note", "", f"{EMULATION_VARIABLE}=1 is set: tile instructions are emulated, right but very slow")
    elif hint := machine.emulation_hint(here.isas):
        yield Fact("note", "", hint)


def _compiler(here: Machine) -> Iterator[Fact]:
    line = here.versions.get("compiler", "")
    if not line:
        yield Fact("no", "compiler", f"none found; the native engine is built with g++ {MINIMUM_GCC} or newer")
        return
    found = re.search(r"(\d+)\.\d+(\.\d+)?\s*$", line) or re.search(r"\s(\d+)\.\d+", line)
    old = "clang" not in line and found is not None and int(found.group(1)) < MINIMUM_GCC
    yield Fact("no" if old else "ok", "compiler", f"{line}; g++ {MINIMUM_GCC} or newer is needed" if old else line)


def _packages(_: Machine) -> Iterator[Fact]:
    """The packages that ktverify declares: only pyproject.toml lists them."""
    found: list[str] = []
    missing: list[str] = []
    for name in _declared() or _declared_in_checkout():
        version = machine.package_version(name)
        (found if version else missing).append(f"{name} {version}".strip())
    if missing:
        what = f"missing: {', '.join(missing)}; `{pip_install(' '.join(missing))}`"
        yield Fact("no", "packages", what, needed=True)
    if found:
        yield Fact("ok", "packages", ", ".join(found))


def _declared(extra: str = "") -> list[str]:
    """The packages that ktverify needs, or those of one extra; none where ktverify is not installed."""
    try:
        declared = importlib.metadata.requires("ktverify") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = []
    for requirement in declared:
        of = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if (of.group(1) if of else "") == extra:
            names += _names([requirement])
    return names


def _names(requirements: Iterable[str]) -> list[str]:
    wanted = [text for text in requirements if "python_version" not in text or sys.version_info < (3, 11)]
    return [found.group() for found in (re.match(r"[A-Za-z0-9._-]+", text) for text in wanted) if found]


def _declared_in_checkout() -> list[str]:
    pyproject = ROOT / "pyproject.toml"
    if not pyproject.is_file():
        return []
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return _names(re.findall(r'"([^"]+)"', block.group(1))) if block else []


def _extras(_: Machine) -> Iterator[Fact]:
    """What some commands need in addition, and how to get it."""
    runs = "train, make-tiny, verify-training and bench c2c"
    missing = [name for name in _declared("training") if not machine.package_version(name)]
    how = f"{runs} need {', '.join(missing)}: `{install_command('training')}`"
    yield Fact("note", "training", how) if missing else Fact("ok", "training", f"{runs} run")
    for need in optional_peers.INSTALLED:
        try:
            path, why = optional_peers.find(need, {})
        except ValueError as error:
            path, why = None, str(error)
        name = "peers of bench" if need == optional_peers.INSTALLED[0] else ""
        what = optional_peers.LOCATIONS[need].what
        yield Fact("ok", name, f"{what}: {path}") if path else Fact("note", name, f"{what}: {why.partition(',')[0]}")


def _native(here: Machine) -> Iterator[Fact]:
    if importlib.util.find_spec("ktverify._native") is None:
        yield Fact("no", "native engine", "not built; `pip install .` builds it", needed=True)
        return
    try:
        from ktverify.engines.native.isa import available_isas

        isas = available_isas()
    # any error that stops the import also stops every run, so the user must see it
    except Exception as error:
        yield Fact("no", "native engine", f"built, but does not load: {error}", needed=True)
        return
    yield Fact("ok", "native engine", f"loads and runs {', '.join(isas)}", needed=True)
    for isa in here.isas:
        if isa not in isas:
            yield Fact("no", "", f"it leaves out {isa}, although this CPU has it")


def _memory(here: Machine) -> Iterator[Fact]:
    limited = here.memory_bytes < here.memory_total_bytes
    free = here.memory_available_bytes
    text = f"{format_bytes(here.memory_bytes)}{' by the control group' if limited else ''}, {format_bytes(free)} free"
    if free >= DEFAULT_TIER:
        yield Fact("ok", "memory", text)
    else:
        yield Fact("no", "memory", f"{text}; the default cases need about {format_bytes(DEFAULT_TIER)}")
    yield _deepseek(free)
    pages = here.huge_pages
    if pages in ("always", "madvise"):
        yield Fact("ok", "huge pages", f"transparent huge pages are on ({pages})")
    else:
        state = pages or "not offered by this kernel"
        yield Fact("note", "huge pages", f"transparent huge pages: {state}; everything runs, large shapes more slowly")


def _deepseek(free: int) -> Fact:
    name = "deepseek_v3_t4"
    need = format_bytes(DEEPSEEK_RESIDENT)
    if free < DEEPSEEK_RESIDENT:
        return Fact(
            "no", name, f"needs {need} of memory, {format_bytes(free)} are free; leave it out with --tier default"
        )
    declared = format_bytes(DEEPSEEK_VIRTUAL)
    if limits.read_text(Path("/proc/sys/vm/overcommit_memory")).strip() == "2":
        return Fact("no", name, f"reserves {declared} and touches a part of it; vm.overcommit_memory=2 forbids that")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < DEEPSEEK_VIRTUAL + DEEPSEEK_RESIDENT:
        return Fact("no", name, f"reserves {declared} of address space; `ulimit -v` allows {format_bytes(limit)}")
    return Fact("ok", name, f"fits: all 256 experts declared ({declared} reserved), at most {need} used")


def _threads(here: Machine) -> Iterator[Fact]:
    if here.cpu_quota and here.cpu_quota < limits.affinity():
        text = f"a control group's quota gives this process the time of {here.cpu_quota:g} of {here.cpus_online} CPUs"
        yield Fact("note", "threads", f"{text}; at most {here.threads} of its threads compute at a time")
    elif here.threads < here.cpus_online:
        yield Fact("note", "threads", f"this process may use {here.threads} of {here.cpus_online} CPUs (affinity)")
    else:
        yield Fact("ok", "threads", f"{here.threads} CPUs")
    listing = "; ".join(f"node {n.node}: CPUs {n.cpus}, {format_bytes(n.memory_bytes)}" for n in here.numa)
    if len(here.numa) > 1:
        yield Fact("ok", "NUMA", f"{listing}: tensor-parallel parts are spread over the nodes")
        yield from _refused_placement()
    else:
        yield Fact("note", "NUMA", f"{listing or 'no nodes reported'}: tensor-parallel parts share one node")


def _refused_placement() -> Iterator[Fact]:
    if importlib.util.find_spec("ktverify._native") is None:
        return
    from ktverify import _native

    if refused := _native.refused_placement():
        text = f"the kernel refuses {refused}: memory is on the node of the worker that writes it first"
        yield Fact("note", "NUMA", text)


def _suites(_: Machine) -> Iterator[Fact]:
    missing = [name for name in _declared("suite") if not machine.package_version(name)]
    how = f"they need {', '.join(missing)}: `{install_command('suite')}`"
    yield Fact("note", "suites", how) if missing else Fact("ok", "suites", f"{RUN_SUITES} runs them")
    if (GOLDENS / "manifest.json").is_file():
        yield Fact("ok", "goldens", os.path.relpath(GOLDENS))
    else:
        yield Fact("note", "goldens", "none; `python -m ktverify.golden regenerate` makes them, --fresh does without")
