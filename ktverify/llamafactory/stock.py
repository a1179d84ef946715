"""Put the engine into stock LLaMA-Factory by replacing a few of its names in this process.

`connect` replaces the reading of arguments, which takes the engine's keys out before LLaMA-Factory sees them, and
`init_adapter`, which wraps the experts and attaches the adapter. The engine's keys travel on the ModelArguments.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from ktverify.engines.argument_checks import check_tp
from ktverify.llamafactory.keys import SplitKeys, split_keys
from ktverify.system.files import MAKE_LLAMAFACTORY
from ktverify.system.machine import package_version
from ktverify.system.text import read_json

# distributions that replace transformers or accelerate by changed copies
_FORKS = {"transformers-kt": "transformers", "accelerate-kt": "accelerate"}
_KEYS = "_ktverify"  # the attribute of ModelArguments with the engine's keys
_PARAMETERS = ("config", "model", "model_args", "finetuning_args", "is_trainable")
# modules that have these functions under their names, by `from … import`
_READERS = {
    "get_train_args": ("hparams.parser", "hparams", "train.tuner"),
    "get_infer_args": ("hparams.parser", "hparams", "train.tuner", "chat.chat_model"),
}


def require_stock() -> None:
    """ImportError in one line where LLaMA-Factory is missing, or a fork stands in a stock package's place."""
    for fork, stock in _FORKS.items():
        if package_version(fork):
            raise ImportError(
                f"{fork} {package_version(fork)} is installed in the place of {stock}: the engine needs the stock one, "
                f"pip uninstall {fork} {stock}, then install {stock}; or make a new environment by {MAKE_LLAMAFACTORY}"
            )
    if importlib.util.find_spec("llamafactory") is None:
        raise ImportError(
            f"llamafactory is not installed for {sys.executable}: {MAKE_LLAMAFACTORY}, then "
            ".llamafactory/bin/python -m ktverify llamafactory …"
        )


def connect() -> None:
    """Replace LLaMA-Factory's names. A second call does nothing. ImportError where its form is not the known one."""
    require_stock()
    _import_without_torchaudio()
    loader: Any = importlib.import_module("llamafactory.model.loader")
    if getattr(loader.init_adapter, _KEYS, False):
        return
    if tuple(inspect.signature(loader.init_adapter).parameters) != _PARAMETERS:
        raise ImportError(
            f"llamafactory {package_version('llamafactory')} has another init_adapter than 0.9.5, which was tried: "
            f"{MAKE_LLAMAFACTORY} installs that one"
        )
    loader.init_adapter = _init_adapter(loader.init_adapter)
    loader.load_config = _load_config(loader.load_config)
    loader.AutoModelForCausalLM = _models(loader.AutoModelForCausalLM)
    checkpointing: Any = importlib.import_module("llamafactory.model.model_utils.checkpointing")
    checkpointing.get_custom_gradient_checkpointing_func = _checkpoint_any_layer(
        checkpointing.get_custom_gradient_checkpointing_func
    )
    for name, modules in _READERS.items():
        for each in modules:
            module = importlib.import_module(f"llamafactory.{each}")
            setattr(module, name, _reader(getattr(module, name), trains=name == "get_train_args"))


def _import_without_torchaudio() -> None:
    """Import the one module that imports torchaudio, which it uses for sound alone, where there is no torchaudio."""
    name = "torchaudio"
    try:
        importlib.import_module(name)
        return
    except (ImportError, OSError):
        pass
    from transformers.utils import is_torchaudio_available

    is_torchaudio_available()  # transformers keeps the answer, which would be wrong from here on
    stand_in = sys.modules[name] = ModuleType(name)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        importlib.import_module("llamafactory.data.mm_plugin")
    finally:
        del sys.modules[name]


# ---- what stands in the places


