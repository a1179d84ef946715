"""make-tiny: a small random checkpoint in a family's real format, with a tokenizer trained on the example data.

It has config.json, model.safetensors, tokenizer and chat template, as the family's checkpoints have them: a few hundred
kilobytes, made from a seed within seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ktverify.training.dataset import example_data, read_records
from ktverify.training.output_directory import whole_directory

# small enough to train in seconds; no size is a multiple of a tile, unless a family's own code demands it
_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "use_cache": True,
    "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 20}
_WIDTHS = {"moe_intermediate_size": 40, "intermediate_size": 96}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
_ROUTED = {"n_routed_experts": 8, "first_k_dense_replace": 1}
_MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    # the form of DeepSeek-V2-Lite: no q_lora, greedy, two shared experts
    "deepseek_v2": {
        **_MLA,
        **_WIDTHS,
        **_ROUTED,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "head_dim": 8,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        **_MLA,
        **_WIDTHS,
        **_ROUTED,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "q_lora_rank": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "qwen2_moe": {**_WIDTHS, **_EXPERTS, "num_key_value_heads": 2, "shared_expert_intermediate_size": 56},
    "qwen3_moe": {**_GROUPED, **_WIDTHS, **_EXPERTS, "norm_topk_prob": True},
    "mixtral": {**_GROUPED, "intermediate_size": 88, "num_local_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe": {
        **_GROUPED,
        **_WIDTHS,
        **_ROUTED,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
    },
    "olmoe": {**_EXPERTS, "num_key_value_heads": 2, "intermediate_size": 40},
}
# families without experts, to time or to pair with another model; the engine has no part in them
DENSE_SIZES: dict[str, dict[str, Any]] = {"qwen3": {**_GROUPED, "intermediate_size": 96}}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tiny(family: str, out: str | Path, *, seed: int = 0, sizes: Mapping[str, int] | None = None) -> Path:
    """Write a checkpoint of `family` with bf16 weights to `out`; `sizes` replace the family's, by its config's names.

    vocab_size is also the tokenizer's. ValueError for an unknown family or size, or a directory that is not empty."""
    target = Path(out)
    families = [*FAMILY_SIZES, *DENSE_SIZES]
    if family not in families:
        near = difflib.get_close_matches(family, families, 1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"family is {family!r}, it takes one of {', '.join(families)}{hint}")
    _check_sizes(family, sizes or {})
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} exists and is not empty: remove it or name another directory")
    given = dict(sizes or {})
    tokenizer = make_tokenizer(given.pop("vocab_size", _COMMON["vocab_size"]))
    model = build_model(family, len(tokenizer), seed=seed, sizes=given)
    with whole_directory(target) as part:
        tokenizer.save_pretrained(str(part))
        model.save_pretrained(str(part))
    return target


def parse_sizes(text: str) -> dict[str, int]:
    """{"hidden_size": 104, …} of "hidden_size=104,…". ValueError for anything else."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or not value.isdecimal() or int(value) == 0:
            raise ValueError(f"--sizes has {part.strip()!r}, it takes NAME=N, like hidden_size=104")
        found[name] = int(value)
    return found


def _check_sizes(family: str, sizes: Mapping[str, int]) -> None:
    known = [name for name, size in _sizes_of(family).items() if isinstance(size, int) and not isinstance(size, bool)]
    for name in sizes:
        if name not in known:
            raise ValueError(f"{family} has no size {name}; it takes {', '.join(sorted(known))}")
    least = len(_SPECIAL) + 256  # every byte is a token
    if sizes.get("vocab_size", least) < least:
        raise ValueError(f"vocab_size is {sizes['vocab_size']}, it takes {least} or more")


def _sizes_of(family: str) -> dict[str, Any]:
    return {**_COMMON, **(FAMILY_SIZES.get(family) or DENSE_SIZES[family])}


def build_model(
    family: str, vocab_size: int = _COMMON["vocab_size"], *, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> Any:
    """The family's own causal language model in bf16, its weights drawn from `seed`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    chosen = {**_sizes_of(family), **(sizes or {}), "vocab_size": vocab_size}
    config = AutoConfig.for_model(family, **chosen, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    generator = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # some families leave routers and experts zero or uninitialised
            if "experts." in name or name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter, std=_COMMON["initializer_range"])
        return model.to(torch.bfloat16)
    finally:
        torch.random.set_rng_state(generator)


def make_tokenizer(vocab_size: int = _COMMON["vocab_size"]) -> Any:
    """A byte-level BPE tokenizer, trained on the example data, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = read_records(example_data())
    tokenizer.train_from_iterator((" ".join(record.texts) for record in records), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
