"""The folder: `case.safetensors` with inputs and expected values, and `run.py`, which the engine brings.

Comes in: a case, its inputs, the fp64 oracle's answers and the engine's name. An engine's factory names its script by
an attribute, `stand_alone = "/path/run.py"`. The script reads the file beside it, makes one forward and backward, and
saves what it got as `actual.safetensors`, by ktverify.names.ALL_TENSORS; what else it prints is for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
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

SCRIPT = "run.py"
CASE_FILE = "case.safetensors"
ACTUAL_FILE = "actual.safetensors"
_TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")


@dataclass(frozen=True)
class Setting:
    """How a case is run: tensor-parallel degree, threads (0: all that this process may use), what isa= gets ("": none);
    suite: what the suite found, rel_l2 by tensor, to be printed beside the script's own.
    """

    tp: int = 1
    threads: int = 0
    isa: str = ""
    suite: Mapping[str, float] = field(default_factory=dict)


def script_of(engine: str) -> Path:
    """The script that an engine brings. ValueError where it brings none."""
    with call_of(IMPORT):
        path = getattr(registry.load(engine), "stand_alone", None)
    if path is None:
        raise ValueError(
            f"engine {engine!r} has no stand-alone script; it takes the attribute stand_alone of its factory, "
            "the path of one"
        )
    if not Path(path).is_file():
        raise ValueError(f"engine {engine!r}: stand_alone is {str(path)!r}, which is no file")
    return Path(path)


def write(inputs: Inputs, oracle: LiveOracle, script: Path, directory: str | os.PathLike[str], how: Setting) -> Path:
    """Write the folder, each file whole; returns the script in it. Weights in the experts' order, fp64 answers."""
    from safetensors.torch import save

    case = inputs.case
    tensors = {f"inputs.{name}": getattr(inputs, name) for name in (*_TOKENS, *BASE_NAMES)}
    tensors |= {f"inputs.{name}": tensor for name, tensor in inputs.lora.items()}
    tensors |= {f"expected.{name}": oracle.tensors[name] for name in ALL_TENSORS}
    sizes = {"E": case.num_experts, "k": case.top_k, "H": case.hidden, "I": case.intermediate, "T": case.qlen}
    sizes |= {"r": case.rank, "tp": how.tp, "threads": how.threads or len(os.sched_getaffinity(0))}
    metadata = {
        "case": case.id,
        "sizes": json.dumps({**sizes, "alpha": case.alpha, "isa": how.isa}),
        "budgets": json.dumps(_budgets(inputs, oracle)),
        "suite": json.dumps(dict(how.suite)),
    }
    target = Path(directory)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    write_whole(target / CASE_FILE, data)
    return write_whole(target / SCRIPT, script.read_text(encoding="utf-8"))


def write_result(result: Result, target: Target, directory: str | os.PathLike[str]) -> Path:
    """write for a case that was judged here."""
    problem = result.problem
    oracle = problem.expected if isinstance(problem.expected, LiveOracle) else LiveOracle.of(problem.inputs)
    suite = {record.tensor: record.rel_l2 for record in result.records if record.gates}
    how = Setting(target.tp, target.threads or 0, isa_name(target.label), suite)
    return write(problem.inputs, oracle, script_of(target.engine), directory, how)


def _budgets(inputs: Inputs, oracle: LiveOracle) -> dict[str, float]:
    """rel_l2 that the suite allows, by tensor; a tensor without such a gate has to be exact.

    They are those of the right answer itself, rounded once: no engine need have run.
    """
    found: dict[str, float] = {}
    for name in ALL_TENSORS:
        right = oracle.compare(name, oracle.tensors[name].to(torch.bfloat16))
        gates = judge(inputs.case, name, right, oracle.peer[name]).gates
        found.update((name, gate.budget) for gate in gates if gate.gate == "rel_l2")
    return found
