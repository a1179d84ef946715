"""The names and shapes of a layer's inputs and outputs. Light: imports nothing.

Sizes in this package: T tokens (qlen), E experts, k experts per token, H hidden, I intermediate, r LoRA rank.
"""

from __future__ import annotations

BASE_NAMES: tuple[str, ...] = (
    "gate_proj",  # [E, I, H]
    "up_proj",  # [E, I, H]
    "down_proj",  # [E, H, I]
)
LORA_NAMES: tuple[str, ...] = (
    "gate_lora_a",  # [E, r, H]
    "gate_lora_b",  # [E, I, r]
    "up_lora_a",  # [E, r, H]
    "up_lora_b",  # [E, I, r]
    "down_lora_a",  # [E, r, I]
    "down_lora_b",  # [E, H, r]
)
GRAD_NAMES: tuple[str, ...] = tuple(f"grad_{name}" for name in LORA_NAMES)

OUTPUT = "output"  # [T, H]
GRAD_INPUT = "grad_input"  # [T, H]
GRAD_WEIGHTS = "grad_weights"  # [T, k]

# the outputs of one forward and one backward, in the order of tables
ALL_TENSORS: tuple[str, ...] = (OUTPUT, GRAD_INPUT, *GRAD_NAMES, GRAD_WEIGHTS)
BACKWARD_TENSORS: tuple[str, ...] = ALL_TENSORS[1:]
# one row per token, so that the rows of a broken token can be separated from the rest
TOKEN_TENSORS: frozenset[str] = frozenset({OUTPUT, GRAD_INPUT, GRAD_WEIGHTS})


def lora_shapes(num_experts: int, hidden: int, intermediate: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """Shape of each LoRA tensor and of its gradient, by LORA_NAMES, for sizes E, H, I, r."""
    e, h, i, r = num_experts, hidden, intermediate, rank
    return {
        "gate_lora_a": (e, r, h),
        "gate_lora_b": (e, i, r),
        "up_lora_a": (e, r, h),
        "up_lora_b": (e, i, r),
        "down_lora_a": (e, r, i),
        "down_lora_b": (e, h, r),
    }


def tensor_shapes(
    num_experts: int, top_k: int, hidden: int, intermediate: int, qlen: int, rank: int
) -> dict[str, tuple[int, ...]]:
    """Shape of each of ALL_TENSORS for sizes E, k, H, I, T, r."""
    lora = lora_shapes(num_experts, hidden, intermediate, rank)
    grads = {f"grad_{name}": shape for name, shape in lora.items()}
    return {OUTPUT: (qlen, hidden), GRAD_INPUT: (qlen, hidden), **grads, GRAD_WEIGHTS: (qlen, top_k)}
