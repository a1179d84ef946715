"""Causes: what can be wrong with an engine, as one word each."""

from __future__ import annotations

import enum


class Cause(str, enum.Enum):
    """One word for each way in which an engine is wrong."""

    LORA_SCALE = "lora_scale"
    ROUTING_WEIGHT = "routing_weight"
    EXCHANGED_PROJECTION = "exchanged_projection"
    TRANSPOSED = "transposed"
    WRONG_PROJECTION = "wrong_projection"
    EXPERT_PERMUTATION = "expert_permutation"
    EXPERT_WRONG = "expert_wrong"
    SLOT_WRONG = "slot_wrong"
    STALE_LORA = "stale_lora"
    STALE_VALUES = "stale_values"
    TP_PART = "tp_part"
    K_TAIL = "k_tail"
    N_TAIL = "n_tail"
    ACCUMULATION_TYPE = "accumulation_type"
    ACTIVATION = "activation"
    NON_FINITE = "non_finite"
    IDS = "ids"
    THREADS = "threads"
    ORDER = "order"
    REFUSAL = "refusal"
    MEMORY_LAYOUT = "memory_layout"
    OTHER = "other"
