"""The configuration of a training, with the keys of LLaMA-Factory's files, checked before torch is imported.

`read_config` makes a TrainConfig of a YAML file and `--key value` pairs. Errors name the key, what it got and what it
takes, and for an unknown key the nearest known one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ktverify.errors import WrongKeys
from ktverify.system.files import expand
from ktverify.training.kt_keys import MOST, Count, KtKeys, problems_of
from ktverify.training.llama_factory import sort_out
from ktverify.training.yaml_file import parse_yaml, read_keys

OWN_TEMPLATES = ("default", "tokenizer")
PATHS = ("model_name_or_path", "dataset", "output_dir", "resume_from_checkpoint")


class TrainConfig(KtKeys):
    """Keys and defaults of a training; docs/training.md says what each does. Paths are expanded (~, $VARIABLE)."""

    model_name_or_path: str = Field(min_length=1)
    trust_remote_code: bool = False
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    stage: Literal["sft"] = "sft"
    do_train: Literal[True] = True
    finetuning_type: Literal["lora"] = "lora"

    kt_ep: bool = False
    kt_ep_timeout: Count = 1800  # seconds

    lora_rank: Count = 8
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target: str | list[str] = "all"
    use_rslora: bool = False

    dataset: str | list[str] = Field(min_length=1)
    max_samples: Count | None = None
    template: str = "default"  # whatever the name, the tokenizer's own
    cutoff_len: int = Field(2048, ge=2, le=MOST)
    preprocessing_num_workers: Count | None = None

    per_device_train_batch_size: Count = 1
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)  # 0 clips nothing
    optim: Literal["adamw_torch_fused", "adamw_torch"] = "adamw_torch_fused"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, ge=0)
    num_train_epochs: float = Field(3.0, gt=0, le=1e6)
    max_steps: int = Field(-1, ge=-1, le=MOST)  # -1 leaves it to num_train_epochs
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, float | int | str | bool | None] = Field({})
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int = Field(0, ge=0, le=MOST)  # goes before warmup_ratio
    seed: int = Field(42, ge=0, lt=2**32)  # numpy takes no more
    logging_steps: Count = 10
    save_steps: Count = 500
    save_total_limit: Count | None = None
    stop_on_nan: bool = True
    output_dir: str = Field(min_length=1)
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on keys of the file that are not used, or are used as other keys."""
        return (*self._notes, *filter(None, [self.template_note]))

    @property
    def alpha(self) -> float:
        """lora_alpha, by default twice the rank."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def targets(self) -> list[str]:
        """The names in lora_target."""
        names = self.lora_target.split(",") if isinstance(self.lora_target, str) else self.lora_target
        return [name.strip() for name in names if name.strip()]

    @property
    def datasets(self) -> list[str]:
        """The data sets: a list, or names with commas between them; a file with a comma in its name is one."""
        if isinstance(self.dataset, list):
            return self.dataset
        whole = [self.dataset] if Path(self.dataset).exists() else self.dataset.split(",")
        return [name.strip() for name in whole if name.strip()]

    @property
    def template_note(self) -> str:
        """A note for a configuration that names a template; "" for the names of the tokenizer's own."""
        if self.template in OWN_TEMPLATES:
            return ""
        return f"template {self.template!r} is not looked up: the tokenizer's own chat template is used"

    @field_validator(*PATHS, mode="after")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        try:
            if isinstance(value, list):
                return [expand(name) for name in value]
            return ",".join(map(expand, value.split(","))) if isinstance(value, str) else value
        except ValueError as error:
            raise PydanticCustomError("path", "{text}", {"text": str(error)}) from None

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise PydanticCustomError("no_steps", "it takes 1 or more, or -1, which leaves it to num_train_epochs")
        return value

    @field_validator("dataset")
    @classmethod
    def _some_data(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip(" ,"):
            raise PydanticCustomError("no_data", "it takes the names of data sets, with commas between them")
        return value


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration at `path`, changed by `overrides` ("--key", "value", …). ValueError in one line."""
    kept, notes, problems = sort_out({**read_keys(path), **pairs(overrides)}, list(TrainConfig.model_fields))
    try:
        config = TrainConfig(**kept)
    except ValidationError as error:
        problems += problems_of(error)
    if problems:
        raise WrongKeys([f"{path}: {problem}" for problem in problems])
    config._notes = tuple(notes)
    return config


def pairs(words: Sequence[str]) -> dict[str, Any]:
    """{"key": value} of "--key value", "--key=value" and "key=value"; values are read as YAML."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") and not equals:
            raise ValueError(f"{word!r} stands where a --key is expected: keys are given as --key value or key=value")
        if not equals:
            if not rest:
                raise ValueError(f"--{key} has no value: keys are given as --key value")
            value = rest.pop(0)
        found[key.replace("-", "_")] = parse_yaml(value, f"--{key} {value}")
    return found
