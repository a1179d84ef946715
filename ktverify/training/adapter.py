"""LoRA on attention and experts with stock peft: choose targets, attach, load, merge.

The adapter is an ordinary one of peft, which also owns the parameters of the experts' LoRA. The engine only replaces
peft's computation of the experts (W + B A, as large as W, at every call).
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import layer as lora_layer
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import nn

from ktverify.engines.argument_checks import check_alpha, check_count, check_dropout
from ktverify.engines.expert_parallel import Share
from ktverify.errors import AdapterMismatch, one_line
from ktverify.system.files import expand
from ktverify.system.text import read_json
from ktverify.training.factors import Factors
from ktverify.training.layer import MOELayerWrapper, uncompiled
from ktverify.training.wrap import WEIGHTS, attention_layers, find_experts

ALL, ALL_ATTENTION = "all", "all_attention"
KT_TENSORS = "fused_expert_lora.safetensors"  # the experts' part of an adapter in kt-kernel's format
# what peft before 0.19 says of every block of experts, which it supports
_OLD_NOTE = "Unsupported layer type"
# name of a separate projection, as in older checkpoints -> the stacked parameter that contains it
_STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
_STACKED |= {"down_proj": "down_proj", "w2": "down_proj", "gate_up_proj": "gate_up_proj"}
# projections that most families have; one list is used for all families, and DeepSeek has no k_proj and v_proj
_USUAL = {"q_proj", "k_proj", "v_proj", "o_proj"}


class ParamWrapper(lora_layer.ParamWrapper):  # type: ignore[misc]  # peft finds its wrappers by this name
    """peft's LoRA of one stacked parameter of a block of experts that the engine computes."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self._own: set[str] = set()  # adapters of which only this process's experts are kept
        self._layer().adapters[self.parameter_name] = self
        self.register_load_state_dict_pre_hook(_take_own_experts)

    def _layer(self) -> MOELayerWrapper:
        layer: MOELayerWrapper = self.get_base_layer()._kt_layer[0]
        return layer

    @property
    def share(self) -> Share | None:
        """Of experts that are divided among processes: what this one has."""
        return self._layer().share

    def factors(self) -> Factors | None:
        """The active adapter's factors; None while adapters are disabled. ValueError for several active ones."""
        return None if self.disable_adapters else self.held()

    def held(self) -> Factors | None:
        """The active adapter's factors, also while adapters are disabled."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return None
        if len(active) > 1:
            raise ValueError(
                f"the engine computes one adapter at a time, {len(active)} are active: {', '.join(active)}"
            )
        return self._of(active[0])

    def attached(self) -> list[Factors]:
        """The factors of all adapters, active or not."""
        return [self._of(name) for name in self.lora_A]

    def _of(self, name: str) -> Factors:
        if self.share is not None and name not in self._own:
            raise ValueError(
                f"adapter {name} was attached by peft alone, and these experts are divided among processes: attach it "
                "with ktverify.training.add_adapter or load_adapter"
            )
        # peft before 0.19 takes the middle dimension of a stacked parameter for its input
        turned = not getattr(self, "_did_swap_in_out_features", False)
        return Factors(self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name]), turned)

    def keep_own_experts(self) -> None:
        """Where experts are divided among processes, keep the LoRA of this process's experts alone."""
        if (share := self.share) is not None:
            for name in self.lora_A:
                self._own.add(name)
                own = self._of(name).part(share.total, share.experts)
                for layer, value in ((self.lora_A[name], own.a), (self.lora_B[name], own.b)):
                    layer.weight = nn.Parameter(value, requires_grad=layer.weight.requires_grad)
                    layer.out_features, layer.in_features = value.shape

    @uncompiled
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._layer().calling.append(self)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        _no_merge()


