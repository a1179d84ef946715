"""An adapter in every format, and back: `python examples/adapter_formats.py [DIRECTORY]`, some seconds.

A tiny Mixtral is trained for five steps; its adapter goes from peft's format to the one that vLLM and SGLang read, from
there to kt-kernel's, and back to peft's. The logits are the same at both ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ktverify.training import load_adapter
from ktverify.training.adapter_formats import export_adapter
from ktverify.training.config import TrainConfig
from ktverify.training.pretrained import load_model
from ktverify.training.run import run
from ktverify.training.tiny import make_tiny

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "saves/adapter_formats")
base, trained = make_tiny("mixtral", folder / "base"), folder / "trained"
keys = {"model_name_or_path": str(base), "dataset": "alpaca_tiny", "output_dir": str(trained)}
run(TrainConfig.model_validate({**keys, "max_steps": 5, "learning_rate": 5e-3}), folder)

adapters, source = {"trained": trained}, trained
for form in ("per-expert", "kt", "peft"):
    source = adapters[form] = export_adapter(source, folder / form, form)
    print(f"{source}: {', '.join(sorted(path.name for path in source.iterdir()))}")


def logits(adapter: Path) -> torch.Tensor:
    model = load_adapter(load_model(str(base), "bfloat16", option="base"), adapter).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(6, 26)[None]).logits.float()
    return found


first, last = logits(trained), logits(adapters["peft"])
difference = float((first - last).norm() / first.norm())
if difference > 2**-7:
    sys.exit(f"the logits differ by {difference:.1e}")
print(f"equal logits, but for the factors' rounding to bfloat16 in kt-kernel's format: {difference:.1e}")
