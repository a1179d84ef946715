"""Write the inputs of one shape and the oracle's results as files that any process can map.

`python -m ktverify.bench.input_files REQUEST` runs in a process of its own, so that its memory is free again when the
engines are loaded. It writes
    DIRECTORY/inputs/NAME       raw little-endian tensors; base weights of idle experts are holes in the file
    DIRECTORY/expected/NAME     the fp32 oracle's, by names of ktverify.spec.names; output_plain: output without LoRA
    DIRECTORY/manifest.json     written last: arguments, dtypes, shapes, active experts; also printed, as one line
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ktverify.bench.host import BASE_NAMES
from ktverify.runs.jsonl import JsonLine
from ktverify.spec.cases import Case
from ktverify.spec.names import LORA_NAMES, OUTPUT
from ktverify.system.files import write_whole

OUTPUT_PLAIN = "output_plain"
_SLACK = 1 << 28  # rows, LoRA and results beside the base weights, rounded up


class InputRequest(JsonLine):
    """What to write, and where. plain: output_plain as well; on_grid: base weights that fewer bits have exactly."""

    case: str
    directory: str
    threads: int
    plain: bool
    on_grid: bool = False


def check_space(case: Case, directory: Path) -> None:
    """Raise OSError if the disk of `directory` has no room for the inputs of `case`."""
    needed = 6 * case.num_experts * case.hidden * case.intermediate + _SLACK
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} has {free / 1e9:.1f} GB free, the inputs take {needed / 1e9:.1f} GB; "
            "name another folder by --scratch"
        )


def write(case: Case, directory: Path, *, plain: bool, on_grid: bool = False) -> dict[str, Any]:
    """Write all files; returns the manifest. plain: output_plain as well; on_grid: base weights of coded.on_grid."""
    from ktverify.bench import coded
    from ktverify.engines.run import layer_arguments
    from ktverify.judge.reference import forward_backward
    from ktverify.spec.inputs import make_inputs

    inputs = make_inputs(case)
    step = coded.step_of(inputs.gate_proj[inputs.active[0]]) if on_grid else 0.0
    if on_grid:
        gate, up, down = (coded.on_grid(getattr(inputs, name), step) for name in BASE_NAMES)
        inputs = replace(inputs, gate_proj=gate, up_proj=up, down_proj=down)
    tensors: dict[str, Any] = {
        "hidden_states": inputs.hidden_states,
        "grad_output": inputs.grad_output,
        "expert_ids": inputs.expert_ids,
        "weights": inputs.weights,
        **{name: getattr(inputs, name) for name in BASE_NAMES},
        **inputs.lora,
    }
    (directory / "inputs").mkdir(parents=True)
    (directory / "expected").mkdir()
    entries = {}
    for name, tensor in tensors.items():
        _write_raw(directory / "inputs" / name, tensor, inputs.active if name in BASE_NAMES else None)
        entries[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    import torch

    expected = forward_backward(inputs, dtype=torch.float32)
    if plain:
        without = replace(inputs, lora={name: torch.zeros_like(inputs.lora[name]) for name in LORA_NAMES})
        expected[OUTPUT_PLAIN] = forward_backward(without, dtype=torch.float32, backward=False)[OUTPUT]
    results = {}
    for name, tensor in expected.items():
        _write_raw(directory / "expected" / name, tensor, None)
        results[name] = {"dtype": "float32", "shape": list(tensor.shape)}
    manifest = {
        "arguments": layer_arguments(case),
        "lora_names": list(LORA_NAMES),
        "active": len(inputs.active),
        "step": step,
        "tensors": entries,
        "expected": results,
    }
    write_whole(directory / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def _write_raw(path: Path, tensor: Any, experts: list[int] | None) -> None:
    """Write all of `tensor`, or only its slices `experts`; the others read as zeros."""
    import torch

    raw = tensor.detach().contiguous().view(torch.uint8).numpy()
    with path.open("wb") as stream:
        if experts is None:
            raw.tofile(stream)
            return
        for expert in experts:
            stream.seek(expert * raw[expert].nbytes)
            raw[expert].tofile(stream)
        stream.truncate(raw.nbytes)


def main(request: InputRequest) -> None:
    import torch

    torch.set_num_threads(request.threads)
    print(
        json.dumps(
            write(Case.parse(request.case), Path(request.directory), plain=request.plain, on_grid=request.on_grid)
        )
    )


if __name__ == "__main__":
    main(InputRequest.model_validate_json(sys.argv[1]))
