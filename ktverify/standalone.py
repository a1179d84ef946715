"""A case as a folder that needs nothing of ktverify: its inputs and expected values, and a script that runs it.

Comes in: a checked case and its engine's name. Goes out: `case.safetensors` and `run.py`. For whoever maintains the
engine: they run one file and see the number.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from ktverify.files import write_whole
from ktverify.names import ALL_TENSORS
from ktverify.verify import Checked, LiveOracle

# what stands beside an engine's adapter: the same calls without the suite
SCRIPTS = {"kt_kernel": Path(__file__).with_name("engines") / "hosted" / "kt_kernel_alone.py"}


def check(engine: str) -> Path:
    """The script of `engine`. ValueError where it has none."""
    if engine not in SCRIPTS:
        raise ValueError(f"--stand-alone: engine is {engine!r}, it takes one of {', '.join(SCRIPTS)}")
    return SCRIPTS[engine]


def write(checked: Checked, engine: str, directory: str | os.PathLike[str], *, tp: int = 1, threads: int = 0) -> Path:
    """Write the folder, each file whole. Weights in the experts' order; expected values are the fp64 oracle's."""
    from safetensors.torch import save

    script = check(engine)
    inputs, case = checked.inputs, checked.case
    oracle = checked.expected if isinstance(checked.expected, LiveOracle) else LiveOracle.of(inputs)
    names = ("hidden_states", "expert_ids", "weights", "grad_output", "gate_proj", "up_proj", "down_proj")
    tensors = {f"inputs.{name}": getattr(inputs, name) for name in names}
    tensors |= {f"inputs.{name}": tensor for name, tensor in inputs.lora.items()}
    tensors |= {f"expected.{name}": oracle.tensors[name] for name in ALL_TENSORS}
    sizes = {"E": case.num_experts, "k": case.top_k, "H": case.hidden, "I": case.intermediate, "T": case.qlen}
    sizes |= {"r": case.rank, "tp": tp, "threads": threads or len(os.sched_getaffinity(0))}
    metadata = {
        "case": case.id,
        "sizes": json.dumps({**sizes, "alpha": case.alpha}),
        "budgets": json.dumps(_budgets(checked)),
        "suite": json.dumps({r.tensor: r.rel_l2 for r in checked.records if not math.isnan(r.rel_l2)}),
    }
    target = Path(directory)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    write_whole(target / "case.safetensors", data)
    return write_whole(target / "run.py", script.read_text(encoding="utf-8"))


def _budgets(checked: Checked) -> dict[str, float]:
    """rel_l2 that the suite allows, by tensor; a tensor without such a gate has to be exact."""
    return {record.tensor: gate.budget for record in checked.records for gate in record.gates if gate.gate == "rel_l2"}
