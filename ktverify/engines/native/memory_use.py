"""What a layer of the native engine would take, by the engine's own arithmetic. Nothing of the layer is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from ktverify import _native
from ktverify.engines.argument_checks import LayerSpec
from ktverify.engines.native.isa import chosen_isa
from ktverify.engines.quantise import MADE
from ktverify.engines.quantised import MXFP4_GROUP, WeightFormat

# base format -> columns that share a scale, 0 for a whole row and for none; the dtype of the scales
_GROUPS = {"bf16": 0, **MADE, "mxfp4": MXFP4_GROUP}
_SCALES = {"int4": "bf16", "mxfp4": "e8m0"}


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one layer. expert: base weights of one expert, with scales; lora: the snapshot of the LoRA of all
    experts; saved: what a forward keeps for its backward; working: buffers that all layers of a process share."""

    expert: int
    lora: int
    saved: int
    working: int


def memory_use(spec: LayerSpec, tokens: int, *, on_gpu: int = 0, lora_fp32: bool = True) -> MemoryUse:
    """What a layer takes whose slots fall on its experts in turn, for calls of at most chunked_prefill_size tokens.

    on_gpu: so many of the experts are computed by a device, and their slots are not the engine's. ValueError and
    RuntimeError as for a layer that is made."""
    experts, top_k, format = spec.num_experts, spec.num_experts_per_tok, spec.weight_format
    pieces = [min(spec.chunked_prefill_size, tokens - at) for at in range(0, tokens, spec.chunked_prefill_size)]
    found = {}
    for piece in set(pieces) or {0}:
        turns = (slot % experts for slot in range(piece * top_k))
        found[piece] = _native.memory_use(
            num_experts=experts,
            top_k=top_k,
            hidden=spec.hidden_size,
            intermediate=spec.moe_intermediate_size,
            rank=spec.lora_rank,
            parts=spec.threadpool_count,
            threads=spec.cpuinfer_threads,
            isa=spec.isa or chosen_isa(),
            format=WeightFormat(format, _GROUPS[format], scale=_SCALES.get(format, "fp32")),
            lora_fp32=lora_fp32,
            ids=[-1 if expert < on_gpu else expert for expert in turns],
        )
    expert, lora, _, _ = next(iter(found.values()))
    saved, working = sum(found[piece][2] for piece in pieces), max(use[3] for use in found.values())
    return MemoryUse(expert, lora, saved, working)
