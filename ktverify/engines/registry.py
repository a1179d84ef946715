"""Find engines by name.

Input: a name, `package.module:factory` or `path/file.py:factory`; without `:factory`, the one callable of the module
that makes a layer. Output: a callable that takes KTMoEWrapper's keyword arguments (docs/contract.md, "Calls") and
returns a layer.
A new engine is one file: a module or package in this folder, called like the engine, with the constant
`ENGINE = "factory"`, or `ENGINE = "module:factory"` for a module of the package.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktverify.engines.capabilities import Capabilities, declared
from ktverify.isolation import host, sandbox
from ktverify.isolation.hosted import Hosted, absolute
from ktverify.system.files import expand

EngineFactory = Callable[..., Any]

NATIVE = "native"
# what every factory is called with
ARGUMENTS = (
    "layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size", "num_gpu_experts",
    "cpuinfer_threads", "threadpool_count", "weight_path", "chunked_prefill_size", "method", "mode", "lora_rank",
    "lora_alpha",
)  # fmt: skip
OWN = "package.module:factory or path/file.py:factory"  # how an engine outside of the package is named
# of a factory, that say what the engine is and can do
ATTRIBUTES = ("isas", "fp32_sums", "stand_alone", "contract", "capabilities")
_ENGINE = re.compile(r'^ENGINE = "(?:([\w.]+):)?(\w+)"$', re.MULTILINE)


@functools.cache
def built_in(folder: Path = Path(__file__).parent, package: str = "ktverify.engines") -> dict[str, str]:
    """`package.module:factory` of the engines in `folder`, by name, the native one first. Imports none of them."""
    found: dict[str, str] = {}
    for path in (*folder.glob("*.py"), *folder.glob("*/__init__.py")):
        if constant := _ENGINE.search(path.read_text(encoding="utf-8")):
            module, factory = constant.groups()
            name = path.parent.name if path.stem == "__init__" else path.stem
            found[name] = f"{'.'.join(filter(None, (package, name, module)))}:{factory}"
    return {name: found[name] for name in sorted(found, key=lambda name: (name != NATIVE, name))}


def names() -> list[str]:
    """The engines that come with the package."""
    return list(built_in())


def option(name: str) -> str:
    """The option of a printed command for engine `name`: " --engine name", quoted; "" for the native one."""
    return f" --engine {shlex.quote(name)}" if name != NATIVE else ""


def find(name: str) -> EngineFactory:
    """The factory of engine `name`: one of names(), `package.module:factory` or `path/file.py:factory`.

    Without `:factory` it is the only callable of the module that makes a layer; see `_only_factory`.
    ValueError for a name or path that does not exist, or that is no callable, or that needs an interpreter which is not
    there; ImportError, with the cause, for a module that cannot be imported, whatever it raised.
    """
    factory = load(name)
    if isinstance(factory, Hosted):
        factory.check()
    return factory


def load(name: str) -> EngineFactory:
    """As find, without a check of a hosted engine's interpreter."""
    path = built_in().get(name) or absolute(name)
    module_name, _, attribute = path.partition(":")
    if not attribute or not module_name:
        if not module_name or not _is_module(module_name):
            near = difflib.get_close_matches(name, names(), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            place = name.partition(":")[0]
            what = f"there is no file {place!r}" if place.endswith(".py") else f"no engine is called {name!r}"
            raise ValueError(f"{what}; {hint}takes {', '.join(names())}, {OWN}")
        attribute = _only_factory(_module(module_name, name), module_name)
    found: Any = _module(module_name, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"engine {name!r}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"engine {name!r}: {attribute} is {type(found).__name__}, it takes a callable")
    factory: EngineFactory = found
    return factory


def _is_module(place: str) -> bool:
    """Whether there is a file, or an importable module, of that name."""
    if place.endswith(".py"):
        return os.path.isfile(place)
    try:
        return bool(place) and importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):
        # a package around it is not there; importing it says which
        return "." in place and not place.startswith(".")


def _only_factory(module: types.ModuleType, place: str) -> str:
    """The name of the one callable of a module that makes a layer. ValueError where there are none or several.

    It is a class with forward_sft and backward that is no interface, a hosted engine, or a callable, also one of
    functools.partial, that takes KTMoEWrapper's arguments. Those that the module only imports count where it has none
    of its own. __all__ counts where there is one.
    """
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    public = {name: vars(module)[name] for name in names if name in vars(module)}
    fitting: dict[str, Any] = {}
    for name, value in public.items():
        # of two names of one object the first
        if _makes_a_layer(value, module) and not any(value is other for other in fitting.values()):
            fitting[name] = value
    own = [name for name, value in fitting.items() if getattr(value, "__module__", "") == module.__name__]
    own += [name for name, value in fitting.items() if isinstance(value, (Hosted, functools.partial))]
    found = own or list(fitting)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{place}:{name}" for name in found)
        raise ValueError(f"{place} has {len(found)} callables that could make a layer: give one of {listed}")
    callables = [name for name, value in public.items() if getattr(value, "__module__", "") == module.__name__]
    has = f"it has {', '.join(callables)}" if callables else "it defines none"
    raise ValueError(f"{place} has no callable that takes an engine's arguments; {has}: give one as {place}:factory")


def _makes_a_layer(value: Any, module: types.ModuleType) -> bool:
    if isinstance(value, Hosted):
        return True
    if isinstance(value, type):
        interface = inspect.isabstract(value) or getattr(value, "_is_protocol", False)
        return not interface and all(callable(getattr(value, name, None)) for name in ("forward_sft", "backward"))
    # what wraps a function has it, as that of functools.cache; else an object of a class of the file itself
    wraps = isinstance(value, (types.FunctionType, functools.partial)) or hasattr(value, "__wrapped__")
    if not callable(value) or not (wraps or type(value).__module__ == module.__name__):
        return False
    try:
        inspect.signature(value).bind(**dict.fromkeys(ARGUMENTS))
    except TypeError:
        return False
    return True


def _module(place: str, name: str) -> types.ModuleType:
    try:
        found: types.ModuleType = host.module_at(place)
    except SystemExit as error:
        raise ImportError(f"engine {name!r}: {place} ends the program when it is imported: exit {error}") from None
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            cause += _advice(error, place)
        else:
            cause = f"{type(error).__name__}: {cause}"
        raise ImportError(f"engine {name!r} cannot be imported: {cause}{_raised_at(error)}") from error
    return found


def _advice(error: ImportError, place: str) -> str:
    """What to do where a module, a package around it, or a neighbour that a file imports is not found."""
    if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
        return "; put the folder that it lies in into PYTHONPATH, or give the file: path/file.py:factory"
    file = Path(place).resolve()
    if not place.endswith(".py"):
        return ""
    if "no known parent package" in str(error):
        return f"; put {file.parent.parent} into PYTHONPATH and name the module: {file.parent.name}.{file.stem}"
    first = (error.name or "").partition(".")[0]
    beside = first and ((file.parent / f"{first}.py").is_file() or (file.parent / first).is_dir())
    return f"; put {file.parent} into PYTHONPATH" if beside else ""


def _raised_at(error: Exception) -> str:
    """ " (file.py:3)": the innermost line outside of the import system and of this module; "" for none."""
    own = (__file__, host.__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in own and f.filename[0] != "<"]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


@dataclass(frozen=True)
class Facts:
    """What the checks have to know of a factory: its attributes, and the interpreter that its engine needs ("": this).

    isas: the instruction sets that its `isa=` takes; (None,) for an engine that has no choice. capabilities: what else
    it claims and disclaims.
    """

    isas: tuple[str | None, ...] = (None,)
    fp32_sums: bool = False
    stand_alone: str | None = None
    hosted: Hosted | None = None
    capabilities: Capabilities = field(default_factory=Capabilities)


def ours(name: str) -> bool:
    """True for an engine that is a part of this package, which may run in a judge's process."""
    return built_in().get(name, name).startswith("ktverify.")


def facts(name: str) -> Facts:
    """The facts of engine `name`. Raises as `find`; EngineDied where importing it ends its process.

    Code of an engine that is not the package's own runs in another process.
    """
    return _facts(absolute(name))


@functools.cache
def _facts(name: str) -> Facts:
    # to look for a module inside a package would import the package here
    outside = not ours(name) and (":" in name or "." in name or _is_module(name))
    place = ""
    if not outside:
        factory = load(name)
        found = {key: getattr(factory, key, None) for key in ATTRIBUTES}
        found["file"] = getattr(sys.modules.get(getattr(factory, "__module__", "")), "__file__", None)
        hosted = factory if isinstance(factory, Hosted) else None
        if hosted is not None:
            _hide_answers()
    else:
        _hide_answers()
        found = _hosted(name).facts()
        other = found.get("hosted")
        hosted = Hosted(*map(str, other)) if isinstance(other, list) and len(other) == 2 else _hosted(name)
        place = name.partition(":")[0] if name.partition(":")[0].endswith(".py") else ""
    place = place or str(found.get("file") or "")
    folder = Path(place).parent if place else None
    said = declared(name, found, folder)
    script = found.get("stand_alone")
    return Facts(
        said.isas or (None,), bool(said.fp32_sums), None if script is None else expand(str(script)), hosted, said
    )


def _hide_answers() -> None:
    """Engines' processes that are started from now on cannot open the stored answers; see isolation/sandbox.py.

    They may write them: so the judge remembers what they are.
    """
    # it imports torch
    from ktverify.judge import golden

    stored = os.path.abspath(golden.golden_dir())
    golden.remember_manifest(Path(stored))
    sandbox.hidden[:] = [stored, os.path.abspath(golden.cache_dir()), *sandbox.committed(stored)]


def _hosted(name: str) -> Hosted:
    return Hosted(name, loader=f"{__name__}:find")


def judged(name: str, *, ask_disclaimed: bool = False) -> EngineFactory:
    """The factory that checks call: the engine's own for one of this package, else layers in another process.

    What the engine disclaims raises NotImplementedError without a call, unless ask_disclaimed. Those of this package
    are called all the same: they raise it themselves.
    """
    found = facts(name)
    make: EngineFactory = find(name) if found.hosted is None else found.hosted
    if found.hosted is not None:
        found.hosted.check()
    if ask_disclaimed or ours(name) or not found.capabilities.all_claims():
        return make
    return functools.partial(_unless_disclaimed, make, found.capabilities)


def _unless_disclaimed(make: EngineFactory, capabilities: Capabilities, **arguments: Any) -> Any:
    if reason := capabilities.disclaimed(arguments):
        raise NotImplementedError(reason)
    return make(**arguments)


def strict(engine: str | EngineFactory) -> bool:
    """True for an engine, by name or factory, that must keep the limits of fp32 sums with one rounding.

    They are the project's own and those with `fp32_sums = True`. Others need only be as accurate as torch in bf16.
    """
    if isinstance(engine, str):
        return engine == NATIVE or facts(engine).fp32_sums
    return bool(getattr(engine, "fp32_sums", False))