def cut_state(adapter: ParamWrapper, name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of this process's experts of two tensors that are like A and B of the adapter `name` of all experts; the
    tensors themselves where they are a part already."""
    own, share = adapter._of(name), adapter.share
    if share is None or a.shape == own.a.shape:
        return a, b
    found = replace(own, a=a, b=b).part(share.total, share.experts)
    return found.a, found.b


def whole_state_of(
    adapter: ParamWrapper, name: str, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """On rank 0, of two tensors like this process's A and B of the adapter `name`, those of all experts. All ranks call
    it. RankLost where another rank ended."""
    share = adapter.share
    assert share is not None
    return share.whole(a), share.whole(b.reshape(len(b), -1, len(share.experts)), dim=2).flatten(1)


def _take_own_experts(adapter: ParamWrapper, state: dict[str, Any], prefix: str, *more: Any) -> None:
    """Before torch loads `state`: of adapters of all experts, leave those of this process."""
    for name in adapter._own:
        keys = [f"{prefix}lora_{letter}.{name}.weight" for letter in "AB"]
        if all(key in state for key in keys):
            state[keys[0]], state[keys[1]] = cut_state(adapter, name, state[keys[0]], state[keys[1]])


def _no_merge() -> None:
    raise RuntimeError(
        "the engine holds the base weights, so an adapter cannot be merged here: save it, then "
        "python -m ktverify export-merged"
    )


def lora_config(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = ALL,
    rslora: bool = False,
) -> LoraConfig:
    """An ordinary LoraConfig for `model`, wrapped or stock; scaling alpha / rank, with rslora alpha / sqrt(rank).

    target: "all" (attention and routed experts), "all_attention", or names: linear layers of the attention, `experts`,
    or the experts' gate_proj and up_proj (together), down_proj. alpha: 2 rank by default.
    """
    check_count("lora_rank", rank)
    alpha = 2 * rank if alpha is None else alpha
    check_alpha(alpha, rank)
    modules, parameters = _targets(model, target)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=parameters or None,
        use_rslora=rslora,
    )
    _compute_experts_in_engine(model, config)
    return config


def add_adapter(model: nn.Module, config: LoraConfig, *, dropout: float = 0.0) -> PeftModel:
    """`model` with a fresh adapter. dropout applies to the input of the attention's adapters, in training.

    The experts' adapters have no dropout, because peft supports none for a stacked parameter and refuses to load a
    configuration with it. So the adapter's own configuration has dropout 0.
    """
    check_dropout(dropout)
    _compute_experts_in_engine(model, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _OLD_NOTE, UserWarning)
        adapted: PeftModel = get_peft_model(model, config)
    _finish(adapted)
    if dropout:
        for module in adapted.modules():
            if isinstance(module, lora_layer.Linear):
                module.lora_dropout["default"] = nn.Dropout(dropout)
    return adapted


def load_adapter(model: nn.Module, directory: str | Path, *, trainable: bool = False) -> PeftModel:
    """`model`, wrapped or stock, with the adapter in `directory`.

    ValueError if it is not one, or belongs to another base; AdapterMismatch if its tensors are not the model's.
    """
    path = Path(expand(str(directory)))
    if not (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} holds no adapter: adapter_config.json is missing")
    read_json(path / "adapter_config.json")  # the library would not name the file
    if (path / KT_TENSORS).is_file():
        raise ValueError(
            f"the adapter in {path} is in kt-kernel's format, and peft would leave out {KT_TENSORS}: "
            f"python -m ktverify export-adapter {path} --out NEW --format peft"
        )
    try:
        config = LoraConfig.from_pretrained(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/adapter_config.json is no configuration of LoRA: {one_line(error)}") from error
    config.inference_mode = not trainable
    _compute_experts_in_engine(model, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # reported below, as an error
            warnings.filterwarnings("ignore", _OLD_NOTE, UserWarning)
            adapted: PeftModel = PeftModel.from_pretrained(model, str(path), config=config, is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(f"the adapter in {path} does not fit this base model: {first}") from error
    _check_keys(adapted, path)
    _finish(adapted)
    return adapted


def _check_keys(adapted: PeftModel, path: Path) -> None:
    """AdapterMismatch unless the file has exactly the model's tensors: peft fills up and leaves out."""
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    stored = load_peft_weights(str(path), device="cpu")
    for kind, names in (("lacks", wanted.keys() - stored.keys()), ("has, beyond it,", stored.keys() - wanted.keys())):
        found = sorted(name for name in names if "lora_" in name)
        if found:
            raise AdapterMismatch(
                f"the adapter in {path} does not fit this base model: it {kind} {len(found)} tensors, first {found[0]}"
            )


def _compute_experts_in_engine(model: nn.Module, config: LoraConfig) -> None:
    """On a wrapped model, let peft use our ParamWrapper, by its extension point for unknown layers."""
    kinds = {type(module) for module in model.modules() if hasattr(module, "_kt_layer")}
    if kinds:
        config._register_custom_module(dict.fromkeys(kinds, ParamWrapper))


def _finish(adapted: PeftModel) -> None:
    """Let peft refuse to merge before it begins: layers that come before the first experts would be merged already.

    Where experts are divided among processes, keep this one's LoRA alone, and let save_pretrained save all."""
    wrapped = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    if wrapped:
        adapted.base_model._check_merge_allowed = _no_merge
    for module in wrapped:
        module.keep_own_experts()
    if any(module.share is not None for module in wrapped):
        adapted.save_pretrained = partial(save_together, adapted)


def save_together(adapted: PeftModel, directory: str | Path, **options: Any) -> None:
    """Save the adapter of experts that are divided among processes, as one process would. All ranks call it; rank 0 of
    the group writes, and all return once the files are there. options: those of peft's save_pretrained.

    RankLost where another rank ended."""
    share = next(module.share for module in adapted.modules() if isinstance(module, ParamWrapper))
    assert share is not None
    state = whole_state(adapted)
    if share.rank == 0:
        type(adapted).save_pretrained(adapted, str(directory), **{**options, "state_dict": state})
    share.gather(None)


def whole_state(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The trainable state by torch's names, on rank 0 with the LoRA of all ranks' experts. All ranks call it."""
    state = {name: value.detach() for name, value in adapted.named_parameters() if "lora_" in name}
    for place, module in adapted.named_modules():
        if not isinstance(module, ParamWrapper) or module.share is None:
            continue
        for name in module.lora_A:
            own = module._of(name)
            a, b = whole_state_of(module, name, own.a, own.b)
            state |= {f"{place}.lora_A.{name}.weight": a, f"{place}.lora_B.{name}.weight": b}
    return state


def _targets(model: nn.Module, target: str | list[str]) -> tuple[list[str], list[str]]:
    """(names of linear layers, names of stacked parameters) for LoraConfig. ValueError for a name that matches none,
    unless it is one of _USUAL: peft passes over those as well."""
    # the model may have an adapter already, whose own layers are linear as well
    linear = [name for name in attention_layers(model) if ".lora_" not in name]
    own = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
    attention = sorted(own)
    experts = [f"experts.{name}" for name in WEIGHTS] if find_experts(model) else []
    if target == ALL:
        return attention, experts
    if target == ALL_ATTENTION:
        return attention, []
    names = [name.strip() for name in (target.split(",") if isinstance(target, str) else target) if name.strip()]
    modules, parameters = [], set()
    for name in names:
        if name in attention:
            modules.append(name)
        elif name == "experts":
            parameters.update(experts)
        elif name in _STACKED:
            parameters.add(f"experts.{_STACKED[name]}")
        elif name not in _USUAL:
            known = [*attention, "experts", *_STACKED]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it takes {ALL}, {ALL_ATTENTION} or {', '.join(known)}"
            raise ValueError(f"lora_target has {name!r}, which this model has not{hint}")
    for pair in (("gate_proj", "up_proj"), ("w1", "w3")):
        if len(set(pair) & set(names)) == 1:
            raise ValueError(f"lora_target has one of {' and '.join(pair)}: they are one stacked parameter, name both")
    if not modules and not parameters:
        has = f"names none of {', '.join([*attention, 'experts'])}" if names else "is empty"
        raise ValueError(f"lora_target {has}; it takes {ALL}, {ALL_ATTENTION} or names")
    return modules, sorted(parameters)


def base_of(adapter: Path, base: str | None) -> str:
    """The base model's path: `base`, else the one that the adapter names. ValueError where neither is."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"{adapter} holds no adapter: adapter_config.json is missing")
    named = read_json(config).get("base_model_name_or_path")
    path = base or named
    if not path:
        raise ValueError(f"{adapter} does not name its base model: give --base")
    return expand(str(path))
