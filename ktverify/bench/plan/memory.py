"""The memory of one process of a split. Bytes; docs/plan.md has the formulas by the names of `ProcessMemory`."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from ktverify.bench.plan.splits import Split
from ktverify.bench.shapes import weight_bytes
from ktverify.engines.argument_checks import FORMATS, LayerSpec, check_count
from ktverify.engines.native.device_experts import MULTIPLE
from ktverify.engines.native.memory_use import MemoryUse, memory_use
from ktverify.engines.quantise import INT4_GROUPS
from ktverify.engines.quantised import check_cut
from ktverify.spec.cases import CUSTOM, Case
from ktverify.spec.names import lora_shapes
from ktverify.training.moe_model import MoeModel

FP32, BF16, INT64 = 4, 2, 8
METHOD_OF = {format: method for method, format in FORMATS.items()}


@dataclass(frozen=True)
class Load:
    """What is trained. tokens: of a step, of all processes together; rank: of LoRA; format: of the base weights."""

    tokens: int
    rank: int
    format: str

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens)
        check_count("rank", self.rank)

    def case(self, model: MoeModel) -> Case:
        """One layer's call as the Case that the bench's formulas take. ValueError for a size below 1."""
        sizes = (model.experts, model.top_k, model.hidden, model.intermediate, self.tokens, self.rank)
        return Case(CUSTOM, "", *sizes, alpha=2.0 * self.rank)


@dataclass(frozen=True)
class ProcessMemory:
    """experts: base weights; lora: parameters; gradients; optimizer: of the LoRA; engine_lora: the engine's copies;
    activations: what the MoE layers keep for backward; working: buffers of one layer, which all share; dense: all other
    weights. gpu: what the GPU has of all these; the others are in memory."""

    experts: float
    lora: float
    gradients: float
    optimizer: float
    engine_lora: float
    activations: float
    working: float
    dense: float
    gpu: float = 0.0

    @property
    def total(self) -> float:
        """What is in memory."""
        return float(sum(astuple(self))) - self.gpu


def lora_parameters(model: MoeModel, rank: int) -> tuple[int, int]:
    """(of one expert, of all attention), as peft has them: gate and up of an expert share an A."""
    h, i = model.hidden, model.intermediate
    return rank * (h + 2 * i) + rank * (i + h), sum(rank * (inputs + outputs) for inputs, outputs in model.attention)


def engine_layer(model: MoeModel, split: Split, load: Load) -> tuple[LayerSpec, int]:
    """The engine's layer in the largest process, and the tokens of its call.

    ValueError or RuntimeError where the split does not fit the model's sizes."""
    if split.ranks > model.experts:
        raise ValueError(f"{split.ranks} ranks for {model.experts} experts: a rank needs one")
    tokens = -(-load.tokens // split.ranks)
    alone = split.ranks == 1
    spec = LayerSpec(
        num_experts=-(-model.experts // split.ranks),
        num_experts_per_tok=model.top_k if alone else 1,
        hidden_size=model.hidden,
        moe_intermediate_size=model.intermediate,
        cpuinfer_threads=1,
        threadpool_count=split.parts,
        method=METHOD_OF[load.format],
        lora_rank=load.rank,
        lora_alpha=2.0 * load.rank,
    )
    check_cut(spec, INT4_GROUPS[0])
    # slots of other ranks are rows of their own there, with one expert each
    return spec, tokens if alone else tokens * model.top_k


def layer_use(model: MoeModel, split: Split, load: Load) -> MemoryUse:
    """What the engine takes for one layer in the largest process."""
    spec, tokens = engine_layer(model, split, load)
    return memory_use(spec, tokens, on_gpu=split.gpu_experts)


def process_memory(model: MoeModel, split: Split, load: Load, *, gpu: bool = False) -> ProcessMemory:
    """The memory of the largest process, all layers. gpu: the parts outside of the engine are on the GPU.

    ValueError or RuntimeError where the split does not fit the model's sizes."""
    spec, rows = engine_layer(model, split, load)
    use = layer_use(model, split, load)
    layers, experts = model.layers, spec.num_experts
    of_expert, of_attention = lora_parameters(model, load.rank)
    parameters = layers * experts * of_expert + of_attention
    six = sum(math.prod(shape) for shape in spec.lora_shapes.values())
    # the A of an expert is the parameter itself; B is copied in halves. From a GPU, A is copied as well
    copied = experts * (of_expert if gpu else load.rank * (2 * model.intermediate + model.hidden))
    kept = rows * (BF16 * model.hidden + spec.num_experts_per_tok * (INT64 + FP32))
    if split.ranks > 1:  # the outputs of its own tokens' slots, and their weights
        kept += rows * (BF16 * model.hidden + FP32)
    states = FP32 * parameters
    dense = BF16 * model.others
    there = _gpu_experts(model, split, load) + (4 * states + dense if gpu else 0)
    return ProcessMemory(
        experts=layers * experts * use.expert,
        lora=0 if gpu else states,
        gradients=0 if gpu else states,
        optimizer=0 if gpu else 2 * states,
        engine_lora=layers * (use.lora + FP32 * copied),
        activations=layers * (use.saved + kept),
        working=use.working + FP32 * six,
        dense=0 if gpu else dense,
        gpu=there,
    )


def _gpu_experts(model: MoeModel, split: Split, load: Load) -> float:
    """Base weights in bf16, LoRA, and what their slots keep for backward: x, y [H], gate, silu(gate), up, h [I]."""
    h, i, n = model.hidden, model.intermediate, split.gpu_experts
    short = -load.rank % MULTIPLE if not (h % MULTIPLE or i % MULTIPLE) else 0
    lora = sum(math.prod(shape) for shape in lora_shapes(n, h, i, load.rank + short).values())
    slots = load.tokens * model.top_k * n / model.experts
    return model.layers * (weight_bytes(load.case(model), n) + BF16 * lora + BF16 * slots * (2 * h + 4 * i))
