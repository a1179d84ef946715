"""How often a data set's tokens reach each expert of a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktverify.training.config import TrainConfig
from ktverify.training.dataset import encode, find_dataset, read_records
from ktverify.training.infer import init_cpu_infer
from ktverify.training.pretrained import BASE_OPTION, load_model, load_tokenizer
from ktverify.training.wrap import find_experts, require_one_process, wrap_moe_layers


def count_routing(config: TrainConfig, beside: Path) -> list[list[int]]:
    """Token slots that reach each expert, for each layer with routed experts, over the examples of `config`, whole and
    without padding. The base model computes, without adapter. Errors as a training's."""
    require_one_process()
    files = [find_dataset(name, beside) for name in config.datasets]
    records = [record for file in files for record in read_records(file, config.max_samples)]
    path, trust = config.model_name_or_path, config.trust_remote_code
    tokenizer = load_tokenizer(path, option=BASE_OPTION, trust=trust)
    rows = encode(records, tokenizer, config.cutoff_len, workers=config.preprocessing_num_workers or 1)
    infer = None
    if config.use_kt:
        infer = init_cpu_infer(
            config.kt_num_threads, config.tp, backend=config.kt_backend, weight_path=config.kt_weight_path
        )
    model: Any = load_model(path, config.torch_dtype, option=BASE_OPTION, trust=trust, infer=infer).eval()
    if infer is not None:
        wrap_moe_layers(model, infer)
    blocks = find_experts(model)
    sizes = [int(block.down_proj.shape[0]) for block in blocks]  # type: ignore[index]
    counts = [torch.zeros(size, dtype=torch.int64, device="cpu") for size in sizes]
    hooks = [block.register_forward_pre_hook(partial(_count, into)) for block, into in zip(blocks, counts, strict=True)]
    try:
        with torch.no_grad():
            for row in rows:
                model(input_ids=torch.tensor([row["input_ids"]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [each.tolist() for each in counts]


def _count(into: Tensor, block: torch.nn.Module, given: tuple[Any, ...]) -> None:
    """A block of experts is called with hidden_states [T, H], expert_ids [T, k], weights [T, k]."""
    into += torch.bincount(given[1].reshape(-1).cpu(), minlength=len(into))
