"""The kinds of defect an engine can have: what a failed check suggests, what diagnosis reports, what a mutant has.

Imports nothing of ktverify.
"""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """One kind of defect. The value is the name in reports and in JSON."""

    LORA_SCALE = "lora_scale"  # a LoRA term or gradient has a wrong factor, or is left out
    ROUTING_WEIGHT = "routing_weight"  # w, or its gradient, is missing, applied twice or otherwise wrong
    EXCHANGED_PROJECTION = "exchanged_projection"  # two matrices or two gradients are exchanged
    TRANSPOSED = "transposed"  # a matrix is read or written with its axes exchanged
    WRONG_PROJECTION = "wrong_projection"  # a term uses another projection's operand, or is missing
    EXPERT_PERMUTATION = "expert_permutation"  # tokens or gradients are assigned to the wrong experts
    EXPERT_WRONG = "expert_wrong"  # some experts are wrong, the others right
    SLOT_WRONG = "slot_wrong"  # a slot of a token is left out, or has another slot's values
    TOKEN_TAIL = "token_tail"  # the last rows of a call or of an expert's group are wrong
    STALE_LORA = "stale_lora"  # LoRA values other than those of the last update
    STALE_VALUES = "stale_values"  # values of an earlier call, another layer or an earlier load, or unwritten memory
    TP_PART = "tp_part"  # wrong only at a tensor parallel degree above 1
    K_TAIL = "k_tail"  # a sum stops before its last terms
    N_TAIL = "n_tail"  # the last columns of a result are wrong
    ACCUMULATION_TYPE = "accumulation_type"  # a type with too few bits, or one rounding too many
    ACTIVATION = "activation"  # silu or its derivative is another function
    NON_FINITE = "non_finite"  # an unexpected NaN or Inf, or one that was hidden
    IDS = "ids"  # expert ids of -1, above E - 1, or given twice
    THREADS = "threads"  # results depend on the number of threads or on timing
    ORDER = "order"  # a waiting forward is mixed up with another, lost or overwritten
    REFUSAL = "refusal"  # bad input is accepted, or changes the layer
    DROPOUT = "dropout"  # lora_dropout drops other elements, at another time or in another way than it must
    QUANTISATION = "quantisation"  # weights other than those that the codes and scales stand for
    OTHER_DEVICE = "other_device"  # wrong only where another device computes some of the experts
    DIVIDED = "divided"  # wrong only where experts are divided among processes
    MEMORY_LAYOUT = "memory_layout"  # strides, addresses, interleaving, writes into the caller's memory
    CRASH = "crash"  # the engine raises, dies, hangs or takes too much memory where it should compute
    OTHER = "other"


PREFIX = "cause: "
UNKNOWN = "not looked for"  # behind PREFIX, where no time was left or the case is too large


def cause_of(message: str) -> str:
    """The line of a record's message that states a cause; "" where there is none."""
    return next((line for line in message.splitlines() if line.startswith(PREFIX)), "")
