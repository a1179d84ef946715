"""A case on disk: `case.safetensors`, and the folder of a reproducer, which has `run.py` of the engine beside it.

The file contains `inputs.*`, the fp64 oracle's answers as `expected.*`, and what an engine gave as `actual.*`; its
metadata has the case's id. An engine's factory names its script by an attribute, `stand_alone = "/path/run.py"`. The
script reads the file beside it, makes one forward and backward, and saves the results as `actual.safetensors`, by the
names of spec.names.ALL_TENSORS. What else it prints is for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ktverify.checks.problem import LiveOracle, Result
from ktverify.checks.repro_commands import isa_name
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.calls import IMPORT, call_of
from ktverify.judge.gates import judge
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import ALL_TENSORS, BASE_NAMES
from ktverify.system.files import write_whole
from ktverify.system.limits import processors

SCRIPT = "run.py"
CASE_FILE = "case.safetensors"
ACTUAL_FILE = "actual.safetensors"
_TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")


def script_of(engine: str) -> Path:
    """The script that an engine brings. ValueError where it brings none."""
    with call_of(IMPORT):
        path = registry.facts(engine).stand_alone
    if path is None:
        raise ValueError(
            f"engine {engine!r} has no stand-alone script; it takes the attribute stand_alone of its factory, "
            "the path of one"
        )
    if not Path(path).is_file():
        raise ValueError(f"engine {engine!r}: stand_alone is {str(path)!r}, which is no file")
    return Path(path)


def save_case(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], inputs: Inputs, **about: str) -> int:
    """Write a case file: `tensors` and the inputs other than base weights. Returns how many tensors it has."""
    from safetensors.torch import save

    found = {f"inputs.{name}": getattr(inputs, name) for name in _TOKENS}
    found |= {f"inputs.{name}": tensor for name, tensor in inputs.lora.items()} | dict(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in found.items()}
    write_whole(path, save(contiguous, metadata={"case": inputs.case.id, **about}))
    return len(found)


def dump(result: Result, path: str | os.PathLike[str]) -> int:
    """Write the case file of a result, with `actual.*`. Returns how many tensors it has.

    Base weights by slot, of the active experts only, as `inputs.gate_proj.<expert>`: all may be gigabytes.
    """
    inputs = result.problem.inputs
    tensors = {"inputs.physical_map": inputs.physical_map}
    for name in BASE_NAMES:
        tensors |= {f"inputs.{name}.{expert}": getattr(inputs, name)[expert] for expert in inputs.active}
    oracle = _oracle_of(result)
    for name, tensor in result.actual.items():
        tensors |= {f"actual.{name}": tensor, f"expected.{name}": oracle.tensors[name]}
    return save_case(path, tensors, inputs)


def write(
    inputs: Inputs,
    oracle: LiveOracle,
    target: Target,
    directory: str | os.PathLike[str],
    suite: Mapping[str, float] | None = None,
) -> Path:
    """Write the folder of a reproducer, each file whole. Returns the script in it. FileExistsError for a folder with a
    script of that name and no case.

    suite: rel_l2 by tensor as the suite found them, for the script to print beside its own.
    """
    script = script_of(target.engine)
    case, folder = inputs.case, Path(directory)
    if (folder / SCRIPT).exists() and not (folder / CASE_FILE).exists():
        raise FileExistsError(f"{folder / SCRIPT} is there already, and belongs to no reproducer: name another folder")
    tensors = {f"inputs.{name}": getattr(inputs, name) for name in BASE_NAMES}
    tensors |= {f"expected.{name}": oracle.tensors[name] for name in ALL_TENSORS}
    sizes = {"E": case.num_experts, "k": case.top_k, "H": case.hidden, "I": case.intermediate, "T": case.qlen}
    sizes |= {"r": case.rank, "tp": target.tp, "threads": target.threads or processors()}
    save_case(
        folder / CASE_FILE,
        tensors,
        inputs,
        sizes=json.dumps({**sizes, "alpha": case.alpha, "isa": isa_name(target.label)}),
        budgets=json.dumps(_budgets(inputs, oracle)),
        suite=json.dumps(dict(suite or {})),
    )
    return write_whole(folder / SCRIPT, script.read_text(encoding="utf-8"))


def write_result(result: Result, target: Target, directory: str | os.PathLike[str]) -> Path:
    """`write` for a case that was judged here."""
    suite = {record.tensor: record.rel_l2 for record in result.records if record.gates}
    return write(result.problem.inputs, _oracle_of(result), target, directory, suite)


def _oracle_of(result: Result) -> LiveOracle:
    """The fp64 answers, computed here if the comparison was with a golden."""
    expected = result.problem.expected
    return expected if isinstance(expected, LiveOracle) else LiveOracle.of(result.problem.inputs)


def _budgets(inputs: Inputs, oracle: LiveOracle) -> dict[str, float]:
    """The suite's budgets of rel_l2, by tensor, for the right answer rounded once; a tensor without one is exact."""
    found: dict[str, float] = {}
    for name in ALL_TENSORS:
        right = oracle.compare(name, oracle.tensors[name].to(torch.bfloat16))
        gates = judge(inputs.case, name, right, oracle.rounding[name]).gates
        found.update((name, gate.budget) for gate in gates if gate.gate == "rel_l2")
    return found
