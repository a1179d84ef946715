"""Another build of the native engine, called by today's Python: whether a change to the C++ gained what it should.

A run without --peers leaves it out; docs/engine.md shows how to ask for it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from ktverify.bench.peers import native

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "other build"
PACKAGE, HELD, LAZY, BACKWARD, LORA = native.PACKAGE, native.HELD, native.LAZY, native.BACKWARD, native.LORA
NEEDS = "other_build"


def load(inputs: BenchInputs) -> Any:
    name = "ktverify._native"
    if name in sys.modules:
        raise RuntimeError("other_build: the usual build is loaded already")
    loader = importlib.machinery.ExtensionFileLoader(name, inputs.options[NEEDS])
    spec = importlib.machinery.ModuleSpec(name, loader, origin=inputs.options[NEEDS])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[name])
    inputs.about["build"] = inputs.options[NEEDS]
    return native.load(inputs)
