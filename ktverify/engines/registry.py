"""Engines under test, found by name.

Comes in: a name, `package.module:factory` or `path/file.py:factory`. Goes out: a callable that takes KTMoEWrapper's
keyword arguments (docs/contract.md, "Calls") and returns a layer. A new engine is one file here and one line in
`_BUILT_IN`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import traceback
from collections.abc import Callable
from typing import Any

from ktverify.isolation import host
from ktverify.isolation.hosted import Hosted

EngineFactory = Callable[..., Any]

NATIVE = "native"
OWN = "package.module:factory or path/file.py:factory"  # how somebody's own engine is named
_BUILT_IN: dict[str, str] = {
    NATIVE: "ktverify.experts:KTMoEWrapper",
    "torch_bf16": "ktverify.engines.torch_bf16:TorchBf16",
    "torch_grouped_mm": "ktverify.engines.torch_grouped_mm:TorchGroupedMm",
    "kt_kernel": "ktverify.engines.kt_kernel.locate:KtKernel",
}


def names() -> list[str]:
    """The engines that come with the package."""
    return list(_BUILT_IN)


def absolute(name: str, folder: str | os.PathLike[str] = "") -> str:
    """`name` with its file, if it names one, by its whole path: not every process is in the user's directory.

    folder: what a relative path starts from; the current directory if "".
    """
    place, colon, attribute = name.partition(":")
    return f"{os.path.abspath(os.path.join(folder, place))}:{attribute}" if colon and place.endswith(".py") else name


def option(name: str) -> str:
    """What a command that is printed needs for engine `name`: " --engine name", quoted, "" for the native one."""
    return f" --engine {shlex.quote(name)}" if name != NATIVE else ""


def find(name: str) -> EngineFactory:
    """The factory of engine `name`: one of names(), `package.module:factory` or `path/file.py:factory`.

    ValueError for a name or path that leads nowhere, to something that cannot be called, or to another interpreter that
    is not there; ImportError, with the cause, for a module that cannot be imported, whatever it raised.
    """
    factory = load(name)
    if isinstance(factory, Hosted):
        factory.check()
    return factory


def load(name: str) -> EngineFactory:
    """As find, without asking whether the interpreter of a hosted engine is there."""
    path = _BUILT_IN.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        near = difflib.get_close_matches(name, _BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no engine is called {name!r}; {hint}takes {', '.join(_BUILT_IN)}, {OWN}")
    found = _module(module_name, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"engine {name!r}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"engine {name!r}: {attribute} is {type(found).__name__}, it takes a callable")
    factory: EngineFactory = found
    return factory


def _module(place: str, name: str) -> Any:
    try:
        return host.module_at(place)
    except SystemExit as error:
        raise ImportError(f"engine {name!r}: {place} ends the program when it is imported: exit {error}") from None
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        # where nothing of its own has run yet, it was not found
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            cause += "; put the folder that it lies in into PYTHONPATH, or give the file: path/file.py:factory"
        elif not isinstance(error, ImportError):
            cause = f"{type(error).__name__}: {cause}"
        raise ImportError(f"engine {name!r} cannot be imported: {cause}{_raised_at(error)}") from error


def _raised_at(error: Exception) -> str:
    """ " (file.py:3)": the innermost line that is neither the import's own nor the call of it; "" for none."""
    own = (__file__, host.__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in own and f.filename[0] != "<"]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def strict(engine: str | EngineFactory) -> bool:
    """True for an engine that is held to what fp32 sums and one rounding leave: the project's own, and any whose
    factory says `fp32_sums = True`. Others need only be as good as plain torch in bf16.

    engine: a name, or the factory itself.
    """
    if engine == NATIVE:
        return True
    return bool(getattr(find(engine) if isinstance(engine, str) else engine, "fp32_sums", False))