def _reader(original: Callable[..., Any], *, trains: bool) -> Callable[..., Any]:
    """get_train_args or get_infer_args, which reads the engine's keys as well and checks that the engine can serve."""

    @wraps(original)
    def read(args: Any = None) -> Any:
        if args is None:
            args = importlib.import_module("llamafactory.hparams").read_args()
        if not isinstance(args, Mapping):
            return original(args)
        split = split_keys(args, trains=trains)
        found = original(_without_own_code(split))
        model_args, finetuning_args = found[0], next(each for each in found if hasattr(each, "lora_target"))
        setattr(model_args, _KEYS, split)
        for note in split.notes:
            print(note, file=sys.stderr)
        if split.engine.use_kt:
            _check(model_args, finetuning_args, split)
        return found

    return read


def _without_own_code(split: SplitKeys) -> dict[str, Any]:
    """The arguments, with trust_remote_code off where transformers has the model's family itself: a model's own code
    does not have the experts interface that the engine needs."""
    arguments = split.arguments
    path = Path(str(arguments.get("model_name_or_path"))) / "config.json"
    if not (split.engine.use_kt and arguments.get("trust_remote_code") and path.is_file()):
        return arguments
    from transformers import CONFIG_MAPPING

    if (family := read_json(path).get("model_type")) not in CONFIG_MAPPING:
        return arguments
    print(f"trust_remote_code: True is not used: transformers has {family} itself", file=sys.stderr)
    return {**arguments, "trust_remote_code": False}


def _check(model_args: Any, finetuning_args: Any, split: SplitKeys) -> None:
    """ValueError for what the engine cannot compute, before the weights are loaded."""
    import torch

    from ktverify.training.adapter import lora_config
    from ktverify.training.pretrained import BASE_OPTION, check_method, load_form
    from ktverify.training.wrap import find_experts, require_one_process

    require_one_process()
    if (count := torch.cuda.device_count()) > 1:
        raise ValueError(f"{count} GPUs are visible, a training takes one: choose it by CUDA_VISIBLE_DEVICES")
    infer = _infer(split)
    trust = model_args.trust_remote_code
    form = load_form(model_args.model_name_or_path, "bfloat16", option=BASE_OPTION, trust=trust)
    shapes = [tuple(map(int, block.down_proj.shape)) for block in find_experts(form)]  # type: ignore[arg-type]
    for shape in shapes:
        check_tp(shape[-1], infer.tp)
    infer.gpu.check([shape[0] for shape in shapes])
    if note := check_method(form.config, infer):
        print(note, file=sys.stderr)
    lora_config(form, rank=finetuning_args.lora_rank, target=_target(finetuning_args))


def _infer(split: SplitKeys) -> Any:
    """The engine's settings. ValueError as init_cpu_infer, and for a file that is no mask file."""
    from ktverify.training.gpu_experts import gpu_experts_of
    from ktverify.training.infer import init_cpu_infer

    keys = split.engine
    return init_cpu_infer(
        keys.kt_num_threads,
        keys.tp,
        backend=keys.kt_backend,
        weight_path=keys.kt_weight_path,
        gpu=gpu_experts_of(keys),
        numa_nodes=keys.kt_numa_nodes,
    )


def _target(finetuning_args: Any) -> str | list[str]:
    names: list[str] = list(finetuning_args.lora_target)
    return names[0] if len(names) == 1 else names


def _init_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """init_adapter, which gives a training the same adapter with and without the engine."""

    @wraps(original)
    def init_adapter(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> Any:
        split: SplitKeys | None = getattr(model_args, _KEYS, None)
        if split is None or not (split.engine.use_kt or (split.compares and _has_experts(model))):
            return original(config, model, model_args, finetuning_args, is_trainable)
        import torch

        from ktverify.training.adapter import add_adapter, load_adapter, lora_config
        from ktverify.training.wrap import wrap_moe_layers

        asked = finetuning_args
        if split.engine.use_kt:
            wrap_moe_layers(model, _infer(split))
        if model_args.adapter_name_or_path:
            adapted = load_adapter(model, model_args.adapter_name_or_path[0], trainable=is_trainable)
        elif is_trainable:
            settings = lora_config(
                model, rank=asked.lora_rank, alpha=asked.lora_alpha, target=_target(asked), rslora=asked.use_rslora
            )
            adapted = add_adapter(model, settings, dropout=asked.lora_dropout)
        else:
            return model
        if is_trainable and not asked.pure_bf16:
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float32)
        return adapted

    setattr(init_adapter, _KEYS, True)
    return init_adapter


