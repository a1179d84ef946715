"""Read an adapter by vllm's own loader, without vllm's requirements: PACKAGE ADAPTER EXPECTED-MODULES, to JSON.

PACKAGE is an unpacked vllm. Of it, the modules that read adapters run; all others that they import are stand-ins.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# of lora/utils.py, which imports all layers of vllm, the functions that read names
_FUNCTIONS = {"parse_fine_tuned_lora_name", "is_base_embedding_weights"}


def main(package: Path, adapter: str, expected: set[str]) -> None:
    sys.meta_path.insert(0, _StandIns())
    utils = ModuleType("vllm.lora.utils")
    tree = ast.parse((package / "lora" / "utils.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in _FUNCTIONS]
    exec(compile(tree, "utils.py", "exec"), vars(utils))
    vars(utils)["get_lora_id"] = lambda: 1
    sys.modules[utils.__name__] = utils
    for name in ("lora_weights", "peft_helper", "lora_model"):
        _load(f"vllm.lora.{name}", package / "lora" / f"{name}.py")
    helper_kind: Any = sys.modules["vllm.lora.peft_helper"]
    helper = helper_kind.PEFTHelper.from_dict(json.loads((Path(adapter) / "adapter_config.json").read_text()))
    if wrong := helper._validate_features():
        sys.exit(f"vllm refuses the configuration: {wrong}")
    kind: Any = sys.modules["vllm.lora.lora_model"]
    model = kind.LoRAModel.from_local_checkpoint(adapter, expected, helper, lora_model_id=1, device="cpu")
    modules = {name: [list(lora.lora_a.shape), list(lora.lora_b.shape)] for name, lora in model.loras.items()}
    scalings = {lora.scaling for lora in model.loras.values()}
    (scaling,) = scalings
    print(json.dumps({"rank": model.rank, "scaling": scaling, "modules": modules}))


class _StandIns:
    """Finds every module of vllm that was not loaded from its file."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        return importlib.util.spec_from_loader(name, self, is_package=True) if name.split(".")[0] == "vllm" else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        module.__spec__ = spec
        module.PIN_MEMORY = False
        return module

    def exec_module(self, module: Any) -> None:
        pass


def _load(name: str, file: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], set(json.loads(sys.argv[3])))
