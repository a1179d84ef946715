"""The findings that are no case of the catalogue, with kt-kernel and torch alone: each in a process of its own.

python contract.py        # any Python that has torch and kt-kernel
"""

import subprocess
import sys

import torch

LORA = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
E, K, H, T, R = 4, 2, 64, 9, 4


def layer_of(intermediate, tp=1):
    from kt_kernel import KTMoEWrapper

    return KTMoEWrapper(
        layer_idx=0, num_experts=E, num_experts_per_tok=K, hidden_size=H, moe_intermediate_size=intermediate,
        gpu_experts_mask=None, num_gpu_experts=0, cpuinfer_threads=2, threadpool_count=tp, weight_path="",
        chunked_prefill_size=512, method="AMXBF16_SFT", mode="sft", lora_rank=R, lora_alpha=8.0,
    )  # fmt: skip


def loaded(intermediate):
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16}
    layer, i = layer_of(intermediate), intermediate
    weights = [torch.randn(shape, **bf16) * 0.1 for shape in ((E, i, H), (E, i, H), (E, H, i))]
    shapes = [(E, R, H), (E, i, R), (E, R, H), (E, i, R), (E, R, i), (E, H, R)]
    lora = [torch.randn(shape, **bf16) * 0.1 for shape in shapes]
    layer.load_weights_from_tensors(*weights, torch.arange(E))
    layer.init_lora_weights(*lora, *(torch.zeros_like(tensor) for tensor in lora))
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return layer, lora, (torch.randn(T, H, **bf16), ids, torch.rand(T, K))


def degree_that_does_not_divide():
    layer_of(2049, tp=2)
    print("threadpool_count 2 was accepted for moe_intermediate_size 2049")


def no_degree():
    layer_of(48, tp=0)
    print("threadpool_count 0 was accepted")


def negative_degree():
    try:
        layer_of(48, tp=-1)
    except Exception as error:
        print(f"threadpool_count -1: {type(error).__name__}: {error}")


def size_48():
    loaded(48)
    print("moe_intermediate_size 48 was loaded")


def parameters_before_update():
    layer, lora, tokens = loaded(64)
    before = layer.forward(*tokens, save_for_backward=False)
    for tensor in lora:
        tensor.mul_(-3)
    after = layer.forward(*tokens, save_for_backward=False)
    print(f"output without update_lora_weights: {int((before != after).sum())} of {before.numel()} elements changed")


def parameters_before_backward():
    found = []
    for factor in (1, -3):
        layer, lora, tokens = loaded(64)
        layer.forward(*tokens, save_for_backward=True)
        for tensor in lora:
            tensor.mul_(factor)
        found.append(layer.backward(torch.ones(T, H, dtype=torch.bfloat16))[0])
    print(f"grad_input of the same forward: {int((found[0] != found[1]).sum())} of {T * H} elements changed")


CHECKS = [degree_that_does_not_divide, no_degree, negative_degree, size_48, parameters_before_update]
CHECKS += [parameters_before_backward]

if __name__ == "__main__":
    if len(sys.argv) > 1:
        next(check for check in CHECKS if check.__name__ == sys.argv[1])()
    else:
        for check in CHECKS:
            done = subprocess.run([sys.executable, __file__, check.__name__], capture_output=True, text=True)
            told = [line for line in done.stdout.splitlines() if any(c in line for c in ":") or "accepted" in line]
            told = [line for line in told if line.startswith(("threadpool_count", "output", "grad_input", "moe_"))]
            print(f"{check.__name__:28} exit {done.returncode:4}  {told[-1] if told else ''}")
