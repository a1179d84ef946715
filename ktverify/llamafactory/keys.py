"""Split a configuration into the engine's keys and those that LLaMA-Factory itself reads. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ktverify.errors import WrongKeys
from ktverify.system.files import expand
from ktverify.training.config import TrainConfig, pairs
from ktverify.training.kt_keys import KtKeys, problems_of
from ktverify.training.llama_factory import sort_out, why_not
from ktverify.training.yaml_file import read_keys

STAGES = ("sft", "dpo", "kto", "rm", "pt")
# names of kt_* that other programs use
_ALSO_OURS = ("cpu_infer",)
# keys of LLaMA-Factory that the engine cannot serve, with another value than training/llama_factory.py names
_WITH_ENGINE = (
    *("deepspeed", "fsdp", "fsdp_config", "use_mca", "quantization_bit", "use_unsloth", "mixture_of_depths", "fp8"),
    *("use_dora", "pissa_init", "pissa_convert", "use_galore", "use_apollo", "use_badam", "use_llama_pro"),
    *("additional_target", "create_new_adapter", "train_from_scratch", "enable_liger_kernel", "torch_compile"),
    *("predict_with_generate", "do_predict"),
)
# names of LLaMA-Factory's templates in documents -> in its releases
_TEMPLATES = {"deepseek2": "deepseek"}
# keys of LLaMA-Factory that are paths, or names that may be paths, some with commas between several
_PATHS = (
    *("model_name_or_path", "adapter_name_or_path", "adapter_folder", "cache_dir", "output_dir", "logging_dir"),
    *("dataset_dir", "media_dir", "tokenized_path", "resume_from_checkpoint", "export_dir", "offload_folder"),
    *("ref_model", "ref_model_adapters", "reward_model", "reward_model_adapters", "deepspeed", "profiler_output_dir"),
)
_DTYPES = get_args(TrainConfig.model_fields["torch_dtype"].annotation)


@dataclass(frozen=True)
class SplitKeys:
    """engine: the engine's keys. arguments: LLaMA-Factory's. dtype: of the model's weights, None for the checkpoint's.
    notes: lines on keys that are not used, or are used as others.

    compares: a LoRA training that says use_kt: false, which then differs from use_kt: true by the engine alone: the
    adapter is the same. LLaMA-Factory itself would attach none to stacked experts."""

    engine: KtKeys
    arguments: dict[str, Any]
    dtype: str | None
    notes: tuple[str, ...] = ()
    compares: bool = False


def read_configuration(path: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of the YAML file at `path`, those of `words` ("key=value", "--key", "value") over them. ValueError."""
    return {**read_keys(path), **pairs(words)}


def split_keys(given: Mapping[str, Any], *, trains: bool) -> SplitKeys:
    """The keys of `given` by who reads them. trains: do_train: true is added where nothing else is to be done.

    Raises WrongKeys (a ValueError) for a value that the engine cannot take, and for a key of LLaMA-Factory that cannot
    be used with the engine."""
    problems: list[str] = []
    rest = {name: _expanded(name, value, problems) if name in _PATHS else value for name, value in given.items()}
    engine = _engine_keys(rest, problems)
    kept, notes, wrong = sort_out(engine, list(KtKeys.model_fields))
    problems += wrong
    kept.setdefault("use_kt", False)
    try:
        keys = KtKeys(**kept)
    except ValidationError as error:
        problems += problems_of(error)
        keys = KtKeys(use_kt=False)
    if keys.use_kt and rest.get("export_dir"):
        notes.append("use_kt: True is not used: an export merges the adapter into the stock model")
        keys = keys.model_copy(update={"use_kt": False})
    compares = (
        trains and kept["use_kt"] is False and "use_kt" in engine and rest.get("finetuning_type") in (None, "lora")
    )
    dtype = rest.pop("torch_dtype", rest.pop("dtype", None))
    if dtype not in (*_DTYPES, "auto", None):
        problems.append(f"torch_dtype got {dtype!r}; it takes {', '.join(_DTYPES)} or auto")
    if (template := rest.get("template")) in _TEMPLATES:
        rest["template"] = _TEMPLATES[template]
        notes.append(f"template: {template} is used as {rest['template']}, its name in LLaMA-Factory's releases")
    if keys.use_kt:
        problems += [text for name in _WITH_ENGINE if name in rest and (text := why_not(name, rest[name]))]
        problems += _training_problems(rest)
    if trains and not any(rest.get(name) for name in ("do_train", "do_eval", "do_predict")):
        if "do_train" in rest:
            problems.append("do_train got False, and neither do_eval nor do_predict is true: there is nothing to do")
        rest["do_train"] = True
    if trains and (keys.use_kt or compares):
        # by default transformers logs the mean of earlier losses, or 0.0, in the place of NaN
        rest.setdefault("logging_nan_inf_filter", False)
    if problems:
        raise WrongKeys(problems)
    return SplitKeys(keys, rest, None if dtype == "auto" else dtype, tuple(notes), compares)


def _engine_keys(rest: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The engine's keys, flat and of `kt_config`, taken out of `rest`."""
    nested = rest.pop("kt_config", None) or {}
    found = {name: rest.pop(name) for name in list(rest) if _is_ours(name)}
    if not isinstance(nested, Mapping):
        problems.append(f"kt_config got {nested!r}; it takes keys and values, like kt_num_threads: 8")
        return found
    for name, value in nested.items():
        full = str(name) if _is_ours(str(name)) else f"kt_{name}"
        if found.setdefault(full, value) != value:
            problems.append(f"{full} {found[full]} and kt_config.{name} {value} are the same key: give one of them")
    return found


def _expanded(name: str, value: Any, problems: list[str]) -> Any:
    """`value`, with ~ and $VARIABLE replaced: LLaMA-Factory and transformers replace ~ in some of their keys alone."""
    try:
        if isinstance(value, list):
            return [_expanded(name, each, problems) for each in value]
        return ",".join(map(expand, value.split(","))) if isinstance(value, str) else value
    except ValueError as error:
        problems.append(f"{name} got {value!r}: {error}")
        return value


def _is_ours(name: str) -> bool:
    return name == "use_kt" or name.startswith("kt_") or name in _ALSO_OURS


def _training_problems(rest: Mapping[str, Any]) -> list[str]:
    found = []
    stage, kind, adapter = (rest.get(name) for name in ("stage", "finetuning_type", "adapter_name_or_path"))
    if stage not in (*STAGES, None):
        found.append(f"stage got {stage!r}; with use_kt: true it takes {', '.join(STAGES)}")
    if kind not in ("lora", None):
        found.append(f"finetuning_type got {kind!r}; with use_kt: true it takes lora")
    if adapter and (len(adapter) if isinstance(adapter, list) else adapter.count(",") + 1) > 1:
        found.append(f"adapter_name_or_path got {adapter!r}; with use_kt: true it takes one adapter")
    return found
