"""The configuration of a training, with the keys of LLaMA-Factory's files, checked before torch is imported.

`read_config` makes a TrainConfig of a YAML file and `--key value` pairs. Errors name the key, what it got and what it
takes, and for an unknown key the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

OWN_TEMPLATES = ("default", "tokenizer")
# keys of LLaMA-Factory's files that have one value here -> how it may be written, and the error for another value
ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "kt_use_wrapper": ((True,), "the engine has no other way in; it takes true. use_kt: false trains without engine"),
    "kt_num_gpu_experts": ((0,), "experts on a GPU do not exist yet; it takes 0"),
    "kt_weight_path": (("", None), "the experts' weights come from model_name_or_path; leave it out"),
}


class TrainConfig(BaseModel):
    """Keys and defaults of a training; docs/training.md says what each does."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name_or_path: str
    trust_remote_code: bool = False
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    stage: Literal["sft"] = "sft"
    do_train: Literal[True] = True
    finetuning_type: Literal["lora"] = "lora"

    use_kt: bool = True
    kt_backend: str = "AMXBF16"
    kt_num_threads: int | None = Field(None, ge=1)
    kt_tp_enabled: bool = False
    kt_tp_count: int = Field(1, ge=1)
    kt_use_wrapper: Literal[True] = True
    kt_num_gpu_experts: Literal[0] = 0
    kt_weight_path: Literal[""] | None = ""

    lora_rank: int = Field(8, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target: str | list[str] = "all"
    use_rslora: bool = False

    dataset: str
    template: str = "default"  # whatever the name, the tokenizer's own
    cutoff_len: int = Field(2048, ge=2)
    preprocessing_num_workers: int | None = Field(None, ge=1)

    per_device_train_batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    learning_rate: float = Field(1e-4, gt=0)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int = -1
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)  # 1 is one step to transformers
    seed: int = Field(42, ge=0)
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(500, ge=1)
    save_total_limit: int | None = Field(None, ge=1)
    output_dir: str
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None

    @property
    def template_note(self) -> str:
        """A note for a configuration that names a template; "" for the names of the tokenizer's own."""
        if self.template in OWN_TEMPLATES:
            return ""
        return f"template {self.template!r} is not looked up: the tokenizer's own chat template is used"

    @field_validator(*ONLY, mode="before")
    @classmethod
    def _only_value(cls, value: Any, info: ValidationInfo) -> Any:
        wanted, reason = ONLY[str(info.field_name)]
        if any(value == one and type(value) is type(one) for one in wanted):
            return value
        raise PydanticCustomError("does_not_exist", reason)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is wanted: pydantic would take true as 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and not any(a is bool or a is True for a in get_args(kind)):
            raise PydanticCustomError("no_bool", "true and false are not what it takes")
        return value

    @property
    def tp(self) -> int:
        """The tensor parallel degree: kt_tp_count where kt_tp_enabled, else 1."""
        return self.kt_tp_count if self.kt_tp_enabled else 1


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration at `path`, changed by `overrides` ("--key", "value", …). ValueError in one line."""
    if not path.is_file():
        raise ValueError(f"there is no configuration {path}")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}; it takes keys and values")
    merged = {**document, **_pairs(overrides)}
    unknown = [key for key in merged if key not in TrainConfig.model_fields]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), TrainConfig.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(TrainConfig.model_fields)}"
        raise ValueError(f"{path}: unknown key {unknown[0]!r}{hint}")
    try:
        return TrainConfig(**merged)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        got = "nothing" if problem["type"] == "missing" else repr(problem["input"])
        raise ValueError(f"{path}: {key} got {got}: {problem['msg']}") from None


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    """{"key": value} of "--key value" and "--key=value"; values are read as YAML, and 1e-3 is a number."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands where a --key is expected: keys are given as --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{key} has no value: keys are given as --key value")
            value = rest.pop(0)
        found[key.replace("-", "_")] = _value(value)
    return found


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)  # 1e-3 is text to YAML 1.1
        except ValueError:
            return value
    return value
