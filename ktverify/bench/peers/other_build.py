"""Another build of the native engine, behind today's Python: whether a change to the C++ gained what it should.

Not among the peers of a plain run; docs/engine.md shows how to ask for it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING

from ktverify.bench.peers import native

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "other build"
HELD, LAZY, BACKWARD, LORA = native.HELD, native.LAZY, native.BACKWARD, native.LORA
NEEDS = "other_build"


def load(problem: BenchInputs) -> native.Native:
    name = "ktverify._native"
    if name in sys.modules:
        raise RuntimeError("other_build: the usual build is loaded already")
    loader = importlib.machinery.ExtensionFileLoader(name, problem.options[NEEDS])
    spec = importlib.machinery.ModuleSpec(name, loader, origin=problem.options[NEEDS])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[name])
    engine = native.Native(problem)
    engine.about["build"] = problem.options[NEEDS]
    return engine
