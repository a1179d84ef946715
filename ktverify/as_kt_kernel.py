"""Make kt-kernel's names importable in this process, with this engine behind them.

`import ktverify.as_kt_kernel` in front of a script, `python -m ktverify run --as-kt-kernel SCRIPT`, or
`pytest -p ktverify.as_kt_kernel`. Then these work: `from kt_kernel.experts import KTMoEWrapper`,
`from kt_kernel import kt_kernel_ext`, `from llamafactory.model.model_utils.kt_moe import MOELayerWrapper`, and, where
LLaMA-Factory is installed, its get_train_args takes the engine's keys. docs/from-kt-kernel.md has a table.

ImportError where kt-kernel, or a LLaMA-Factory with a kt_moe of its own, is installed: neither is ever hidden.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ktverify.engines.native import layer
from ktverify.system.files import document
from ktverify.system.machine import package_version
from ktverify.training import infer
from ktverify.training import layer as training

_PARENTS = ("llamafactory", "llamafactory.model", "llamafactory.model.model_utils")
_KT_MOE = f"{_PARENTS[-1]}.kt_moe"
_IS_OURS = "__ktverify__"
# names of modules -> the names in them
NAMES: dict[str, dict[str, Any]] = {
    "kt_kernel": {"KTMoEWrapper": layer.KTMoEWrapper},
    "kt_kernel.experts": {"KTMoEWrapper": layer.KTMoEWrapper},
    "kt_kernel.kt_kernel_ext": {},
    _KT_MOE: {
        "MOELayerWrapper": training.MOELayerWrapper,
        "MOEAMXFunction": training.MOEAMXFunction,
        "init_cpu_infer": infer.init_cpu_infer,
    },
}


def install() -> None:
    """Put the modules into sys.modules; a second call does nothing. ImportError: see above."""
    if hasattr(sys.modules.get("kt_kernel"), _IS_OURS):
        return
    _refuse_installed()
    if importlib.util.find_spec("llamafactory") is not None:
        from ktverify.llamafactory import stock

        stock.connect()
    else:
        for name in _PARENTS:
            _add(name, {}, package=True)
    for name, members in NAMES.items():
        _add(name, members, package=name == "kt_kernel")


def _refuse_installed() -> None:
    """ImportError where a name belongs to a package that is installed."""
    if "kt_kernel" in sys.modules or importlib.util.find_spec("kt_kernel") is not None:
        name = " ".join(filter(None, ["kt-kernel", package_version("kt-kernel")]))
        raise ImportError(
            f"{name} is installed for {sys.executable}: scripts use it as they are; to run them on this "
            "engine, use an environment without it"
        )
    found = importlib.util.find_spec("llamafactory")
    for folder in (found.submodule_search_locations or ()) if found else ():
        own = Path(folder, *_KT_MOE.split(".")[1:]).with_suffix(".py")
        if own.exists():
            raise ImportError(
                f"this LLaMA-Factory has a kt_moe of its own, {own}: use an environment with the stock one "
                f"({document('llamafactory')})"
            )


def _add(name: str, members: dict[str, Any], *, package: bool = False) -> None:
    module = ModuleType(name, f"{name} as ktverify offers it: docs/from-kt-kernel.md")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
    if package:
        module.__path__ = []
    module.__dict__.update(members, **{_IS_OURS: True, "__getattr__": _missing(name)})
    parent, _, last = name.rpartition(".")
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], last, module)


def _missing(module: str) -> Any:
    def get(name: str) -> Any:
        has = ", ".join(NAMES.get(module, {})) or "nothing but its presence"
        raise AttributeError(f"{module}.{name} is not offered; ktverify has {has} ({document('from-kt-kernel')})")

    return get


install()
