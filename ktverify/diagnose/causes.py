"""What can be wrong with an engine: the vocabulary of the diagnosis, and of the engines that are wrong on purpose.

Light: imports nothing of ours.
"""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """One kind of defect; the value is what reports and JSON show."""

    LORA_SCALE = "lora_scale"  # a LoRA part or gradient times a wrong factor, or left out
    ROUTING_WEIGHT = "routing_weight"  # w missing, applied twice or otherwise wrong; so its gradient
    EXCHANGED_PROJECTION = "exchanged_projection"  # two matrices or gradients in each other's place
    TRANSPOSED = "transposed"  # a matrix read or written with its axes exchanged
    WRONG_PROJECTION = "wrong_projection"  # one projection's term is formed with another's operand, or is missing
    EXPERT_PERMUTATION = "expert_permutation"  # tokens or gradients meet other experts than theirs
    EXPERT_WRONG = "expert_wrong"  # some experts are wrong, the others right
    SLOT_WRONG = "slot_wrong"  # a slot of a token is left out, or gets another slot's values
    TOKEN_TAIL = "token_tail"  # the last rows of a call or of an expert's group are wrong
    STALE_LORA = "stale_lora"  # LoRA values other than those of the last update
    STALE_VALUES = "stale_values"  # values left over from another call, layer or load, or never written
    TP_PART = "tp_part"  # wrong with tensor parallelism only
    K_TAIL = "k_tail"  # a sum stops before its last terms
    N_TAIL = "n_tail"  # the last columns of a result are wrong
    ACCUMULATION_TYPE = "accumulation_type"  # noise of a type with fewer bits, or of one rounding too many
    ACTIVATION = "activation"  # silu, or its derivative, is another function
    NON_FINITE = "non_finite"  # a NaN or Inf that is too many, or hidden
    IDS = "ids"  # ids of -1, beyond E, or named twice
    THREADS = "threads"  # depends on the number of threads or on the moment
    ORDER = "order"  # outstanding forwards are confused
    REFUSAL = "refusal"  # bad input is accepted, or leaves the layer changed
    MEMORY_LAYOUT = "memory_layout"  # strides, addresses, interleaving, writing into what belongs to the caller
    OTHER = "other"
