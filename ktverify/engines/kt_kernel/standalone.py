"""One case through kt-kernel with nothing of ktverify: prints each tensor's error against the expected values.

    python run.py [case.safetensors]      # exit code 1: a tensor is beyond its budget

It needs a Python that has torch, safetensors and kt-kernel. The file contains inputs.*, the fp64 oracle's answers as
expected.*, and as metadata the sizes, the suite's budgets (relative L2; a tensor without one has one right answer) and
the errors that the suite found. The results of kt-kernel are saved beside it as actual.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from kt_kernel import KTMoEWrapper  # type: ignore[import-not-found]
from safetensors import safe_open
from safetensors.torch import save_file

LORA = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("case.safetensors")
with safe_open(path, framework="pt") as stored:
    about = stored.metadata()
    tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no dict
sizes, budgets, suite = (json.loads(about[name]) for name in ("sizes", "budgets", "suite"))
given = {name.removeprefix("inputs."): tensor for name, tensor in tensors.items() if name.startswith("inputs.")}

layer = KTMoEWrapper(
    layer_idx=0,
    num_experts=sizes["E"],
    num_experts_per_tok=sizes["k"],
    hidden_size=sizes["H"],
    moe_intermediate_size=sizes["I"],
    gpu_experts_mask=None,
    num_gpu_experts=0,
    cpuinfer_threads=sizes["threads"],
    threadpool_count=sizes["tp"],
    weight_path="",
    chunked_prefill_size=max(512, sizes["T"]),
    method="AMXBF16_SFT",
    mode="sft",
    lora_rank=sizes["r"],
    lora_alpha=sizes["alpha"],
)
weights = (given[name] for name in ("gate_proj", "up_proj", "down_proj"))
layer.load_weights_from_tensors(*weights, torch.arange(sizes["E"]))
gradients = {f"grad_{name}": torch.zeros_like(given[name]) for name in LORA}
layer.init_lora_weights(*(given[name] for name in LORA), *gradients.values())
output = layer.forward(given["hidden_states"], given["expert_ids"], given["weights"], save_for_backward=True)
grad_input, grad_weights = layer.backward(given["grad_output"])
actual = {"output": output, "grad_input": grad_input, **gradients, "grad_weights": grad_weights}
save_file({name: tensor.contiguous() for name, tensor in actual.items()}, path.with_name("actual.safetensors"))

print(f"{about['case']}, kt-kernel against the fp64 oracle, relative L2")
print(f"{'tensor':18}{'here':>10}{'suite':>10}{'budget':>10}{'not finite':>12}{'differ':>10}{'of':>10}")
beyond = 0
for name, tensor in actual.items():
    # what the contract says of the result's form
    parameter = given.get(name.removeprefix("grad_"), given["hidden_states"])
    form, wanted_form = (tensor.dtype, tensor.shape), (parameter.dtype, tensors[f"expected.{name}"].shape)
    if form != wanted_form:
        print(f"{name:18} is {form}, expected {wanted_form}")
        beyond += 1
        continue
    wanted, found = tensors[f"expected.{name}"].double(), tensor.double()
    # a tensor with one right answer: the exact one, rounded once to the tensor's type
    rounded = wanted.to(tensor.dtype).double()
    differ = int((rounded != found).logical_and(~(rounded.isnan() & found.isnan())).sum())
    wanted = wanted if name in budgets else rounded
    finite = torch.isfinite(wanted) & torch.isfinite(found)
    wrong = int((torch.isfinite(wanted) != torch.isfinite(found)).sum())
    scale = float(wanted[finite].norm())
    error = float((found - wanted)[finite].norm()) / scale if scale else float(found[finite].norm())
    beyond += error > budgets.get(name, 0.0) or wrong > 0
    said, budget = suite.get(name, float("nan")), budgets.get(name, 0.0)
    print(f"{name:18}{error:10.2e}{said:10.2e}{budget:10.2e}{wrong:12}{differ:10}{found.numel():10}")
sys.exit(1 if beyond else 0)