def _has_experts(model: Any) -> bool:
    from ktverify.training.wrap import find_experts

    try:
        return bool(find_experts(model))
    except ValueError:
        return False


def _load_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """load_config, with the configuration's torch_dtype: LLaMA-Factory loads a model in the dtype of its config.

    Where the checkpoint is quantised, or its experts stay in files, quantization_config moves from the config to an
    attribute, with the engine's settings: LLaMA-Factory would act on it, and `_models` reads it there."""

    @wraps(original)
    def load_config(model_args: Any) -> Any:
        config = original(model_args)
        split: SplitKeys | None = getattr(model_args, _KEYS, None)
        if split is not None and split.dtype:
            import torch

            config.dtype = getattr(torch, split.dtype)
        if split is not None and (found := _by_files(config, split)):
            setattr(config, _KEYS, (config.__dict__.pop("quantization_config", None), *found))
        return config

    return load_config


def _by_files(config: Any, split: SplitKeys) -> tuple[Any] | None:
    """(the engine's settings or None,) where `_models` is to read the checkpoint, else None.

    ValueError where use_kt asks for a quantised form that is not read, or for a model that LLaMA-Factory loads by
    another class."""
    import transformers

    from ktverify.training.quantised import quantisation_of

    try:
        infer = _infer(split) if split.engine.use_kt else None
        found = quantisation_of(config) is not None
        if not found and not (infer and infer.experts_in_files(False)):
            return None
        for name in ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTextToWaveform"):
            if type(config) in getattr(getattr(transformers, name, None), "_model_mapping", {}):
                raise ValueError("it is no causal language model, of which alone codes are read")
    except ValueError as error:
        if split.engine.use_kt or split.compares:
            raise ValueError(f"model_name_or_path {config.name_or_path!r}: {error}") from None
        return None
    return (infer,)


def _models(original: Any) -> Any:
    """AutoModelForCausalLM, which reads codes by training/quantised.py: transformers needs more packages or a GPU."""

    class AutoModelForCausalLM(original):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **settings: Any) -> Any:
            from ktverify.training.pretrained import load_by_files

            config: Any = settings.get("config")
            if not hasattr(config, _KEYS):
                return original.from_pretrained(pretrained_model_name_or_path, *args, **settings)
            quantisation, infer = config.__dict__.pop(_KEYS)
            if quantisation is not None:
                config.quantization_config = quantisation
            trust = bool(settings.get("trust_remote_code"))
            hub = {name: settings[name] for name in ("revision", "cache_dir", "token") if settings.get(name)}
            path, dtype = pretrained_model_name_or_path, config.dtype
            return load_by_files(path, dtype, infer=infer, config=config, trust_remote_code=trust, hub=hub)

    return AutoModelForCausalLM


def _checkpoint_any_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """get_custom_gradient_checkpointing_func, which takes any function as well; it takes bound methods alone, and newer
    versions of transformers give it others."""

    @wraps(original)
    def get(gradient_checkpointing_func: Callable[..., Any]) -> Callable[..., Any]:
        by_module = original(gradient_checkpointing_func)

        @wraps(by_module)
        def checkpoint(func: Any, *args: Any, **kwargs: Any) -> Any:
            inner = getattr(func, "func", func)
            run = by_module if hasattr(inner, "__self__") else gradient_checkpointing_func
            return run(func, *args, **kwargs)

        return checkpoint

    return get
